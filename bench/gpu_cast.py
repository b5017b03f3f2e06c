"""Casts on a CUDA device: an array and its codes, the right answer, and who casts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

import fastagg
import gpu_machine
from gpu_cases import FASTAGG, Case
from gpu_subject import Contender
from gpu_timing import Call

_BLOCK = 256
_LIMITS = {"int8": 127, "int4": 7}
# Half a step of a fp16 value: relative to it, and where it is subnormal.
_HALF_STEP, _HALF_SMALLEST = 2.0**-11, 2.0**-25
# Half a step of a scale, and what a division that is rounded may add.
_HALF = 0.5 * (1 + 1e-6)
# Elements that are checked at a time.
_PIECE = 1 << 26


class Piece(NamedTuple):
    """Neighbouring elements of a cast, whole blocks of them."""

    x: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor | None
    decoded: torch.Tensor


class Cast:
    """One array with its codes, of which the operation makes the one from the other."""

    def __init__(self, case: Case, seed: int, quick: bool) -> None:
        self.case, count = case, case.elements(quick)
        generator = torch.Generator(gpu_machine.DEVICE).manual_seed(seed)
        self.x = torch.empty(count, device=gpu_machine.DEVICE).normal_(generator=generator)
        self.codes = fastagg.quantize(self.x, case.kind, block=_BLOCK if case.kind in _LIMITS else None)
        self.decoded = torch.empty_like(self.x)

    @property
    def bytes(self) -> int:
        """Of the array and its codes and scales."""
        return int(self.x.nbytes) + self.codes.nbytes

    @property
    def whole(self) -> Piece:
        """All of it."""
        return Piece(self.x, self.codes.data, self.codes.scales, self.decoded)

    def spoil(self) -> None:
        """See `Subject`."""
        if self.case.operation == "dequantize":
            self.decoded.fill_(math.nan)
            return
        self.codes.data.fill_(math.nan if self.case.kind == "fp16" else 85)
        if self.codes.scales is not None:
            self.codes.scales.fill_(math.nan)

    def check(self, tolerance: float) -> None:
        """See `Subject`."""
        for piece in self._pieces():
            if self.case.operation == "quantize":
                _check_codes(piece, self.case.kind)
            else:
                assert torch.equal(piece.decoded, _values(piece, self.case.kind).float()), "decoded to something else"

    def _pieces(self) -> Iterator[Piece]:
        per_code = 2 if self.case.kind == "int4" else 1
        for begin in range(0, self.x.numel(), _PIECE):
            end = begin + _PIECE
            codes = self.codes.data[begin // per_code : end // per_code]
            scales = None if self.codes.scales is None else self.codes.scales[begin // _BLOCK : end // _BLOCK]
            yield Piece(self.x[begin:end], codes, scales, self.decoded[begin:end])


def _values(piece: Piece, wire: str) -> torch.Tensor:
    """What codes stand for, in float64."""
    if piece.scales is None:
        return piece.codes.double()
    codes = _unpacked(piece.codes) if wire == "int4" else piece.codes
    return (codes.view(-1, _BLOCK).double() * piece.scales[:, None]).view(-1)


def _check_codes(piece: Piece, wire: str) -> None:
    """Asserts that codes are nearest to the values, by the smallest scale at which a block's largest one fits."""
    x = piece.x.double()
    error = (_values(piece, wire) - x).abs_()
    if piece.scales is None:
        allowed = _HALF_STEP * x.abs() + _HALF_SMALLEST
    else:
        scales = piece.scales.double()
        assert bool((x.view(-1, _BLOCK).abs().amax(1) >= scales * _LIMITS[wire] / 2).all()), "a scale is too large"
        allowed = (scales * _HALF).repeat_interleave(_BLOCK)
    assert bool((error <= allowed).all()), f"off by {float(error.max()):.3g}"


def _encode(piece: Piece, wire: str) -> None:
    """What one writes by hand: a power of two a block, at which its largest value fits."""
    assert piece.scales is not None
    limit = _LIMITS[wire]
    blocks = piece.x.view(-1, _BLOCK)
    scales = torch.exp2(torch.ceil(torch.log2(blocks.abs().amax(1) / limit)))
    codes = torch.round(blocks / scales[:, None]).clamp_(-limit, limit).to(torch.int8)
    piece.scales.copy_(scales)
    piece.codes.copy_(_packed(codes.view(-1)) if wire == "int4" else codes.view(-1))


def _decode(piece: Piece, wire: str) -> None:
    """What one writes by hand."""
    assert piece.scales is not None
    codes = _unpacked(piece.codes) if wire == "int4" else piece.codes
    torch.mul(codes.view(-1, _BLOCK), piece.scales[:, None], out=piece.decoded.view(-1, _BLOCK))


def _packed(codes: torch.Tensor) -> torch.Tensor:
    """Pairs of int4 codes as bytes, the first one low."""
    pairs = codes.view(torch.uint8).view(-1, 2)
    return (pairs[:, 0] & 15) | (pairs[:, 1] << 4)


def _unpacked(codes: torch.Tensor) -> torch.Tensor:
    """Bytes as pairs of int4 codes."""
    low = (codes << 4).view(torch.int8) >> 4
    return torch.stack((low, codes.view(torch.int8) >> 4), 1).view(-1)


def _fastagg(cast: Cast) -> Call:
    if cast.case.operation == "quantize":
        return lambda: fastagg.quantize(cast.x, cast.case.kind, out=cast.codes)
    return lambda: fastagg.dequantize(cast.codes, out=cast.decoded)


def _copy(cast: Cast) -> Call:
    source, out = (cast.x, cast.codes.data) if cast.case.operation == "quantize" else (cast.codes.data, cast.decoded)
    return lambda: out.copy_(source)


def _by_hand(cast: Cast) -> Callable[[], None]:
    piece, wire = cast.whole, cast.case.kind
    function = _encode if cast.case.operation == "quantize" else _decode
    return lambda: function(piece, wire)


def _compiled(cast: Cast) -> Call:
    return torch.compile(_by_hand(cast), fullgraph=True, dynamic=False)


def _has_scales(case: Case) -> bool:
    return case.kind in _LIMITS


CONTENDERS = [
    Contender(FASTAGG, FASTAGG, _fastagg),
    Contender("torch copy_", "torch", _copy, lambda case: not _has_scales(case), is_eager=True),
    Contender("torch by hand", "torch", _by_hand, _has_scales, is_eager=True),
    Contender("torch.compile of it", "torch", _compiled, _has_scales),
]
