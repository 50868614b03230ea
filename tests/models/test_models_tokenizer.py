"""Tokenizers against transformers and by hand, chat templates, and streams of text."""

import json
import random
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from kvstore.errors import InvalidArgumentError
from kvstore_engine.byte_alphabet import BYTE_OF_CHARACTER, CHARACTER_OF_BYTE
from kvstore_engine.chat import ChatTemplate
from kvstore_engine.model_files import end_tokens
from kvstore_engine.model_source import ModelLoadError
from kvstore_engine.tokenizer import DetokenizeStream, Tokenizer, load_tokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "",
    "Hello, world!",
    "  leading, trailing  \n\n\tand\r\ninner   space ",
    "naïve café, Ελληνικά, Привет, 日本語テキスト, 한국어, עברית, 😀👩‍👩‍👧‍👦🇫🇷",
    "def f(x: int) -> float:\n    return x ** 2.5  # it's fine, isn't it?\n",
    "1234567 3.14159 0x1F 12,345",
    "I'll we've they're DON'T it's",
    "a\u0301 combined, \u00e1 not; \ufeff bom, zero\u200bwidth, \x00 nul \x7f",
]
LLAMA_CONFIG = '{"architectures": ["LlamaForCausalLM"]}'
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there"}]


def stream_all(tokenizer: Tokenizer, ids: list[int], step: int = 1) -> list[str]:
    stream = DetokenizeStream(tokenizer)
    pieces = [stream.push(ids[i : i + step]) for i in range(0, len(ids), step)]
    return [*pieces, stream.flush()]


def test_byte_alphabet_is_one_to_one_and_printable() -> None:
    assert len(BYTE_OF_CHARACTER) == 256
    assert CHARACTER_OF_BYTE[ord("A")] == "A"
    assert CHARACTER_OF_BYTE[ord(" ")] == "Ġ"
    assert CHARACTER_OF_BYTE[ord("\n")] == "Ċ"
    assert set(BYTE_OF_CHARACTER) == set(pre_tokenizers.ByteLevel.alphabet())


@pytest.mark.parametrize("name", ["tiny-random", "tiny-random-qwen3"])
def test_tiny_tokenizer_takes_bytes(name: str) -> None:
    tokenizer = load_tokenizer(name)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == 260
    assert tokenizer.encode("<|im_end|>") == [259]
    assert tokenizer.eos_token_ids == (257, 259)
    assert tokenizer.token_text(259) == "<|im_end|>"
    assert tokenizer.token_text(65) == "A"
    prompt = tokenizer.apply_chat_template(MESSAGES)
    assert prompt.endswith("there<|im_end|>\n<|im_start|>assistant\n")
    assert not tokenizer.apply_chat_template(MESSAGES, False).endswith("assistant\n")


def test_streams_never_cut_a_character_and_lose_nothing() -> None:
    tokenizer = load_tokenizer("tiny-random")
    for text in TEXTS:
        for step in (1, 2, 7):
            pieces = stream_all(tokenizer, tokenizer.encode(text), step)
            assert "".join(pieces) == text
            assert not any("�" in piece for piece in pieces)


