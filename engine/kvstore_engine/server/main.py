"""The command kvstore-engine."""

from collections.abc import Sequence

from kvstore.entry import quiet_interrupt


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: exit code 2 for a usage error, 1 for another failure, 0 when told to stop."""
    with quiet_interrupt():
        from kvstore_engine.server.serving import run

        run(argv)


if __name__ == "__main__":
    main()
