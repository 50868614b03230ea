"""Serves a real model with its KV cache in the store, and shows what each kind of hit saves.

python -m tools.demo [--model NAME_OR_PATH] [--tokens 4000] [--json build/demo.json]
"""

import argparse
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from kvstore.errors import KVStoreError
from kvstore_engine.tokenizer import load_tokenizer
from rich.console import Console

from tools.cluster import Cluster, ClusterError
from tools.demo.measure import Answer, ask
from tools.demo.prompt import OTHER_QUESTION, QUESTIONS, conversation, document, shared_tokens
from tools.demo.results import BLOCK_TOKENS, Case, shortfall, write
from tools.demo.show import Screen

BUILD = Path("build")


class Demo:
    """The cases in their order; every one asks the same questions, each under its own salt."""

    def __init__(self, cluster: Cluster, screen: Screen, text: str) -> None:
        self.cluster = cluster
        self.screen = screen
        self.text = text
        self.cases: list[Case] = []
        self._expected: list[tuple[int, ...]] = []
        self.tokens_equal = True

    def run(self) -> None:
        """All cases."""
        self.screen.doing("starting master, node and engine, loading the model")
        self.cluster.start_store()
        self.cluster.start_engine()
        self._case("cold")
        self._case("hbm")
        self.screen.doing("starting a fresh engine process")
        self.cluster.restart_engine()
        self._case("dram")
        self.screen.doing("emptying the DRAM tier, starting a fresh engine process")
        self.cluster.empty_dram()
        self.cluster.restart_engine()
        self._case("ssd")
        self.screen.doing("kill -9 of engine, master and node, then starting them again")
        self.cluster.wait_persisted()
        self.cluster.kill_everything()
        self.cluster.start_store()
        self.cluster.start_engine()
        self._case("restart")
        self._shared()

    def _ask(self, question: str, salt: str) -> Answer:
        return ask(self.cluster.url, self.cluster.model, conversation(self.text, question), salt)

    def _case(self, name: str) -> None:
        answers = []
        for i, question in enumerate(QUESTIONS):
            self.screen.doing(f"{name}: question {i + 1} of {len(QUESTIONS)}")
            answers.append(self._ask(question, salt=f"conversation {i}"))
        tokens = [answer.tokens for answer in answers]
        self._expected = self._expected or tokens
        self.tokens_equal &= tokens == self._expected
        self._add(Case.of(name, answers))

    def _shared(self) -> None:
        answers = []
        for i in range(len(QUESTIONS)):
            self.screen.doing(f"shared: conversation {i + 1} of {len(QUESTIONS)}")
            answers.append(self._ask(OTHER_QUESTION, salt=f"conversation {i}"))
        self.screen.doing("shared: the same question without any cache, to compare the tokens")
        reference = self._ask(OTHER_QUESTION, salt="reference")
        self.tokens_equal &= all(answer.tokens == reference.tokens for answer in answers)
        self._add(Case.of("shared", answers))

    def _add(self, case: Case) -> None:
        self.cases.append(case)
        self.screen.add(case)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; exits with 2 where it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=4000, help="tokens of the document")
    parser.add_argument("--json", type=Path, default=BUILD / "demo.json")
    options = parser.parse_args(argv)
    if options.tokens < BLOCK_TOKENS:
        parser.error(
            f"--tokens is {options.tokens}; take at least {BLOCK_TOKENS}: only whole blocks of "
            f"{BLOCK_TOKENS} tokens are cached"
        )
    return options


def interrupt(_signal: int, _frame: FrameType | None) -> None:
    """SIGTERM and SIGHUP end the demo as Ctrl-C does."""
    raise KeyboardInterrupt


def main() -> int:
    """Entry point; 0 if all cases gave the same tokens, and all but cold had them cached."""
    options = parse()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    console = Console()
    logs = BUILD / "demo-logs"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    data = Path(tempfile.mkdtemp(prefix="kvstore-demo-"))
    cluster = Cluster(data, logs, options.model)
    try:
        tokenizer = load_tokenizer(options.model)
        text = document(tokenizer, options.tokens)
        with Screen(console) as screen:
            demo = Demo(cluster, screen, text)
            demo.run()
        shared = shared_tokens(tokenizer, text)
        if short := shortfall(demo.cases, shared):
            raise RuntimeError(f"{short}; logs: {logs}/")
        write(options.json, options.model, shared, demo.cases, demo.tokens_equal)
    except KeyboardInterrupt:
        console.print("interrupted; stopping what was started", style="yellow")
        return 130
    except (ClusterError, KVStoreError, RuntimeError) as error:
        console.print(f"demo failed: {error}", style="red", markup=False)
        return 1
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        cluster.stop()
        shutil.rmtree(data, ignore_errors=True)
    verdict = "the same in every case" if demo.tokens_equal else "NOT the same in every case"
    console.print(f"Greedy tokens are {verdict}.\nResults: {options.json}, logs: {logs}/")
    return 0 if demo.tokens_equal else 1


if __name__ == "__main__":
    sys.exit(main())
