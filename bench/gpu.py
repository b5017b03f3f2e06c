"""The benchmark of a CUDA device: `python bench/gpu.py [--quick] [--results FOLDER] [--seconds NUMBER]`.

The weighted mean, casts, the DDP hook's arithmetic and the cost of a call, beside what torch, CuPy and Triton make of
them, each as a ratio to a copy from device memory to device memory in the same run.
"""

from __future__ import annotations

import argparse
import gc
import math
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import fastagg
import gpu_cast
import gpu_fedavg_contenders
import gpu_hook
import gpu_machine
import gpu_report
import scripts
from gpu_cases import CASES, FASTAGG, HOOK, Case
from gpu_fedavg import Updates
from gpu_rows import Results, Row
from gpu_subject import Contender, Subject, prepared
from gpu_timing import COPY, Call, Copy, device_seconds, host_seconds, take_turns, waiting_seconds

# What is worked on in turn is larger than this many second-level caches.
_CACHES = 4
_TURNS, _QUEUED_TURNS = 11, 5
_SECONDS = 150.0

_SUBJECTS: dict[str, Callable[[Case, int, bool], Subject]] = {
    "fedavg": Updates,
    "call": Updates,
    "quantize": gpu_cast.Cast,
    "dequantize": gpu_cast.Cast,
    "hook": gpu_hook.Gradients,
}
_CONTENDERS = {
    "fedavg": gpu_fedavg_contenders.CONTENDERS,
    "call": gpu_fedavg_contenders.CONTENDERS,
    "quantize": gpu_cast.CONTENDERS,
    "dequantize": gpu_cast.CONTENDERS,
    "hook": gpu_hook.CONTENDERS,
}


class Benchmark:
    """A run: what was measured, and why the rest is missing."""

    def __init__(self, quick: bool) -> None:
        self.quick, self.copy = quick, Copy()
        self.rows, self.missing = list[Row](), dict[str, str]()

    def measure(self, case: Case) -> None:
        """Times every contender of a case; one that fails is left out, with the reason."""
        subjects = self._lay_out(case)
        contenders = [contender for contender in _CONTENDERS[case.operation] if contender.fits(case)]
        calls = dict[str, Call]()
        for contender in contenders:
            call = self._prepared(contender, case, subjects)
            if call is not None:
                calls[contender.name] = call
        on_host = case.operation == "call"
        beside: dict[str, Call] = calls if on_host else {COPY: self.copy, **calls}
        seconds = take_turns(beside, host_seconds if on_host else device_seconds, _TURNS)
        # Where the host is too slow for the device, the two differ. The hook's step itself waits for the device.
        queued = []
        if not on_host and case != HOOK and FASTAGG in calls:
            queued = take_turns({FASTAGG: calls[FASTAGG]}, waiting_seconds, _QUEUED_TURNS)[FASTAGG]
        self.rows += [
            Row(
                operation=case.operation,
                key=case.key,
                contender=contender.name,
                package=contender.package,
                is_eager=contender.is_eager,
                bytes=None if on_host else subjects[0].bytes,
                seconds=seconds[contender.name],
                copy_bytes=self.copy.bytes,
                copy_seconds=seconds.get(COPY, []),
                queued_seconds=queued if contender.is_fastagg else [],
            )
            for contender in contenders
            if contender.name in seconds
        ]

    def _lay_out(self, case: Case) -> list[Subject]:
        """As many sets of inputs as the cache cannot hold."""
        make = _SUBJECTS[case.operation]
        first = make(case, 0, self.quick)
        sets = 1 if case.operation == "call" else math.ceil(_CACHES * gpu_machine.cache_bytes() / first.bytes)
        return [first, *(make(case, seed, self.quick) for seed in range(1, sets))]

    def _prepared(self, contender: Contender, case: Case, subjects: list[Subject]) -> Call | None:
        if not contender.is_installed:
            self.missing[contender.name] = f"{contender.package} is not installed"
            return None
        try:
            return prepared(contender, subjects)
        except Exception as error:  # whatever a contender's library raises: the others' numbers shall not be lost
            self.missing[f"{case.key}: {contender.name}"] = reason(error)
            return None


def reason(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def measure_all(seconds: float, quick: bool) -> Results:
    """All cases, as far as the time reaches, or until an interruption: what was measured is never lost."""
    begin, benchmark, end = time.perf_counter(), Benchmark(quick), ""
    for case in CASES:
        elapsed, known = time.perf_counter() - begin, len(benchmark.rows)
        if not end and elapsed > seconds:
            end = f"{seconds:g} seconds were over"
        if end:
            benchmark.missing[case.key] = end
            continue
        print(f"{elapsed:5.1f} s  {case.key}", flush=True)
        try:
            benchmark.measure(case)
        except KeyboardInterrupt:
            benchmark.missing[case.key] = end = "interrupted"
        except Exception as error:  # too little memory, say
            benchmark.missing[case.key] = reason(error)
        for row in benchmark.rows[known:]:
            print(f"{row.median * 1e6:15.1f} us  {row.contender}", flush=True)
        release()
    return Results(benchmark.rows, benchmark.missing)


def release() -> None:
    """Gives back what a case held."""
    torch.compiler.reset()  # type: ignore[no-untyped-call, unused-ignore]
    gc.collect()
    torch.cuda.empty_cache()


def main() -> int:
    """Measures, and writes the report; the exit status tells whether fastagg could do all of it."""
    parser = argparse.ArgumentParser(description="Time fastagg on a CUDA device against what people use instead.")
    parser.add_argument("--results", type=Path, default=Path("fastagg-bench"), help="folder of the report")
    parser.add_argument("--quick", action="store_true", help="small tensors: a smoke test")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="begin no further case after so many")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/gpu.py needs a CUDA device, and torch finds none")
    if fastagg.build_info()["cuda"] is None:
        sys.exit("bench/gpu.py needs a build of fastagg with the CUDA backend: make gpu-check builds one")
    with torch.cuda.device(gpu_machine.DEVICE):
        results = measure_all(chosen.seconds, chosen.quick)
        described = gpu_machine.describe()
    command = shlex.join(["python", "bench/gpu.py", *sys.argv[1:]])
    path = gpu_report.write(results, chosen.results, described, command, chosen.quick)
    print(gpu_report.summary(results, chosen.quick))
    print(f"report: {path}")
    return int(any(results.row(case, FASTAGG) is None for case in CASES))


if __name__ == "__main__":
    scripts.end_with(main)
