"""POST /v1/completions."""

import time
from dataclasses import dataclass

from fastapi import Request
from starlette.responses import Response

from kvstore_engine.messages import SamplingParams, TokenLogprob
from kvstore_engine.server.generation import Delta, Generation, Job
from kvstore_engine.server.protocol import CompletionBody, read_body
from kvstore_engine.server.responses import Answer, Choice, Json
from kvstore_engine.server.service import Service
from kvstore_engine.tokenizer import Tokenizer

MAX_TOKENS_DEFAULT = 16


@dataclass(slots=True)
class CompletionFormat:
    """Choices of a text completion."""

    tokenizer: Tokenizer
    show_tokens: bool
    show_logprobs: bool
    offsets: dict[int, int]  # choice -> characters of the tokens that were written so far
    id_prefix: str = "cmpl"
    whole_object: str = "text_completion"
    chunk_object: str = "text_completion"

    def opening(self, index: int) -> Json | None:  # noqa: ARG002
        """Nothing stands before the first token."""
        return None

    def part(self, delta: Delta) -> Json:
        """The choice of a chunk."""
        return self._choice(delta)

    def whole(self, choice: Choice) -> Json:
        """A choice of a whole answer."""
        return self._choice(choice)

    def _choice(self, piece: Delta | Choice) -> Json:
        choice: Json = {
            "index": piece.index,
            "text": piece.text,
            "logprobs": self._logprobs(piece.index, piece.logprobs) if self.show_logprobs else None,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        if self.show_tokens:
            choice["token_ids"] = piece.tokens
        return choice

    def _logprobs(self, index: int, logprobs: list[TokenLogprob]) -> Json:
        texts = [self.tokenizer.token_text(entry.token) for entry in logprobs]
        offsets = []
        for text in texts:
            offsets.append(self.offsets.setdefault(index, 0))
            self.offsets[index] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [entry.logprob for entry in logprobs],
            "top_logprobs": [
                {self.tokenizer.token_text(token): value for token, value in entry.top}
                for entry in logprobs
            ],
            "text_offset": offsets,
        }


async def complete(service: Service, request: Request) -> Response:
    """Answers one request; ApiError for what cannot be answered."""
    arrival_s = time.monotonic()
    body = await read_body(request, CompletionBody)
    ready = service.ready(body.model)
    prompts = [await _tokens(service, prompt, body) for prompt in body.prompt]
    job = Job(
        prompts=prompts,
        params=[_params(service, body, len(tokens)) for tokens in prompts],
        n=body.n,
        stop=tuple(body.stop),
        include_stop=body.include_stop_str_in_output,
        cache_salt=body.cache_salt,
    )
    generation = Generation(service.engine, service.tokenizer, service.metrics, job)
    generation.start(arrival_s, service.open_max)
    form = CompletionFormat(
        service.tokenizer, body.return_token_ids, body.logprobs is not None, offsets={}
    )
    include_usage = body.stream_options.include_usage
    answer = Answer(generation, form, ready.model, body.return_token_ids, include_usage)
    return answer.stream() if body.stream else await answer.whole(request)


async def _tokens(service: Service, prompt: str | list[int], body: CompletionBody) -> list[int]:
    if isinstance(prompt, str):
        prompt = await service.encode(prompt, add_special_tokens=body.add_special_tokens)
    service.check_tokens(prompt)
    return prompt


def _params(service: Service, body: CompletionBody, prompt_tokens: int) -> SamplingParams:
    return service.sampling(
        body,
        prompt_tokens,
        max_tokens=body.max_tokens,
        default=MAX_TOKENS_DEFAULT,
        logprobs=body.logprobs,
    )
