"""SmolLM2-135M-Instruct from its GGUF file: weights, logits, tokens and tokenizer."""

import pydoc_data.topics
from typing import Any

import pytest
import torch
from kvstore_engine.loader import LoadedModel, load_model
from kvstore_engine.model_source import find_model
from kvstore_engine.tokenizer import Tokenizer, load_tokenizer
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from tests.models.model_harness import (
    Runner,
    Sequence_,
    empty_twin,
    load_twin,
    relative_error,
    twin_logits,
)
from tests.unmeasured import unmeasured

pytestmark = [pytest.mark.weights, pytest.mark.timeout(400)]
NAME = "smollm2-135m-instruct"
QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about rain.",
    "Name three prime numbers.",
    "Who wrote Hamlet?",
    "Explain gravity to a child.",
    "Translate 'good morning' into Spanish.",
    "What is 12 times 12?",
    "List the planets of the solar system in order.",
    "Write a Python function that adds two numbers.",
    "Why is the sky blue?",
    "What do bees make?",
    "Give me a recipe for pancakes.",
    "Tell a joke about computers.",
    "Summarise: the cat sat on the mat and slept.",
    "How many legs has a spider?",
    "What is the boiling point of water?",
    "Finish the sentence: once upon a time,",
    "What is the opposite of hot?",
    "Describe the colour red.",
    "What causes tides?",
]
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(NAME)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(NAME)


@pytest.fixture(scope="module")
def reference(loaded: LoadedModel) -> Any:
    """The model of transformers, with the weights that transformers reads from the file."""
    model = empty_twin(loaded.config)
    path = str(find_model(NAME).location)
    with unmeasured():
        tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    load_twin(model, tensors)
    return model.eval()


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> list[torch.Tensor]:
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in QUESTIONS
    ]
    return [torch.tensor(tokenizer.encode(text, add_special_tokens=False)) for text in texts]


def document(tokenizer: Tokenizer, tokens: int) -> torch.Tensor:
    text = pydoc_data.topics.topics["assignment"]
    return torch.tensor(tokenizer.encode(text)[:tokens])


@pytest.mark.parametrize("cuts", [[], [64, 65, 200, 327]], ids=["whole", "odd"])
def test_I12_logits_agree_with_transformers(
    loaded: LoadedModel, tokenizer: Tokenizer, reference: Any, cuts: list[int]
) -> None:
    tokens = document(tokenizer, 400)
    ours = Runner(loaded.model, page_tokens=64, num_pages=8).sequence().run(tokens, cuts)
    assert relative_error(ours, twin_logits(reference, tokens)) < 1e-3


def greedy(runner: Runner, sequences: list[Sequence_], logits: torch.Tensor) -> torch.Tensor:
    """NEW_TOKENS tokens of each sequence, all in one batch, from the logits of the prompts."""
    tokens = [logits.argmax(-1)]
    while len(tokens) < NEW_TOKENS:
        work = list(zip(sequences, torch.split(tokens[-1], 1), strict=True))
        tokens.append(runner.step(work).argmax(-1))
    return torch.stack(tokens, dim=1)


@pytest.fixture(scope="module")
def answers(loaded: LoadedModel, prompts: list[torch.Tensor]) -> torch.Tensor:
    """Greedy tokens of all prompts in one batch."""
    runner = Runner(loaded.model, page_tokens=64, num_pages=60)
    sequences = [runner.sequence() for _ in prompts]
    ends = torch.tensor([len(prompt) for prompt in prompts]).cumsum(0) - 1
    logits = runner.step(list(zip(sequences, prompts, strict=True)))[ends]
    return greedy(runner, sequences, logits)


def test_I12_greedy_tokens_of_20_prompts_equal_transformers(
    prompts: list[torch.Tensor], answers: torch.Tensor, reference: Any
) -> None:
    """Given the same tokens so far, transformers takes the same next one, at all 20 x 64 places:
    by induction it generates the same.
    """
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = torch.cat([prompt, answer[:-1]])
        with torch.inference_mode():
            logits = reference(tokens[None], logits_to_keep=NEW_TOKENS).logits[0]
        assert logits.argmax(-1).tolist() == answer.tolist()


def test_I12_greedy_tokens_alone_and_in_chunks_equal_those_of_the_batch(
    loaded: LoadedModel, prompts: list[torch.Tensor], answers: torch.Tensor
) -> None:
    for i in (0, 13):
        runner = Runner(loaded.model, page_tokens=64, num_pages=4)
        sequence = runner.sequence()
        logits = sequence.run(prompts[i], [5, 6, 23])[-1:]
        assert greedy(runner, [sequence], logits)[0].tolist() == answers[i].tolist()


def test_the_file_answers_questions(
    loaded: LoadedModel, tokenizer: Tokenizer, answers: torch.Tensor
) -> None:
    assert "Paris" in tokenizer.decode(answers[0].tolist())
    assert tokenizer.eos_token_ids == loaded.config.eos_token_ids == (2,)


def test_tokenizer_equals_the_one_of_transformers(tokenizer: Tokenizer) -> None:
    path = find_model(NAME).location
    with unmeasured():
        reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # Read from GGUF, transformers forgets that this model takes digits out before all else.
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    texts = list(pydoc_data.topics.topics.values())
    texts += ["naïve Ελληνικά Привет 日本語 한국어 😀👩‍👩‍👧\t\r\n\n x<|im_end|>y", "a b 12 3.5\n7"]
    for text in texts:
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False)
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text
    messages = [{"role": "user", "content": "Hi"}]
    wanted = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(messages) == wanted
