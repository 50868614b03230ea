"""Triton kernels of kvstore: one folder an op. None yet: the CPU engine needs none."""
