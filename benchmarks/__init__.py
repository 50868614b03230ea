"""Benchmarks: each measures itself against a ceiling or a peer in the same run."""
