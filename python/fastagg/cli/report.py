"""The command `fastagg report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastagg.cli.sentences import failing_with_a_sentence, sentence
from fastagg.report import Run, write_report


def report_command(
    run: Annotated[Path, typer.Argument(dir_okay=False)],
    output: Annotated[Path, typer.Option("--output", "-o", dir_okay=False, help="The page, an HTML file.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output.")] = False,
) -> None:
    """Show a recorded run as one HTML page: outliers and why, norms, cosines, layers, weights.

    RUN is a file that `fastagg.report.Run.save` wrote.
    """
    with failing_with_a_sentence("report"):
        write_report(Run.load(run), output, force=force)
    print(sentence(f"wrote {output}"))
