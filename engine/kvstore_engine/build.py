"""Makes an engine from its configuration: model, pages, cache spec, connector."""

import importlib
import os
import uuid

import msgspec
import torch
from kvstore.core.keys import namespace_root
from kvstore.core.spec import CacheSpec
from kvstore.errors import ConfigError

from kvstore_engine.config import EngineConfig, KVTransferConfig
from kvstore_engine.engine import Engine, pages_to_lend
from kvstore_engine.kv_transfer import KVConnector
from kvstore_engine.loader import LoadedModel, load_model
from kvstore_engine.pages import allocate_pages, page_bytes

MANY_CORES = 8


def compute_threads(config: EngineConfig) -> int:
    """Threads that compute; 0: torch's own choice.

    Of many cores a quarter is left to HTTP and the store: where all compute, each waits at the next
    barrier for the one that was interrupted (docs/decisions/0007-some-cores-do-not-compute.md).
    """
    cores = len(os.sched_getaffinity(0))
    if config.torch_threads or cores < MANY_CORES or "OMP_NUM_THREADS" in os.environ:
        return config.torch_threads
    return min(torch.get_num_threads(), cores - cores // 4)


def build_engine(config: EngineConfig) -> Engine:
    """An engine that still has to be started. ConfigError for what the user has to change."""
    if threads := compute_threads(config):
        torch.set_num_threads(threads)
    loaded = load_model(config.model, config.dtype)
    num_pages = count_pages(config, loaded)
    check_context(config, loaded, num_pages)
    spec = cache_spec(config, loaded)
    # Before the connector: no thread of it is left behind when the memory is not there.
    pages = allocate_pages(loaded.config, num_pages, config.page_tokens, loaded.model.dtype)
    connector = None
    if config.kv_transfer_config is not None:
        engine_id = config.kv_transfer_config.engine_id or config.engine_id or uuid.uuid4().hex
        connector = make_connector(config.kv_transfer_config, spec, engine_id)
    root = connector.root if connector else namespace_root(spec)
    return Engine(config, loaded.model, loaded.config, pages, root, connector)


def cache_spec(config: EngineConfig, loaded: LoadedModel) -> CacheSpec:
    """Everything that makes this engine's KV usable by another one."""
    return CacheSpec.gqa(
        model=loaded.model_id,
        weights_fingerprint=loaded.fingerprint,
        kv_dtype=config.dtype,
        num_layers=loaded.config.num_layers,
        num_kv_heads=loaded.config.num_kv_heads,
        head_dim=loaded.config.head_dim,
        rope=loaded.config.rope.canonical,
        block_tokens=config.page_tokens,
    )


def count_pages(config: EngineConfig, loaded: LoadedModel) -> int:
    """``num_pages``, or how many fit in ``kv_memory``; ConfigError below two."""
    if config.num_pages:
        pages = config.num_pages
    else:
        one = page_bytes(loaded.config, config.page_tokens, loaded.model.dtype)
        pages = config.kv_memory_bytes // one
        if pages < 2:
            raise ConfigError(
                f"kv_memory {config.kv_memory} holds {pages} pages of {one} bytes; "
                "two are the least, and one for each 64 tokens in use is better"
            )
    if pages < 2:
        raise ConfigError(f"num_pages is {pages}; take at least 2")
    return pages


def check_context(config: EngineConfig, loaded: LoadedModel, num_pages: int) -> None:
    """ConfigError for a ``max_context`` that the model or the pages have no room for."""
    wanted, made_for = config.max_context, loaded.config.max_context
    if wanted > made_for:
        raise ConfigError(
            f"max_context is {wanted}, but the model was made for {made_for} tokens; "
            "take at most that, or 0 for all of it"
        )
    lent = pages_to_lend(num_pages, wanted, config.page_tokens) if config.kv_transfer_config else 0
    held = (num_pages - lent) * config.page_tokens
    if wanted > held:
        raise ConfigError(
            f"max_context is {wanted}, but the KV pages hold a context of {held} tokens; "
            "take a smaller one, 0 for what fits, or more kv_memory"
        )


def make_connector(transfer: KVTransferConfig, spec: CacheSpec, engine_id: str) -> KVConnector:
    """The connector that ``kv_transfer_config`` names, by its module's ``create_connector``."""
    name = transfer.connector_module
    try:
        module = importlib.import_module(name)
        create = module.create_connector
        getattr(module, transfer.kv_connector)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"kv-transfer-config: no connector {transfer.kv_connector!r} in module {name}: {error}"
        ) from None
    connector: KVConnector = create(msgspec.to_builtins(transfer), spec, engine_id)
    return connector
