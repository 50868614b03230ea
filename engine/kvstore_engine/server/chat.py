"""POST /v1/chat/completions."""

import time
from dataclasses import dataclass

from fastapi import Request
from kvstore.errors import KVStoreError
from starlette.responses import Response

from kvstore_engine.messages import TokenLogprob
from kvstore_engine.server.errors import bad_request
from kvstore_engine.server.generation import Delta, Generation, Job
from kvstore_engine.server.protocol import ChatBody, ChatMessage
from kvstore_engine.server.responses import Answer, Choice, Json
from kvstore_engine.server.service import Service
from kvstore_engine.tokenizer import Tokenizer


@dataclass(slots=True)
class ChatFormat:
    """Choices of a chat completion."""

    tokenizer: Tokenizer
    show_tokens: bool
    show_logprobs: bool
    id_prefix: str = "chatcmpl"
    whole_object: str = "chat.completion"
    chunk_object: str = "chat.completion.chunk"

    def opening(self, index: int) -> Json | None:
        """Who speaks."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def part(self, delta: Delta) -> Json:
        """The choice of a chunk."""
        return self._choice(delta, "delta", {"content": delta.text} if delta.text else {})

    def whole(self, choice: Choice) -> Json:
        """A choice of a whole answer."""
        return self._choice(choice, "message", {"role": "assistant", "content": choice.text})

    def _choice(self, piece: Delta | Choice, name: str, content: dict[str, str]) -> Json:
        choice: Json = {
            "index": piece.index,
            name: content,
            "logprobs": self._logprobs(piece.logprobs) if self.show_logprobs else None,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        if self.show_tokens:
            choice["token_ids"] = piece.tokens
        return choice

    def _logprobs(self, logprobs: list[TokenLogprob]) -> Json:
        return {
            "content": [
                self._token(entry.token, entry.logprob)
                | {"top_logprobs": [self._token(token, value) for token, value in entry.top]}
                for entry in logprobs
            ]
        }

    def _token(self, token: int, logprob: float) -> Json:
        return {
            "token": self.tokenizer.token_text(token),
            "logprob": logprob,
            "bytes": list(self.tokenizer.spelling(token)),
        }


async def chat(service: Service, request: Request) -> Response:
    """Answers one request; ApiError for what cannot be answered."""
    arrival_s = time.monotonic()
    body = await service.read_body(request, ChatBody)
    ready = service.ready(body.model)
    if body.top_logprobs and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true", param="top_logprobs")
    tokens = await chat_tokens(
        service, body.messages, add_generation_prompt=body.add_generation_prompt
    )
    service.check_tokens(tokens, "messages")
    params = service.sampling(
        body,
        len(tokens),
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    job = Job(
        prompts=[tokens],
        params=[params],
        n=body.n,
        stop=tuple(body.stop),
        include_stop=body.include_stop_str_in_output,
        cache_salt=body.cache_salt,
    )
    generation = Generation(service.engine, service.tokenizer, service.metrics, job)
    generation.start(arrival_s, service.open_max)
    form = ChatFormat(service.tokenizer, body.return_token_ids, body.logprobs)
    include_usage = body.stream_options.include_usage
    answer = Answer(generation, form, ready.model, body.return_token_ids, include_usage)
    return answer.stream() if body.stream else await answer.whole(request)


async def chat_tokens(
    service: Service, messages: list[ChatMessage], *, add_generation_prompt: bool
) -> list[int]:
    """Tokens of a conversation, through the model's chat template."""
    plain = [
        {"role": "system" if m.role == "developer" else m.role, "content": m.text} for m in messages
    ]
    try:
        text = service.tokenizer.apply_chat_template(
            plain, add_generation_prompt=add_generation_prompt
        )
    except KVStoreError as error:
        raise bad_request(str(error), param="messages") from None
    return await service.encode(text, add_special_tokens=False)
