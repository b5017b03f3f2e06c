"""The console script `fastagg`: it starts without the packages that its commands need, to say which are missing."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line of `fastagg`."""
    try:
        from fastagg.cli.commands import application
    except KeyboardInterrupt:  # later on, typer ends in this way
        sys.exit(130)
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "typer"):
            raise
        sys.exit("The command line of fastagg needs typer and rich: pip install 'fastagg[cli]'")
    from fastagg.cli.sentences import end_in_order

    end_in_order()
    application()
