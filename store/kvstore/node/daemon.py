"""The command kvstore-node."""

from collections.abc import Sequence

from kvstore.entry import quiet_interrupt, start_small, wake_few_threads


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    wake_few_threads()
    start_small()
    with quiet_interrupt():
        from kvstore.node.serving import run

        run(argv)


if __name__ == "__main__":
    main()
