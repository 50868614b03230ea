"""The engine process: the engine loop, fed over ZeroMQ by the server process.

The server binds two ZeroMQ sockets, best ``ipc://`` in a private temporary directory: a PUSH for
requests and a PULL for outputs. Then it runs ``python -m kvstore_engine.engine_process`` and writes
one line of JSON, ``wire.encode_launch(wire.Launch(config, requests, outputs))``, to its stdin:

    {"engine": {"model": "tiny-random", ...}, "requests": "ipc://...", "outputs": "ipc://..."}

Frames are ``wire.encode([...])`` of ``messages``. The first message is EngineReady or EngineFailed;
after EngineFailed the process exits with 2 (the user's input, ``usage``) or 1. EngineStats come
about once a second while they change. ``Shutdown`` or SIGTERM ends it with 0; SIGINT is ignored,
since a Ctrl-C reaches the server too, which then says Shutdown. It ends by itself when its parent
process ends. A stop token (EOS or one of ``stop_token_ids``) is the last of ``tokens`` with
``finish_reason`` "stop". An unknown or already ended id in AbortRequest is ignored; an aborted
request sends nothing more.
"""
