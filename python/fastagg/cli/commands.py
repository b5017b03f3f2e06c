"""The commands of the command line; `fastagg.cli` starts them."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fastagg._extras import EXTRAS
from fastagg._native.build import __version__
from fastagg.cli.average import average_command
from fastagg.cli.report import report_command
from fastagg.cli.sentences import failing_with_a_sentence

application = typer.Typer(
    help="The aggregation step of federated and distributed training as a small native library.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    """Ends with the version of fastagg where it was asked for."""
    if asked:
        print(f"fastagg {__version__}")
        raise typer.Exit


@application.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """What stands before a command."""


application.command("average")(average_command)
application.command("report")(report_command)


def _require(extra: str) -> None:
    """Ends with one sentence where a command's packages are not installed."""
    missing = EXTRAS[extra].missing
    if missing:
        sys.exit(f"{EXTRAS[extra].adds} needs {', '.join(missing)}: {EXTRAS[extra].command}")


@application.command()
def info() -> None:
    """Show versions, the processor's instruction sets, CUDA, and what could be added."""
    from fastagg.cli.info import tables

    console = Console()
    for table in tables():
        console.print(table)


@application.command()
def demo(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of training and averaging.")] = 30,
    clients: Annotated[int, typer.Option(min=1, max=300, help="Clients; half of them are drawn each round.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", dir_okay=False, help="The figure, a PNG.")] = Path(
        "fastagg-demo.png"
    ),
) -> None:
    """Train handwritten digits on unlike clients, with uploads in fp32, fp16 and int8."""
    _require("demo")
    from fastagg.cli.demo import Settings
    from fastagg.cli.demo_report import present

    with failing_with_a_sentence("demo"):
        present(Settings(rounds=rounds, clients=clients, seed=seed), output, Console())


@application.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Smaller sizes and fewer repeats.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", file_okay=False, help="Folder for the results.")] = Path(
        "fastagg-bench"
    ),
) -> None:
    """Time fastagg against what people use instead, on this machine."""
    _require("bench")
    import pytest

    folder = _bench_folder()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: pytest takes SystemExit for a failed test
    # One word: as two, pytest would take the folder for one of tests.
    options = [f"--results={output}", *(["--quick"] if quick else [])]
    # Nothing is written beside the installed benchmarks, which may be read-only.
    status = int(pytest.main([str(folder), "-p", "no:cacheprovider", "--benchmark-only", *options]))
    if status == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt  # which pytest keeps to itself
    for name in ("all_reduce", "average_files", *_federated_benchmarks()):
        returned = _status_of([sys.executable, str(folder / f"{name}.py"), *options])
        status = status or returned
    sys.exit(status)


def _status_of(command: list[str]) -> int:
    """A child's exit status. Ctrl-C ends both: where it did not come from a terminal, it is passed on to the child."""
    with subprocess.Popen(command) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            for number, patience in ((signal.SIGINT, 0.5), (signal.SIGKILL, 5)):
                try:
                    process.wait(patience)
                    break
                except subprocess.TimeoutExpired:
                    process.send_signal(number)
            raise


def _federated_benchmarks() -> list[str]:
    """The benchmarks of robust rules and of federated rounds, where what they compare with is installed."""
    missing = [extra for extra in ("flower", "nvflare") if EXTRAS[extra].missing]
    for extra in missing:
        print(f"no federated rounds: {EXTRAS[extra].adds} needs {', '.join(EXTRAS[extra].missing)}")
    return [] if "flower" in missing else ["robust"] if missing else ["robust", "federated"]


def _bench_folder() -> Path:
    """The benchmarks as installed, or those of the source checkout."""
    package = Path(__file__).parents[1]
    for folder in (package / "bench", package.parents[1] / "bench"):
        if (folder / "conftest.py").is_file():
            return folder
    sys.exit("The benchmarks are not in this installation: run fastagg bench from a wheel or a source checkout")
