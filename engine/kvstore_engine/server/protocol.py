"""Requests of the HTTP API: what is accepted, what is refused, and with which words."""

import contextlib
import gc
import reprlib
from collections.abc import Iterator
from itertools import islice
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    model_validator,
)

from kvstore_engine.server.errors import ApiError, bad_request

CHOICES_MAX = 32
PROMPTS_MAX = 128
MESSAGES_MAX = 4096
PARTS_MAX = 4096  # of content, in all messages of a request
# The event loop stands still while a body is decoded and validated. What these bound, over all of
# its bytes, keeps that to a fraction of a second.
VALUES_MAX = 1_200_000  # commas and opening brackets
COLONS_MAX = 100_000
MODEL_CHARS_MAX = 1024
SHOWN_CHARS = 80
STOPS_MAX = 16
STOP_CHARS_MAX = 1024
LOGPROBS_MAX = 20

# Refused unless neutral: ignoring them would answer another question than the one asked.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logits_processors": ([],),
    "min_p": (0,),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_logprobs": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
    "web_search_options": (),
}
# Accepted without effect: they change nothing that the answer says.
_IGNORED = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)


def _prompts(value: object) -> list[str | list[int]]:
    """One prompt or several, as text or token ids, as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(token) is int for token in value):
            return [value]
        if len(value) > PROMPTS_MAX:
            raise ValueError(f"at most {PROMPTS_MAX} prompts a request, these are {len(value)}")
        if all(isinstance(one, str) or _is_tokens(one) for one in value):
            return value
    raise ValueError("give text, a list of token ids, or a list of either")


def _is_tokens(value: object) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def _stops(value: object) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise ValueError("give a string or a list of strings, none of them empty")
    if len(stops) > STOPS_MAX or any(len(s) > STOP_CHARS_MAX for s in stops):
        raise ValueError(f"at most {STOPS_MAX} stop strings of {STOP_CHARS_MAX} characters")
    return stops


def _content(value: object) -> object:
    """Text is one part."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise ValueError("give text, or a list of text parts")
    for part in value:
        if isinstance(part, dict) and part.get("type") not in (None, "text"):
            raise ValueError(f"a part is of type {_shown(part['type'])}; only text is supported")
    return value


def _messages(value: object) -> object:
    """Their parts, counted before each is looked at."""
    if isinstance(value, list) and len(value) <= MESSAGES_MAX:
        contents = [message.get("content") for message in value if isinstance(message, dict)]
        parts = sum(len(content) for content in contents if isinstance(content, list))
        if parts > PARTS_MAX:
            raise ValueError(f"at most {PARTS_MAX} parts of content a request, these are {parts}")
    return value


def _top_k(value: object) -> object:
    """Other engines also write -1 for off."""
    return 0 if value == -1 else value


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: object) -> object:
        """JSON null means the default, as OpenAI's clients have it; also in a part of a body.

        Of unknown fields only the first is kept: it is the one that is told, and each is an error.
        """
        if not isinstance(value, dict):
            return value
        known = cls.model_fields
        kept = {name: value[name] for name in known if value.get(name) is not None}
        unknown = (name for name in value if name not in known and value[name] is not None)
        return kept | {name: value[name] for name in islice(unknown, 1)}


Model = Annotated[str, Field(max_length=MODEL_CHARS_MAX)]


class StreamOptions(_Body):
    """Options of a streamed answer."""

    include_usage: bool = False
    continuous_usage_stats: Literal[False] = False


class SamplingBody(_Body):
    """Fields that completions and chat completions have in common."""

    model: Model | None = None
    n: Annotated[int, Field(ge=1, le=CHOICES_MAX)] = 1
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] = 0
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, BeforeValidator(_top_k), Field(ge=0, lt=2**31)] = 0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[str], BeforeValidator(_stops)] = []
    stop_token_ids: Annotated[list[int], Field(max_length=256, fail_fast=True)] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    return_token_ids: bool = False


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts)]
    logprobs: Annotated[int, Field(ge=0, le=LOGPROBS_MAX)] | None = None
    add_special_tokens: bool = True


