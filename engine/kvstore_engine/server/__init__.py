"""The OpenAI-compatible HTTP server; the engine loop runs in a process of its own."""
