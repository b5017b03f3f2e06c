"""Integer leaves that are no numbers of the model's own: codes of other quantisers, and serialised bytes.

The largest of several clients' codes stands for nothing, least of all beside the mean of their scales. Refused are

- names of codes and zero points: "qweight", "qzeros", "weight_packed", "zero_point", …
- leaves beside scales of their own name: "w" beside "w_scale" or "w.absmax", "w_blocks" beside "w_scales"
- integers of eight bits other than 0 and 1: at least `_FEW`, or some beside scales in the same module
- one-dimensional uint8, where the update has no floating leaf: a serialised model

Counters, positions, indices and masks are none of these.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple

from fastagg._native.codes import Code, code_of_dtype, name_of
from fastagg._quoting import quoted

_FEW = 16
_EIGHT_BITS = (Code.INT8, Code.UINT8)

# The last part of a name, as GPTQ, AWQ, compressed-tensors, HQQ, EXL2, QuIP, AQLM, torch.ao and ONNX have them.
_CODES = re.compile(
    r"(?:.*_)?(?:qweights?|q_?zeros|packed|packed_params|quantized|int_weight|int_data|qdata)"
    r"|q_weight|q_scale|q_perm|q_invperm|w_q|qidxs|trellis"
)
_ZERO_POINT = re.compile(r"(?:.*_)?(?:zero_?points?|zp)")

# What scales are called behind the name of their codes, or of their module; and what codes add to the name they share.
_SCALE_WORDS = tuple(
    f"{prefix}{word}"
    for prefix in ("", "weight_")
    for word in (
        *("scale", "scales", "scale_inv", "scales_inv", "scale_2", "absmax", "quant_map", "scb"),
        *("zero_point", "zero_points", "codebook", "codebooks", "centroids", "scales_and_zeros"),
    )
)
_ENDING = re.compile(r"[._/]+(?:blocks|packed|quantized|data|codes|indices|q|int8|int4)$")
_SEPARATORS = "._/"


class IntegerLeaf(NamedTuple):
    """An integer or bool leaf of an update, and its place among the names."""

    place: int
    dtype: Any
    shape: tuple[int, ...]


class _Suspect(NamedTuple):
    """A leaf that looks like codes or bytes; unless it is certain, only where it holds more than zeros and ones."""

    leaf: IntegerLeaf
    reason: str
    is_certain: bool


def refuse_codes(
    names: tuple[Any, ...], integers: tuple[IntegerLeaf, ...], values: Callable[[int], Iterable[tuple[str, Any]]]
) -> None:
    """Refuses integer leaves that look like codes or bytes.

    Args:
        names: of all leaves of the update, the floating ones too; None for a single array.
        integers: its integer and bool leaves.
        values: every contributing client's array in a place, with what the message says before the leaf; it is asked
            where names and shapes do not tell.

    Raises:
        ValueError: there is one; the message names it, what it looks like, and the remedy.
    """
    for leaf, reason, is_certain in _suspects(names, integers):
        if is_certain:
            raise _looks_like(names[leaf.place], leaf, reason)
        for who, array in values(leaf.place):
            if not _is_mask(array):
                raise _looks_like(names[leaf.place], leaf, reason, who)


def _looks_like(name: Any, leaf: IntegerLeaf, reason: str, who: str = "") -> ValueError:
    what = "the array" if name is None else f"leaf {quoted(name)}"
    return ValueError(
        f"{who}{what}, {name_of(leaf.dtype)} {tuple(leaf.shape)}: looks like {reason}. Neither their mean nor the "
        "largest of them means anything: decode them first, or choose an integer_policy: max, first or round"
    )


@lru_cache(maxsize=64)  # every round has the same names
def _suspects(names: tuple[Any, ...], integers: tuple[IntegerLeaf, ...]) -> tuple[_Suspect, ...]:
    scales: dict[str, str] = {}
    if any(math.prod(leaf.shape) > 1 for leaf in integers):
        for given in names:
            name = _plain(given)
            if name is not None:
                scales.update(dict.fromkeys(_stems(name), name))
    only_integers = len(integers) == len(names)
    found = (_suspect(leaf, names[leaf.place], scales, only_integers) for leaf in integers)
    return tuple(suspect for suspect in found if suspect is not None)


def _suspect(leaf: IntegerLeaf, given: Any, scales: dict[str, str], only_integers: bool) -> _Suspect | None:
    """What a leaf looks like; None for integers of the model's own."""
    if name_of(leaf.dtype) == "bool":
        return None
    name = _plain(given)
    elements = math.prod(leaf.shape)
    if name is not None:
        last = re.split(r"[./]", name)[-1]
        if _ZERO_POINT.fullmatch(last):
            return _Suspect(leaf, "a quantiser's zero points", True)
        if elements > 1 and _CODES.fullmatch(last):
            return _Suspect(leaf, "a quantiser's codes", True)
        own = next((scales[stem] for stem in (name, _ENDING.sub("", name)) if stem in scales), None)
        if elements > 1 and own is not None:
            return _Suspect(leaf, f"codes whose scales are leaf {quoted(own)}", True)
    if elements <= 1:
        return None
    module = None if name is None else re.sub(r"[^./]*$", "", name).rstrip(_SEPARATORS)
    if module in scales and name is not None and re.split(r"[./]", name)[-1] == "weight":
        return _Suspect(leaf, f"codes whose scales are leaf {quoted(scales[module])}", True)
    if code_of_dtype(leaf.dtype) not in _EIGHT_BITS:
        return None
    if module in scales:
        return _Suspect(leaf, f"codes whose scales are leaf {quoted(scales[module])}", False)
    if only_integers and code_of_dtype(leaf.dtype) == Code.UINT8 and len(leaf.shape) == 1:
        return _Suspect(leaf, "the bytes of something serialised", False)
    return _Suspect(leaf, "codes or bytes, eight-bit integers other than 0 and 1", False) if elements >= _FEW else None


def _plain(name: Any) -> str | None:
    """A name in small letters, without Keras 2's ":0"; Flax's are tuples. None for a leaf without a name."""
    if isinstance(name, tuple) and name and all(isinstance(part, str) for part in name):
        name = ".".join(name)
    return re.sub(r":\d+$", "", name).lower() if isinstance(name, str) else None


def _stems(name: str) -> list[str]:
    """The names of codes or modules whose scales a leaf of this name would be."""
    return [name[: -len(word)].rstrip(_SEPARATORS) for word in _SCALE_WORDS if name.endswith(word)]


def _is_mask(array: Any) -> bool:
    return bool(array.max() <= 1) and bool(array.min() >= 0)
