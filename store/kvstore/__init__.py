"""kvstore: a tiered, distributed KV-cache store for LLM inference engines."""

__version__ = "0.1.0"
