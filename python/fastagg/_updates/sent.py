"""The model that a server has sent, beside what its clients made of it.

Who rounds an upload rounds what he has not trained, too. `Q(y) - x` of such a leaf is a rounding error, which an
adaptive optimiser takes for a gradient; `Q(y) - Q(x)` is zero. And where the model itself is infinite, as a causal mask
is, a client is not at fault for the same infinity.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np

from fastagg._arrays.library import Kind, View
from fastagg._arrays.registry import adopt
from fastagg._native.codes import FLOATS, Code
from fastagg._native.operands import SourceOperands
from fastagg._updates.buffers import is_buffer
from fastagg._updates.structure import Structure
from fastagg.quantization.cast import dequantize, quantize
from fastagg.quantization.quantized import Quantized, source_operands

# The wires on which every value of a dtype stays what it is.
_EXACT_WIRES = {
    Code.FLOAT64: frozenset[str](),
    Code.FLOAT32: frozenset({"fp32"}),
    Code.FLOAT16: frozenset({"fp32", "fp16"}),
    Code.BFLOAT16: frozenset({"fp32", "bf16"}),
}

Rounding = tuple[str, int | None, tuple[int, int, int] | None]
"""A wire, its block, and the key of stochastic rounding."""


class Sent(NamedTuple):
    """A model that was sent to clients.

    Attributes:
        model: of the structure, shapes, libraries and devices of the updates.
        buffers: names of leaves whose plain mean counts, beside those that `is_buffer` knows.
        unrounded: whether the roundings of quantised leaves are taken out of the mean.
    """

    model: Any
    buffers: Collection[Any] = ()
    unrounded: bool = True


class Correction(NamedTuple):
    """What joins the weighted sum of a leaf: sources with their weights, and what keeps them alive."""

    sources: list[SourceOperands]
    weights: list[float]
    owners: list[Any]


class SentLeaves:
    """The leaves of a model that was sent."""

    def __init__(self, sent: Sent, structure: Structure, like: Iterable[tuple[Kind, tuple[int, ...], str]]) -> None:
        """Checks the model against the updates, of each of whose leaves `like` has the library, shape and device.

        Raises:
            TypeError, ValueError: it does not fit; the message names the leaf.
        """
        self._names, self._sent = structure.names or (None,), sent
        self._views: list[View] = []
        self._codes: dict[tuple[int, str, int | None, bool], Quantized] = {}
        self._finite: dict[int, Any] = {}  # leaves that hold infinities, with zeros in their places
        leaves = structure.leaves(sent.model, "sent", "the updates'")
        for index, (leaf, (kind, shape, device)) in enumerate(zip(leaves, like, strict=True)):
            try:
                own, array = adopt(dequantize(leaf) if isinstance(leaf, Quantized) else leaf)
                view = own.view(array)
                if own is not kind:
                    raise TypeError(f"expected a {kind.name} array like the updates', got {own.name}")
                if (view.shape, view.device) != (shape, device):
                    raise ValueError(
                        f"expected shape {shape} on {device} like the updates', got {view.shape} on {view.device}"
                    )
            except (TypeError, ValueError) as error:
                raise type(error)(f"sent, {structure.leaf_name(index)}: {error}") from None
            self._views.append(view)

    @property
    def unrounds(self) -> bool:
        """Whether the roundings of quantised leaves are taken out of the mean."""
        return self._sent.unrounded

    def excuses(self, index: int, leaf: Any) -> bool:
        """Whether a client's leaf holds no NaN, and infinities only where the model has the same."""
        return same_infinities(dequantize(leaf) if isinstance(leaf, Quantized) else leaf, self._views[index].owner)

    def is_infinite(self, index: int) -> bool:
        """Whether the model's leaf holds an infinity or a NaN."""
        return bool(is_nonfinite(self._views[index].owner).any())

    def correction(self, index: int, leaves: Sequence[Any], weights: Sequence[float]) -> Correction | None:
        """What makes a leaf's ``sum(weight * Q(y))`` the sum of ``weight * (x + Q(y) - Q(x))``; None for nothing.

        Q is each quantised update's own rounding; updates that round alike share one source. Other updates count as
        they are, and so do those on whose wire the model itself overflows.
        """
        view = self._views[index]
        if view.code not in FLOATS or not self._sent.unrounded:
            return None
        shares: dict[Rounding, list[float]] = {}
        for leaf, weight in zip(leaves, weights, strict=True):
            if loses(leaf, view.code):
                shares.setdefault((leaf.wire, leaf.block, leaf.seed), []).append(weight)
        if not shares or is_buffer(self._names[index], view.owner.dtype, self._sent.buffers):
            return None
        codes = [self._quantized(index, rounding) for rounding in shares]
        if index not in self._finite and any(code.nonfinite for code in codes):
            self._finite[index] = with_zeros(view.owner, is_nonfinite(view.owner))
            codes = [self._quantized(index, rounding) for rounding in shares]
        x = self._finite.get(index, view.owner)
        parts = [(code, share) for code, share in zip(codes, shares.values(), strict=True) if not code.nonfinite]
        if not parts:
            return None
        plain, is_wide = adopt(x)[0].view(x), view.code == Code.FLOAT64
        terms = _terms((plain.address, 0, plain.code, 0), [weight for _, share in parts for weight in share], is_wide)
        for code, share in parts:
            terms += _terms(source_operands(code), [-weight for weight in share], is_wide)
        return Correction([source for source, _ in terms], [weight for _, weight in terms], [x, *codes])

    def _quantized(self, index: int, rounding: Rounding) -> Quantized:
        """The model's leaf as a client would round it; without a seed it is kept for later updates."""
        wire, block, seed = rounding
        x = self._finite.get(index, self._views[index].owner)
        if seed is not None:  # of one update alone
            return quantize(x, wire, rounding="stochastic", seed=seed, block=block)
        key = index, wire, block, index in self._finite
        if key not in self._codes:
            self._codes[key] = quantize(x, wire, block=block)
        return self._codes[key]

    def check_overlap(self, out: Any, structure: Structure) -> None:
        """Raises ValueError where a result would be written over the model, which is still to be read."""
        for index, array in enumerate(structure.leaves(out, "out")):
            begin, end = adopt(array)[0].view(array).span
            if any(view.span[0] < end and begin < view.span[1] for view in self._views):
                raise ValueError(f"out, {structure.leaf_name(index)}: overlaps the sent model")


