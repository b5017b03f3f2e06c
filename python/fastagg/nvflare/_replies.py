"""One client's reply, checked: its weight, its leaves, and the form that it has to share with the others'."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from nvflare.app_common.abstract.fl_model import FLModel, MetaKey, ParamsType
from nvflare.app_common.app_constant import AppConstants

from fastagg._codes import code_of_dtype, name_of
from fastagg._tensor import adopt
from fastagg.nvflare._metrics import as_number
from fastagg.nvflare._wire import DESCRIPTIONS, check_processing, unpack
from fastagg.quantization import Quantized


class ReplyForm(NamedTuple):
    """What replies must share to be averaged: FULL or DIFF, and every leaf's name, shape and dtype."""

    params_type: str
    leaves: frozenset[tuple[str, tuple[int, ...], str]]

    def difference_from(self, other: ReplyForm) -> str:
        """In what a reply of this form differs from the others', which have the other one."""
        if self.params_type != other.params_type:
            return f"expected params_type {other.params_type} like most replies', got {self.params_type}"
        mine = {name: (shape, dtype) for name, shape, dtype in self.leaves}
        theirs = {name: (shape, dtype) for name, shape, dtype in other.leaves}
        for what, names in (("missing", theirs.keys() - mine.keys()), ("unexpected", mine.keys() - theirs.keys())):
            if names:
                return f"{what} leaves {', '.join(repr(name) for name in sorted(names, key=str)[:5])}"
        name = min((name for name in mine if mine[name] != theirs[name]), key=str)
        (shape, dtype), (other_shape, other_dtype) = mine[name], theirs[name]
        return f"leaf {name!r}: expected {other_dtype} {other_shape} like most replies', got {dtype} {shape}"


def client_of(model: FLModel) -> str | None:
    """The name of the client that sent a reply, if the workflow has noted it."""
    name = (model.meta or {}).get("client_name")
    return name if isinstance(name, str) and name not in ("", AppConstants.CLIENT_UNKNOWN) else None


def number_of_steps(model: FLModel) -> float:
    """The weight that a reply states: its steps in this round, 1 if it states none.

    Raises:
        TypeError, ValueError: it is no finite number of 0 or more.
    """
    steps = (model.meta or {}).get(MetaKey.NUM_STEPS_CURRENT_ROUND)
    return as_weight(1 if steps is None else steps, MetaKey.NUM_STEPS_CURRENT_ROUND)


def as_weight(value: Any, what: str) -> float:
    """A weight as a float.

    Raises:
        TypeError, ValueError: it is no finite number of 0 or more.
    """
    number = as_number(value)
    if number is None:
        raise TypeError(f"{what}: expected a number, got {value!r}")
    if not 0 <= number < math.inf:
        raise ValueError(f"{what}: expected a finite number of 0 or more, got {value!r}")
    return number


def leaves_of(model: FLModel, exclude: re.Pattern[str] | None) -> dict[str, Any]:
    """A reply's leaves by name: arrays as they are, `Quantized` where a filter has quantised, files read.

    Raises:
        TypeError, ValueError: there are none, or one cannot be read; the message names it.
    """
    params, meta = model.params, model.meta or {}
    if not isinstance(params, Mapping):
        raise TypeError(f"params: expected a dict of arrays, got {type(params).__name__}")
    check_processing(meta)
    leaves = {
        name: _in_memory(name, leaf)
        for name, leaf in params.items()
        if exclude is None or not exclude.search(str(name))
    }
    if not leaves:
        raise ValueError("params: expected at least one array, got none")
    return unpack(leaves, meta[DESCRIPTIONS]) if DESCRIPTIONS in meta else leaves


def is_on_disk(model: FLModel) -> bool:
    """Whether a leaf is a reference to a file, as NVFlare's tensor disk offload makes them."""
    return any(callable(getattr(leaf, "materialize", None)) for leaf in model.params.values())


def form_of(model: FLModel, leaves: Mapping[str, Any]) -> ReplyForm:
    """The form of a reply.

    Raises:
        TypeError: a leaf is no array of a dtype that fastagg averages.
    """
    described = []
    for name, leaf in leaves.items():
        if isinstance(leaf, Quantized):
            described.append((name, leaf.shape, name_of(leaf.dtype)))
            continue
        try:
            array = adopt(leaf)[1]
        except TypeError as error:
            raise TypeError(f"leaf {name!r}: {error}") from None
        if code_of_dtype(array.dtype) is None:
            raise TypeError(f"leaf {name!r}: dtype {name_of(array.dtype)} is not supported")
        described.append((name, tuple(array.shape), name_of(array.dtype)))
    return ReplyForm(ParamsType(model.params_type or ParamsType.FULL).value, frozenset(described))


def _in_memory(name: str, leaf: Any) -> Any:
    if isinstance(leaf, (int, float)):
        return np.asarray(leaf)
    materialize = getattr(leaf, "materialize", None)
    if not callable(materialize):
        return leaf
    try:
        return materialize()
    except Exception as error:  # safetensors' errors share no base class with others
        raise ValueError(f"leaf {name!r}: its file cannot be read: {error}") from error
