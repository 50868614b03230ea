"""Makes the helpers beside the tests importable under their full names."""
