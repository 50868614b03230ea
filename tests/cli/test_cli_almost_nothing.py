"""A value that means almost nothing is refused: it must not come to mean everything."""

import pytest
from kvstore.cli.main import main
from kvstore.config import parse_size
from kvstore.errors import ConfigError

from tests.cli.test_cli_refusals import refused

EVICT = ("evict", "--tier", "dram", "--drop", "--master", "127.0.0.1:1")
PURGE = ("purge", "--all", "--yes", "--master", "127.0.0.1:1")
EMPTY = "is empty; leave {} out, or give it a value"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((*EVICT, "--bytes", "0.5"), "size '0.5' is less than one byte; write 0 or at least 1"),
        ((*EVICT, "--bytes", "0.0004KB"), "size '0.0004KB' is less than one byte"),
        ((*EVICT, "--bytes", ""), "size '' is not understood"),
        ((*EVICT, "--keys", ""), EMPTY.format("--keys")),
        ((*EVICT, "--keys", ","), "',' has no key; `blocks --json` has them"),
        ((*EVICT, "--keys", " , "), "' , ' has no key"),
        ((*EVICT, "--node", ""), EMPTY.format("--node")),
        ((*EVICT, "--node", " "), EMPTY.format("--node")),
        ((*PURGE, "--namespace", ""), EMPTY.format("--namespace")),
        (("purge", "--yes", "--namespace", ""), EMPTY.format("--namespace")),
        (("locate", "--tokens", "1", "--namespace", ""), EMPTY.format("--namespace")),
        (("blocks", "--node", ""), EMPTY.format("--node")),
        (("blocks", "--after", ","), "',' has no key"),
        (("nodes", "--forget", ""), EMPTY.format("--forget")),
        (("status", "--master", ""), EMPTY.format("--master")),
        (("status", "--master", "foo"), "'foo'; write it like 127.0.0.1:9400"),
        (("status", "--master", "unix:"), "'unix:' is an empty path; name one"),
        (("status", "--master", "127.0.0.1:99999"), "'127.0.0.1:99999'; write it like"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_almost_nothing_is_not_everything(
    arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused(capsys, 2, *arguments)


@pytest.mark.parametrize("text", ["0", "0.0", "0KiB"])
def test_a_size_of_nothing_may_be_asked_for(text: str) -> None:
    assert parse_size(text) == 0


def test_a_size_that_rounds_to_nothing_is_refused_everywhere() -> None:
    for text in ("0.5", "0.0001KiB", f"0.{'0' * 400}1TiB"):
        with pytest.raises(ConfigError, match="less than one byte"):
            parse_size(text)


def test_what_is_left_out_is_everything(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (EVICT, PURGE):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 1
        assert "no master answers" in capsys.readouterr().err
