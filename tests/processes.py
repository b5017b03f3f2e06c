"""Programs run in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys


def restore_signals() -> None:
    """Undoes what a shell does that starts this in the background: it ignores interrupts, and children inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def run(program: str, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code with some environment variables set; FASTAGG_ISA and OMP_NUM_THREADS are not inherited."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("FASTAGG_ISA", "OMP_NUM_THREADS")}
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def output_of(program: str, timeout: float = 60, **environment: str) -> str:
    """What a program that must succeed prints."""
    done = run(program, timeout, **environment)
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-3000:]}"
    return done.stdout.strip()
