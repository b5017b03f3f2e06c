"""Shared fixtures: the one backend fixture, and the option for the exhaustive tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import backends
import cuda_on_cpu_module
from fastagg import _backend, _core


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="run the exhaustive tests too (minutes)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "exhaustive: checks every value there is; run by --exhaustive")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--exhaustive"):
        return
    chosen = [item for item in items if item.get_closest_marker("exhaustive") is None]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


@pytest.fixture(params=backends.NAMES)
def backend(request: pytest.FixtureRequest) -> Iterator[backends.Backend]:
    """Every backend in turn, put in the place of the default one for the test."""
    yield from _backend_named(request.param)


@pytest.fixture(params=[name for name in backends.NAMES if name.startswith("cpu-")])
def cpu(request: pytest.FixtureRequest) -> Iterator[backends.Backend]:
    """Every instruction set in turn, for tests of what only the CPU has."""
    yield from _backend_named(request.param)


def _backend_named(name: str) -> Iterator[backends.Backend]:
    if name == "cuda":
        yield _cuda()
    elif name == "cuda-on-cpu":
        try:
            module = cuda_on_cpu_module.load()
        except cuda_on_cpu_module.NotAvailableError as error:
            pytest.skip(str(error))
        _backend.override_cpu(module)
        yield backends.Backend(name)
        _backend.override_cpu(None)
    else:
        wanted = name.removeprefix("cpu-")
        if wanted not in _core.available_isas():
            pytest.skip(f"this processor or this build has no {wanted}")
        with backends.isa(wanted):
            yield backends.Backend(name)


def _cuda() -> backends.Backend:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return backends.Cuda("cuda")
