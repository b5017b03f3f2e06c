"""One client's reply, checked: its weight, its leaves, and the form that it has to share with the others'."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.fl_model import FLModel, MetaKey, ParamsType
from nvflare.app_common.abstract.model import ModelLearnableKey
from nvflare.app_common.app_constant import AppConstants

from fastagg._arrays.registry import adopt
from fastagg._native.codes import code_of_dtype, name_of
from fastagg._quoting import printable, quoted, quoted_list
from fastagg.nvflare._metrics import as_number
from fastagg.nvflare._wire import DESCRIPTIONS, check_processing, unpack
from fastagg.quantization.quantized import Quantized

_MOST_ROUNDS = 1 << 63


class ReplyForm(NamedTuple):
    """What replies must share to be averaged: the round, FULL or DIFF, and every leaf's name, shape and dtype."""

    current_round: int | None
    params_type: str
    leaves: frozenset[tuple[str, tuple[int, ...], str]]

    def difference_from(self, other: ReplyForm) -> str:
        """In what a reply of this form differs from the others', which have the other one."""
        if self.current_round != other.current_round:
            return f"expected a reply of round {other.current_round}, got one of round {quoted(self.current_round)}"
        if self.params_type != other.params_type:
            return f"expected params_type {other.params_type} like most replies', got {self.params_type}"
        mine = {name: (shape, dtype) for name, shape, dtype in self.leaves}
        theirs = {name: (shape, dtype) for name, shape, dtype in other.leaves}
        for what, names in (("missing", theirs.keys() - mine.keys()), ("unexpected", mine.keys() - theirs.keys())):
            if names:
                return f"{what} leaves {quoted_list(sorted(names, key=quoted)[:5])}"
        name = min((name for name in mine if mine[name] != theirs[name]), key=quoted)
        (shape, dtype), (other_shape, other_dtype) = mine[name], theirs[name]
        expected = f"{other_dtype} {quoted(other_shape)} like most replies'"
        return f"leaf {quoted(name)}: expected {expected}, got {dtype} {quoted(shape)}"

    def fits(self, shapes: Mapping[Any, tuple[int, ...]]) -> bool:
        """Whether the leaves have these names and shapes."""
        return {name: shape for name, shape, _ in self.leaves} == shapes


def client_of(model: FLModel) -> str | None:
    """The name of the client that sent a reply, if the workflow has noted it."""
    name = meta_of(model).get("client_name")
    return name if isinstance(name, str) and name not in ("", AppConstants.CLIENT_UNKNOWN) else None


def meta_of(model: FLModel) -> Mapping[str, Any]:
    """A reply's meta; raises TypeError if that is no dict."""
    meta = {} if model.meta is None else model.meta
    if not isinstance(meta, Mapping):
        raise TypeError(f"meta: expected a dict, got {type(meta).__name__}")
    return meta


def round_of(model: FLModel, expected: int | None) -> int | None:
    """The round that a reply belongs to: the expected one where a workflow tells it, else what the reply states.

    Raises:
        TypeError, ValueError: the reply states no integer, or another round than the expected one.
    """
    stated = model.current_round
    if stated is not None and (isinstance(stated, bool) or not isinstance(stated, int)):
        raise TypeError(f"current_round: expected an integer, got {quoted(stated)}")
    if stated is not None and not 0 <= stated < _MOST_ROUNDS:
        raise ValueError(f"current_round: expected a number below 2**63, got {quoted(stated)}")
    if expected is not None and stated not in (None, expected):
        raise ValueError(f"expected a reply of round {expected}, got one of round {quoted(stated)}")
    return stated if expected is None else expected


def shapes_of_global_model(fl_ctx: FLContext | None, exclude: re.Pattern[str] | None) -> dict[Any, tuple[int, ...]]:
    """The names and shapes of the model that a workflow has sent, as far as it tells; empty where it does not."""
    model = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL) if fl_ctx else None
    weights = model.get(ModelLearnableKey.WEIGHTS) if isinstance(model, Mapping) else None
    if not isinstance(weights, Mapping):
        return {}
    return {
        name: tuple(getattr(leaf, "shape", ())) for name, leaf in weights.items() if not _is_excluded(name, exclude)
    }


