"""`server_step`, the operation of the server optimisers: NumPy's bits on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from backends import Backend, threads
from data import any_finite, at_offset, generator, normal
from fastagg.server import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi
from fastagg.server.step import add
from reference import FLOATS, assert_same_bits

by_dtype = pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())
RATE, BETA_1, BETA_2, TAU = 0.3, 0.9, 0.99, 1e-3


class Step(NamedTuple):
    """A model with its moments: what a rule's formula takes and makes."""

    x: np.ndarray
    m: np.ndarray
    v: np.ndarray


def interpolate(y: np.ndarray, step: Step) -> Step:
    return step._replace(x=step.x + RATE * (y - step.x))


def momentum(y: np.ndarray, step: Step) -> Step:
    m = BETA_1 * step.m + (step.x - y)
    return step._replace(x=step.x - RATE * m, m=m)


def adaptive(y: np.ndarray, step: Step, beta_1: float, second: Callable[..., np.ndarray]) -> Step:
    delta = y - step.x
    m = beta_1 * step.m + (1 - beta_1) * delta
    v = second(step.v, delta**2)
    return Step(step.x + RATE * m / (np.sqrt(v) + TAU), m, v)


def adagrad(y: np.ndarray, step: Step) -> Step:
    return adaptive(y, step, 0.0, lambda v, square: v + square)


def adam(y: np.ndarray, step: Step) -> Step:
    return adaptive(y, step, BETA_1, lambda v, square: BETA_2 * v + (1 - BETA_2) * square)


def yogi(y: np.ndarray, step: Step) -> Step:
    return adaptive(y, step, BETA_1, lambda v, square: v - (1 - BETA_2) * square * np.sign(v - square))


BETAS = {"beta_1": BETA_1, "beta_2": BETA_2, "tau": TAU}
RULES: dict[str, tuple[Callable[[], Any], Callable[[np.ndarray, Step], Step]]] = {
    "interpolate": (lambda: FedAvg(learning_rate=RATE), interpolate),
    "momentum": (lambda: FedAvgM(learning_rate=RATE, momentum=BETA_1), momentum),
    "adagrad": (lambda: FedAdagrad(learning_rate=RATE, tau=TAU), adagrad),
    "adam": (lambda: FedAdam(learning_rate=RATE, **BETAS), adam),
    "yogi": (lambda: FedYogi(learning_rate=RATE, **BETAS), yogi),
}
MOMENTS = {"interpolate": 0, "momentum": 1, "adagrad": 2, "adam": 2, "yogi": 2}
by_rule = pytest.mark.parametrize("rule", RULES)


def arithmetic(dtype: np.dtype) -> np.dtype:
    """What a leaf is computed in."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def expected(rule: str, x: np.ndarray, means: list[np.ndarray]) -> Step:
    """NumPy's model and moments after a step towards each mean; Python's numbers take the arrays' precision."""
    wide, dtype = arithmetic(x.dtype), x.dtype
    zeros = np.zeros(x.shape, wide)
    step = Step(x, zeros, zeros)
    with np.errstate(all="ignore"):
        for y in means:
            step = RULES[rule][1](y.astype(wide), step._replace(x=step.x.astype(wide)))
            step = step._replace(x=step.x.astype(dtype))
    return step


def assert_steps(backend: Backend, rule: str, x: np.ndarray, means: list[np.ndarray]) -> None:
    """Steps towards each mean give NumPy's bits, moments included, out of place and in place."""
    step = expected(rule, x, means)
    for in_place in (False, True):
        optimizer = RULES[rule][0]()
        model = backend.put(x.copy())
        for y in means:
            mean = backend.put(y)
            model = optimizer.step(model, mean, out=model if in_place else None)
            assert_same_bits(backend.get(mean), y)
        assert_same_bits(backend.get(model), step.x)
        moments = [moment for leaf in optimizer.state_dict()["leaves"] for moment in leaf[-1]]
        for moment, wanted in zip(moments, step[1 : 1 + MOMENTS[rule]], strict=True):
            assert_same_bits(moment, wanted)


@by_rule
@by_dtype
def test_numpys_bits_at_every_size(backend: Backend, rule: str, dtype: np.dtype) -> None:
    random = generator(1)
    for size in backend.sizes:
        x = normal(random, size, dtype)
        assert_steps(backend, rule, x, [normal(random, size, dtype) for _ in range(2)])


@by_rule
@by_dtype
def test_numpys_bits_of_any_finite_values(backend: Backend, rule: str, dtype: np.dtype) -> None:
    # Every exponent: subnormals are kept, what overflows does so as in NumPy.
    random = generator(2)
    x, y = (any_finite(random, 1025, dtype) for _ in range(2))
    assert_steps(backend, rule, x, [y])


@by_rule
@by_dtype
def test_numpys_bits_at_any_address(backend: Backend, rule: str, dtype: np.dtype) -> None:
    random = generator(3)
    for offset in (1, 3):
        x, y = (at_offset(normal(random, 261, dtype), offset * place) for place in (1, 2))
        out = at_offset(np.zeros_like(x), 5)
        step = expected(rule, x, [y])
        model, mean, result = backend.put(x), backend.put(y), backend.put(out)
        assert RULES[rule][0]().step(model, mean, out=result) is result
        assert_same_bits(backend.get(result), step.x)


def test_many_leaves_in_one_call(backend: Backend) -> None:
    random = generator(4)
    shapes = [(), (0,), (3, 5), (1,), (1025,), (2, 0, 3)]
    dtypes = [*FLOATS.values(), *FLOATS.values()]
    x = {f"{i}": normal(random, shape, dtype) for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))}
    x = {name: np.asarray(leaf, dtype) for (name, leaf), dtype in zip(x.items(), dtypes, strict=False)}
    y = {name: np.asarray(leaf + np.ones((), leaf.dtype), leaf.dtype) for name, leaf in reversed(x.items())}
    result = FedAdam(learning_rate=RATE, **BETAS).step(
        {name: backend.put(leaf) for name, leaf in x.items()}, {name: backend.put(leaf) for name, leaf in y.items()}
    )
    assert list(result) == list(x)
    for name, leaf in x.items():
        assert_same_bits(backend.get(result[name]), expected("adam", leaf, [y[name]]).x)


@by_dtype
def test_adding_a_change(backend: Backend, dtype: np.dtype) -> None:
    random = generator(5)
    x, change = (normal(random, 333, dtype) for _ in range(2))
    wide = arithmetic(dtype)
    wanted = (x.astype(wide) + -RATE * change.astype(wide)).astype(dtype)
    assert_same_bits(backend.get(add(backend.put(x), backend.put(change), -RATE)), wanted)


@by_rule
def test_the_bits_do_not_depend_on_threads(cpu: Backend, rule: str) -> None:
    random = generator(6)
    x, y = (normal(random, cpu.large, np.dtype(np.float32)) for _ in range(2))
    step = expected(rule, x, [y])
    for count in (1, 2, 5):
        with threads(count):
            assert_same_bits(RULES[rule][0]().step(x, y), step.x)


def test_results_stored_around_the_cache(cpu: Backend) -> None:
    # From 4 MB on, at an address that no vector store may begin at.
    random = generator(7)
    x, y = (at_offset(normal(random, (1 << 20) + 77, np.dtype(np.float32)), place) for place in (1, 2))
    out = at_offset(np.zeros_like(x), 3)
    FedAdam(learning_rate=RATE, **BETAS).step(x, y, out=out)
    assert_same_bits(out, expected("adam", x, [y]).x)
