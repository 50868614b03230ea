"""Configuration is checked once, at the edge, with messages that say what to do."""

import os
import re
import types

import pytest
import torch
from kvstore.core.spec import CacheSpec
from kvstore.errors import ConfigError
from kvstore_engine.build import build_engine, cache_spec, compute_threads, make_connector
from kvstore_engine.config import (
    EngineConfig,
    KVTransferConfig,
    parse_engine_config,
    parse_kv_transfer_config,
)
from kvstore_engine.loader import load_model
from kvstore_engine.wire import Launch, decode_launch, encode_launch

from tests.engine.fake_connector import FakeConnector
from tests.engine.rig import ROOT


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "model"),
        ({"model": ""}, "model is empty"),
        ({"model": 1}, "Expected `str`"),
        ({"model": "m", "colour": 1}, "colour"),
        ({"model": "m", "dtype": "int3"}, "int3.*float32"),
        ({"model": "m", "page_tokens": 0}, "page_tokens is 0"),
        ({"model": "m", "num_pages": -1}, "num_pages is -1"),
        ({"model": "m", "max_running": 600}, "below max_running 600"),
        ({"model": "m", "kv_memory": "much"}, "much"),
        ({"model": "m", "load_timeout_s": 0}, "above 0"),
        ({"model": "m", "kv_transfer_config": {"kv_connector": "x", "colour": 1}}, "colour"),
        (
            {"model": "m", "kv_transfer_config": {"kv_connector": "Nope"}},
            "unknown connector 'Nope'",
        ),
    ],
    ids=str,
)
def test_a_wrong_configuration_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_engine_config(values)


def test_sizes_are_read() -> None:
    assert EngineConfig(model="m", kv_memory="3MiB").kv_memory_bytes == 3 << 20


def test_the_transfer_config_has_the_names_that_users_know() -> None:
    text = (
        '{"kv_connector":"KVStoreConnector","kv_role":"kv_both",'
        '"kv_connector_extra_config":{"node":"unix:/run/kvstore/node.sock"}}'
    )
    config = parse_kv_transfer_config(text)
    assert config.kv_connector_extra_config == {"node": "unix:/run/kvstore/node.sock"}
    for wrong in ("{", '{"kv_connector": 1}', '{"kv_connector":"x","kv_role":"none"}'):
        with pytest.raises(ConfigError, match="kv-transfer-config"):
            parse_kv_transfer_config(wrong)


def test_a_launch_line_is_read_back() -> None:
    launch = Launch(EngineConfig(model="m", num_pages=5), "ipc://a", "ipc://b")
    line = encode_launch(launch)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert decode_launch(line) == launch


@pytest.mark.parametrize(
    ("cores", "own", "asked", "omp", "threads"),
    [
        (2, 2, 0, None, 0),
        (7, 7, 0, None, 0),
        (8, 8, 0, None, 6),
        (16, 16, 0, None, 12),
        (16, 8, 0, None, 8),
        (16, 16, 16, None, 16),
        (16, 16, 0, "16", 0),
    ],
)
def test_of_many_cores_some_do_not_compute(
    monkeypatch: pytest.MonkeyPatch, cores: int, own: int, asked: int, omp: str | None, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: own)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    assert compute_threads(EngineConfig(model="m", torch_threads=asked)) == threads


def test_pages_are_counted_from_memory() -> None:
    engine = build_engine(EngineConfig(model="tiny-random", kv_memory="2MiB", torch_threads=1))
    # 2 layers x 2 heads x (k, v) x 64 tokens x 16 elements x 4 bytes are 32 KiB a page.
    assert engine.blocks.num_pages == 64


@pytest.mark.parametrize("values", [{"kv_memory": "40KiB"}, {"num_pages": 1}], ids=str)
def test_a_cache_below_two_pages_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="pages"):
        build_engine(parse_engine_config({"model": "tiny-random"} | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_context": 100_000_000}, "made for 8192 tokens"),
        ({"max_context": 8192, "num_pages": 64}, "a context of 4096 tokens"),
    ],
    ids=["model", "pages"],
)
def test_a_context_that_cannot_be_had_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=f"max_context is {values['max_context']}.*{message}"):
        build_engine(parse_engine_config({"model": "tiny-random"} | values))


def test_the_spec_follows_whatever_makes_kv_usable() -> None:
    loaded = load_model("tiny-random")
    base = cache_spec(EngineConfig(model="tiny-random"), loaded)
    assert base.block_bytes == 32 << 10
    assert base != cache_spec(EngineConfig(model="tiny-random", page_tokens=32), loaded)
    assert base != cache_spec(EngineConfig(model="tiny-random", dtype="bfloat16"), loaded)


def test_a_connector_comes_from_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    asked: list[tuple[object, str]] = []

    def create(config: dict[str, object], spec: CacheSpec, engine_id: str) -> FakeConnector:
        asked.append((config["kv_connector_extra_config"], engine_id))
        return FakeConnector(ROOT)

    module = types.ModuleType("my_connector")
    module.create_connector = create  # type: ignore[attr-defined]
    module.Mine = FakeConnector  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_connector", module)
    transfer = KVTransferConfig("Mine", "kv_both", "my_connector", {"a": 1}, "engine-7")
    engine = build_engine(
        EngineConfig(model="tiny-random", num_pages=8, kv_transfer_config=transfer)
    )
    assert engine.root == ROOT
    assert asked == [({"a": 1}, "engine-7")]
    engine.start()
    engine.close()


def test_a_connector_module_that_is_none_is_refused() -> None:
    spec = CacheSpec.raw("x", block_bytes=1)
    for name in ("no_such_module_anywhere", "json", ".relative", ".."):
        with pytest.raises(ConfigError, match=f"module {re.escape(name)}"):
            make_connector(KVTransferConfig("x", kv_connector_module_path=name), spec, "e")


def test_a_connector_of_another_name_than_its_modules_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown connector 'Nope'; known: KVStoreConnector"):
        parse_kv_transfer_config('{"kv_connector":"Nope"}')
    with pytest.raises(ConfigError, match="unknown connector 'Nope'"):
        parse_kv_transfer_config('{"kv_connector":"Nope","kv_connector_module_path":""}')
    module = "kvstore_connector.bundled"
    transfer = KVTransferConfig("Nope", kv_connector_module_path=module)
    with pytest.raises(ConfigError, match=f"no connector 'Nope' in module {module}"):
        make_connector(transfer, CacheSpec.raw("x", block_bytes=1), "e")
