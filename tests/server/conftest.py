"""A server over a fake engine process, and what its tests share."""
