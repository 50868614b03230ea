"""Connects inference engines to kvstore: an engine-agnostic core and thin adapters."""
