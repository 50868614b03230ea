import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import __main__ as command
from benchmarks import harness, local
from benchmarks.errors import BenchmarkError
from benchmarks.harness import Ratio, Row

ROOT = Path(__file__).parents[2]


async def test_rounds_are_interleaved_and_the_first_place_changes() -> None:
    order: list[tuple[str, int]] = []

    async def ours(number: int) -> float:
        order.append(("ours", number))
        return 1.0 + number

    async def other(number: int) -> float:
        order.append(("other", number))
        return 2.0 + number

    rounds = await harness.interleave(ours, other, rounds=2, warmup=1)
    assert [who for who, _ in order] == ["ours", "other", "other", "ours", "ours", "other"]
    assert rounds.ours == [2.0, 3.0]
    assert rounds.ratio == Ratio(4 / 3, (3 / 2 + 4 / 3) / 2, 3 / 2, 2)
    assert rounds.rate_row("get", 10**9, "memcpy").against == "memcpy: 0.3 GB/s"
    assert rounds.time_row("match", "a dict").value == 2500.0


def test_the_file_has_what_readers_ask_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [Row("get_1MiB", 10.0, "GB/s", "memcpy", Ratio(0.8, 0.9, 1.0, 30)), Row("x", 1.0, "s")]
    harness.show(rows)
    assert "get_1MiB" in capsys.readouterr().out
    harness.write(tmp_path / "new" / "rows.json", "local", rows)
    report = json.loads((tmp_path / "new" / "rows.json").read_text())
    assert set(report) == {"benchmark", "date", "machine", "versions", "rows"}
    assert report["benchmark"] == "local"
    assert report["machine"]["cores"] >= 1
    assert {"python", "numpy"} <= set(report["versions"])
    assert report["rows"][0] == {
        "metric": "get_1MiB",
        "value": 10.0,
        "unit": "GB/s",
        "against": "memcpy",
        "ratio": {"min": 0.8, "median": 0.9, "max": 1.0, "n": 30},
    }


def test_grpc_is_not_imported_before_it_is_told_what_to_do_without() -> None:
    code = "import sys, benchmarks.__main__; sys.exit('grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


def test_a_benchmark_that_cannot_go_on_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(rounds: int) -> list[Row]:
        raise BenchmarkError(f"no luck in {rounds} rounds")

    monkeypatch.setattr(sys, "argv", ["benchmarks", "local", "--json", str(tmp_path / "x")])
    monkeypatch.setattr(local, "run", fails)
    with pytest.raises(SystemExit, match="no luck in 20 rounds"):
        command.main()
    monkeypatch.setattr(local, "run", lambda rounds: [Row("x", float(rounds), "s")])
    command.main()
    assert json.loads((tmp_path / "x").read_text())["rows"][0]["value"] == 20.0


def test_the_local_benchmark_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "BATCH_BYTES", 4 << 20)
    monkeypatch.setattr(local, "POOL_BATCHES", 12)
    monkeypatch.setattr(local, "ROUND_BATCHES", 5)
    monkeypatch.setattr(local, "LOOKUPS", 3)
    monkeypatch.setattr(local, "INDEXED_BLOCKS", 20_000)
    rows = {row.metric: row for row in local.run(2)}
    wanted = {f"{op}_{size}" for op in ("get", "put") for size in ("1MiB", "64KiB")}
    assert wanted | {"match_512", "acquire_512", "master_bytes_per_block"} <= set(rows)
    assert all(row.ratio is not None and row.value > 0 for row in rows.values())


def test_memory_of_the_index_is_bounded() -> None:
    # In a process of its own: memory that other tests gave back would be used again, unseen.
    argv = [sys.executable, "-m", "benchmarks.master_memory", "50000"]
    done = subprocess.run(argv, check=True, capture_output=True, text=True, cwd=ROOT)
    assert 32 < float(done.stdout) < 400


@pytest.mark.parametrize("rounds", ["0", "-1", "x"])
def test_a_number_of_rounds_that_is_none_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rounds: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "local", "--rounds", rounds])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert "take 1 or more" in capsys.readouterr().err


def test_help_names_the_rounds_of_every_benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--help"])
    with pytest.raises(SystemExit):
        command.main()
    out = " ".join(capsys.readouterr().out.split())
    rounds = out.partition("the benchmark's own: ")[2]
    assert all(f"{name} " in rounds for name in command.BENCHMARKS)
