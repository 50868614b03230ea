"""What every endpoint needs: the engine, the tokenizer, the limits, and the checks before a run."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastapi import Request

from kvstore_engine.messages import EngineReady, SamplingParams
from kvstore_engine.server.bodies import Bodies, bytes_max
from kvstore_engine.server.engine_client import EngineClient
from kvstore_engine.server.errors import ApiError, bad_request
from kvstore_engine.server.metrics import Metrics
from kvstore_engine.server.protocol import CHOICES_MAX, BodyT, SamplingBody, parse_body
from kvstore_engine.tokenizer import Tokenizer

CHARS_SLACK = 4  # normalisers shorten a text before it is cut into tokens
ROOM_SHARES = 4  # no request may take more than one of so many shares of open_max
INLINE_CHARS_MAX = 4096  # longer text is tokenised in a thread, beside the event loop


@dataclass(slots=True)
class Service:
    """The served model. ``tokenizer`` is there before the engine is ready."""

    engine: EngineClient
    tokenizer: Tokenizer
    metrics: Metrics
    names: tuple[str, ...] = ()  # other names that requests may give the model
    open_max: int = 4096  # completions at once; the engine never sees more
    bodies: Bodies = field(default_factory=Bodies)
    created: int = field(default_factory=lambda: int(time.time()))

    def ready(self, model: str | None = None) -> EngineReady:
        """The engine's facts; ApiError with 503 while it is not there, 404 for another model."""
        ready = self.engine.ready
        if ready is None or self.engine.state != "ready":
            raise ApiError(503, self.engine.death or "the model is still being loaded")
        if model is not None and model != ready.model and model not in self.names:
            raise ApiError(
                404,
                f"model {model!r} is not served here; the model is {ready.model!r}",
                code="model_not_found",
                param="model",
            )
        return ready

    async def read_body(self, request: Request, kind: type[BodyT]) -> BodyT:
        """The request's JSON body as ``kind``; ApiError for anything else, or without an engine."""
        data = await self.bodies.read(request, bytes_max(self.ready().max_context))
        return parse_body(data, kind)

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Tokens of ``text``; ApiError for one so long that it cannot fit the context.

        Tokenising takes seconds for some ten megabytes, and threads for it are few.
        """
        ready = self.engine.ready
        if ready is not None:
            chars_max = CHARS_SLACK * ready.max_context * self.tokenizer.token_chars_max
            if len(text) > max(chars_max, INLINE_CHARS_MAX):
                raise bad_request(
                    f"the context of this model is {ready.max_context} tokens; the prompt has "
                    f"{len(text)} characters, too many for any tokens to fit",
                    param="prompt",
                    code="context_length_exceeded",
                )
        if len(text) <= INLINE_CHARS_MAX:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(
            self.tokenizer.encode, text, add_special_tokens=add_special_tokens
        )

    def check_choices(self, prompts: int, choices: int) -> None:
        """ApiError for more completions than one request may ask for: a quarter of all room."""
        allowed = min(max(self.open_max // ROOM_SHARES, CHOICES_MAX), max(self.open_max, 1))
        if prompts * choices > allowed:
            raise bad_request(
                f"{prompts} prompts with {choices} choices each are {prompts * choices} "
                f"completions; take at most {allowed} in one request",
                param="n",
            )

    def check_tokens(self, tokens: Sequence[int], param: str = "prompt") -> None:
        """ApiError for ids that the tokenizer or the model does not know."""
        known, computed = self.tokenizer.vocab_size, self.ready().vocab_size
        size = min(known, computed)
        if not tokens or 0 <= min(tokens) <= max(tokens) < size:
            return
        wrong = next(token for token in tokens if not 0 <= token < size)
        if computed <= wrong < known:
            raise bad_request(
                f"token id {wrong} ({self.tokenizer.token_text(wrong)!r}) is in the vocabulary of "
                f"the tokenizer, but the model has only {computed} tokens; leave it out, or serve "
                "the model with the tokenizer that belongs to it",
                param=param,
            )
        raise bad_request(
            f"token id {wrong} is not in the vocabulary of {size} tokens; give ids from 0 to "
            f"{size - 1}",
            param=param,
        )

    def sampling(
        self,
        body: SamplingBody,
        prompt_tokens: int,
        *,
        max_tokens: int | None,
        default: int | None = None,
        logprobs: int | None = None,
    ) -> SamplingParams:
        """Parameters for the engine; without ``max_tokens``, ``default`` or the room that is left.

        Raises ApiError, with the numbers, where prompt and answer do not fit the context.
        """
        if not prompt_tokens:
            raise bad_request("the prompt is empty; give at least one token", param="prompt")
        room = self.ready().max_context - prompt_tokens
        if room < 1 or (max_tokens or 0) > room:
            raise self._too_long(prompt_tokens, max_tokens)
        wanted = max_tokens or min(room, default or room)
        if body.min_tokens > wanted:
            raise bad_request(
                f"min_tokens is {body.min_tokens}, more than the {wanted} of max_tokens",
                param="min_tokens",
            )
        self.check_tokens(body.stop_token_ids, "stop_token_ids")
        return SamplingParams(
            temperature=body.temperature,
            top_k=body.top_k,
            top_p=body.top_p,
            seed=body.seed,
            max_tokens=wanted,
            min_tokens=body.min_tokens,
            ignore_eos=body.ignore_eos,
            stop_token_ids=tuple(body.stop_token_ids),
            logprobs=logprobs,
        )

    def _too_long(self, prompt_tokens: int, max_tokens: int | None) -> ApiError:
        limit = self.ready().max_context
        what = f"the prompt has {prompt_tokens} tokens"
        if prompt_tokens < limit:
            what += f" and max_tokens asks for {max_tokens} more"
        else:
            what += ", which leaves no room for an answer"
        return bad_request(
            f"the context of this model is {limit} tokens; {what}",
            param="prompt" if prompt_tokens >= limit else "max_tokens",
            code="context_length_exceeded",
        )
