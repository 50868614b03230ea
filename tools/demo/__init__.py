"""The demo of `make demo`: what the cache saves on a real model and a real document."""
