"""Several choices of one prompt, and how many completions one request may ask for."""

import asyncio

import pytest
from kvstore_engine.messages import AddRequest, SamplingParams

from tests.server.harness import Sink, fake_engine, server, until


async def test_a_prompt_goes_to_the_engine_once_whatever_its_choices() -> None:
    async with server() as api:
        answer = await api.complete(prompt=["ab", "cd"], n=3, max_tokens=2, seed=-1)
        assert [choice["text"] for choice in answer["choices"]] == ["ab"] * 3 + ["cd"] * 3
        await until(lambda: api.counter("added_requests") == 6)
        assert api.counter("added_prompts") == 2
        for seed in (-1, 0, 1):
            assert await api.metric(f'seen_seeds_total{{kind="{seed}"}}') == 1


async def test_one_request_cannot_take_all_the_room() -> None:
    async with server() as api:
        api.service.open_max = 256
        response = await api.post("/v1/completions", prompt=["a"] * 5, n=13)
        assert response.status_code == 400
        error = response.json()["error"]
        assert "5 prompts with 13 choices each are 65 completions" in error["message"]
        assert "at most 64" in error["message"]
        assert error["param"] == "n"
        await api.complete(prompt=["a"] * 4, n=16, max_tokens=1)


async def test_every_choice_of_one_prompt_fits_however_little_room_there_is() -> None:
    async with server() as api:
        api.service.open_max = 32
        assert len((await api.complete(prompt="a", n=32, max_tokens=1))["choices"]) == 32


@pytest.mark.parametrize("token", [65, 10**20], ids=["good", "not sendable"])
async def test_every_choice_gets_its_end(token: int) -> None:
    async with fake_engine() as engine:
        sink = Sink()
        params = SamplingParams(max_tokens=1)
        engine.add(AddRequest("a", [token], params, others=[("b", 1), ("c", None)]), sink)
        await asyncio.wait_for(engine.idle.wait(), 10)
        ends = {output.request_id: output.finish_reason for output in sink.outputs}
        assert ends == dict.fromkeys("abc", "length" if token == 65 else "error")
