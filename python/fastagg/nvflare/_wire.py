"""Quantised parameters as they travel: plain arrays for NVFlare's serialisation, and a plain description of each."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
from nvflare.apis.dxo import MetaKey

from fastagg._arguments import as_shape
from fastagg._arrays.registry import adopt, kind_of
from fastagg._native.codes import ELEMENT_BYTES, FLOATS, Code, code_of_dtype, name_of
from fastagg._quoting import quoted
from fastagg.quantization.cast import quantize
from fastagg.quantization.quantized import Quantized

ALGORITHM = "fastagg"  # of MetaKey.PROCESSED_ALGORITHM
DESCRIPTIONS = "fastagg_quantized"  # key of the meta: for each quantised leaf, what describes its codes
WIRE_BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "fp8_e4m3": 8, "fp8_e5m2": 8, "int8": 8, "int4": 4, "sign": 1}

_FIELDS = {"wire", "shape", "dtype", "block", "scales", "nonfinite"}


def pack(
    leaves: Mapping[str, Any], wire: str, rounding: str, block: int | None
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The leaves with codes in the place of floating arrays that are wider than the wire, and what describes those."""
    packed, descriptions = {}, {}
    for name, leaf in leaves.items():
        if not _is_wider(leaf, wire):
            packed[name] = leaf
            continue
        quantized = quantize(leaf, wire, rounding=rounding, block=block)
        packed[name] = _as_plain(quantized.data)
        descriptions[name] = {
            "wire": wire,
            "shape": list(quantized.shape),
            "dtype": name_of(quantized.dtype),
            "block": quantized.block,
            "scales": quantized.scales,
            "nonfinite": quantized.nonfinite,
        }
    return packed, descriptions


def unpack(leaves: Mapping[str, Any], descriptions: Any) -> dict[str, Any]:
    """The leaves with a `Quantized` over the same memory in the place of codes.

    Raises:
        TypeError, ValueError: codes or scales do not fit their description; the message names the leaf.
    """
    if not isinstance(descriptions, Mapping):
        raise TypeError(f"meta {DESCRIPTIONS!r}: expected a dict, got {type(descriptions).__name__}")
    return {
        name: _unpack_leaf(name, leaf, descriptions[name]) if name in descriptions else leaf
        for name, leaf in leaves.items()
    }


def check_processing(meta: Mapping[str, Any]) -> None:
    """Raises ValueError if something other than `QuantizeFilter` has processed the parameters and nothing undid it."""
    algorithm = meta.get(MetaKey.PROCESSED_ALGORITHM)
    if algorithm not in (None, ALGORITHM):
        raise ValueError(
            f"the parameters are processed by {quoted(algorithm)}: undo that in a filter before the aggregator"
        )


def _unpack_leaf(name: str, codes: Any, description: Any) -> Quantized:
    if not isinstance(description, Mapping) or description.keys() != _FIELDS:
        raise ValueError(f"leaf {quoted(name)}: expected a description of {sorted(_FIELDS)}, got {quoted(description)}")
    fields = dict(description)
    try:
        if not isinstance(fields["nonfinite"], (bool, np.bool_)):
            raise TypeError(f"nonfinite: expected True or False, got {quoted(fields['nonfinite'])}")
        fields["nonfinite"], shape = bool(fields["nonfinite"]), tuple(map(operator.index, fields.pop("shape")))
        quantized = Quantized(_as_codes(codes, fields["wire"]), fields.pop("scales"), shape=shape, **fields)
        as_shape(shape)
    except (TypeError, ValueError) as error:
        raise type(error)(f"leaf {quoted(name)}: {error}") from None
    return quantized


def _is_wider(leaf: Any, wire: str) -> bool:
    """Whether a leaf is a floating array that the wire makes smaller."""
    if kind_of(leaf) is None:
        return False
    code = code_of_dtype(leaf.dtype)
    return code in FLOATS and 8 * ELEMENT_BYTES[code] > WIRE_BITS[wire]


def _as_plain(codes: Any) -> Any:
    """Codes in a dtype that NumPy's file format has: bfloat16 goes as its bits."""
    if isinstance(codes, np.ndarray) and code_of_dtype(codes.dtype) == Code.BFLOAT16:
        return codes.view(np.uint16)
    return codes


def _as_codes(plain: Any, wire: Any) -> Any:
    """What `_as_plain` was given."""
    if wire != "bf16" or not isinstance(plain, np.ndarray) or plain.dtype != np.uint16:
        return plain
    try:
        return plain.view(adopt(plain)[0].dtype_for(Code.BFLOAT16))
    except TypeError:  # without ml_dtypes a Quantized holds the bits too
        return plain
