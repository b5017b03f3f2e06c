"""What this build of fastagg is, and what it found on this machine."""

from __future__ import annotations

import importlib
import platform
import sys
from typing import Any

from fastagg._native import core

__version__: str = core.__version__
TRANSPORT_VARIABLE = "FASTAGG_TRANSPORT"  # "backend": never shared memory


def build_info() -> dict[str, Any]:
    """Versions, instruction sets, threads and the CUDA backend, as plain values.

    Returns:
        `version`, `python`, `platform`, `compiler`, `isa` (in use), `available_isas`, `threads`, `processors`, and
        `cuda`: None without the CUDA backend, else its `runtime` and `driver` versions (driver 0: none installed) and
        number of `devices`.
    """
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        "compiler": core.__compiler__,
        "isa": core.isa(),
        "available_isas": core.available_isas(),
        "threads": core.get_num_threads(),
        "processors": core.available_processors(),
        "cuda": _cuda_info(),
    }


def _cuda_info() -> dict[str, int] | None:
    try:
        cuda: Any = importlib.import_module("fastagg._cuda")
    except ImportError:
        return None
    return {"runtime": cuda.runtime_version(), "driver": cuda.driver_version(), "devices": cuda.device_count()}
