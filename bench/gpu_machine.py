"""The CUDA device that is measured, and what it is."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import subprocess
from typing import Any

import torch

import fastagg

DEVICE = "cuda:0"
_CUPY = ("cupy-cuda13x", "cupy-cuda12x", "cupy")  # the same package for every CUDA


def cache_bytes() -> int:
    """The size of the device's second-level cache."""
    return int(torch.cuda.get_device_properties(DEVICE).L2_cache_size)


def describe() -> dict[str, Any]:
    """The device, its driver and the versions of what runs on it, as plain values."""
    device, build = torch.cuda.get_device_properties(DEVICE), fastagg.build_info()
    assert build["cuda"] is not None
    return {
        "device": device.name,
        "compute_capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "memory_gigabytes": round(device.total_memory / 1e9, 1),
        "cache_bytes": cache_bytes(),
        "driver": _driver(),
        "cuda_driver": _cuda_version(build["cuda"]["driver"]),
        "cuda_runtime": _cuda_version(build["cuda"]["runtime"]),
        "cuda_of_torch": torch.version.cuda,
        "system": f"{platform.system()} {platform.machine()}",
        "python": build["python"],
        "fastagg": build["version"],
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "cupy": next(filter(None, map(_version, _CUPY)), None),
    }


def slug(name: str) -> str:
    """A device's name as files carry it: "h200" for "NVIDIA H200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-")


def _cuda_version(number: int) -> str:
    """13000 as "13.0"."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _driver() -> str | None:
    """The driver's own version, which only nvidia-smi tells."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return lines[0].strip() if lines else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