def number_of_steps(model: FLModel) -> float:
    """The weight that a reply states: its steps in this round, 1 if it states none.

    Raises:
        TypeError, ValueError: it is no finite number of 0 or more.
    """
    steps = meta_of(model).get(MetaKey.NUM_STEPS_CURRENT_ROUND)
    return as_weight(1 if steps is None else steps, MetaKey.NUM_STEPS_CURRENT_ROUND)


def as_weight(value: Any, what: str) -> float:
    """A weight as a float.

    Raises:
        TypeError, ValueError: it is no finite number of 0 or more.
    """
    number = as_number(value)
    if number is None:
        raise TypeError(f"{what}: expected a number, got {quoted(value)}")
    if not 0 <= number < math.inf:
        raise ValueError(f"{what}: expected a finite number of 0 or more, got {quoted(value)}")
    return number


def leaves_of(model: FLModel, exclude: re.Pattern[str] | None) -> dict[str, Any]:
    """A reply's leaves by name: arrays as they are, `Quantized` where a filter has quantised, files read.

    Raises:
        TypeError, ValueError: there are none, or one cannot be read; the message names it.
    """
    params, meta = model.params, meta_of(model)
    if not isinstance(params, Mapping):
        raise TypeError(f"params: expected a dict of arrays, got {type(params).__name__}")
    check_processing(meta)
    leaves = {name: _in_memory(name, leaf) for name, leaf in params.items() if not _is_excluded(name, exclude)}
    if not leaves:
        raise ValueError("params: expected at least one array, got none")
    return unpack(leaves, meta[DESCRIPTIONS]) if DESCRIPTIONS in meta else leaves


def is_on_disk(model: FLModel) -> bool:
    """Whether a leaf is a reference to a file, as NVFlare's tensor disk offload makes them."""
    return any(callable(getattr(leaf, "materialize", None)) for leaf in model.params.values())


def form_of(model: FLModel, leaves: Mapping[str, Any], current_round: int | None) -> ReplyForm:
    """The form of a reply.

    Raises:
        TypeError, ValueError: a leaf is no array of a dtype that fastagg averages, or there is no such params_type.
    """
    described = []
    for name, leaf in leaves.items():
        if isinstance(leaf, Quantized):
            described.append((name, leaf.shape, name_of(leaf.dtype)))
            continue
        try:
            array = adopt(leaf)[1]
        except TypeError as error:
            raise TypeError(f"leaf {quoted(name)}: {printable(str(error), 200)}") from None
        if code_of_dtype(array.dtype) is None:
            raise TypeError(f"leaf {quoted(name)}: dtype {printable(name_of(array.dtype))} is not supported")
        described.append((name, tuple(array.shape), name_of(array.dtype)))
    return ReplyForm(current_round, _params_type(model).value, frozenset(described))


def _params_type(model: FLModel) -> ParamsType:
    try:
        return ParamsType(model.params_type or ParamsType.FULL)
    except ValueError:
        raise ValueError(f"params_type: expected FULL or DIFF, got {quoted(model.params_type)}") from None


def _is_excluded(name: Any, exclude: re.Pattern[str] | None) -> bool:
    return exclude is not None and exclude.search(str(name)) is not None


def _in_memory(name: str, leaf: Any) -> Any:
    if isinstance(leaf, (int, float)):
        return np.asarray(leaf)
    materialize = getattr(leaf, "materialize", None)
    if not callable(materialize):
        return leaf
    try:
        return materialize()
    except Exception as error:  # safetensors' errors share no base class with others
        raise ValueError(f"leaf {quoted(name)}: its file cannot be read: {printable(str(error))}") from error
