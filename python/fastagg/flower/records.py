"""A torch model as an ArrayRecord and back, in any precision, and the mod that quantises what a node uploads."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message

from fastagg._arrays.registry import kind_of
from fastagg._native.codes import code_of_dtype, name_of, wire_name
from fastagg._updates.buffers import is_buffer
from fastagg.flower.arrays import read_record, write_leaf
from fastagg.quantization.cast import dequantize, quantize
from fastagg.quantization.quantized import Quantized, check_block
from fastagg.quantization.rounding import random_key
from fastagg.server.optimizer import as_buffers

if TYPE_CHECKING:
    import torch

Mod = Callable[[Message, Context, Callable[[Message, Context], Message]], Message]


def to_array_record(
    state_dict: Mapping[str, Any],
    wire: Any = None,
    *,
    rounding: str = "nearest",
    seed: int | None = None,
    block: int | None = None,
    buffers: Collection[str] = (),
) -> ArrayRecord:
    """A state_dict as an ArrayRecord, bf16 leaves included.

    Args:
        state_dict: names to torch tensors, NumPy arrays or `Quantized`.
        wire: "fp16", "bf16", "int8", "int4" or any other of `fastagg.quantize` for the floating leaves; None sends them
            as they are. Buffers (running statistics, integers) and `Quantized` leaves always travel as they are; leaves
            with an infinity or a NaN, such as causal masks, do on wires with scales, which cannot say where it is.
        rounding: "nearest" or "stochastic".
        seed: of stochastic rounding; leaf number t is rounded with (seed, 0, t). None draws one a leaf.
        block: elements that share a scale.
        buffers: names of further leaves to send as they are.

    Raises:
        TypeError: `state_dict` is no mapping, or a leaf no array of a real floating, integer or bool dtype.
        ValueError: as `fastagg.quantize`.
    """
    if not isinstance(state_dict, Mapping):
        hint = ": pass its state_dict()" if hasattr(state_dict, "state_dict") else ""
        raise TypeError(f"state_dict: expected a mapping of arrays, got {type(state_dict).__name__}{hint}")
    buffers = as_buffers(buffers)
    if wire is not None:
        wire = wire_name(wire)
        check_block(wire, block)
        random_key(wire, rounding, seed)
    record = ArrayRecord()
    for index, (name, leaf) in enumerate(state_dict.items()):
        try:
            leaf = _as_leaf(leaf)
            if wire is not None and not isinstance(leaf, Quantized) and not is_buffer(name, leaf.dtype, buffers):
                key = None if seed is None or rounding == "nearest" else (seed, 0, index)
                codes = quantize(leaf, wire, rounding=rounding, seed=key, block=block)
                if codes.scales is None or not codes.nonfinite:
                    leaf = codes
            record[name] = write_leaf(leaf)
        except (TypeError, NotImplementedError) as error:  # torch's, of a tensor without values
            raise TypeError(f"leaf {name!r}: {error}") from None
    return record


def _as_leaf(leaf: Any) -> Any:
    """A leaf that can be written; raises TypeError if it is none."""
    if isinstance(leaf, Quantized):
        return leaf
    if kind_of(leaf) is None:
        raise TypeError(f"expected an array, a tensor or a Quantized, got {type(leaf).__name__}")
    if code_of_dtype(leaf.dtype) is None:
        expected = "expected a real floating, integer or bool dtype"
        raise TypeError(f"dtype {name_of(leaf.dtype)} is not supported ({expected})")
    return np.asarray(leaf) if isinstance(leaf, np.generic) else leaf


def to_state_dict(record: ArrayRecord) -> OrderedDict[str, torch.Tensor]:
    """An ArrayRecord of `to_array_record`, or of Flower's own making, as torch tensors on the CPU.

    Raises:
        TypeError, ValueError: a leaf's bytes are not what they claim to be; the message names it.
    """
    return OrderedDict((name, _as_tensor(leaf)) for name, leaf in read_record(record).items())


def _as_tensor(leaf: Any) -> torch.Tensor:
    import torch

    if isinstance(leaf, Quantized):
        scales = None if leaf.scales is None else torch.from_numpy(leaf.scales.copy())
        shape, dtype = leaf.shape, name_of(leaf.dtype)
        codes = _codes_as_tensor(leaf)
        decoded: torch.Tensor = dequantize(
            Quantized(codes, scales, wire=leaf.wire, shape=shape, dtype=dtype, block=leaf.block)
        )
        return decoded
    if name_of(leaf.dtype) == "bfloat16":
        return torch.from_numpy(leaf.view("uint16").copy()).view(torch.bfloat16)
    return torch.from_numpy(leaf.astype(leaf.dtype.newbyteorder("="), order="C", copy=True))


def _codes_as_tensor(leaf: Quantized) -> torch.Tensor:
    import torch

    if leaf.wire == "bf16":
        return torch.from_numpy(leaf.data.view("uint16").copy()).view(torch.bfloat16)
    return torch.from_numpy(leaf.data.copy())


def quantize_mod(
    wire: Any = "int8", *, rounding: str = "nearest", block: int | None = None, buffers: Collection[str] = ()
) -> Mod:
    """A client mod that quantises the models a node uploads: `ClientApp(mods=[quantize_mod("int8")])`.

    The server decodes them while it adds them up; put it first in the list, so that other mods see plain arrays. Leaves
    that are quantised already stay as they are.

    Args:
        wire: as in `to_array_record`.
        rounding: as there.
        block: as there.
        buffers: as there.
    """
    to_array_record({}, wire, rounding=rounding, block=block)  # a wrong argument is an error here

    def mod(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        reply = call_next(message, context)
        if reply.has_content():
            for name, record in list(reply.content.array_records.items()):
                leaves = read_record(record)
                reply.content[name] = to_array_record(leaves, wire, rounding=rounding, block=block, buffers=buffers)
        return reply

    return mod
