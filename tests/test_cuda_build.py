"""What CMake builds of the CUDA backend with the nvcc that it finds: here scripts that say what old ones say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")


def fake_nvcc(folder: Path, *lines: str) -> Path:
    """A script called nvcc that answers with some lines of shell."""
    folder.mkdir(exist_ok=True)
    script = folder / "nvcc"
    script.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    script.chmod(0o755)
    return script


def listing(*architectures: int, option: str = "--list-gpu-arch") -> str:
    names = " ".join(f"compute_{architecture}" for architecture in architectures)
    return f'case "$*" in *{option}*) echo "{names}"; exit 0 ;; esac'


def asked(folder: Path, function: str, nvcc: Path) -> list[str]:
    """What a function of cmake/cuda_architectures.cmake prints and answers, in a folder of its own."""
    program = folder / "program.cmake"
    program.write_text(
        f'include("{ROOT}/cmake/cuda_architectures.cmake")\n{function}({nvcc} answer)\nmessage(STATUS "${{answer}}")\n'
    )
    done = subprocess.run(["cmake", "-P", str(program)], cwd=folder, capture_output=True, text=True, check=True)
    return [line.removeprefix("-- ") for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("known", "built", "unknown"),
    [
        ((75, 80, 90, 100, 120), "80-real;90-real;100", None),
        ((70, 80, 86, 90), "80-real;90", "100"),
        ((52, 70, 80), "80", "90;100"),
        ((100, 110, 120), "100", "80;90"),
        ((30, 70), "", None),
    ],
)
def test_architectures_are_those_that_nvcc_knows(
    tmp_path: Path, known: tuple[int, ...], built: str, unknown: str | None
) -> None:
    nvcc = fake_nvcc(tmp_path, listing(*known), "exit 1")
    *remarks, answer = asked(tmp_path, "fastagg_cuda_architectures", nvcc)
    assert answer.strip() == built
    said = [] if unknown is None else [f"{nvcc} knows no architecture {unknown}: building for "]
    assert len(remarks) == len(said)
    assert all(remark.startswith(start) for remark, start in zip(remarks, said, strict=True))


def test_an_nvcc_without_a_list_is_asked_for_its_help(tmp_path: Path) -> None:
    nvcc = fake_nvcc(tmp_path, listing(70, 80, option="--help"), "echo Unknown option >&2; exit 1")
    assert asked(tmp_path, "fastagg_cuda_architectures", nvcc)[-1] == "80"


def configure(folder: Path, nvcc: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """CMake for the whole package with this nvcc first on the PATH."""
    pybind11 = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True
    ).stdout.strip()
    command = ["cmake", "-S", str(ROOT), "-B", str(folder / "build"), "-DSKBUILD_PROJECT_VERSION=0"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11}", *options]
    environment = {name: value for name, value in os.environ.items() if name not in ("CUDACXX", "CUDAARCHS")}
    environment["PATH"] = f"{nvcc.parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_an_nvcc_that_does_not_work_is_told(tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    nvcc = fake_nvcc(tmp_path, "echo 'nvcc fatal: unsupported GNU version' >&2", "exit 1")
    reason = f"{nvcc} does not work here (nvcc fatal: unsupported GNU version)"
    auto = configure(tmp_path, nvcc, "-DFASTAGG_CUDA=AUTO")
    assert auto.returncode == 0, auto.stderr
    assert f"Building without the CUDA backend: {reason}" in auto.stdout
    on = configure(tmp_path, nvcc, "-DFASTAGG_CUDA=ON")
    assert on.returncode != 0
    assert reason in " ".join(on.stderr.split())


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc to stand behind the older one")
def test_an_older_nvcc_builds_what_it_can(tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    refusal = 'case "$*" in *100*) echo "Unsupported gpu architecture" >&2; exit 1 ;; esac'
    nvcc = fake_nvcc(tmp_path, listing(80, 90), refusal, f'exec {shutil.which("nvcc")} "$@"')
    done = configure(tmp_path, nvcc, "-DFASTAGG_CUDA=AUTO")
    assert done.returncode == 0, done.stderr
    assert f"{nvcc} knows no architecture 100: building for 80;90" in done.stdout
    refused = configure(tmp_path / "named", nvcc, "-DFASTAGG_CUDA=AUTO", "-DCMAKE_CUDA_ARCHITECTURES=100")
    assert refused.returncode != 0  # who names one gets it or an error
