"""The command `fastagg average`."""

from __future__ import annotations

import contextlib
import resource
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from fastagg._errors import DroppedUpdateWarning, NotKeptWarning
from fastagg._native.codes import WIRES, float_code
from fastagg._quoting import quoted
from fastagg._updates.policies import INTEGER_POLICIES, NAN_POLICIES
from fastagg.cli.sentences import failing_with_a_sentence, sentence
from fastagg.files import Averaged, average


def _one_of(names: Any) -> Callable[[str | None], str | None]:
    """A check that an option is one of some names."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in names:
            raise typer.BadParameter(f"expected one of {', '.join(names)}, got {value!r}")
        return value

    return check


def _listed(names: Iterable[str]) -> str:
    """Choices as the help names them: "max, first or round"."""
    *others, last = names
    return f"{', '.join(others)} or {last}"


def _floating(value: str | None) -> str | None:
    """Checks that an option is a floating dtype."""
    try:
        if value is not None:
            float_code(value)
    except TypeError as error:
        raise typer.BadParameter(str(error)) from None
    return value


def average_command(
    files: Annotated[list[Path], typer.Argument()],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="A .safetensors, .npz, .pt or .pth file; a directory if the first input is sharded."
        ),
    ],
    weight: Annotated[
        list[float] | None,
        typer.Option("--weight", "-w", help="One for each file, in their order; without, all count the same."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output.")] = False,
    nan_policy: Annotated[
        str,
        typer.Option(
            callback=_one_of(NAN_POLICIES), help=f"For a file with a NaN or an infinity: {_listed(NAN_POLICIES)}."
        ),
    ] = "raise",
    integer_policy: Annotated[
        str | None,
        typer.Option(
            callback=_one_of(INTEGER_POLICIES),
            help=f"For integer and bool leaves: {_listed(INTEGER_POLICIES)}; without, max, but for other quantisers' "
            "codes, which are refused.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            callback=_floating, help="Of floating leaves: fp64, fp32, fp16 or bf16; without, the first file's."
        ),
    ] = None,
    wire: Annotated[
        str | None,
        typer.Option(
            callback=_one_of(WIRES), help=f"Quantise floating leaves (.safetensors only) to {_listed(WIRES)}."
        ),
    ] = None,
    allow_negative: Annotated[bool, typer.Option("--allow-negative", help="Permit negative weights.")] = False,
    normalize: Annotated[bool, typer.Option(help="Divide by the sum of the weights.")] = True,
) -> None:
    """Average checkpoint files of any size into a new one.

    FILES are .safetensors, .npz, .pt or .pth files, or directories with an index of shards, also mixed.
    """
    _permit_many_files()
    if weight and len(weight) != len(files):
        raise typer.BadParameter(f"expected {len(files)}, one for each file, got {len(weight)}", param_hint="--weight")
    with failing_with_a_sentence("average"), warnings.catch_warnings(), _progress_bar() as bar:
        for said_below in (DroppedUpdateWarning, NotKeptWarning):
            warnings.simplefilter("ignore", said_below)
        task = bar.add_task("averaging", total=None)
        done = average(
            files,
            output,
            weight or None,
            wire=wire,
            nan_policy=nan_policy,
            integer_policy=integer_policy,
            dtype=dtype,
            normalize=normalize,
            allow_negative=allow_negative,
            force=force,
            progress=lambda read, total: bar.update(task, completed=read, total=total),
        )
    _report(done, sum(map(bool, weight)) if weight else len(files))


def _permit_many_files() -> None:
    """Lets this process open as many files as the system permits: all inputs stay open, and the usual limit is 1024."""
    with contextlib.suppress(OSError, ValueError):  # a system that has no such number keeps its limit
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _progress_bar() -> Progress:
    """Bytes and their rate on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _report(done: Averaged, contributing: int) -> None:
    for path, leaf in done.dropped.items():
        print(sentence(f"dropped {path}: leaf {quoted(leaf)} holds a NaN or an infinity"), file=sys.stderr)
    for lost in done.not_kept:
        print(sentence(lost), file=sys.stderr)
    rate = int(done.bytes_read / max(done.seconds, 1e-9))
    print(
        sentence(
            f"wrote {done.output}: {done.leaves} leaves of {contributing - len(done.dropped)} files, "
            f"{decimal(done.bytes_read)} read in {done.seconds:.2f} s, {decimal(rate)}/s"
        )
    )
