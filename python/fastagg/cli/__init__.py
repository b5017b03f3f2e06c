"""The command line."""

from fastagg.cli.entry import main

__all__ = ["main"]