def test_streams_of_bytes_that_are_no_text_equal_the_whole() -> None:
    tokenizer = load_tokenizer("tiny-random")
    seed = random.randrange(1 << 32)
    print("seed", seed)
    choice = random.Random(seed)
    for _ in range(200):
        ids = [
            choice.choice([choice.randrange(256), 0xE2, 0x82, 0xAC, 0xF0, 258]) for _ in range(30)
        ]
        assert "".join(stream_all(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_stream_goes_on_behind_bytes_that_are_no_text() -> None:
    stream = DetokenizeStream(load_tokenizer("tiny-random"))
    assert stream.push([0xFF]) == "�"
    assert stream.push([0xE2, 0x82]) == ""
    assert stream.push([0xAC]) == "€"
    assert stream.push([0xE2]) == ""
    assert stream.flush() == "�"


def sentencepiece_like() -> tokenizers.Tokenizer:
    """A vocabulary with a space sign and byte fallback, as Llama 2 has it."""
    pieces = ["<unk>", "▁Hello", "▁world", "!", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return backend


def test_streams_of_other_vocabularies_keep_spaces_and_characters() -> None:
    tokenizer = Tokenizer(sentencepiece_like(), eos_token_ids=[])
    euro = [4 + byte for byte in "€".encode()]
    ids = [1, 2, 3, *euro, *euro, 1, 4 + 0xFF]
    pieces = stream_all(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == "Hello world!€€ Hello�"
    assert pieces[:6] == ["Hello", " world", "!", "", "", "€"]


def build_bpe(pre: Any, merges: list[tuple[str, str]]) -> tuple[list[str], tokenizers.Tokenizer]:
    tokens = sorted(BYTE_OF_CHARACTER)
    tokens += ["".join(merge) for merge in merges]
    tokens += ["<|eot|>", "<think>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre
    backend.decoder = decoders.ByteLevel()
    return tokens, backend


MERGES = [("1", "2"), ("12", "3"), ("Ġ", "Ġ"), ("h", "i"), ("Ġ", "hi"), ("Ċ", "Ċ"), ("'", "s")]


def write_gguf(
    path: Path, pre: str, tokens: list[str], *, bos: bool = False, kind: str = "gpt2"
) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    if pre:
        writer.add_tokenizer_pre(pre)
    if tokens:
        writer.add_token_list(tokens)
        writer.add_token_types([1] * (len(tokens) - 2) + [3, 4])
        writer.add_token_merges([" ".join(merge) for merge in MERGES])
        writer.add_eos_token_id(len(tokens) - 2)
        writer.add_bos_token_id(len(tokens) - 2)
    writer.add_add_bos_token(bos)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


TOKENS, _ = build_bpe(None, MERGES)


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("", " hi 123 12", ["Ġhi", "Ġ", "123", "Ġ", "12"]),
        ("gpt-2", "hi\n\n12", ["hi", "Ċ", "Ċ", "12"]),
        ("smollm", "hi  12", ["hi", "ĠĠ", "1", "2"]),
        ("llama-bpe", "hi  1234's", ["hi", "Ġ", "Ġ", "123", "4", "'s"]),
        ("llama-bpe", "hi\n\nhi", ["hi", "ĊĊ", "hi"]),
        ("qwen2", "hi 123", ["hi", "Ġ", "1", "2", "3"]),
    ],
)
def test_gguf_pre_tokenizers_cut_as_their_models_do(
    tmp_path: Path, pre: str, text: str, pieces: list[str]
) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, pre, TOKENS)
    tokenizer = load_tokenizer(path)
    assert [TOKENS[i] for i in tokenizer.encode(text)] == pieces
    for sample in TEXTS[:-1]:
        assert tokenizer.decode(tokenizer.encode(sample)) == sample


def test_gguf_special_tokens_are_whole_and_only_control_ones_are_hidden(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama-bpe", TOKENS, bos=True)
    tokenizer = load_tokenizer(path)
    control, user = len(TOKENS) - 2, len(TOKENS) - 1
    ids = tokenizer.encode("hi<think><|eot|>")
    assert ids == [control, TOKENS.index("hi"), user, control]
    assert tokenizer.encode("hi", add_special_tokens=False) == [TOKENS.index("hi")]
    assert tokenizer.decode(ids) == "hi<think>"
    assert "".join(stream_all(tokenizer, ids)) == "hi<think>"
    assert tokenizer.eos_token_ids == (control,)
    assert tokenizer.token_bytes(10**6) == b""
    with pytest.raises(InvalidArgumentError, match="no chat template"):
        tokenizer.apply_chat_template(MESSAGES)


@pytest.mark.parametrize(
    ("pre", "tokens", "kind", "message"),
    [
        ("deepseek", TOKENS, "gpt2", "pre-tokenizer 'deepseek' is not supported"),
        ("default", TOKENS, "llama", "kind 'llama' are not supported"),
        ("default", [], "gpt2", "has no tokens"),
    ],
)
def test_gguf_tokenizers_that_are_not_understood_are_refused(
    tmp_path: Path, pre: str, tokens: list[str], kind: str, message: str
) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, pre, tokens, kind=kind)
    with pytest.raises(ModelLoadError, match=message):
        load_tokenizer(path)


TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


def write_directory(path: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False)
    _, backend = build_bpe(pre, MERGES)
    backend.add_special_tokens(["<|eot|>"])
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return backend


def test_directory_tokenizer_equals_the_one_of_transformers(tmp_path: Path) -> None:
    backend = write_directory(
        tmp_path,
        {
            "bos_token": {"content": "<|eot|>"},
            "eos_token": "<|eot|>",
            "chat_template": [
                {"name": "tool", "template": "x"},
                {"name": "default", "template": TEMPLATE},
            ],
        },
    )
    reference = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|eot|>", chat_template=TEMPLATE
    )
    tokenizer = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert tokenizer.encode(text) == reference.encode(text)
    wanted = reference.apply_chat_template(MESSAGES, tokenize=False)
    assert tokenizer.apply_chat_template(MESSAGES) == wanted
    end = len(TOKENS) - 2
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (end, (end,))
    assert load_tokenizer(tmp_path / "tokenizer.json").vocab_size == tokenizer.vocab_size


def test_directory_tokenizer_takes_end_tokens_and_templates_of_every_file(tmp_path: Path) -> None:
    write_directory(tmp_path, {"eos_token": "<|eot|>"})
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.eos_token_ids == (7, 9, len(TOKENS) - 2)
    assert tokenizer.apply_chat_template(MESSAGES) == "hi!"


def test_broken_or_missing_tokenizers_are_refused_clearly(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no model at"):
        load_tokenizer(tmp_path / "nothing")
    (tmp_path / "config.json").write_text(LLAMA_CONFIG)
    with pytest.raises(ModelLoadError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelLoadError, match="is broken"):
        load_tokenizer(tmp_path)


def test_chat_templates_run_in_a_sandbox_and_fail_clearly() -> None:
    assert (
        ChatTemplate("{{ strftime_now('%%') }}{{ 'ü' | tojson }}", {}).render([], False) == '%"ü"'
    )
    for source, message in (
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}{{ messages.append(1) }}", "refuses the messages"),
        ("{{ messages[0].content + 1 }}", "refuses the messages"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            ChatTemplate(source, {}).render(MESSAGES, True)
    with pytest.raises(InvalidArgumentError, match="is broken"):
        ChatTemplate("{% if %}", {})


def save_tiny(path: Path, config_end: int, tokenizer_config: dict[str, Any]) -> None:
    """A directory with the byte tokenizer, as training scripts leave it."""
    backend = load_tokenizer("tiny-random")._backend
    backend.enable_truncation(16)
    backend.enable_padding(length=16)
    backend.save(str(path / "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    (path / "config.json").write_text(json.dumps({"eos_token_id": config_end}))
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))


def test_truncation_and_padding_of_the_training_are_not_applied(tmp_path: Path) -> None:
    save_tiny(tmp_path, 257, {})
    tokenizer = load_tokenizer(str(tmp_path))
    assert len(tokenizer.encode("x" * 100)) == 100
    assert tokenizer.encode("abc") == [97, 98, 99]


@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token": "<|im_end|>"},
        {"eos_token": {"content": "<|im_end|>"}},
        {"eos_token": "<|im_end|>", "added_tokens_decoder": {"259": {"content": "<|im_end|>"}}},
    ],
)
def test_the_end_token_of_the_tokenizer_ends_a_text(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    save_tiny(tmp_path, 257, settings)
    assert end_tokens(tmp_path, {"eos_token_id": 257}) == (257, 259)
    assert load_tokenizer(str(tmp_path)).eos_token_ids == (257, 259)


def test_an_end_token_that_is_nowhere_is_none(tmp_path: Path) -> None:
    save_tiny(tmp_path, 257, {"eos_token": "<|never|>"})
    assert end_tokens(tmp_path, {"eos_token_id": 257}) == (257,)
    save_tiny(tmp_path, 257, {"eos_token": "a"})
    assert end_tokens(tmp_path, {"eos_token_id": 257}) == (257, 97), "of the vocabulary"
