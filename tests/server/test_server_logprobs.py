"""Log probabilities of tokens that are parts of a character, or that share their text."""

import pytest
import tokenizers
from kvstore_engine.messages import TokenLogprob
from kvstore_engine.server.chat import ChatFormat
from kvstore_engine.server.completion import CompletionFormat
from kvstore_engine.server.generation import Delta
from kvstore_engine.server.responses import Choice
from kvstore_engine.tokenizer import DetokenizeStream, Tokenizer, load_tokenizer
from tokenizers import decoders, models

TEXT = "é€a🙂"
IM_END = 259


@pytest.fixture
def tokenizer() -> Tokenizer:
    return load_tokenizer("tiny-random")  # its tokens are single bytes


def entry(token: int, *others: int) -> TokenLogprob:
    """A chosen token as the likeliest, and others behind it."""
    top = [(one, -1.0 - i) for i, one in enumerate((token, *others))]
    return TokenLogprob(token, -1.0, top)


def test_chat_bytes_of_the_tokens_are_those_of_the_text(tokenizer: Tokenizer) -> None:
    ids = [*TEXT.encode(), IM_END]
    form = ChatFormat(tokenizer, False, True)
    content = [form._token(token, -1.0) for token in ids]
    assert [one["bytes"] for one in content[:-1]] == [[byte] for byte in TEXT.encode()]
    assert content[-1]["bytes"] == list(b"<|im_end|>")
    top = form._logprobs([entry(0xC3, 0xA9)])["content"]
    assert isinstance(top, list)
    assert [one["bytes"] for one in top[0]["top_logprobs"]] == [[0xC3], [0xA9]]


def test_completion_names_of_incomplete_tokens_stay_distinct(tokenizer: Tokenizer) -> None:
    form = CompletionFormat(tokenizer, False, True)
    logprobs = form._logprobs(0, [entry(0xC3, 0xA9, 0xAA, ord("a"), IM_END)])
    assert logprobs["tokens"] == [r"bytes:\xc3"]
    assert logprobs["top_logprobs"] == [
        {r"bytes:\xc3": -1, r"bytes:\xa9": -2, r"bytes:\xaa": -3, "a": -4, "<|im_end|>": -5}
    ]


def test_the_chosen_token_is_always_among_the_top() -> None:
    vocab = {"a": 0, "Ġ": 1, "b": 2}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.Replace("b", "a")  # two tokens of one text
    form = CompletionFormat(Tokenizer(backend, eos_token_ids=[]), False, True)
    chosen = TokenLogprob(2, -3.0, [(0, -1.0), (1, -2.0)])
    logprobs = form._logprobs(0, [chosen])
    assert logprobs["tokens"] == ["a"]
    assert logprobs["top_logprobs"] == [{"a": -3.0, "token_id:0": -1.0, "Ġ": -2.0}]


def test_text_offsets_agree_with_the_text(tokenizer: Tokenizer) -> None:
    ids = [*TEXT.encode(), 0xFF, ord("b")]
    wanted = [0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 4, 5]
    whole = CompletionFormat(tokenizer, False, True)
    choice = Choice(0, TEXT + "\ufffdb", ids, [entry(token) for token in ids])
    answer = whole.whole(choice)["logprobs"]
    assert isinstance(answer, dict)
    assert answer["text_offset"] == wanted
    streamed = CompletionFormat(tokenizer, False, True)
    streams = {index: DetokenizeStream(tokenizer) for index in (0, 1)}
    offsets = []
    for token in ids:
        for index, stream in streams.items():
            delta = Delta(index, stream.push([token]), [token], [entry(token)])
            part = streamed.part(delta)["logprobs"]
            assert isinstance(part, dict)
            if index == 0:
                offsets += part["text_offset"]
    assert offsets == wanted
