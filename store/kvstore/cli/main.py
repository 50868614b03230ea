"""The command kvstore."""

from collections.abc import Sequence

from kvstore.entry import quiet_interrupt


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exits with 0, with 1 if the command failed, with 2 for wrong usage."""
    with quiet_interrupt():
        from kvstore.cli.app import run
    run(argv)


if __name__ == "__main__":
    main()
