"""Text to tokens and back, for every kind of model that the engine loads; needs no torch."""

import codecs
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from kvstore.errors import InvalidArgumentError
from tokenizers import decoders

from kvstore_engine.byte_alphabet import token_bytes
from kvstore_engine.chat import ChatTemplate, Messages

# Tokens that one character can be spread over, at one byte a token.
_PENDING_MAX = 4


class Tokenizer:
    """A model's vocabulary, its end tokens and its chat template."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token_ids: Sequence[int],
        bos_token_id: int | None = None,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        self._backend = backend
        self._chat_template = chat_template
        self.eos_token_ids = tuple(eos_token_ids)
        self.bos_token_id = bos_token_id
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.token_chars_max: int = max(map(len, backend.get_vocab()), default=1)
        self.byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        added = backend.get_added_tokens_decoder()
        self._added = {token: entry.content for token, entry in added.items()}
        self._special = {token for token, entry in added.items() if entry.special}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; special tokens written out in ``text`` become themselves.

        Other threads run meanwhile: a batch releases the interpreter, a single ``encode`` does not.
        """
        batch = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = batch[0].ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; bytes that are no UTF-8 become U+FFFD."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token: int) -> str:
        """One token on its own, special ones by name; for logprobs and for people."""
        return self._added.get(token) or self.decode([token], skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        """Bytes that a token adds to a text, of a byte-level vocabulary; special ones add none."""
        if token in self._special:
            return b""
        if token in self._added:
            return self._added[token].encode()
        entry = self._backend.id_to_token(token)
        return b"" if entry is None else token_bytes(entry)

    def spelling(self, token: int) -> bytes:
        """Bytes of one token on its own: a part of a character as it is, special ones by name."""
        data = self.token_bytes(token) if self.byte_level else b""
        return data or self.token_text(token).encode()

    def apply_chat_template(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        """The text of a conversation, special tokens included: encode it without adding more.

        Raises InvalidArgumentError when the model has no template, or it refuses the messages.
        """
        if self._chat_template is None:
            raise InvalidArgumentError(
                "the model has no chat template; use /v1/completions with a prompt"
            )
        return self._chat_template.render(messages, add_generation_prompt)


class DetokenizeStream:
    """Text of a growing token sequence; what it returns is always whole characters.

    The pieces joined, ``flush()`` included, are the decoded whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._shown: list[int] = []
        self._pending: list[int] = []

    def push(self, tokens: Sequence[int]) -> str:
        """Text that became certain with ``tokens``."""
        if self._tokenizer.byte_level:
            return self._utf8.decode(b"".join(map(self._tokenizer.token_bytes, tokens)))
        return "".join(self._push_one(token) for token in tokens)

    def flush(self) -> str:
        """What was held back, at the end of the sequence."""
        if self._tokenizer.byte_level:
            return self._utf8.decode(b"", final=True)
        return self._show()

    def _push_one(self, token: int) -> str:
        """Decodes the new tokens behind the shown ones, which say whether a space comes first."""
        self._pending.append(token)
        incomplete = self._fresh_text().endswith("�")
        return "" if incomplete and len(self._pending) < _PENDING_MAX else self._show()

    def _fresh_text(self) -> str:
        before = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode(self._shown + self._pending)[len(before) :]

    def _show(self) -> str:
        text = self._fresh_text()
        if self._pending:
            self._shown, self._pending = self._pending, []
        return text


def load_tokenizer(path_or_name: str | Path) -> Tokenizer:
    """The tokenizer of a built-in model, a GGUF file, a Hugging Face directory or tokenizer.json.

    Raises ModelLoadError when there is none.
    """
    # Here and not above, as the builders need the class of this module.
    from kvstore_engine import tokenizer_files

    return tokenizer_files.load(path_or_name)
