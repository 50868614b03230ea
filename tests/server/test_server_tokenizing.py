"""Tokenising beside the event loop: the same ids, and no stream stands still meanwhile."""

import sys
import threading
import time

import pytest
from kvstore_engine.tokenizer import Tokenizer, load_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

TEXTS = ["", " a  b\n\n c", "naïve 你好 🙂", "<s>hi<s> hi", "hi" * 5000]
ROUNDS_MAX = 500
NO_SWITCH_S = 1000.0


def backend() -> Backend:
    """Bytes with one merge, and a special token that is put in front."""
    vocab = {
        character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    made = Backend(models.BPE(vocab=vocab | {"hi": len(vocab)}, merges=[("h", "i")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>"])
    start = made.token_to_id("<s>")
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", start)]
    )
    return made


@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_ids_are_those_of_the_single_encode(add_special_tokens: bool) -> None:
    reference = backend()
    tokenizer = Tokenizer(reference, eos_token_ids=[])
    for text in TEXTS:
        wanted = reference.encode(text, add_special_tokens=add_special_tokens).ids
        assert tokenizer.encode(text, add_special_tokens=add_special_tokens) == wanted


def test_other_threads_run_while_a_text_is_tokenised() -> None:
    """Threads switch only where one lets go of the interpreter, so only ``encode`` can do it."""
    tokenizer = load_tokenizer("tiny-random")
    inside = seen = False

    def work() -> None:
        nonlocal inside
        for _ in range(ROUNDS_MAX):
            inside = True
            tokenizer.encode(TEXTS[-1])
            inside = False
            if seen:
                return

    worker = threading.Thread(target=work)
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(NO_SWITCH_S)
    try:
        worker.start()
        while worker.is_alive() and not seen:
            time.sleep(0)  # lets go of the interpreter
            seen = inside
    finally:
        sys.setswitchinterval(interval_s)
        worker.join()
    assert seen