class TextPart(_Body):
    """A part of a message; text is the only kind that the models here read."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], Field(fail_fast=True), BeforeValidator(_content)]
    name: str | None = None

    @property
    def text(self) -> str:
        """The content as one string."""
        return "".join(part.text for part in self.content)


Messages = Annotated[
    list[ChatMessage],
    Field(min_length=1, max_length=MESSAGES_MAX, fail_fast=True),
    BeforeValidator(_messages),
]


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=LOGPROBS_MAX)] | None = None
    add_generation_prompt: bool = True


class TokenizeBody(_Body):
    """POST /tokenize, of a text or of a conversation."""

    model: Model | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True


BodyT = TypeVar("BodyT", bound=BaseModel)


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Decoding makes a million objects and no cycle; each search for one would take longer."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def parse_body(data: bytes | bytearray, kind: type[BodyT]) -> BodyT:
    """``data`` as ``kind``; ApiError says what is wrong with it."""
    _check_counts(data)
    with _no_collections():
        return _parse(data, kind)


def _check_counts(data: bytes | bytearray) -> None:
    """ApiError for more values than fit the time of decoding, by bounds that cost none."""
    if len(data) <= COLONS_MAX:
        return
    if sum(map(data.count, (b",", b"[", b"{"))) > VALUES_MAX:
        raise bad_request(
            f"at most {VALUES_MAX:,} values fit one request, by its commas and opening brackets; "
            "split it into several"
        )
    if data.count(b":") > COLONS_MAX:
        raise bad_request(
            f"at most {COLONS_MAX:,} fields fit one request, by its colons; split it into several"
        )


def _parse(data: bytes | bytearray, kind: type[BodyT]) -> BodyT:
    try:
        values = msgspec.json.decode(data)
    except (ValueError, RecursionError) as error:
        what = str(error) if data else "the body is empty"
        raise bad_request(f"the body is not JSON: {what}") from None
    if not isinstance(values, dict):
        raise bad_request("the body is JSON, but not an object")
    try:
        return kind.model_validate(_supported(values))
    except ValidationError as error:
        raise _explain(error) from None


def _supported(values: dict[str, Any]) -> dict[str, Any]:
    """The fields that count, without those that say nothing."""
    kept = {}
    for name, value in values.items():
        if value is None or name in _IGNORED:
            continue
        if name not in _UNSUPPORTED:
            kept[name] = value
        elif value not in _UNSUPPORTED[name]:
            raise bad_request(f"{name} is not supported; leave it out", param=name)
    return kept


# What to give instead, by pydantic's type of the mistake.
_REMEDIES = {
    "bool_type": "give true or false",
    "finite_number": "give a finite number",
    "float_type": "give a number",
    "greater_than": "take more than {gt:g}",
    "greater_than_equal": "take at least {ge}",
    "int_from_float": "give a whole number",
    "int_type": "give a whole number",
    "less_than": "take less than {lt}",
    "less_than_equal": "take at most {le:g}",
    "list_type": "give a list",
    "literal_error": "take {expected}",
    "model_type": "give an object",
    "string_too_long": "give at most {max_length} characters",
    "string_too_short": "give at least {min_length} character",
    "string_type": "give text",
    "too_long": "give at most {max_length} items",
    "too_short": "give at least {min_length} item",
    "value_error": "{error}",
}


def _explain(error: ValidationError) -> ApiError:
    """The first mistake in words: where it is, what is wrong, which value was given."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return bad_request(f"unknown field {_shown(where)}", param=where[:SHOWN_CHARS])
    if first["type"] == "missing":
        return bad_request(f"{where} is missing", param=where)
    given = _shown(first["input"])
    remedy = _REMEDIES.get(first["type"], first["msg"]).format_map(first.get("ctx", {}))
    return bad_request(f"{where}: {remedy} (given: {given})", param=where)


class _Shown(reprlib.Repr):
    """``repr`` of what may be large, in time and length that do not follow from it."""

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        """Without the sorting of all keys."""
        if level <= 0:
            return "{...}"
        first = islice(x.items(), self.maxdict)
        pairs = [f"{self.repr1(k, level - 1)}: {self.repr1(v, level - 1)}" for k, v in first]
        return f"{{{', '.join(pairs + ['...'] * (len(x) > self.maxdict))}}}"


_short = _Shown()
_short.maxstring = _short.maxlong = _short.maxother = SHOWN_CHARS


def _shown(value: object) -> str:
    """``value`` in at most SHOWN_CHARS characters."""
    text = _short.repr(value)
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 3] + "..."
