"""Finds or builds `_cuda_on_cpu`: the CUDA kernels compiled by the C++ compiler."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
VARIABLE = "FASTAGG_CUDA_ON_CPU"


class NotAvailableError(Exception):
    """Why the module cannot be had here."""


@functools.cache
def load() -> ModuleType:
    """The module, from the folder that FASTAGG_CUDA_ON_CPU names or built into a cache folder.

    Raises:
        NotAvailableError: there is nothing to build it with.
    """
    folder = os.environ.get(VARIABLE)
    path = _find(Path(folder)) if folder else _build()
    if path is None:
        raise NotAvailableError(f"{VARIABLE}={folder} holds no _cuda_on_cpu module")
    spec = importlib.util.spec_from_file_location("_cuda_on_cpu", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _find(folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob("_cuda_on_cpu*" + sysconfig.get_config_var("EXT_SUFFIX")))), None)


def cuda_headers() -> Path | None:
    """The folder with cuda_runtime.h: nvcc's own, or that of NVIDIA's wheels."""
    candidates = [Path(folder) / "nvidia/cu13/include" for folder in sys.path if folder]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        candidates.append(Path(nvcc).resolve().parent.parent / "include")
        candidates.append(Path("/usr/local/cuda/include"))
    candidates += sorted(Path("/usr/local").glob("cuda-*/include"), reverse=True)
    return next((folder for folder in candidates if (folder / "cuda_runtime.h").is_file()), None)


def _build() -> Path | None:
    source = TESTS / "cuda_on_cpu"
    headers = cuda_headers()
    if not (source / "CMakeLists.txt").is_file():
        raise NotAvailableError("tests/cuda_on_cpu is not there")
    if headers is None:
        raise NotAvailableError(
            "no CUDA headers: put nvcc on the PATH, or pip install nvidia-cuda-runtime nvidia-cuda-crt"
        )
    if shutil.which("cmake") is None:
        raise NotAvailableError("no cmake to build it with")
    folder = _cache_folder()
    configure = ["cmake", "-S", source, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-DFASTAGG_CUDA_HEADERS={headers}", f"-Dpybind11_DIR={_pybind11_folder()}"]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # pytest-xdist's workers all come here
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, ["cmake", "--build", folder, "--parallel", str(os.cpu_count())]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"building _cuda_on_cpu failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return _find(folder)


def _pybind11_folder() -> str:
    try:
        import pybind11
    except ImportError:
        raise NotAvailableError("no pybind11 to build it with: pip install pybind11") from None
    return pybind11.get_cmake_dir()


def _cache_folder() -> Path:
    """A folder for this checkout and this Python, so that later sessions build only what changed."""
    key = hashlib.sha256(f"{ROOT}{sys.executable}{sys.version}".encode()).hexdigest()[:12]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path(tempfile.gettempdir()))
    return base / f"fastagg-cuda-on-cpu-{key}"
