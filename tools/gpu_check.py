"""Builds fastagg for this machine's GPU, tests it there and times it: `make gpu-check`.

Nothing is installed outside build/gpu and nothing is fetched: the Python that runs this has torch and the packages of
the tests already. Every step runs, whatever became of those before it; the exit status tells whether one failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
SITE, LOG = BUILD / "site", BUILD / "check.log"
PACKAGES = (
    *("torch", "numpy", "ml_dtypes", "scikit_build_core", "pybind11", "pytest", "hypothesis", "rich", "typer"),
    "matplotlib",
)
# Tests of several processes, on the transports of devices; on one device they take turns.
RANK_FILES = ("tests/test_all_reduce.py", "tests/test_ddp.py", "tests/test_hook_state.py", "tests/test_cuda_device.py")
RANK_TESTS = "(peer and memory) or collectives or nccl or captured_and"
# NCCL wants a device for each of these ranks. With fewer, the tests of collectives would run on the CPU, as they do
# wherever there is no GPU.
RANKS_OF_COLLECTIVES = 4
SANITIZED_FILES = ("tests/test_weighted_sum.py", "tests/test_cast.py", "tests/test_reduce.py")
# A few short tests that start every kernel that one process starts.
SANITIZED_TESTS = ("mixed_codes_on_one_leaf", "hundreds_of_leaves", "every_source", "feedback_adds", "stretches_say")
# How compute-sanitizer says that a machine does not let it near the device.
REFUSALS = ("Device not supported", "Failed to initialize")
_LAST_WORDS = 10  # seconds between asking a step to end and ending it
_LINES_OF_A_FAILURE = 30


@dataclass(frozen=True)
class Step:
    """A command with a time limit; `missing` says why it cannot run here, `refusals` what it prints in that case."""

    name: str
    command: Sequence[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    missing: str = ""
    refusals: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a step: "passed", "failed" or "not available"."""

    name: str
    verdict: str
    seconds: float
    remark: str


def found_devices() -> tuple[str, int]:
    """The architecture of the first device, as CMake writes it, and how many there are.

    Raises:
        SystemExit: something is missing, in one sentence.
    """
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        sys.exit(f"make gpu-check needs {', '.join(absent)} in {sys.executable}: it installs no packages itself")
    import torch

    if not torch.cuda.is_available():
        sys.exit("make gpu-check needs a CUDA GPU, and torch finds none")
    if shutil.which("nvcc") is None:
        sys.exit("make gpu-check needs nvcc on the PATH to build the kernels")
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}", torch.cuda.device_count()


def steps(device_architecture: str, devices: int, results: Path) -> list[Step]:
    """All steps, in their order; their limits are made for 16 processors and come to nine minutes.

    What a step leaves of its time is the next one's.
    """
    # Without torch's cache every tensor has bounds of its own, which memcheck can see.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Step("build", build_command(device_architecture), 95),
        Step("tests", pytest(*workers(8), "-k", f"not ({RANK_TESTS})"), 130),
        sanitized("memcheck", uncached),
        sanitized("racecheck", {}),
        ranks(devices),
        Step("benchmark", [sys.executable, "bench/gpu.py", f"--results={results}", "--seconds=110"], 140),
    ]


def build_command(device_architecture: str) -> list[str]:
    """Installs fastagg with the kernels for one architecture into a folder of its own."""
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-index", "--no-deps"]
    settings = {
        "build-dir": str(BUILD / "cmake"),
        "cmake.define.FASTAGG_CUDA": "ON",
        "cmake.define.CMAKE_CUDA_ARCHITECTURES": f"{device_architecture}-real",
    }
    options = [f"--config-settings={name}={value}" for name, value in settings.items()]
    return [*pip, "--no-build-isolation", "--upgrade", "--target", str(SITE), *options, "."]


def pytest(*arguments: str) -> list[str]:
    """Tests on the device."""
    return [sys.executable, "-m", "pytest", "--backend=cuda", "-q", "--durations=10", *arguments]


