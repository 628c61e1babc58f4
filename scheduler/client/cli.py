"""Where the `darkroom` command begins."""

from __future__ import annotations

import gc
import os


def main() -> None:
    """Run the command line."""
    # gRPC notes on stderr, past everybody, that a connection was closed. It reads this while it is imported,
    # and no program but this one has a right to decide it.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from scheduler.client.commands import app

    # What was imported stays. To look through it again and again, and once more at the end, takes a fifth of
    # the time of a short command.
    gc.freeze()
    app()


if __name__ == "__main__":
    main()
