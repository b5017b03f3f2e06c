"""All-reduce: sums and means of tensors over the ranks of a process group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fastagg._extras import needing

with needing("torch", __name__):
    import torch
    import torch.distributed as dist

from fastagg._arrays.plain_tensors import check_plain, check_writable, in_order
from fastagg._native.codes import FLOATS, WIRES, Code, code_of_dtype, wire_name
from fastagg._native.operands import RandomKey
from fastagg.distributed.channels import channel_of, group_of, refusing
from fastagg.distributed.exchange.exchange import NO_KEY, Encoding, Exchange, Outcome
from fastagg.distributed.host_executor import Work
from fastagg.distributed.stream_executor import DeviceWork
from fastagg.distributed.transports.base import Transport
from fastagg.quantization.quantized import block_shift, check_block
from fastagg.quantization.rounding import random_key

OPERATIONS = ("mean", "sum")


def all_reduce(
    tensor_or_tensors: Any,
    *,
    op: str = "mean",
    wire: Any = "fp32",
    rounding: str = "nearest",
    seed: int | tuple[int, int, int] | None = None,
    block: int | None = None,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> Work | DeviceWork | None:
    """Replaces tensors by their mean or sum over all ranks of a group, in place.

    ``x = decode(encode(sum_r(decode(encode(x_r))) / world))``

    Every rank encodes its values, each slice is added up in rank order by one rank in float32 or wider, and what that
    rank has encoded is decoded by all: all ranks end with the same bits. Two ranks, and ranks with few elements, each
    add up everything themselves, and the sum is not encoded again. Ranks of one host exchange through shared memory,
    others through Gloo; CUDA tensors through the memory that their devices share, else through NCCL.

    CUDA tensors: the work is queued behind the current stream's, the host does not wait for it, and it can be captured
    into a CUDA graph once the same call has been made outside (docs/all_reduce.md tells the rest). A rank that is lost
    is an error of the next call, and the tensors hold NaN.

    Args:
        tensor_or_tensors: a tensor of fp32, fp16, bf16 or fp64 on a CPU or CUDA device, or a sequence of them.
        op: "mean" or "sum".
        wire: how values travel, as in `quantize`. "fp32" keeps every bit of fp32, and of fp64 tensors too.
        rounding: "nearest" or "stochastic", as in `quantize`; ranks round with random numbers of their own.
        seed: of stochastic rounding; the same on every rank. None: another one at every call, alike on all ranks.
        block: elements that share a scale, as in `quantize`.
        group: the process group; None for the default one.
        async_op: return at once; the tensors must be left alone until `wait`.

    Returns:
        None, or with async_op what to wait for.

    Raises:
        TypeError: no tensors, or of a dtype without a wire.
        ValueError: wrong arguments, or tensors of several devices; or ranks that differ in shape, dtype, wire or op,
            on every rank.
        PeerError: a rank has died or hung. Over NCCL it is NCCL that finds it.
    """
    options = _Options(op, wire, rounding, seed, block)
    return begin_all_reduce(tensor_or_tensors, options, group, async_op=async_op)


class _Options(NamedTuple):
    """How `all_reduce` reduces, and the name by which all ranks know what they reduce."""

    op: str
    wire: Any
    rounding: str = "nearest"
    seed: int | tuple[int, int, int] | None = None
    block: int | None = None
    name: str = ""


def reduce_named(tensor: torch.Tensor, name: str, op: str, wire: Any, group: dist.ProcessGroup | None) -> None:
    """`all_reduce` of a tensor that must have the same name on all ranks."""
    begin_all_reduce(tensor, _Options(op, wire, name=name), group, async_op=False)


def begin_all_reduce(given: Any, options: _Options, group: Any, *, async_op: bool) -> Work | DeviceWork | None:
    """`all_reduce`; wrong arguments of one rank are told to the others, who would wait for it."""
    with refusing(group, device_of(given)):
        tensors = _tensors(given)
        if options.op not in OPERATIONS:
            raise ValueError(f"op: expected one of {', '.join(OPERATIONS)}, got {options.op!r}")
        wire = wire_name(options.wire)
        block = check_block(wire, options.block)
        random_key(wire, options.rounding, options.seed)
    group = group_of(group)
    channel = channel_of(group, tensors[0][0].device if tensors else torch.device("cpu"))

    def reduce_all() -> None:
        transport = channel.transport
        key = random_key(wire, options.rounding, channel.seed() if options.seed is None else options.seed)
        nothing = (torch.empty(0, dtype=torch.float32, device="cpu"), Code.FLOAT32)
        for index, (tensor, code) in enumerate(tensors or [nothing]):
            words = (key[0], key[1], key[2] + index, dist.get_rank(group)) if key else None
            exchange = Exchange(tensor, code, encoding_of(wire, code, block, words), options.op == "mean")
            subject = f"tensor {index} of {len(tensors)}, shape {tuple(tensor.shape)}"
            if options.name:
                subject = f"{options.name!r}, {subject}"
            reduce_tensor(transport, exchange.described(subject))
        channel.has_used_seed()

    own = [tensor for tensor, _ in tensors]
    if async_op:
        return channel.line.begin(reduce_all, own)
    channel.line.run(reduce_all, own)
    return None


def device_of(given: Any) -> torch.device:
    """Where the first tensor is; the CPU if there is none."""
    tensors = given if isinstance(given, Sequence) else [given]
    return next((tensor.device for tensor in tensors if isinstance(tensor, torch.Tensor)), torch.device("cpu"))


def encoding_of(wire: str, code: Code, block: int | None, key: RandomKey | None) -> Encoding:
    """How values of a dtype travel; stochastically rounded if there is a key."""
    travels = Code.FLOAT64 if wire == "fp32" and code == Code.FLOAT64 else WIRES[wire]
    return Encoding(travels, block_shift(check_block(wire, block)), key is not None, key or NO_KEY)


def reduce_tensor(transport: Transport, exchange: Exchange) -> Outcome:
    """Reduces a tensor in place, by way of a copy where its memory does not hold its values in order."""
    tensor = exchange.tensor.detach()
    whole = in_order(tensor)
    outcome = transport.all_reduce(exchange._replace(tensor=whole.view(-1)))
    if whole.data_ptr() != tensor.data_ptr():
        tensor.copy_(whole)
    return outcome


def _tensors(given: Any) -> list[tuple[torch.Tensor, Code]]:
    """The tensors and their codes.

    Raises:
        TypeError, ValueError: one is no plain floating tensor that can be written, or they are not all on one device.
    """
    tensors = [given] if isinstance(given, torch.Tensor) else given
    if not isinstance(tensors, Sequence):
        raise TypeError(f"expected a tensor or a sequence of tensors, got {type(given).__name__}")
    checked: list[tuple[torch.Tensor, Code]] = []
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"tensor {index}: expected a torch.Tensor, got {type(tensor).__name__}")
        try:
            check_plain(tensor)
            check_writable(tensor)
        except (TypeError, ValueError) as error:
            raise type(error)(f"tensor {index}: {error}") from None
        code = code_of_dtype(tensor.dtype)
        if code not in FLOATS:
            raise TypeError(f"tensor {index}: expected a floating dtype (fp32, fp16, bf16, fp64), got {tensor.dtype}")
        if checked and tensor.device != checked[0][0].device:
            raise ValueError(f"tensor {index}: expected {checked[0][0].device} like tensor 0, got {tensor.device}")
        checked.append((tensor, Code(code)))
    return checked
