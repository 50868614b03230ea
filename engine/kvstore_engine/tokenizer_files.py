"""Builds tokenizers from GGUF headers, Hugging Face files, and for the tiny models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from kvstore_engine.byte_alphabet import CHARACTER_OF_BYTE
from kvstore_engine.chat import ChatTemplate
from kvstore_engine.gguf_fields import GgufFields, open_gguf
from kvstore_engine.model_files import check_directory, end_tokens, read_json_if_there, token_name
from kvstore_engine.model_source import ModelLoadError, SourceKind, find_model
from kvstore_engine.tokenizer import Tokenizer

_TINY_SPECIAL = ("<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>")
_TINY_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Entries of tokenizer.ggml.token_type.
_CONTROL, _USER_DEFINED = 3, 4
# How a text is cut before BPE: Llama 3's rule, and Qwen's, which takes digits one by one.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load(path_or_name: str | Path) -> Tokenizer:
    """See ``tokenizer.load_tokenizer``."""
    path = Path(path_or_name).expanduser()
    if path.name == "tokenizer.json" and path.is_file():
        return _from_directory(path.parent)
    if (path / "tokenizer.json").is_file():
        return _from_directory(path)
    source = find_model(path_or_name)
    if source.kind is SourceKind.TINY:
        return _tiny()
    if source.kind is SourceKind.GGUF:
        return _from_gguf(source.location)
    check_directory(source.location)  # a directory that is no usable model lacks more than this
    raise ModelLoadError(f"{source.location} has no tokenizer.json")


def _tiny() -> Tokenizer:
    """One token a byte, and four special ones."""
    vocab = {character: byte for byte, character in CHARACTER_OF_BYTE.items()}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in _TINY_SPECIAL])
    return Tokenizer(
        backend,
        eos_token_ids=(257, 259),
        bos_token_id=256,
        chat_template=ChatTemplate(_TINY_TEMPLATE, {}),
    )


def _from_directory(path: Path) -> Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:
        raise ModelLoadError(f"{path / 'tokenizer.json'} is broken: {error}") from error
    # Left over from training: the length of a prompt is the engine's affair.
    backend.no_truncation()
    backend.no_padding()
    settings = read_json_if_there(path / "tokenizer_config.json")
    names = {key: token_name(settings.get(key)) for key in ("bos_token", "eos_token")}
    ends = end_tokens(path, read_json_if_there(path / "config.json"))
    template = _template_source(path, settings)
    return Tokenizer(
        backend,
        eos_token_ids=ends,
        bos_token_id=backend.token_to_id(names["bos_token"]) if names["bos_token"] else None,
        chat_template=ChatTemplate(template, names) if template else None,
    )


def _template_source(path: Path, settings: Mapping[str, Any]) -> str | None:
    """The template's own file, or the setting: one text, or several by name."""
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    value = settings.get("chat_template")
    if isinstance(value, list):
        value = {entry.get("name"): entry.get("template") for entry in value}.get("default")
    return value if isinstance(value, str) else None


def _from_gguf(path: Path) -> Tokenizer:
    fields = GgufFields(open_gguf(path))
    kind = fields.text("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ModelLoadError(
            f"{path}: tokenizers of kind {kind!r} are not supported in GGUF files, only byte-level "
            "BPE (gpt2); give the model's Hugging Face directory instead"
        )
    tokens: list[str] = fields.value("tokenizer.ggml.tokens") or []
    merges: list[str] = fields.value("tokenizer.ggml.merges") or []
    if not tokens:
        raise ModelLoadError(f"{path} has no tokens in its header")
    backend = _byte_level_bpe(tokens, merges, fields.text("tokenizer.ggml.pre", "default"))
    _add_special(backend, tokens, fields.value("tokenizer.ggml.token_type") or [])
    bos, eos = fields.token_id("bos"), fields.token_id("eos")
    if fields.value("tokenizer.ggml.add_bos_token") and bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    names = {
        name: tokens[token]
        for name, token in (("bos_token", bos), ("eos_token", eos))
        if token is not None
    }
    template = fields.value("tokenizer.chat_template")
    ends = (eos, fields.token_id("eot"))
    return Tokenizer(
        backend,
        eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
        bos_token_id=bos,
        chat_template=ChatTemplate(template, names) if template else None,
    )


def _byte_level_bpe(tokens: list[str], merges: list[str], kind: str) -> tokenizers.Tokenizer:
    """``kind`` is the header's name for how a text is cut into words before the merges."""
    whole_words_first = kind == "llama-bpe"
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[(left, right) for left, _, right in (m.partition(" ") for m in merges)],
            ignore_merges=whole_words_first,
        )
    )
    backend.decoder = decoders.ByteLevel()
    backend.pre_tokenizer = _pre_tokenizer(kind)
    if kind == "qwen2":
        backend.normalizer = normalizers.NFC()
    return backend


def _pre_tokenizer(kind: str) -> Any:
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if kind in ("default", "gpt-2", "gpt2"):
        return words
    if kind in ("smollm", "starcoder", "refact", "codeshell"):
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    digits = {"llama-bpe": "{1,3}", "qwen2": ""}.get(kind)
    if digits is None:
        raise ModelLoadError(
            f"GGUF pre-tokenizer {kind!r} is not supported; "
            "give the model's Hugging Face directory instead"
        )
    split = pre_tokenizers.Split(Regex(_SPLIT.format(digits=digits)), behavior="isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, bytes_only])


def _add_special(backend: tokenizers.Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Control tokens are special: not shown. User-defined ones are only never cut."""
    for special, kind in ((True, _CONTROL), (False, _USER_DEFINED)):
        named = [
            AddedToken(token, normalized=False, special=special)
            for token, its_kind in zip(tokens, types, strict=False)
            if its_kind == kind
        ]
        if special:
            backend.add_special_tokens(named)
        else:
            backend.add_tokens(named)
