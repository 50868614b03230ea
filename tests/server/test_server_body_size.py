"""Bodies that would keep the event loop: refused by cheap looks, before or early in validation."""

from typing import Any

import msgspec
import pytest
from kvstore_engine.server import protocol
from kvstore_engine.server.errors import ApiError
from kvstore_engine.server.protocol import (
    COLONS_MAX,
    MESSAGES_MAX,
    PARTS_MAX,
    VALUES_MAX,
    ChatBody,
    CompletionBody,
    TokenizeBody,
    parse_body,
)
from pydantic import ValidationError

PART = {"type": "text", "text": "a"}
WRONG_PART = {"type": "text", "text": 1}


def refused(data: bytes | dict[str, Any], kind: type[Any] = ChatBody) -> ApiError:
    raw = data if isinstance(data, bytes) else msgspec.json.encode(data)
    with pytest.raises(ApiError) as caught:
        parse_body(raw, kind)
    assert caught.value.status == 400
    assert len(caught.value.message) < 400
    assert len(caught.value.param or "") < 200
    return caught.value


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"prompt":[' + b"1," * VALUES_MAX + b"1]}", f"at most {VALUES_MAX:,} values"),
        (b'{"prompt":[' + b"[]," * (VALUES_MAX // 2) + b"1]}", f"at most {VALUES_MAX:,} values"),
        (b'{"prompt":[' + b"[[[[]]]]," * (VALUES_MAX // 5) + b"1]}", "values"),
        (
            b"{" + b",".join(b'"k%d":1' % i for i in range(COLONS_MAX + 1)) + b"}",
            f"at most {COLONS_MAX:,} fields",
        ),
    ],
    ids=["tokens", "lists", "nested", "fields"],
)
def test_I11_too_many_values_are_refused_before_they_are_decoded(
    data: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(msgspec.json, "decode", None)
    assert message in refused(data, CompletionBody).message


def test_the_largest_batch_of_token_ids_is_taken() -> None:
    prompts = [[250] * 8191] * 128
    body = parse_body(msgspec.json.encode({"prompt": prompts}), CompletionBody)
    assert body.prompt == prompts


@pytest.mark.parametrize(
    "fields",
    [
        {f"k{i}": 1 for i in range(1000)},
        {"messages": [{"role": "user", "content": "a"} | {f"k{i}": 1 for i in range(1000)}]},
        {"messages": [{"role": "user", "content": [PART | {f"k{i}": 1 for i in range(1000)}]}]},
        {"messages": [{"role": "user", "content": [WRONG_PART] * 1000}]},
        {"messages": [{"role": "nobody", "content": "a"}] * 1000},
        {"messages": [{"role": "user", "content": "a"}], "stop_token_ids": ["a"] * 256},
    ],
    ids=["fields", "fields of a message", "fields of a part", "parts", "messages", "stop ids"],
)
def test_only_the_first_mistakes_are_built(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    explain, counts = protocol._explain, []

    def counted(error: ValidationError) -> ApiError:
        counts.append(error.error_count())
        return explain(error)

    monkeypatch.setattr(protocol, "_explain", counted)
    refused(fields)
    assert sum(counts) <= 3


def test_the_first_of_many_unknown_fields_is_named() -> None:
    many = {f"k{i}": 1 for i in range(1000)}
    assert refused(many | {"prompt": "x"}, CompletionBody).message == "unknown field 'k0'"
    message = {"role": "user", "content": "a"} | many
    assert refused({"messages": [message]}).message == "unknown field 'messages.0.k0'"


def test_messages_and_their_parts_have_a_limit() -> None:
    for kind in (ChatBody, TokenizeBody):
        message = {"role": "user", "content": [PART] * (PARTS_MAX // 2)}
        assert parse_body(msgspec.json.encode({"messages": [message] * 2}), kind)
        error = refused({"messages": [message] * 3}, kind)
        assert error.param == "messages"
        assert f"at most {PARTS_MAX} parts of content" in error.message
        message = {"role": "user", "content": "a"}
        error = refused({"messages": [message] * (MESSAGES_MAX + 1)}, kind)
        assert f"give at most {MESSAGES_MAX} items" in error.message


@pytest.mark.parametrize(
    "fields",
    [
        {"n": "a" * 10**6},
        {"n": list(range(100_000))},
        {"n": {str(i): i for i in range(50_000)}},
        {"a" * 10**6: 1},
        {"model": "a" * 10**6},
        {"messages": [{"role": "user", "content": [{"type": "b" * 10**6}]}]},
        {"messages": [{"role": "user", "content": [{"type": list(range(100_000))}]}]},
    ],
    ids=["text", "list", "object", "name", "model", "type", "odd type"],
)
def test_what_was_given_is_told_in_short(fields: dict[str, Any]) -> None:
    refused({"messages": [{"role": "user", "content": "a"}]} | fields)
