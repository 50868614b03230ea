"""What the endpoints answer. The fake engine repeats the prompt's tokens."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from kvstore.errors import ConfigError
from kvstore_engine.server.bodies import bytes_max

from tests.server.fake_engine import MAX_CONTEXT
from tests.server.harness import MODEL, Server, server, until

pytestmark = pytest.mark.asyncio(loop_scope="module")
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def api() -> AsyncIterator[Server]:
    async with server() as started:
        yield started


async def error_of(api: Server, path: str, **body: Any) -> dict[str, Any]:
    """The error object of a 400."""
    response = await api.post(path, **body)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


async def test_completion_has_text_usage_and_cache_counts(api: Server) -> None:
    answer = await api.complete(prompt="abc", max_tokens=5, model=MODEL)
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == MODEL
    [choice] = answer["choices"]
    assert choice["text"] == "abcab"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    assert "token_ids" not in choice
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 5,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 3},
        "kvstore": {"hbm": 2, "dram": 1, "ssd": 0, "remote": 0, "end_reason": "evicted"},
    }


async def test_streamed_text_is_the_same(api: Server) -> None:
    events = await api.events("/v1/completions", prompt="abc", max_tokens=5)
    assert "".join(e["choices"][0]["text"] for e in events) == "abcab"
    assert [e["choices"][0]["finish_reason"] for e in events] == [None] * 4 + ["length"]
    assert all("usage" not in e for e in events)


async def test_stream_with_usage_ends_with_it(api: Server) -> None:
    events = await api.events(
        "/v1/completions", prompt="abc", max_tokens=2, stream_options={"include_usage": True}
    )
    assert all(e["usage"] is None for e in events[:-1])
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 2


async def test_several_prompts_and_choices_are_numbered(api: Server) -> None:
    answer = await api.complete(prompt=["ab", "xyz"], n=2, max_tokens=3, seed=40)
    texts = [(c["index"], c["text"]) for c in answer["choices"]]
    assert texts == [(0, "aba"), (1, "aba"), (2, "xyz"), (3, "xyz")]
    assert answer["usage"]["prompt_tokens"] == 5
    assert answer["usage"]["completion_tokens"] == 12
    assert answer["usage"]["kvstore"]["hbm"] == 4
    assert await api.metric('seen_seeds_total{kind="41"}') == 1


async def test_tokens_go_in_and_come_out(api: Server) -> None:
    tokens = (await api.post("/tokenize", prompt="hey", add_special_tokens=False)).json()["tokens"]
    answer = await api.complete(prompt=tokens, max_tokens=3, return_token_ids=True)
    assert answer["choices"][0]["token_ids"] == tokens
    events = await api.events(
        "/v1/completions", prompt=tokens, max_tokens=3, return_token_ids=True, stop="y"
    )
    assert [e["choices"][0]["token_ids"] for e in events] == [[t] for t in tokens]


async def test_stop_string_across_tokens_ends_the_answer_and_the_request(api: Server) -> None:
    aborted = api.counter("aborted_requests")
    answer = await api.complete(prompt="one, two. ", max_tokens=100, stop=["two.", "zzz"])
    [choice] = answer["choices"]
    assert choice["text"] == "one, "
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "two.")
    assert answer["usage"]["completion_tokens"] == 9
    await until(lambda: api.counter("aborted_requests") > aborted)


async def test_streamed_stop_string_is_never_shown(api: Server) -> None:
    events = await api.events("/v1/completions", prompt="abcSTOP", max_tokens=50, stop="STOP")
    assert "".join(e["choices"][0]["text"] for e in events) == "abc"
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


async def test_stop_string_may_be_kept_and_waits_for_min_tokens(api: Server) -> None:
    kept = await api.complete(
        prompt="abcX", max_tokens=50, stop="X", include_stop_str_in_output=True, min_tokens=6
    )
    assert kept["choices"][0]["text"] == "abcXabcX"


async def test_stop_string_that_the_last_token_completes(api: Server) -> None:
    answer = await api.complete(prompt="abX", max_tokens=3, stop="X")
    assert answer["choices"][0]["text"] == "ab"
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_stop_token_is_counted_but_is_no_text(api: Server) -> None:
    tokens = (await api.post("/tokenize", prompt="hey", add_special_tokens=False)).json()["tokens"]
    answer = await api.complete(prompt=tokens, max_tokens=9, stop_token_ids=[tokens[2]])
    assert answer["choices"][0]["text"] == "he"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 3


async def test_text_of_several_tokens_a_character_is_never_broken(api: Server) -> None:
    events = await api.events("/v1/completions", prompt="né✓", max_tokens=6)
    pieces = [e["choices"][0]["text"] for e in events]
    assert "".join(pieces) == "né✓"
    assert all("\ufffd" not in piece for piece in pieces)


async def test_completion_logprobs(api: Server) -> None:
    answer = await api.complete(prompt="abc", max_tokens=3, logprobs=2)
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "c"]
    assert logprobs["token_logprobs"] == [-0.5] * 3
    assert logprobs["text_offset"] == [0, 1, 2]
    assert logprobs["top_logprobs"][1] == {"b": -0.5, "a": -1.5}
    events = await api.events("/v1/completions", prompt="abc", max_tokens=3, logprobs=0)
    offsets = [e["choices"][0]["logprobs"]["text_offset"] for e in events]
    assert offsets == [[0], [1], [2]]


async def test_chat_goes_through_the_template(api: Server) -> None:
    count = (await api.post("/tokenize", messages=HELLO)).json()["count"]
    response = await api.post(CHAT, messages=HELLO, max_completion_tokens=4)
    answer = response.json()
    assert answer["object"] == "chat.completion"
    [choice] = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["prompt_tokens"] == count > 5
    assert answer["usage"]["completion_tokens"] == 4


async def test_chat_without_max_tokens_takes_the_room_that_is_left(api: Server) -> None:
    answer = (await api.post(CHAT, messages=HELLO)).json()
    assert answer["usage"]["total_tokens"] == MAX_CONTEXT


async def test_chat_stream_says_who_speaks_first(api: Server) -> None:
    events = await api.events(CHAT, messages=HELLO, max_tokens=8, n=2)
    assert events[0]["object"] == "chat.completion.chunk"
    assert [e["choices"][0]["delta"].get("role") for e in events[:3]] == ["assistant"] * 2 + [None]
    whole = (await api.post(CHAT, messages=HELLO, max_tokens=8, n=2)).json()
    for index in (0, 1):
        mine = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        text = "".join(c["delta"].get("content", "") for c in mine)
        assert text == whole["choices"][index]["message"]["content"]
        assert mine[-1]["finish_reason"] == "length"


async def test_chat_logprobs(api: Server) -> None:
    response = await api.post(CHAT, messages=HELLO, max_tokens=40, logprobs=True, top_logprobs=2)
    content = response.json()["choices"][0]["logprobs"]["content"]
    entry = next(e for e in content if e["token"] == "h")
    assert entry["bytes"] == [104]
    assert [t["token"] for t in entry["top_logprobs"]] == ["h", "g"]
    error = await error_of(api, CHAT, messages=HELLO, top_logprobs=2)
    assert error["param"] == "top_logprobs"


async def test_a_conversation_that_the_template_refuses(api: Server) -> None:
    def refuse(*_args: object, **_options: object) -> str:
        raise ConfigError("roles must alternate")

    tokenizer = api.service.tokenizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(tokenizer), "apply_chat_template", refuse)
        error = await error_of(api, CHAT, messages=HELLO)
    assert error["message"] == "roles must alternate"


async def test_models_health_and_aliases(api: Server) -> None:
    listed = (await api.client.get("/v1/models")).json()
    assert [m["id"] for m in listed["data"]] == [MODEL]
    assert listed["data"][0]["max_model_len"] == MAX_CONTEXT
    assert (await api.client.get("/health")).json() == {"status": "ok"}
    assert (await api.complete(prompt="a", model="alias"))["model"] == MODEL


async def test_another_model_is_a_404(api: Server) -> None:
    response = await api.post("/v1/completions", prompt="a", model="gpt-9")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert MODEL in response.json()["error"]["message"]


async def test_wrong_path_and_method(api: Server) -> None:
    lost = await api.client.get("/v2/nothing")
    assert lost.status_code == 404
    assert "no such endpoint" in lost.json()["error"]["message"]
    wrong = await api.client.get("/v1/completions")
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "POST"
    assert "another method" in wrong.json()["error"]["message"]


async def test_prompt_longer_than_the_context_says_the_numbers(api: Server) -> None:
    error = await error_of(api, "/v1/completions", prompt="a" * 5000)
    assert error["code"] == "context_length_exceeded"
    assert str(MAX_CONTEXT) in error["message"]
    assert "5000" in error["message"]
    long = [{"role": "user", "content": "a" * 5000}]
    error = await error_of(api, CHAT, messages=long)
    assert error["code"] == "context_length_exceeded"


async def test_I7_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(api: Server) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "a" * 1_000_000}),
        ("/tokenize", {"prompt": "a" * 1_000_000}),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 1_000_000}]}),
    ):
        async with asyncio.timeout(5):
            error = await error_of(api, path, **body)
        assert error["code"] == "context_length_exceeded"
        assert "characters, too many for any tokens" in error["message"]


async def test_answer_longer_than_the_context(api: Server) -> None:
    error = await error_of(api, "/v1/completions", prompt="abc", max_tokens=MAX_CONTEXT)
    assert error["param"] == "max_tokens"
    assert f"max_tokens asks for {MAX_CONTEXT} more" in error["message"]
    fits = await api.complete(prompt="abc", max_tokens=MAX_CONTEXT - 3)
    assert fits["usage"]["total_tokens"] == MAX_CONTEXT
    near = await api.complete(prompt="a" * (MAX_CONTEXT - 2))
    assert near["usage"]["completion_tokens"] == 2


async def test_prompts_that_are_no_prompts(api: Server) -> None:
    assert "empty" in (await error_of(api, "/v1/completions", prompt=""))["message"]
    error = await error_of(api, "/v1/completions", prompt=[1, 10**9])
    assert "token id 1000000000 is not in the vocabulary" in error["message"]
    error = await error_of(api, "/v1/completions", prompt=[-1])
    assert "token id -1" in error["message"]
    for token in (-1, 10**9, 10**20):
        error = await error_of(api, "/v1/completions", prompt="a", stop_token_ids=[token])
        assert error["param"] == "stop_token_ids"
    error = await error_of(api, "/v1/completions", prompt="a", min_tokens=9, max_tokens=5)
    assert error["param"] == "min_tokens"
    error = await error_of(api, "/tokenize", prompt="a", messages=HELLO)
    assert error["message"] == "give either prompt or messages"


async def test_I11_a_token_that_only_the_tokenizer_knows_is_a_400(
    api: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert api.engine.ready is not None
    fewer = msgspec.structs.replace(api.engine.ready, vocab_size=259)
    monkeypatch.setattr(api.engine, "ready", fewer)
    added = api.counter("added_requests")
    for path, param, body in (
        ("/v1/completions", "prompt", {"prompt": [97, 259]}),
        ("/v1/completions", "prompt", {"prompt": "a<|im_end|>"}),
        ("/v1/completions", "prompt", {"prompt": ["a", [259]], "stream": True}),
        ("/v1/completions", "stop_token_ids", {"prompt": "a", "stop_token_ids": [259]}),
        (CHAT, "messages", {"messages": HELLO, "stream": True}),
    ):
        error = await error_of(api, path, **body)
        assert error["param"] == param
        assert "token id 259 ('<|im_end|>')" in error["message"]
        assert "the model has only 259 tokens" in error["message"]
    error = await error_of(api, "/v1/completions", prompt=[300])
    assert "give ids from 0 to 258" in error["message"]
    await api.complete(prompt=[258], max_tokens=1)
    await until(lambda: api.counter("added_requests") == added + 1)


async def test_I11_malformed_bodies(api: Server) -> None:
    for data in (b"", b"{", b"[1]", b"\xff", b"a=b"):
        response = await api.client.post("/v1/completions", content=data)
        assert response.status_code == 400
        assert response.json()["error"]["message"].startswith("the body is")


async def test_I7_a_body_that_is_too_large_is_a_413(api: Server) -> None:
    assert api.engine.ready is not None
    limit = bytes_max(api.engine.ready.max_context)
    for more in (1, 30 << 20):
        response = await api.client.post("/tokenize", content=b" " * (limit + more))
        assert response.status_code == 413
        assert "larger than 1.25 MiB" in response.json()["error"]["message"]
    body = b'{"prompt": "a"}'.ljust(limit)
    assert (await api.client.post("/tokenize", content=body)).status_code == 200


async def test_engine_error_is_a_500_with_its_message(api: Server) -> None:
    response = await api.post("/v1/completions", prompt="a", cache_salt="error")
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "no luck"
    assert response.json()["error"]["type"] == "server_error"
    response = await api.post("/v1/completions", prompt="a", cache_salt="abort")
    assert response.status_code == 503


async def test_engine_error_in_a_stream_is_its_last_event(api: Server) -> None:
    events = await api.events("/v1/completions", prompt="abc", cache_salt="late-error")
    assert [e["choices"][0]["text"] for e in events[:-1]] == ["a", "b"]
    assert events[-1]["error"]["message"] == "no luck"


async def test_reset_prefix_cache(api: Server) -> None:
    before = api.counter("cache_resets")
    assert (await api.post("/reset_prefix_cache")).json() == {"status": "ok"}
    await until(lambda: api.counter("cache_resets") > before)


async def test_I7_too_many_open_completions_are_a_429(
    api: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.service, "open_max", 2)
    never = await api.post("/v1/completions", prompt="a", n=3)
    assert never.status_code == 400  # to try again later would be of no use
    waiting = asyncio.create_task(api.post("/v1/completions", prompt="abc", cache_salt="hang"))
    await until(lambda: api.engine.open_requests == 1)
    response = await api.post("/v1/completions", prompt="a", n=2)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"
    waiting.cancel()
    await until(lambda: api.engine.open_requests == 0)


async def test_a_bug_is_a_500_without_its_traceback(
    api: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("kvstore_engine.server.service.Service.check_tokens", fail)
    response = await api.post("/v1/completions", prompt=[1])
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    assert await api.metric('http_responses_total{route="/v1/completions",status="500"}') >= 1


async def test_thirty_two_requests_at_once(api: Server) -> None:
    prompts = [f"prompt number {i} " for i in range(32)]
    answers = await asyncio.gather(*(api.complete(prompt=p, max_tokens=len(p)) for p in prompts))
    assert [a["choices"][0]["text"] for a in answers] == prompts
    assert api.engine.open_requests == 0