def _terms(source: SourceOperands, weights: Sequence[float], is_wide: bool) -> list[tuple[SourceOperands, float]]:
    """A source with the sum of its weights; where sums are wider than a float, once more with what that lacks."""
    total = math.fsum(weights)
    rest = math.fsum((*weights, -total)) if is_wide else 0.0
    return [(source, total), (source, rest)] if rest else [(source, total)]


_rounded: WeakValueDictionary[int, Any] = WeakValueDictionary()


def note_rounded(array: Any, is_rounded: bool) -> None:
    """Remembers whether an array is a mean of quantised leaves from which their roundings were not taken out."""
    if is_rounded:
        with suppress(TypeError):  # an array that no weak reference can be made of is not warned of
            _rounded[id(array)] = array
    elif _rounded:
        _rounded.pop(id(array), None)


def holds_roundings(array: Any) -> bool:
    """Whether `note_rounded` remembers that it does."""
    return bool(_rounded) and _rounded.get(id(array)) is array


def loses(leaf: Any, code: int) -> bool:
    """Whether a client's leaf is quantised so that not every value of a dtype stays what it is."""
    return isinstance(leaf, Quantized) and leaf.wire not in _EXACT_WIRES[Code(code)]


def rounded_like(x: Any, leaf: Any) -> Any:
    """An array as the wire of a client's leaf rounds it; as it is where the leaf is not quantised."""
    if not isinstance(leaf, Quantized):
        return x
    rounding = "nearest" if leaf.seed is None else "stochastic"
    codes = quantize(x, leaf.wire, rounding=rounding, seed=leaf.seed, block=leaf.block)
    return x if codes.nonfinite else dequantize(codes)


def is_nonfinite(array: Any) -> Any:
    """Where an array of any library is infinite or NaN."""
    with np.errstate(invalid="ignore"):
        return array - array != 0


def same_infinities(array: Any, model: Any) -> bool:
    """Whether an array is finite but where it equals the model."""
    return not (is_nonfinite(array) & (array != model)).any()


def with_zeros(array: Any, where: Any) -> Any:
    """A copy with zeros in some places."""
    copied = array.detach().clone() if hasattr(array, "detach") else array.copy()
    copied[where] = 0
    return copied
