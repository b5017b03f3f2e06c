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
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from fastagg._codes import Code, code_of_dtype, name_of

_FEW = 16
_EIGHT_BITS = (Code.INT8, Code.UINT8)

# The last part of a name, as GPTQ, AWQ, compressed-tensors, HQQ, EXL2, QuIP, AQLM, torch.ao and ONNX have them.
_CODES = re.compile(
    r"(?:.*_)?(?:qweights?|q_?zeros|packed|packed_params|quantized|int_weight|int_data|qdata)"
    r"|q_weight|q_scale|q_perm|w_q|qidxs"
)
_ZERO_POINT = re.compile(r"(?:.*_)?(?:zero_?points?|zp)")

# What follows the leaf's own name, or its module's, in that of its scales; and what codes add to the name they share.
_SCALES = re.compile(
    r"[._/]*(?:(?:weight_)?scales?(?:_inv|_2)?|(?:weight_)?absmax|quant_map|scb|(?:weight_)?zero_?points?|codebooks?)"
)
_ENDING = re.compile(r"[._/]+(?:blocks|packed|quantized|data|codes|q|int8|int4)$")


class IntegerLeaf(NamedTuple):
    """An integer leaf of an update; `values` gives one client's array, which is asked for where names do not tell."""

    name: Any
    dtype: Any
    shape: tuple[int, ...]
    values: Callable[[], Any]


def refuse_codes(names: Sequence[Any], integers: Iterable[IntegerLeaf]) -> None:
    """Refuses integer leaves that look like codes or bytes.

    Args:
        names: of all leaves of the update, the floating ones too.
        integers: its integer and bool leaves.

    Raises:
        ValueError: there is one; the message names it, what it looks like, and the remedy.
    """
    listed = list(integers)
    plain = {_plain(name): name for name in names if isinstance(name, str)} if listed else {}
    for leaf in listed:
        reason = _reason(leaf, plain, only_integers=len(listed) == len(names))
        if reason is not None:
            what = "the array" if leaf.name is None else f"leaf {leaf.name!r}"
            raise ValueError(
                f"{what}, {name_of(leaf.dtype)} {tuple(leaf.shape)}: looks like {reason}, of which neither a mean nor "
                "the largest stands for anything: decode it before, or say by integer_policy= (max, first or round) "
                "what becomes of integers"
            )


def _reason(leaf: IntegerLeaf, plain: dict[str, str], only_integers: bool) -> str | None:
    """What a leaf looks like; None for integers of the model's own."""
    if name_of(leaf.dtype) == "bool":
        return None
    name = _plain(leaf.name) if isinstance(leaf.name, str) else None
    several = math.prod(leaf.shape) > 1
    if name is not None:
        last = re.split(r"[./]", name)[-1]
        if _ZERO_POINT.fullmatch(last):
            return "a quantiser's zero points"
        if several and _CODES.fullmatch(last):
            return "a quantiser's codes"
        if several and (scales := _scales_of({name, _ENDING.sub("", name)}, plain)):
            return f"codes whose scales are leaf {scales!r}"
    if code_of_dtype(leaf.dtype) not in _EIGHT_BITS or not several or _is_mask(leaf.values()):
        return None
    module = None if name is None else re.sub(r"[^./]*$", "", name)
    if module is not None and (scales := _scales_of({module}, plain)):
        return f"codes whose scales are leaf {scales!r}"
    if only_integers and code_of_dtype(leaf.dtype) == Code.UINT8 and len(leaf.shape) == 1:
        return "the bytes of something serialised"
    return "codes or bytes, eight-bit integers other than 0 and 1" if math.prod(leaf.shape) >= _FEW else None


def _plain(name: str) -> str:
    """A name in small letters, without Keras 2's ":0"."""
    return re.sub(r":\d+$", "", name).lower()


def _scales_of(stems: set[str], plain: dict[str, str]) -> str | None:
    """The first leaf whose name is one of the stems and a word for scales."""
    for other, name in plain.items():
        if any(other.startswith(stem) and _SCALES.fullmatch(other, len(stem)) for stem in stems):
            return name
    return None


def _is_mask(array: Any) -> bool:
    return bool(((array == 0) | (array == 1)).all())
