"""The pure part of the store: no I/O, no clock, no asyncio, no randomness of its own."""
