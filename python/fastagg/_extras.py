"""fastagg's optional packages: which are installed, and how to get those that are not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec
from typing import NamedTuple


class Extra(NamedTuple):
    """What `pip install 'fastagg[name]'` adds."""

    name: str
    adds: str
    modules: tuple[str, ...]

    @property
    def missing(self) -> list[str]:
        """The modules that are not installed."""
        return [module for module in self.modules if find_spec(module) is None]

    @property
    def command(self) -> str:
        """What installs it."""
        return f"pip install 'fastagg[{self.name}]'"


EXTRAS = {
    extra.name: extra
    for extra in (
        Extra("torch", "PyTorch tensors", ("torch",)),
        Extra("cli", "the command line", ("rich", "typer")),
        Extra("bench", "fastagg bench", ("matplotlib", "pytest", "pytest_benchmark", "safetensors", "torch")),
        Extra("demo", "fastagg demo", ("matplotlib", "sklearn")),
        Extra("report", "outlier detection and reports", ("jinja2", "matplotlib", "sklearn")),
        Extra("flower", "Flower's strategies", ("flwr",)),
        Extra("nvflare", "NVFlare's aggregator and filters", ("nvflare",)),
        Extra("ray", "aggregation on a Ray cluster", ("ray",)),
    )
}

# pip does nothing for a version that is installed, and takes a wheel that it has built before with other settings.
CUDA_COMMAND = (
    "pip install --force-reinstall --no-deps --no-cache-dir --no-binary fastagg "
    "--config-settings=cmake.define.FASTAGG_CUDA=ON fastagg"
)


@contextlib.contextmanager
def needing(extra: str, user: str) -> Iterator[None]:
    """Says in a sentence what installs an extra's package, where a block of imports does not find it.

    Raises:
        ModuleNotFoundError: the package is missing, which `user` needs.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRAS[extra].modules:
            raise
        raise ModuleNotFoundError(f"{user} needs {module}: {EXTRAS[extra].command}", name=module) from None
