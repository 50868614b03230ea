"""Configuration of the engine process; no torch here, so that the server validates with it."""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from kvstore.config import parse_size
from kvstore.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")
# Connectors that need no kv_connector_module_path, and their modules.
CONNECTOR_MODULES = {"KVStoreConnector": "kvstore_connector.bundled"}


class KVTransferConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The ``--kv-transfer-config`` JSON, with the names that vLLM users know.

    ``kv_connector`` names a class. ``kv_connector_module_path`` names the module that has it, and
    ``create_connector(config, spec, engine_id)``, which makes one.
    """

    kv_connector: str
    kv_role: Literal["kv_both", "kv_producer", "kv_consumer"] = "kv_both"
    kv_connector_module_path: str | None = None
    kv_connector_extra_config: dict[str, Any] = {}  # msgspec copies an empty default
    engine_id: str | None = None

    def __post_init__(self) -> None:
        if not self.kv_connector_module_path and self.kv_connector not in CONNECTOR_MODULES:
            raise ConfigError(
                f"kv-transfer-config: unknown connector {self.kv_connector!r}; known: "
                f"{', '.join(CONNECTOR_MODULES)}; kv_connector_module_path names the module of "
                "another"
            )

    @property
    def connector_module(self) -> str:
        """The name of the module that has the connector."""
        return self.kv_connector_module_path or CONNECTOR_MODULES[self.kv_connector]


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that the engine process needs; checked once, when it is built.

    Pages: ``num_pages`` of them, or as many as fit in ``kv_memory`` when it is 0.
    """

    model: str
    served_model_name: str = ""  # "": ``model`` as given
    dtype: str = "float32"
    page_tokens: int = 64
    num_pages: int = 0
    kv_memory: str = "1GiB"
    max_batch_tokens: int = 512  # token budget of one step
    max_running: int = 64  # requests that hold pages at once
    max_waiting: int = 4096  # requests beyond those; more are refused
    max_context: int = 0  # tokens of prompt and output; 0: all that the model was made for
    kv_transfer_config: KVTransferConfig | None = None
    engine_id: str = ""  # "": random
    match_timeout_s: float = 0.05  # a look-up that takes longer is a miss
    load_timeout_s: float = 10.0  # a load that takes longer is recomputed
    torch_threads: int = 0  # 0: see build.compute_threads
    seed: int = 0  # for requests that bring none
    warm_up: bool = True

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("model is empty; give a directory, a GGUF file or a built-in name")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}; take one of {', '.join(DTYPES)}")
        for name, low in (("page_tokens", 1), ("max_batch_tokens", 1), ("max_running", 1)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name} is {getattr(self, name)}; take at least {low}")
        for name in ("num_pages", "max_waiting", "max_context", "torch_threads", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it cannot be negative")
        if self.match_timeout_s <= 0 or self.load_timeout_s <= 0:
            raise ConfigError("match_timeout_s and load_timeout_s must be above 0")
        if self.max_batch_tokens < self.max_running:
            raise ConfigError(
                f"max_batch_tokens is {self.max_batch_tokens}, below max_running "
                f"{self.max_running}; every running request needs one token a step"
            )
        self.kv_memory_bytes  # noqa: B018  # a size that cannot be read is refused now

    @property
    def kv_memory_bytes(self) -> int:
        """``kv_memory`` in bytes."""
        return parse_size(self.kv_memory)


def parse_engine_config(values: Mapping[str, object]) -> EngineConfig:
    """EngineConfig from JSON-like values; ConfigError names an unknown key or a wrong type."""
    try:
        return msgspec.convert(dict(values), EngineConfig)
    except msgspec.ValidationError as error:
        raise _config_error(error) from None


def parse_kv_transfer_config(text: str) -> KVTransferConfig:
    """KVTransferConfig from the JSON of the command line; ConfigError when it is not one."""
    try:
        return msgspec.json.decode(text.encode(), type=KVTransferConfig)
    except msgspec.MsgspecError as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise ConfigError(f"kv-transfer-config: {error}") from None


def _config_error(error: msgspec.ValidationError) -> ConfigError:
    """msgspec wraps what ``__post_init__`` raises; its message is already the one to show."""
    if isinstance(error.__cause__, ConfigError):
        return error.__cause__
    return ConfigError(f"engine configuration: {error}")
