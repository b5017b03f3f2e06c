"""The harness that runs CUDA kernels on the CPU finds the faults that it is there for."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import cuda_on_cpu_module

FOLDER = Path(__file__).resolve().parent / "cuda_on_cpu"
HEADERS = cuda_on_cpu_module.cuda_headers()

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
    pytest.mark.skipif(HEADERS is None, reason="no CUDA headers"),
]


def run(folder: Path, *options: str, source: str = "planted.cu") -> subprocess.CompletedProcess[str]:
    """Builds a small program with the options, and runs it."""
    program = folder / "planted"
    # The launch helper asks the runtime for the device's size: runtime.cpp answers.
    sources = ["-x", "c++", str(FOLDER / source), str(FOLDER / "runtime.cpp")]
    includes = [f"-I{FOLDER}", f"-I{FOLDER.parents[1] / 'csrc'}", "-isystem", str(HEADERS)]
    build = ["g++", "-std=c++20", "-O1", "-g", "-pthread", *options, *includes, *sources, "-o", str(program)]
    built = subprocess.run(build, capture_output=True, text=True)
    if "-fsanitize=thread" in options and "tsan" in built.stderr and built.returncode != 0:
        pytest.skip("this compiler has no ThreadSanitizer")
    assert built.returncode == 0, built.stderr
    return subprocess.run([str(program)], capture_output=True, text=True, timeout=60)


def test_correct_kernel_passes(tmp_path: Path) -> None:
    done = run(tmp_path, "-fsanitize=thread")
    assert done.returncode == 0, done.stderr


def test_missing_barrier_is_reported_at_its_line(tmp_path: Path) -> None:
    done = run(tmp_path, "-fsanitize=thread", "-DPLANT_MISSING_BARRIER")
    assert done.returncode != 0
    assert "ThreadSanitizer: data race" in done.stderr
    assert "planted.cu" in done.stderr


@pytest.mark.parametrize("fault", ["PLANT_DIVERGENT_BARRIER", "PLANT_DIVERGENT_SHUFFLE"])
def test_divergence_fails_the_launch_and_never_hangs(tmp_path: Path, fault: str) -> None:
    done = run(tmp_path, f"-D{fault}")
    assert done.returncode == 2, done.stderr
    assert done.stdout == "diverged\n"


def test_correct_peers_pass(tmp_path: Path) -> None:
    done = run(tmp_path, "-fsanitize=thread", source="planted_peers.cu")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("fault", ["PLANT_EARLY_SIGNAL", "PLANT_MISSING_WAIT"])
def test_a_race_between_ranks_is_reported_at_its_line(tmp_path: Path, fault: str) -> None:
    done = run(tmp_path, "-fsanitize=thread", f"-D{fault}", source="planted_peers.cu")
    assert done.returncode != 0
    assert "ThreadSanitizer: data race" in done.stderr
    assert "planted_peers.cu" in done.stderr
