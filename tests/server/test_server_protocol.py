from typing import Any

import msgspec
import pytest
from kvstore_engine.server.errors import ApiError
from kvstore_engine.server.protocol import (
    PROMPTS_MAX,
    ChatBody,
    CompletionBody,
    parse_body,
)


def completion(**fields: Any) -> CompletionBody:
    return parse_body(msgspec.json.encode({"prompt": "x"} | fields), CompletionBody)


def refused(data: bytes | dict[str, Any], kind: type[Any] = CompletionBody) -> ApiError:
    """The error for a body."""
    raw = data if isinstance(data, bytes) else msgspec.json.encode(data)
    with pytest.raises(ApiError) as caught:
        parse_body(raw, kind)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("text", ["text"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a", [7]], ["a", [7]]),
    ],
    ids=["text", "texts", "tokens", "lists", "mixed"],
)
def test_every_form_of_prompt(prompt: object, expected: object) -> None:
    assert completion(prompt=prompt).prompt == expected


@pytest.mark.parametrize(
    "prompt",
    [[], 5, {"a": 1}, [1, "a"], [[1], [True]], [1.5], ["a"] * (PROMPTS_MAX + 1)],
    ids=["empty", "number", "object", "mix", "bool", "float", "many"],
)
def test_a_wrong_prompt_is_named(prompt: object) -> None:
    error = refused({"prompt": prompt})
    assert error.param == "prompt"
    assert error.message.startswith("prompt: ")
    assert len(error.message) < 250


def test_null_means_the_default() -> None:
    body = completion(temperature=None, stop=None, seed=None, stream_options=None)
    assert body == completion()


def test_null_means_the_default_in_parts_of_a_body_too() -> None:
    options = {"include_usage": None, "continuous_usage_stats": None}
    assert completion(stream_options=options) == completion()
    unused = dict.fromkeys(("refusal", "tool_calls", "function_call", "audio", "name"))
    part = {"type": "text", "text": "b", "annotations": None}
    history = [
        {"role": "assistant", "content": "a"} | unused,
        {"role": "user", "content": [part]},
    ]
    body = parse_body(msgspec.json.encode({"messages": history}), ChatBody)
    assert [message.text for message in body.messages] == ["a", "b"]


def test_null_for_a_required_field_is_a_missing_field() -> None:
    assert refused({"prompt": None}).message == "prompt is missing"
    error = refused({"messages": [{"role": "assistant", "content": None}]}, ChatBody)
    assert error.message == "messages.0.content is missing"
    error = refused({"messages": [{"role": "user", "content": "a", "tool_calls": []}]}, ChatBody)
    assert error.message == "unknown field 'messages.0.tool_calls'"


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages: give at least 1 item (given: [])"),
        ("hello", "messages: give a list (given: 'hello')"),
        (["hello"], "messages.0: give an object (given: 'hello')"),
        (
            [{"role": "nope", "content": "a"}],
            "messages.0.role: take 'system', 'developer', 'user' or 'assistant' (given: 'nope')",
        ),
        (
            [{"role": "user", "content": 5}],
            "messages.0.content: give text, or a list of text parts (given: 5)",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": 5}]}],
            "messages.0.content.0.text: give text (given: 5)",
        ),
        (
            [{"role": "user", "content": [{"text": "a"}]}],
            "messages.0.content.0.type is missing",
        ),
    ],
    ids=["empty", "text", "texts", "role", "content", "part", "no type"],
)
def test_mistakes_in_messages_are_told_in_plain_words(messages: object, message: str) -> None:
    assert refused({"messages": messages}, ChatBody).message == message


def test_images_are_refused_as_what_they_are() -> None:
    content = [{"type": "text", "text": "What is this?"}, IMAGE]
    error = refused({"messages": [{"role": "user", "content": content}]}, ChatBody)
    assert error.param == "messages.0.content"
    assert "a part is of type 'image_url'; only text is supported" in error.message


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("n", 0, "take at least 1"),
        ("n", 1.5, "give a whole number"),
        ("temperature", 3, "take at most 2"),
        ("top_p", 0, "take more than 0"),
        ("stream", "yes", "give true or false"),
        ("cache_salt", "", "give at least 1 character"),
    ],
    ids=["low", "fraction", "high", "zero", "bool", "empty"],
)
def test_remedies_are_in_plain_words(field: str, value: object, remedy: str) -> None:
    message = refused({"prompt": "x", field: value}).message
    assert message == f"{field}: {remedy} (given: {value!r})"


def test_neutral_values_of_unsupported_fields_pass() -> None:
    neutral: dict[str, Any] = {"presence_penalty": 0.0, "logit_bias": {}, "best_of": 1, "user": "u"}
    assert completion(**neutral) == completion()


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": {"5": 1}},
        {"frequency_penalty": 0.5},
        {"echo": True},
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_object"}},
        {"guided_regex": "a+"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_unsupported_fields_are_refused_by_name(fields: dict[str, Any]) -> None:
    error = refused({"prompt": "x"} | fields)
    assert error.param in fields
    assert "is not supported" in error.message


def test_stop_is_one_string_or_several() -> None:
    assert completion(stop="a").stop == ["a"]
    assert completion(stop=["a", "bc"]).stop == ["a", "bc"]


def test_top_k_minus_one_is_off() -> None:
    assert completion(top_k=-1).top_k == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", "warm"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 10**20),
        ("n", 0),
        ("n", 1000),
        ("n", True),
        ("max_tokens", 0),
        ("max_tokens", "5"),
        ("seed", 2**63),
        ("stop", ""),
        ("stop", [1]),
        ("stop", ["a"] * 17),
        ("logprobs", 21),
        ("stream", "yes"),
        ("cache_salt", ""),
        ("stop_token_ids", [1.5]),
    ],
    ids=str,
)
def test_values_out_of_range_are_named_and_shown(field: str, value: object) -> None:
    error = refused({"prompt": "x", field: value})
    assert error.param is not None
    assert error.param.startswith(field)
    assert "given: " in error.message


def test_unknown_and_missing_fields_are_named() -> None:
    assert refused({"prompt": "x", "max_token": 3}).message == "unknown field 'max_token'"
    assert refused({}).message == "prompt is missing"
    assert refused({"messages": []}, ChatBody).param == "messages"
    nested = refused({"messages": [{"role": "user"}]}, ChatBody)
    assert nested.message == "messages.0.content is missing"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b'{"prompt": "x",}',
        b"\xff\xfe",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": 1e999}',
        b"[" * 100_000,
    ],
    ids=["none", "cut", "comma", "bom", "utf8", "surrogate", "nan", "huge", "deep"],
)
def test_I11_malformed_json_is_a_clear_400(data: bytes) -> None:
    assert refused(data).message.startswith("the body is not JSON: ")


def test_json_that_is_no_object() -> None:
    assert "not an object" in refused(b"[1]").message


def test_messages_are_text_or_parts_of_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    raw = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": parts}]}
    body = parse_body(msgspec.json.encode(raw), ChatBody)
    assert [message.text for message in body.messages] == ["s", "ab"]
    image = {"type": "image_url", "image_url": {"url": "http://x"}}
    raw = {"messages": [{"role": "user", "content": [image]}]}
    assert "messages.0.content" in refused(raw, ChatBody).message
