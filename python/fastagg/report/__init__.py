"""What happened in a run: a record of its rounds and models, and a page that shows it to a person."""

from __future__ import annotations

import os
from pathlib import Path

from fastagg._public import name_publicly
from fastagg.plots.models import Histogram, LayerComparison, compare_models, weight_histograms
from fastagg.report.run import Comparison, Round, Run

__all__ = [
    "Comparison",
    "Histogram",
    "LayerComparison",
    "Round",
    "Run",
    "compare_models",
    "weight_histograms",
    "write_report",
]

name_publicly(globals())


def write_report(run: Run, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Writes a run as one HTML page, in one step; it needs no network and no other file.

    Args:
        run: the record.
        path: of the page.
        force: overwrite what is there.

    Raises:
        FileExistsError: something is at `path`, and not `force`.
        OSError: it cannot be written.
        ValueError: the run is empty.
        ModuleNotFoundError: matplotlib or jinja2 is missing.
    """
    from fastagg.files.atomic import atomic_file, check_place
    from fastagg.report.html import render

    check_place(Path(path), force)
    page = render(run)
    with atomic_file(Path(path), force) as descriptor, os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(page.encode("utf-8", "replace"))  # a label may hold half a character
