"""Quantisation: arrays as fp16, bf16, fp8, int8, int4 or sign codes, and back."""

from __future__ import annotations

from typing import Any

from fastagg._arrays.library import Kind, View
from fastagg._arrays.registry import adopt, kind_of
from fastagg._native import core
from fastagg._native.backend import backend_for
from fastagg._native.codes import FLOATS, WIRES, wire_name
from fastagg._native.operands import CastOperands
from fastagg.quantization.quantized import Quantized, _kept, _overlaps, block_shift, check_block, source_operands
from fastagg.quantization.rounding import random_key


def quantize(
    x: Any,
    wire: Any = "fp16",
    *,
    rounding: str = "nearest",
    seed: int | tuple[int, int, int] | None = None,
    block: int | None = None,
    out: Quantized | None = None,
) -> Quantized:
    """Encodes an array for the wire, in one pass.

    ``data[i] = round(x[i] / scales[i // block])``

    Nearest rounding goes to even; overflow of fp16 and bf16 becomes infinity, NaN stays NaN, subnormals are kept.
    Stochastic rounding is unbiased: up with the probability of the fraction, from Philox4x32-10 (Salmon et al. 2011)
    keyed by (seed, step, tensor, element). The scales of fp8, int8 and int4 are the smallest powers of two at which
    the block's largest value fits.

    Args:
        x: an array of fp32, fp16, bf16 or fp64: NumPy, PyTorch, CuPy or DLPack.
        wire: "fp32", "bf16", "fp16", "fp8_e4m3", "fp8_e5m2", "int8", "int4" or "sign", or a dtype such as
            torch.float16.
        rounding: "nearest" or "stochastic"; fp32 and sign have no stochastic rounding.
        seed: an int, or (seed, step, tensor). None draws one for stochastic rounding; it stays in `.seed`.
        block: elements that share a scale, a power of two from 32 to 4096 (default 256); None for wires without.
        out: a `Quantized` of the same wire, shape and block, to write into.

    Raises:
        TypeError: x is no floating array, or a seed no integer.
        ValueError: an unknown wire or rounding, a wrong block, or an `out` that does not fit.
    """
    wire = wire_name(wire)
    code = WIRES[wire]
    kind, array = adopt(x)
    view = kind.view(array)
    if view.code not in FLOATS:
        raise TypeError(f"x: expected a floating dtype (fp32, fp16, bf16, fp64), got {array.dtype}")
    key = random_key(wire, rounding, seed)
    block = check_block(wire, block)
    if out is None:
        out = Quantized._fresh(kind, view, wire, block, kind.dtype_of(array))
    else:
        _check_out(out, kind, view, wire, block)
    source = (view.address, 0, view.code, 0)
    scales = out._scales.address() if out._scales else 0
    words = (*key, 0) if key else (0, 0, 0, 0)
    shift = block_shift(block)
    operands = (source, code, shift, out._data.address(), scales, view.elements, key is not None, words, 1.0)
    out._nonfinite, out._seed = _cast(operands, kind, view.device), key
    return out


def _cast(operands: CastOperands, kind: Kind, device: str) -> Any:
    """Casts; returns whether something became infinite or NaN, or on a device the array that will tell."""
    backend = backend_for(device)
    if backend is None:
        return not core.cast(operands)
    flag = kind.zeros((1,), kind.dtype_named("int32"), device)
    backend.cast(operands, kind.stream(device), kind.address(flag))
    return flag


def dequantize(q: Quantized, *, out: Any = None) -> Any:
    """Decodes what `quantize` made.

    ``x[i] = data[i] * scales[i // block]``, exact in float32, rounded once more where the dtype is narrower.

    Args:
        q: the codes.
        out: an array of q's shape, floating and of the same library and device, to write into.

    Returns:
        An array of q's dtype, library and device, or `out`.

    Raises:
        TypeError: q is no `Quantized`, or `out` no floating array of the same library.
        ValueError: `out` has another shape or device, cannot be written, or overlaps the codes.
    """
    if not isinstance(q, Quantized):
        raise TypeError(f"q: expected a Quantized, got {type(q).__name__}")
    kind, device = q._kind, q._device
    source = source_operands(q)
    if out is None:
        out = kind.empty(q.shape, q.dtype, device)
    elif kind_of(out) is not kind:
        raise TypeError(f"out: expected a {kind.name} array like the codes, got {type(out).__name__}")
    view = kind.writable_view(out)
    if view.code not in FLOATS:
        raise TypeError(f"out: expected a floating dtype, got {out.dtype}")
    if view.shape != q.shape or view.device != device:
        raise ValueError(f"out: expected shape {q.shape} on {device}, got {view.shape} on {view.device}")
    if _overlaps(q, view):
        raise ValueError("out: overlaps the codes or scales")
    operands = (source, view.code, 0, view.address, 0, view.elements, False, (0, 0, 0, 0), 1.0)
    backend = backend_for(device)
    if backend is None:
        core.cast(operands)
    else:
        backend.cast(operands, kind.stream(device), 0)
    return out


def _check_out(out: Quantized, kind: Kind, view: View, wire: str, block: int | None) -> None:
    """Raises unless `out` can take the codes of `view`."""
    if not isinstance(out, Quantized):
        raise TypeError(f"out: expected a Quantized, got {type(out).__name__}")
    expected = (wire, view.shape, block, kind.name)
    given = (out.wire, out.shape, out.block, out._kind.name)
    if expected != given:
        raise ValueError(f"out: expected (wire, shape, block, library) {expected}, got {given}")
    if out._device != view.device:
        raise ValueError(f"out: expected codes on {view.device}, got {out._device}")
    for kept in _kept(out):
        kept.address()  # it may have none any more
        kind.note_write(kept.array)
    if _overlaps(out, view):
        raise ValueError("out: overlaps x")
