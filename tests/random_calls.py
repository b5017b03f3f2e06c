"""Random calls of the functions that compute: what two ways of computing are compared on, and what is attacked."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import fastagg
from data import any_finite, at_offset, normal, whole
from fastagg import robust
from reference import FLOATS, INTEGERS

WIRES = ("fp32", "bf16", "fp16", "fp8_e4m3", "fp8_e5m2", "int8", "int4", "sign")
BLOCKED = ("fp8_e4m3", "fp8_e5m2", "int8", "int4")
BLOCKS = (32, 64, 256, 1024)


class Call(NamedTuple):
    """A function of fastagg and its arguments, as often as one likes."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self) -> Any:
        """What it answers; an error is an answer too."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of dropped clients
            try:
                return self.function(*self.arguments, **self.options)
            except (ValueError, TypeError) as error:
                return f"{type(error).__name__}: {error}"

    def __str__(self) -> str:
        shown = [repr(argument)[:300] for argument in self.arguments]
        return f"{self.function.__name__}({', '.join(shown)}, {self.options})"


def random_call(random: np.random.Generator) -> Call:
    """A call that is right, though it may meet infinity and NaN."""
    make = (_mean, _accumulated, _quantized, _decoded, _rule)[random.integers(5)]
    return make(random)


def bits_of(answer: Any) -> Any:
    """The bits of an answer, in which all NaNs are one."""
    if isinstance(answer, fastagg.Quantized):
        codes = np.asarray(answer.data)
        wide = codes if codes.dtype.kind in "iu" else np.where(np.isnan(codes), np.array(np.nan, codes.dtype), codes)
        return wide.tobytes(), None if answer.scales is None else bits_of(answer.scales), answer.nonfinite
    if isinstance(answer, dict):
        return {name: bits_of(leaf) for name, leaf in answer.items()}
    if isinstance(answer, np.ndarray) and answer.dtype.kind not in "iub":
        return np.where(np.isnan(answer), np.array(np.nan, answer.dtype), answer).tobytes()
    return answer.tobytes() if isinstance(answer, np.ndarray) else answer


def _size(random: np.random.Generator) -> int:
    """Mostly small, now and then enough for several tasks."""
    return int(2 ** random.uniform(0, 18 if random.random() < 0.1 else 11))


def _array(random: np.random.Generator, size: int, dtype: np.dtype) -> np.ndarray:
    """Values of all kinds at any place in memory."""
    if dtype.kind in "iub":
        return at_offset(whole(random, size, dtype), int(random.integers(8)))
    make = (normal, any_finite)[int(random.random() < 0.3)]
    array = at_offset(make(random, size, dtype), int(random.integers(8)))
    if random.random() < 0.1:
        array[random.integers(size)] = (np.inf, -np.inf, np.nan)[random.integers(3)]
    return array


def _updates(random: np.random.Generator, dtypes: list[np.dtype]) -> list[dict[str, Any]]:
    clients = int(2 ** random.uniform(0, 5))
    layout = [(_size(random), dtypes[random.integers(len(dtypes))]) for _ in range(random.integers(1, 4))]
    updates = [{str(i): _array(random, *leaf) for i, leaf in enumerate(layout)} for _ in range(clients)]
    if random.random() < 0.2:  # uploads
        wire, block = WIRES[random.integers(len(WIRES))], int(random.choice(BLOCKS))
        for update in updates:
            for name, leaf in update.items():
                if leaf.dtype == np.float32:
                    update[name] = fastagg.quantize(leaf, wire, block=block if wire in BLOCKED else None)
    return updates


def _weights(random: np.random.Generator, count: int) -> list[float] | None:
    if random.random() < 0.2:
        return None
    if random.random() < 0.5:
        return [float(weight) for weight in random.integers(0, 5000, count)]
    return [float(weight) for weight in random.random(count) * 10.0 ** random.integers(-5, 6)]


def _policies(random: np.random.Generator) -> dict[str, str]:
    return {
        "nan_policy": ("raise", "drop", "propagate")[random.integers(3)],
        "integer_policy": ("max", "first", "round")[random.integers(3)],
    }


def _mean(random: np.random.Generator) -> Call:
    updates = _updates(random, [*FLOATS.values(), *INTEGERS])
    return Call(fastagg.fedavg, (updates, _weights(random, len(updates))), _policies(random))


def accumulate(updates: list[Any], weights: list[float], **options: Any) -> Any:
    """The mean by one to three accumulators that are merged."""
    accumulators = [fastagg.Accumulator(**options) for _ in range(1 + len(updates) % 3)]
    for index, (update, weight) in enumerate(zip(updates, weights, strict=True)):
        accumulators[index % len(accumulators)].add(update, weight)
    whole, *others = accumulators
    for other in others:
        whole.merge(other)
    return whole.result()


def _accumulated(random: np.random.Generator) -> Call:
    updates = _updates(random, [*FLOATS.values(), *INTEGERS])
    weights = _weights(random, len(updates)) or [1.0] * len(updates)
    options = {**_policies(random), "batch": int(random.choice([1, 1, 3, 8]))}
    return Call(accumulate, (updates, weights), options)


def _quantized(random: np.random.Generator) -> Call:
    wire = WIRES[random.integers(len(WIRES))]
    dtypes = list(FLOATS.values())
    options: dict[str, Any] = {}
    if wire not in ("fp32", "sign") and random.random() < 0.5:
        options |= {"rounding": "stochastic", "seed": int(random.integers(2**60))}
    if wire in BLOCKED:
        options |= {"block": int(random.choice(BLOCKS))}
    array = _array(random, _size(random), dtypes[random.integers(len(dtypes))])
    return Call(fastagg.quantize, (array, wire), options)


def _decoded(random: np.random.Generator) -> Call:
    function, arguments, options = _quantized(random)
    return Call(fastagg.dequantize, (function(*arguments, **options),), {})


def _rule(random: np.random.Generator) -> Call:
    updates = _updates(random, list(FLOATS.values()))
    options = {"nan_policy": ("raise", "drop")[random.integers(2)]}
    if random.random() < 0.2:
        return Call(robust.geometric_median, (updates,), options)
    if random.random() < 0.2:
        return Call(robust.median, (updates,), options)
    rules = (robust.trimmed_mean, robust.meamed, robust.phocas, robust.krum, robust.multi_krum, robust.bulyan)
    hostile = int(random.integers(max(1, (len(updates) - 3) // 4) + 1))
    return Call(rules[random.integers(len(rules))], (updates, hostile), options)
