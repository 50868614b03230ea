"""POST /v1/completions."""

import time
from dataclasses import dataclass, field

from fastapi import Request
from starlette.responses import Response

from kvstore_engine.messages import SamplingParams, TokenLogprob
from kvstore_engine.server.generation import Delta, Generation, Job
from kvstore_engine.server.protocol import CompletionBody
from kvstore_engine.server.responses import Answer, Choice, Json
from kvstore_engine.server.service import Service
from kvstore_engine.tokenizer import DetokenizeStream, Tokenizer

MAX_TOKENS_DEFAULT = 16


@dataclass(slots=True)
class _Written:
    """The text of one choice so far, as far as text offsets need it."""

    detokenizer: DetokenizeStream
    chars: int = 0

    def offset(self, token: int) -> int:
        """Where the text of the next token starts; one inside a character starts with it."""
        before = self.chars
        self.chars += len(self.detokenizer.push([token]))
        return before


@dataclass(slots=True)
class CompletionFormat:
    """Choices of a text completion."""

    tokenizer: Tokenizer
    show_tokens: bool
    show_logprobs: bool
    written: dict[int, _Written] = field(default_factory=dict)  # of each choice
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
        if index not in self.written:
            self.written[index] = _Written(DetokenizeStream(self.tokenizer))
        written = self.written[index]
        return {
            "tokens": [self._name(entry.token) for entry in logprobs],
            "token_logprobs": [entry.logprob for entry in logprobs],
            "top_logprobs": [self._top(entry) for entry in logprobs],
            "text_offset": [written.offset(entry.token) for entry in logprobs],
        }

    def _name(self, token: int) -> str:
        """The token's text, or its bytes as OpenAI writes them where they are part of a text."""
        data = self.tokenizer.spelling(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + repr(data)[2:-1]

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """The chosen token and the likeliest others; one whose name is taken goes by its id."""
        named = {self._name(entry.token): entry.logprob}
        for token, value in entry.top:
            if token != entry.token:
                name = self._name(token)
                named[f"token_id:{token}" if name in named else name] = value
        return named


async def complete(service: Service, request: Request) -> Response:
    """Answers one request; ApiError for what cannot be answered."""
    arrival_s = time.monotonic()
    body = await service.read_body(request, CompletionBody)
    ready = service.ready(body.model)
    service.check_choices(len(body.prompt), body.n)
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
    form = CompletionFormat(service.tokenizer, body.return_token_ids, body.logprobs is not None)
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