def workers(most: int) -> list[str]:
    """Options of pytest-xdist where it is installed; tests start processes of their own, so half the processors."""
    count = min(most, (os.cpu_count() or 1) // 2)
    return ["-p", "xdist", f"-n{count}"] if count > 1 and importlib.util.find_spec("xdist") else []


def sanitized(tool: str, environment: dict[str, str]) -> Step:
    """A few tests under a tool of compute-sanitizer."""
    program = shutil.which("compute-sanitizer")
    # Calls of the driver that fail are their callers' to judge: torch asks for much that not every driver has.
    options = ["--tool", tool, "--report-api-errors", "no", "--error-exitcode", "1"]
    command = [str(program), *options, *pytest("-k", " or ".join(SANITIZED_TESTS), *SANITIZED_FILES)]
    missing = "" if program else "compute-sanitizer is not on the PATH"
    return Step(tool, command, 50, environment, missing, REFUSALS)


def ranks(devices: int) -> Step:
    """The all-reduce and the DDP hook among several processes, on so many devices."""
    chosen = RANK_TESTS if devices >= RANKS_OF_COLLECTIVES else f"({RANK_TESTS}) and not collectives"
    return Step("ranks", pytest(*workers(3), "-k", chosen, *RANK_FILES), 75)


def run(step: Step, log: Path, limit: float) -> Outcome:
    """Runs a step for so many seconds at most; all that it prints goes to the log, the end of a failed one is shown."""
    if step.missing:
        return Outcome(step.name, "not available", 0, step.missing)
    with log.open("ab") as output:
        output.write(f"\n== {step.name}: {' '.join(step.command)}\n".encode())
        output.flush()
        begin_of_output, begin = output.tell(), time.perf_counter()
        status = wait_for(step, output, limit)
        seconds = time.perf_counter() - begin
    printed = log.read_bytes()[begin_of_output:].decode(errors="replace").splitlines()
    remark = next((line.strip(" =") for line in reversed(printed) if line.strip(" =")), "")
    if status == 0:
        return Outcome(step.name, "passed", seconds, remark)
    if any(refusal in line for line in printed for refusal in step.refusals):
        return Outcome(step.name, "not available", seconds, "the machine does not let it near the device")
    print("\n".join(printed[-_LINES_OF_A_FAILURE:]), flush=True)
    over = f"ended after {limit:.0f} s: "
    return Outcome(step.name, "failed", seconds, f"{over if status is None else ''}{remark}")


def run_all(all_steps: Sequence[Step], log: Path, patience: float) -> list[Outcome]:
    """What became of every step, which is printed as it comes."""
    outcomes, spare = list[Outcome](), 0.0
    for step in all_steps:
        limit = step.seconds * patience + spare
        print(f"{step.name}, at most {limit:.0f} s", flush=True)
        outcome = run(step, log, limit)
        print(f"{step.name}: {outcome.verdict} after {outcome.seconds:.0f} s: {outcome.remark}", flush=True)
        outcomes.append(outcome)
        spare = max(0.0, limit - outcome.seconds)
    return outcomes


def wait_for(step: Step, output: BinaryIO, seconds: float) -> int | None:
    """A step's exit status; None where it had to be ended."""
    paths = [str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Of pytest's plugins only those that are named: not whatever else this machine has.
    ours = {"PYTHONPATH": os.pathsep.join(paths), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env={**os.environ, **ours, **step.environment},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a step and all that it has started, pytest with the time for a summary."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_LAST_WORDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def show(outcomes: Sequence[Outcome]) -> None:
    """The summary."""
    from rich.console import Console
    from rich.table import Table

    table = Table("step", "verdict", "seconds", "remark", title="make gpu-check")
    for outcome in outcomes:
        table.add_row(outcome.name, outcome.verdict, f"{outcome.seconds:.0f}", outcome.remark)
    Console(markup=False).print(table)


def main() -> int:
    """Runs all steps; the exit status."""
    parser = argparse.ArgumentParser(description="Build, test and time fastagg on this machine's GPU.")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "bench" / "results", help="folder of the benchmark's report"
    )
    parser.add_argument("--log", type=Path, default=LOG, help="file that receives all that is printed")
    parser.add_argument("--patience", type=float, default=1.0, help="multiplies every step's time limit")
    chosen = parser.parse_args()
    device_architecture, devices = found_devices()
    shutil.rmtree(SITE, ignore_errors=True)  # or a failed build would leave an older one to be tested
    chosen.log.parent.mkdir(parents=True, exist_ok=True)
    chosen.log.write_bytes(b"")
    print(f"log: {chosen.log}", flush=True)
    outcomes = run_all(steps(device_architecture, devices, chosen.results.resolve()), chosen.log, chosen.patience)
    show(outcomes)
    return int(any(outcome.verdict == "failed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
