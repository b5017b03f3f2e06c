"""Shared fixtures: the one backend fixture, and the options that choose backends and the exhaustive tests."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import NoReturn

import pytest

import backends
import cuda_on_cpu_module
import fastagg
import processes
from fastagg import _core
from fastagg._native import backend as native_backend


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the exhaustive tests and the fuzzers too (minutes)")
    parser.addoption("--seed", type=int, help="of the fuzzers (default: a new one every time, which is printed)")
    parser.addoption(
        "--backend",
        action="append",
        choices=backends.NAMES,
        help="run the tests of all backends on this one alone; may be repeated; one that is missing is an error",
    )


def pytest_configure(config: pytest.Config) -> None:
    processes.restore_signals()
    if config.getoption("--seed") is None:
        config.option.seed = secrets.randbits(32)
    config.addinivalue_line("markers", "exhaustive: checks every value there is, or random ones; run by --all")
    config.addinivalue_line("markers", "real_run: starts the servers of Flower, NVFlare or Ray")


def pytest_report_header(config: pytest.Config) -> str | None:
    return f"fuzzers: repeat with --seed={config.getoption('--seed')}" if config.getoption("--all") else None


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The fuzzers' seed, also in what a failed one prints."""
    chosen: int = request.config.getoption("--seed")
    print(f"repeat with --seed={chosen}")
    return chosen


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = [item for item in items if _is_wanted(item, config)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


def _is_wanted(item: pytest.Item, config: pytest.Config) -> bool:
    """Whether the options ask for a test: one that has no backend is asked for by every --backend."""
    if item.get_closest_marker("exhaustive") is not None and not config.getoption("--all"):
        return False
    callspec = getattr(item, "callspec", None)
    parameters = {} if callspec is None else callspec.params
    names = {parameters[fixture] for fixture in ("backend", "cpu") if fixture in parameters}
    return names <= set(config.getoption("--backend") or backends.NAMES)


@pytest.fixture(params=backends.NAMES)
def backend(request: pytest.FixtureRequest) -> Iterator[backends.Backend]:
    """Every backend in turn, put in the place of the default one for the test."""
    yield from _backend_named(request.param, request.config)


@pytest.fixture(params=[name for name in backends.NAMES if name.startswith("cpu-")])
def cpu(request: pytest.FixtureRequest) -> Iterator[backends.Backend]:
    """Every instruction set in turn, for tests of what only the CPU has."""
    yield from _backend_named(request.param, request.config)


def _backend_named(name: str, config: pytest.Config) -> Iterator[backends.Backend]:
    if name == "cuda":
        yield _cuda(config)
    elif name == "cuda-on-cpu":
        try:
            module = cuda_on_cpu_module.load()
        except cuda_on_cpu_module.NotAvailableError as error:
            _is_missing(str(error), config)
        native_backend.override_cpu(module)
        yield backends.Backend(name)
        native_backend.override_cpu(None)
    else:
        wanted = name.removeprefix("cpu-")
        if wanted not in _core.available_isas():
            _is_missing(f"this processor or this build has no {wanted}", config)
        with backends.isa(wanted):
            yield backends.Backend(name)


def _cuda(config: pytest.Config) -> backends.Backend:
    try:
        import torch
    except ImportError:
        _is_missing("no torch, whose arrays are on the CUDA device", config)
    if not torch.cuda.is_available():
        _is_missing("no CUDA device", config)
    if fastagg.build_info()["cuda"] is None:
        _is_missing("this build has no CUDA backend", config)
    return backends.Cuda("cuda")


def _is_missing(reason: str, config: pytest.Config) -> NoReturn:
    """Skips a test of a backend that cannot be had here; fails where --backend asks for it."""
    if config.getoption("--backend"):
        pytest.fail(reason)
    pytest.skip(reason)
