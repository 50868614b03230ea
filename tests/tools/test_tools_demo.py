"""The demo fails where the cache did not do what it shows."""

from pathlib import Path
from typing import Any

import pytest

from tools.demo import __main__ as demo
from tools.demo.measure import Answer
from tools.demo.results import Case, shortfall

PROMPT, SHARED = 1000, 980


def case(name: str, cached: int, prompt: int = PROMPT) -> Case:
    return Case.of(name, [Answer(0.1, (1, 2), prompt, cached, {"dram": cached})])


def cases(**cached: int) -> list[Case]:
    """All cases, with everything cached that whole blocks can hold, but for ``cached``."""
    names = {"cold": 0, "hbm": 960, "dram": 960, "ssd": 960, "restart": 960, "shared": 960}
    return [case(name, n) for name, n in (names | cached).items()]


@pytest.mark.parametrize("tokens", ["0", "-5", "63"])
def test_documents_below_one_block_are_refused(
    tokens: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        demo.parse(["--tokens", tokens])
    assert caught.value.code == 2
    assert f"--tokens is {tokens}; take at least 64" in capsys.readouterr().err
    assert demo.parse(["--tokens", "64"]).tokens == 64


def test_a_warm_case_needs_95_percent_of_its_whole_blocks() -> None:
    assert shortfall(cases(), SHARED) == ""
    assert shortfall(cases(ssd=912), SHARED) == ""
    assert shortfall(cases(ssd=911), SHARED) == "ssd had 911 of 960 tokens cached"
    assert shortfall(cases(shared=0, hbm=0), SHARED) == (
        "hbm had 0 of 960 tokens cached; shared had 0 of 960 tokens cached"
    )
    assert shortfall([case("hbm", 0, prompt=64)], 0) == "hbm had 0 of 0 tokens cached"


class FakeDemo:
    """Has run already."""

    tokens_equal = True

    def __init__(self, *_: object) -> None:
        self.cases = cases(dram=0)

    def run(self) -> None:
        """Nothing is left to do."""


class FakeCluster:
    """Starts nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def stop(self) -> None:
        """Nothing was started."""


def test_a_run_without_hits_fails_and_leaves_the_last_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "demo.json"
    results.write_text("of an earlier run")
    changes: dict[str, Any] = {"Demo": FakeDemo, "Cluster": FakeCluster, "BUILD": tmp_path}
    for name, value in changes.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    arguments = ["demo", "--model", "tiny-random", "--tokens", "900", "--json", str(results)]
    monkeypatch.setattr("sys.argv", arguments)
    assert demo.main() == 1
    out = capsys.readouterr().out
    assert "dram had 0 of" in out
    assert "the same in every case" not in out
    assert results.read_text() == "of an earlier run"
