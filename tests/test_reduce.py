"""`reduce`, the operation of an all-reduce: against NumPy's float32 and our own quantize, on every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import backends
import fastagg
from fastagg import _core
from fastagg._native import backend as native_backend
from fastagg._native.codes import WIRES, Code
from fastagg.distributed.exchange.arithmetic import DeviceArithmetic, HostArithmetic
from reference import assert_same_bits

ENCODED = ["fp32", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2", "int8", "int4", "sign"]
SHIFT = 8
NEAREST = (False, (0, 0, 0, 0), 1.0)


def reduce(backend: backends.Backend, operands: Any, norm: bool = True) -> tuple[bool, float]:
    """The operation on a backend's arrays."""
    device = "cuda" if backend.name == "cuda" else "cpu"
    native = native_backend.backend_for(device)
    arithmetic = HostArithmetic() if native is None else DeviceArithmetic(native, torch.device(device), 0)
    arithmetic.reduce(operands, norm=norm, check=True)
    return bool(arithmetic.finite), float(arithmetic.squares)


def reduced(
    backend: backends.Backend,
    sources: list[fastagg.Quantized],
    wire: str,
    divisor: float = 1.0,
    feedback: tuple[Any, float, Any, float, bool] = (None, 0.0, None, 0.0, False),
) -> tuple[fastagg.Quantized, bool, float]:
    """The encoded quotient of the sources' sum, whether it is finite, and its sum of squares."""
    count = sources[0].shape[0]
    out = fastagg.quantize(backend.put(np.zeros(count, np.float32)), wire)
    residual, residual_factor, error, error_factor, raises = feedback
    result = (described(sources[0]), WIRES[wire], SHIFT, address(out.data), address(out.scales), count, *NEAREST)
    fed_back = (address(residual), residual_factor, address(error), error_factor, raises)
    operands = ([described(source) for source in sources], divisor, *fed_back, result, 0, ())
    finite, squares = reduce(backend, operands)
    return out, finite, squares


def address(array: Any) -> int:
    if array is None:
        return 0
    return array.data_ptr() if hasattr(array, "data_ptr") else array.ctypes.data


def described(source: fastagg.Quantized) -> tuple[int, int, int, int]:
    return address(source.data), address(source.scales), WIRES[source.wire], SHIFT


def values(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=count).astype(np.float32)


def encoded(backend: backends.Backend, x: np.ndarray, wire: str) -> fastagg.Quantized:
    return fastagg.quantize(backend.put(x), wire)


def decoded(backend: backends.Backend, q: fastagg.Quantized) -> np.ndarray:
    return backend.get(fastagg.dequantize(q)).astype(np.float32)


def assert_same(backend: backends.Backend, one: fastagg.Quantized, other: fastagg.Quantized) -> None:
    assert_same_bits(backend.get(one.data), backend.get(other.data))
    if one.scales is not None:
        assert_same_bits(backend.get(one.scales), backend.get(other.scales))


@pytest.mark.parametrize("wire", ENCODED)
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_the_sum_is_float32s_in_the_order_of_the_ranks(backend: backends.Backend, wire: str, ranks: int) -> None:
    for count in (1, 15, 257, backend.large):
        sources = [encoded(backend, values(count, rank), wire) for rank in range(ranks)]
        expected = np.zeros(count, np.float32)
        for source in sources:
            expected += decoded(backend, source)
        expected /= np.float32(ranks)
        for result in {wire, "fp32"}:  # as in two phases, and as in one shot
            out, finite, squares = reduced(backend, sources, result, divisor=ranks)
            expected_out = encoded(backend, expected, result)
            assert_same(backend, out, expected_out)
            assert finite
            exact = np.sum(np.square(decoded(backend, expected_out).astype(np.float64)))
            assert squares == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("wire", ENCODED[1:])
def test_feedback_adds_the_residual_and_keeps_what_encoding_took(backend: backends.Backend, wire: str) -> None:
    count = min(backend.large, 5000)
    x, owed = values(count, 1), values(count, 2) * np.float32(0.01)
    source, residual, error = (
        encoded(backend, x, "fp32"),
        backend.put(owed),
        backend.put(np.full(count, 7, np.float32)),
    )
    out, _, _ = reduced(backend, [source], wire, 2.0, (residual, 0.5, error, 2.0, False))
    value = (x + owed * np.float32(0.5)) * np.float32(0.5)
    assert_same(backend, out, encoded(backend, value, wire))
    taken = (value - decoded(backend, out)) * np.float32(2)
    assert_same_bits(backend.get(error), taken)
    reduced(backend, [source], wire, 2.0, (residual, 0.5, error, 2.0, True))
    assert_same_bits(backend.get(error), taken + taken)


def test_squares_do_not_depend_on_the_instruction_set_or_the_threads(cpu: backends.Backend) -> None:
    source = fastagg.quantize(values(300_001, 3), "fp16")
    with backends.isa("scalar"):
        expected = reduced(cpu, [source], "fp16")[2]
    for threads in (1, 2, 3):
        with backends.threads(threads):
            assert reduced(cpu, [source], "fp16")[2] == expected


def test_not_finite_sums_are_reported(backend: backends.Backend) -> None:
    for bad, wire in ((np.inf, "fp32"), (np.nan, "fp16"), (7e4, "fp16"), (np.inf, "int8")):
        x = values(900, 4)
        x[700] = bad
        assert not reduced(backend, [encoded(backend, x, "fp32")], wire)[1]
    assert reduced(backend, [encoded(backend, values(900, 4), "fp32")], "fp16")[1]


def test_a_later_part_of_an_array_has_the_same_random_numbers(backend: backends.Backend) -> None:
    count = min(backend.large, 2 * _core.PASS)
    x = values(_core.PASS + count, 5)
    whole = backends.on_scalar(lambda: fastagg.quantize(x, "fp16", rounding="stochastic", seed=9))
    given, part = backend.put(x[_core.PASS :].copy()), backend.put(np.zeros(count, np.float16))
    source = (address(given), 0, Code.FLOAT32, 0)
    result = (source, Code.FLOAT16, SHIFT, address(part), 0, count, True, (9, 0, 0, 0), 1.0)
    reduce(backend, ([source], 1.0, 0, 0.0, 0, 0.0, False, result, _core.PASS, ()), norm=False)
    assert_same_bits(backend.get(part), whole.data[_core.PASS :])


def test_stretches_say_where_random_numbers_come_from(backend: backends.Backend) -> None:
    count = min(backend.large, 9000)
    x = values(count, 6)
    whole = backends.on_scalar(lambda: fastagg.quantize(x, "bf16", rounding="stochastic", seed=3).data)
    # The array's parts in another order, their places with them.
    order = [(501, count), (0, 13), (13, 501)]
    shuffled = backend.put(np.concatenate([x[begin:end] for begin, end in order]))
    begins = np.cumsum([0, *(end - begin for begin, end in order)])
    stretches = [(int(at), begin) for at, (begin, _) in zip(begins, order, strict=False)]
    out = backend.put(np.zeros(count, np.uint16).view(whole.dtype))
    source = (address(shuffled), 0, Code.FLOAT32, 0)
    result = (source, Code.BFLOAT16, SHIFT, address(out), 0, count, True, (3, 0, 0, 0), 1.0)
    reduce(backend, ([source], 1.0, 0, 0.0, 0, 0.0, False, result, 0, stretches), norm=False)
    assert_same_bits(backend.get(out), np.concatenate([whole[begin:end] for begin, end in order]))
