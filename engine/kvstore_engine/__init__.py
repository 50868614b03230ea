"""A small, readable inference engine with paged attention, made to show what kvstore saves."""
