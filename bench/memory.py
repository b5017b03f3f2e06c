"""The most memory that a call needs beyond its inputs, measured in a fresh process.

`python memory.py OPERATION CASE CONTENDER [--quick]` prints it in bytes; for `accumulator`, CONTENDER is the number of
clients to add.
"""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import fastagg
from cases import Case, case_named
from contenders import CONTENDERS
from inputs import Inputs
from machine import use_all_processors

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def is_measurable() -> bool:
    """Whether this system tells a process its peak."""
    return _STATUS.exists()


def extra_bytes(case: Case, contender: str, quick: bool) -> int:
    """Bytes beyond the inputs that the call needs at its peak, from a fresh process."""
    arguments = [case.operation, case.key, contender, *(["--quick"] if quick else [])]
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"memory of {' '.join(arguments)}: {done.stderr.strip()}")
    return int(done.stdout.split()[-1])


def peak_of(call: Callable[[], Any]) -> int:
    """How far the resident memory rises above what it was before the call."""
    gc.collect()
    _give_back_free_memory()
    if _RESET.exists():
        _RESET.write_text("5")  # the peak starts from here
    before = _kilobytes("VmRSS")
    answer = call()
    peak = _kilobytes("VmHWM")
    del answer
    return max(peak - before, 0) * 1024


def _give_back_free_memory() -> None:
    """Returns freed heap to the system, so that nobody's temporaries hide in it."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _kilobytes(field: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def _measure_call(case: Case, name: str) -> int:
    contender = next(one for one in CONTENDERS[case.operation] if one.name == name)
    small = replace(case, elements=min(case.elements, 100_000))
    contender.prepare(Inputs(small))()  # what is loaded and started once is not the call's
    return peak_of(contender.prepare(Inputs(case)))


def _measure_accumulator(case: Case, clients: int) -> int:
    """The sums of many clients that arrive one by one in the same memory, so that only copies can keep them."""
    fastagg.Accumulator().add(np.ones(1_000_000, np.float32))  # what is loaded and started once is not the sums'
    update = np.ones(case.elements, np.float32)  # zeros would have no pages yet
    accumulator = fastagg.Accumulator()

    def add_all() -> None:
        for client in range(clients):
            update.fill(client)
            accumulator.add(update, 1.0)

    peak = peak_of(add_all)
    assert accumulator.result()[-1] == (clients - 1) / 2
    return peak


def main(operation: str, key: str, contender: str, *options: str) -> None:
    """Measures in this process, and prints."""
    use_all_processors()
    case = case_named(operation, key).at_size("--quick" in options)
    accumulates = operation == "accumulator"
    print(_measure_accumulator(case, int(contender)) if accumulates else _measure_call(case, contender))


if __name__ == "__main__":
    main(*sys.argv[1:])
