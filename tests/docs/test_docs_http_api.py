"""docs/http-api.md names every endpoint, field and reason that there is, and none else."""

import re
from pathlib import Path

import kvstore_connector
import kvstore_engine
import pytest
from kvstore.core.types import EndReason
from kvstore.errors import KVStoreError, UnavailableError
from kvstore_connector.loads import reason_of
from kvstore_engine.messages import CacheUsage
from kvstore_engine.server.app import ROUTES
from kvstore_engine.server.generation import Usage
from kvstore_engine.server.protocol import (
    _IGNORED,
    _UNSUPPORTED,
    ChatBody,
    CompletionBody,
    StreamOptions,
    TokenizeBody,
)
from pydantic import BaseModel

from tests.docs.pages import code, page, rows, section, table

PAGE = page("docs/http-api.md")
BODIES: dict[str, type[BaseModel]] = {
    "completions": CompletionBody,
    "chat": ChatBody,
    "tokenize": TokenizeBody,
}
ENDPOINTS = {"all": set(BODIES), "both": {"completions", "chat"}}
_LITERAL_REASON = re.compile(r'(?:end_reason|reason|BlockSource\(\w+,) *=?=? *"([a-z_]+)"')


def test_endpoints() -> None:
    listed = {(method, code(path)[0]) for method, path, _ in rows(section(PAGE, "Endpoints"))}
    assert listed == {(method, path) for method, path, _ in ROUTES}


def test_fields_of_each_body() -> None:
    fields = table(section(PAGE, "Fields"))
    every = {name for body in BODIES.values() for name in body.model_fields}
    assert fields.keys() == every
    for name, (where, default, _) in fields.items():
        takers = {end for end, body in BODIES.items() if name in body.model_fields}
        if name in ("prompt", "messages"):  # /tokenize takes one of them, and says so elsewhere
            takers -= {"tokenize"}
        assert ENDPOINTS.get(where, set(where.split(", "))) == takers, name
        required = any(BODIES[end].model_fields[name].is_required() for end in takers)
        assert (default == "required") is required, name


def test_stream_options() -> None:
    (said,) = code(table(section(PAGE, "Fields"))["stream_options"][2])[:1]
    assert said in StreamOptions.model_fields


@pytest.mark.parametrize(
    ("title", "names"), [("Refused fields", set(_UNSUPPORTED)), ("Ignored fields", set(_IGNORED))]
)
def test_fields_without_effect(title: str, names: set[str]) -> None:
    listed = code(section(PAGE, title))
    assert set(listed) == names
    assert listed == sorted(listed)


def test_end_reasons() -> None:
    reasons = {reason.name.lower() for reason in EndReason} - {"unspecified"}
    reasons |= {reason_of(KVStoreError("")), reason_of(UnavailableError(""))}
    for package in (kvstore_engine, kvstore_connector):
        for path in Path(package.__path__[0]).rglob("*.py"):
            reasons |= set(_LITERAL_REASON.findall(path.read_text(encoding="utf-8")))
    reasons -= {"stop", "length", "abort", "error"}  # of a completion
    assert {"mixed", "store_error", "complete"} <= reasons
    keys_and_reasons = table(section(PAGE, "usage.kvstore"))
    assert keys_and_reasons.keys() - _usage() == reasons


def test_usage_keys() -> None:
    assert _usage() - {"end_reason"} <= table(section(PAGE, "usage.kvstore")).keys()


def _usage() -> set[str]:
    usage = Usage(cache=CacheUsage()).to_json()["kvstore"]
    assert isinstance(usage, dict)
    return set(usage)
