"""kvstore-node: one host's DRAM pool and SSD tier, and the sessions of its clients."""
