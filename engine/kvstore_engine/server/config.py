"""Settings of `kvstore-engine`, from a TOML file, the environment and flags."""

from dataclasses import asdict, dataclass

import msgspec
from kvstore.config import option
from kvstore.errors import ConfigError

from kvstore_engine.config import (
    EngineConfig,
    parse_engine_config,
    parse_kv_transfer_config,
)

_SERVER_ONLY = ("host", "port", "insecure", "log_level")


@dataclass(frozen=True)
class ServerConfig:
    """The server's own settings, and those that it hands to the engine process."""

    model: str = option(
        text="GGUF file, Hugging Face directory, smollm2-135m-instruct, tiny-random, ..."
    )
    served_model_name: str = option("", text="name in the API; default: --model as given")
    host: str = option("127.0.0.1", text="address to listen on")
    port: int = option(8000, text="port to listen on; 0 takes a free one")
    insecure: bool = option(False, text="allow an address that others on the network reach")
    log_level: str = option("info", text="debug, info, warning or error")
    dtype: str = option("float32", text="float32, bfloat16 or float16")
    kv_transfer_config: str = option("", text="JSON that names the KV connector, as in vLLM")
    kv_memory: str = option("1GiB", text="memory for KV pages")
    num_pages: int = option(0, text="number of KV pages; 0: as many as fit in kv-memory")
    page_tokens: int = option(64, text="tokens of a KV page, and of a block in the store")
    max_batch_tokens: int = option(512, text="token budget of one step")
    max_running: int = option(64, text="requests in the running batch")
    max_waiting: int = option(4096, text="completions that may be open at once; more get a 429")
    max_context: int = option(0, text="tokens of prompt and answer; 0: all that the model takes")
    torch_threads: int = option(0, text="threads that compute; 0: one a core, or 3 of 4")
    seed: int = option(0, text="seed of requests that bring none")
    match_timeout_s: float = option(0.05, text="a look-up in the store that takes longer is a miss")
    load_timeout_s: float = option(10.0, text="a load that takes longer is computed instead")
    engine_id: str = option("", text="this engine's name in the store; default: random")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; take one of 0 to 65535")

    def engine(self) -> EngineConfig:
        """The engine's part; raises ConfigError."""
        values = {k: v for k, v in asdict(self).items() if k not in _SERVER_ONLY}
        transfer = values.pop("kv_transfer_config")
        if transfer:
            values["kv_transfer_config"] = msgspec.to_builtins(parse_kv_transfer_config(transfer))
        return parse_engine_config(values)
