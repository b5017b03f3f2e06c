"""Names of dtypes and wires, and the native code behind each (`enum class Code` of csrc/core/types.h)."""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache
from typing import Any

from fastagg._quoting import quoted


class Code(IntEnum):
    """How elements are encoded; the values are those of the native enum."""

    FLOAT64 = 0
    FLOAT32 = 1
    FLOAT16 = 2
    BFLOAT16 = 3
    STATE48 = 4
    INT8 = 5
    INT16 = 6
    INT32 = 7
    INT64 = 8
    UINT8 = 9
    UINT16 = 10
    UINT32 = 11
    UINT64 = 12
    WIRE_FP8_E4M3 = 13
    WIRE_FP8_E5M2 = 14
    WIRE_INT8 = 15
    WIRE_INT4 = 16
    WIRE_SIGN = 17
    STATE128 = 18


FLOATS = frozenset({Code.FLOAT64, Code.FLOAT32, Code.FLOAT16, Code.BFLOAT16})

WIRES = {
    "fp32": Code.FLOAT32,
    "bf16": Code.BFLOAT16,
    "fp16": Code.FLOAT16,
    "fp8_e4m3": Code.WIRE_FP8_E4M3,
    "fp8_e5m2": Code.WIRE_FP8_E5M2,
    "int8": Code.WIRE_INT8,
    "int4": Code.WIRE_INT4,
    "sign": Code.WIRE_SIGN,
}

_WIRE_SYNONYMS = {
    "float32": "fp32",
    "float": "fp32",
    "single": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float8_e4m3fn": "fp8_e4m3",
    "float8_e5m2": "fp8_e5m2",
}

_DTYPES = {
    "float64": Code.FLOAT64,
    "fp64": Code.FLOAT64,
    "double": Code.FLOAT64,
    "float32": Code.FLOAT32,
    "fp32": Code.FLOAT32,
    "float": Code.FLOAT32,
    "single": Code.FLOAT32,
    "float16": Code.FLOAT16,
    "fp16": Code.FLOAT16,
    "half": Code.FLOAT16,
    "bfloat16": Code.BFLOAT16,
    "bf16": Code.BFLOAT16,
    "int8": Code.INT8,
    "int16": Code.INT16,
    "int32": Code.INT32,
    "int64": Code.INT64,
    "uint8": Code.UINT8,
    "uint16": Code.UINT16,
    "uint32": Code.UINT32,
    "uint64": Code.UINT64,
    "bool": Code.UINT8,
}

ELEMENT_BYTES = {
    Code.FLOAT64: 8,
    Code.FLOAT32: 4,
    Code.FLOAT16: 2,
    Code.BFLOAT16: 2,
    Code.INT8: 1,
    Code.INT16: 2,
    Code.INT32: 4,
    Code.INT64: 8,
    Code.UINT8: 1,
    Code.UINT16: 2,
    Code.UINT32: 4,
    Code.UINT64: 8,
}


def name_of(dtype: Any) -> str:
    """The plain name of a dtype in any spelling: "float16" for torch.float16, np.float16, np.dtype("f2"), "float16"."""
    if isinstance(dtype, str):
        return dtype
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    return str(name).removeprefix("torch.")


@lru_cache(maxsize=256)
def code_of_dtype(dtype: Any) -> Code | None:
    """The code of an array's dtype, or None if fastagg has none for it."""
    return _DTYPES.get(name_of(dtype))


def float_code(dtype: Any) -> Code:
    """The code of a floating dtype that a user asked for.

    Raises:
        TypeError: it is not one of fp64, fp32, fp16 and bf16.
    """
    if dtype is float:  # Python's, as NumPy takes it
        dtype = "float64"
    code = _DTYPES.get(dtype) if isinstance(dtype, str) else code_of_dtype(dtype)  # no cache keeps anybody's text
    if code not in FLOATS:
        raise TypeError(f"dtype: expected fp64, fp32, fp16 or bf16, got {quoted(dtype)}")
    return code


def wire_name(wire: Any) -> str:
    """The design's name of a wire in any spelling.

    Raises:
        ValueError: there is no such wire.
    """
    name = name_of(wire)
    name = _WIRE_SYNONYMS.get(name, name)
    if name not in WIRES:
        raise ValueError(f"wire: expected one of {', '.join(WIRES)}, got {quoted(wire)}")
    return name


def encoded_bytes(code: Code, count: int) -> int:
    """Bytes of `count` elements of a code, scales left out."""
    if code == Code.WIRE_INT4:
        return -(-count // 2)
    if code == Code.WIRE_SIGN:
        return -(-count // 8)
    return count * ELEMENT_BYTES.get(code, 1)
