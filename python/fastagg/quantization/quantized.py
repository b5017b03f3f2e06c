"""An array as a wire's codes."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from fastagg._arguments import as_shape
from fastagg._arrays.library import Kept, Kind, View
from fastagg._arrays.registry import adopt, kind_of
from fastagg._native import core
from fastagg._native.codes import WIRES, Code, float_code, wire_name
from fastagg._native.operands import SourceOperands
from fastagg._quoting import quoted
from fastagg.quantization.rounding import random_key

DEFAULT_BLOCK = 256


_DATA_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "int8"}


class Quantized:
    """An array as a wire's codes.

    ``value[i] = data[i] * scales[i // block]``, without the scale for fp32, bf16 and fp16.

    Attributes:
        data: the codes. fp32, bf16, fp16 and int8: arrays of that dtype (bf16 in NumPy without ml_dtypes: uint16).
            fp8: uint8. These have the shape of the original. int4 (two's complement, the first of two in the lower
            half of a byte) and sign (bit i % 8 of byte i // 8 set for a negative value): uint8, one dimension.
        scales: one float32 a block, or None for fp32, bf16 and fp16. Powers of two; for sign the mean magnitude. NaN
            marks an int8, int4 or sign block that held an infinity or a NaN.
        wire: "fp32", "bf16", "fp16", "fp8_e4m3", "fp8_e5m2", "int8", "int4" or "sign".
        shape: the shape of the original.
        dtype: the dtype of the original, which `dequantize` gives back.
        block: elements that share a scale, or None.
        nonfinite: whether a value was, or became, infinite or NaN. On a CUDA device the first look waits for it.
        seed: the (seed, step, tensor) of stochastic rounding, or None.
    """

    __slots__ = (
        *("_block", "_data", "_device", "_dtype", "_encoding", "_kind", "_nonfinite"),
        *("_scales", "_seed", "_shape", "_wire"),
    )

    def __init__(
        self,
        data: Any,
        scales: Any,
        *,
        wire: str,
        shape: tuple[int, ...],
        dtype: Any = "float32",
        block: int | None = None,
        nonfinite: bool = False,
        seed: tuple[int, int, int] | None = None,
    ) -> None:
        """From codes that were sent as plain arrays; `quantize` makes them.

        Raises:
            TypeError, ValueError: the arrays are not what the wire, the shape and the block ask for, or a field is none
                that `quantize` would make.
        """
        kind = kind_of(data)
        if kind is None:
            raise TypeError(f"data: expected an array, got {type(data).__name__}")
        self._kind, self._wire, self._shape = kind, wire_name(wire), as_shape(shape)
        self._dtype = kind.dtype_for(float_code(dtype))
        if not isinstance(nonfinite, (bool, np.bool_)):
            raise TypeError(f"nonfinite: expected a bool, got {nonfinite!r}")
        self._nonfinite: Any = bool(nonfinite)  # or an array of one int32 on the device that tells
        self._seed = None if seed is None else random_key(self._wire, "stochastic", seed)
        codes = kind.view(data)
        factors = None if scales is None else adopt(scales)[0].view(scales)
        self._block = _check_layout(kind, self._wire, self._shape, block, codes, factors)
        self._keep(codes.owner, None if factors is None else factors.owner, codes.device)

    @classmethod
    def _fresh(cls, kind: Kind, view: View, wire: str, block: int | None, dtype: Any) -> Quantized:
        """New arrays for the codes of an array, their contents undefined."""
        layout = codes_layout(kind, wire, view.shape, block)
        q = cls.__new__(cls)
        q._kind, q._wire, q._shape, q._dtype, q._block = kind, wire, view.shape, dtype, block
        q._nonfinite, q._seed = False, None
        scales = None
        if block is not None:
            scales = kind.empty((layout.scales,), _named_dtype(kind, "float32"), view.device)
        q._keep(kind.empty(layout.shape, layout.dtype, view.device), scales, view.device)
        return q

    def _keep(self, data: Any, scales: Any, device: str) -> None:
        """Keeps arrays in objects of our own: a caller who changes the shape or dtype of his changes nothing here."""
        self._data, self._scales = self._kind.keep(data), None if scales is None else self._kind.keep(scales)
        self._device, self._encoding = device, (int(WIRES[self._wire]), block_shift(self._block))

    @property
    def wire(self) -> str:
        """How the array is encoded."""
        return self._wire

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the original."""
        return self._shape

    @property
    def dtype(self) -> Any:
        """The dtype of the original."""
        return self._dtype

    @property
    def block(self) -> int | None:
        """Elements that share a scale, or None."""
        return self._block

    @property
    def seed(self) -> tuple[int, int, int] | None:
        """The key of stochastic rounding, or None."""
        return self._seed

    @property
    def nonfinite(self) -> bool:
        """Whether a value was, or became, infinite or NaN."""
        if not isinstance(self._nonfinite, bool):
            self._nonfinite = bool(self._kind.to_numpy(self._nonfinite)[0])
        return self._nonfinite

    @property
    def data(self) -> Any:
        """The codes."""
        return self._kind.alias(self._data.array)

    @property
    def scales(self) -> Any:
        """One float32 a block, or None."""
        return None if self._scales is None else self._kind.alias(self._scales.array)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and scales."""
        return sum(int(kept.array.nbytes) for kept in _kept(self))

    def __reduce__(self) -> tuple[Any, ...]:
        names = ("wire", "shape", "dtype", "block", "nonfinite", "seed")
        return partial(Quantized, **{name: getattr(self, name) for name in names}), (self.data, self.scales)

    def __repr__(self) -> str:
        return f"Quantized(wire={self.wire!r}, shape={self.shape}, dtype={self.dtype}, nbytes={self.nbytes})"


def source_operands(q: Quantized) -> SourceOperands:
    """A `Quantized` as the native code reads it, where it lies now.

    Raises:
        ValueError: its memory has been taken away.
    """
    return q._data.address(), q._scales.address() if q._scales else 0, *q._encoding


def device_of(q: Quantized) -> str:
    """Where the codes lie."""
    return q._device


def block_shift(block: int | None) -> int:
    """log2 of a block; 0 without one."""
    return block.bit_length() - 1 if block else 0


def _kept(q: Quantized) -> list[Kept]:
    return [q._data] if q._scales is None else [q._data, q._scales]


def _overlaps(q: Quantized, view: View) -> bool:
    """Whether an array shares memory with the codes or the scales."""
    begin, end = view.span
    return any(kept.address() < end and begin < kept.address() + int(kept.array.nbytes) for kept in _kept(q))


def _has_scales(wire: str) -> bool:
    return WIRES[wire] >= Code.WIRE_FP8_E4M3


def check_block(wire: str, block: int | None) -> int | None:
    """The block of a wire, the default one for None.

    Raises:
        ValueError: it is no power of two in range, or the wire has no blocks.
    """
    if not _has_scales(wire):
        if block is not None:
            raise ValueError(f"block: {wire} has no scales, so no block, got {quoted(block)}")
        return None
    if block is None:
        return DEFAULT_BLOCK
    low, high = core.MINIMUM_BLOCK, core.MAXIMUM_BLOCK
    block = int(block) if isinstance(block, np.integer) else block
    if not isinstance(block, int) or not low <= block <= high or block & (block - 1):
        raise ValueError(f"block: expected a power of two from {low} to {high}, got {quoted(block)}")
    return block


class CodesLayout(NamedTuple):
    """The arrays that hold an array's codes."""

    shape: tuple[int, ...]
    dtype: Any
    scales: int  # how many float32, 0 for none


def codes_layout(kind: Kind, wire: str, shape: tuple[int, ...], block: int | None) -> CodesLayout:
    """How an array of that shape is laid out on a wire."""
    count, per_byte = math.prod(shape), {"int4": 2, "sign": 8}.get(wire)
    data_shape = shape if per_byte is None else (-(-count // per_byte),)
    return CodesLayout(data_shape, _data_dtype(kind, wire), -(-count // block) if block else 0)


def _data_dtype(kind: Kind, wire: str) -> Any:
    try:
        return _named_dtype(kind, _DATA_DTYPES.get(wire, "uint8"))
    except TypeError:  # NumPy's bf16 without ml_dtypes
        return _named_dtype(kind, "uint16")


def _named_dtype(kind: Kind, name: str) -> Any:
    return kind.dtype_for(Code[name.upper()])


def _check_layout(
    kind: Kind, wire: str, shape: tuple[int, ...], block: int | None, data: View, scales: View | None
) -> int | None:
    """The block, as an integer.

    Raises:
        TypeError, ValueError: the arrays do not hold what the wire, the shape and the block ask for.
    """
    if _has_scales(wire) and block is None:
        raise ValueError(f"block: expected that of the {wire} codes, got None")
    block = check_block(wire, block)
    layout = codes_layout(kind, wire, shape, block)
    if data.shape != layout.shape:
        expected = f"expected shape {quoted(layout.shape)} for {wire} of {quoted(shape)}"
        raise ValueError(f"data: {expected}, got {data.shape}")
    if data.owner.dtype != layout.dtype:
        raise TypeError(f"data: expected {layout.dtype} for {wire}, got {data.owner.dtype}")
    if block is None:
        if scales is not None:
            raise ValueError(f"scales: {wire} has none")
        return None
    if scales is None or kind_of(scales.owner) is not kind:
        got = type(None if scales is None else scales.owner).__name__
        raise TypeError(f"scales: expected a {kind.name} float32 array, got {got}")
    if scales.code != Code.FLOAT32 or scales.shape != (layout.scales,) or scales.device != data.device:
        got = f"{scales.owner.dtype} {scales.shape}"
        raise ValueError(f"scales: expected {layout.scales} float32 on {data.device}, got {got}")
    return block
