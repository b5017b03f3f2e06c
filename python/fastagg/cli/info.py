"""What `fastagg info` shows."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from fastagg._extras import CUDA_COMMAND, EXTRAS
from fastagg._native import core
from fastagg._native.build import TRANSPORT_VARIABLE, build_info

_COMPANIONS = ("numpy", "torch", "cupy", "flwr", "nvflare")


def tables() -> list[Table]:
    """Versions, processor, CUDA, and what is missing."""
    build = build_info()
    return [
        _facts("Versions", {"fastagg": build["version"], "python": build["python"], **_installed()}),
        _facts("Processor", _processor(build)),
        _facts("CUDA", _cuda(build["cuda"])),
        _facts("all_reduce", _transport()),
        _missing(build["cuda"]),
    ]


def _installed() -> dict[str, str]:
    found = {}
    for name in _COMPANIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor(build: dict[str, Any]) -> dict[str, str]:
    return {
        "platform": build["platform"],
        "instruction set": f"{build['isa']} (available: {', '.join(build['available_isas'])})",
        "threads": f"{build['threads']} of {build['processors']} processors",
        "compiler": build["compiler"],
    }


def _cuda(cuda: dict[str, int] | None) -> dict[str, str]:
    if cuda is None:
        return {"backend": "not built"}
    driver = _cuda_version(cuda["driver"]) if cuda["driver"] else "none installed"
    backend = f"built with CUDA {_cuda_version(cuda['runtime'])}"
    return {"backend": backend, "driver": driver, "devices": str(cuda["devices"])}


def _transport() -> dict[str, str]:
    """What ranks of this host would exchange through."""
    if os.environ.get(TRANSPORT_VARIABLE):
        return {"on one host": f"Gloo: {TRANSPORT_VARIABLE} asks for it"}
    try:
        core.SharedMemoryGroup([os.getpid()], [0], 0)
    except OSError as error:
        return {"on one host": f"Gloo: no shared memory ({error})"}
    return {"on one host": "shared memory", "between hosts": "Gloo, once for all ranks of a host"}


def _cuda_version(number: int) -> str:
    """12040 is 12.4."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _missing(cuda: dict[str, int] | None) -> Table:
    table = Table(title="What is missing", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("what", max_width=26)
    table.add_column("add it by", overflow="fold")
    for extra in EXTRAS.values():
        if extra.missing:
            table.add_row(extra.adds, Text(extra.command))  # as Text: [torch] is no markup
    if cuda is None:
        table.add_row("the CUDA backend (nvcc on the PATH)", CUDA_COMMAND)
    elif not cuda["driver"]:
        table.add_row("an NVIDIA driver", "your system's packages")
    if not table.row_count:
        table.add_row("nothing", "")
    return table


def _facts(title: str, facts: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(style="bold", min_width=16)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, value)
    return table
