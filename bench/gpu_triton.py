"""The weighted mean as a kernel in Triton: what a user would write who knows how to."""

# Triton's kernels have no types that mypy knows.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# No annotations from the future: Triton reads those of its kernels.
import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

import gpu_machine
from gpu_fedavg import Updates
from gpu_timing import Call, device_seconds

# Elements of a program, and its warps: which is quickest depends on the dtype.
_CONFIGURATIONS = ((1024, 4), (4096, 8))
_ALIGNMENT = tl.constexpr(16)
# Clients whose loads are under way together, at most.
_MOST_IN_FLIGHT = 10
_TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.int8: tl.int8,
}


@triton.jit
def _mean_of(
    addresses,
    scales,
    shares,
    out,
    places,
    count,
    clients,
    in_flight: tl.constexpr,
    element: tl.constexpr,
    block_of_scales: tl.constexpr,
    tail: tl.constexpr,
):
    """The means of some elements of one leaf; only at its tail they are masked, which costs wide accesses."""
    inside = places < count if tail else None
    total = tl.zeros(places.shape, tl.float32)
    for first in range(0, clients, in_flight):
        for k in tl.static_range(in_flight):
            source = tl.load(addresses + first + k).to(tl.pointer_type(element))
            x = tl.load(tl.multiple_of(source, _ALIGNMENT) + places, mask=inside).to(tl.float32)
            if block_of_scales > 0:
                scale = tl.load(scales + first + k).to(tl.pointer_type(tl.float32))
                x *= tl.load(scale + places // block_of_scales, mask=inside)
            total += x * tl.load(shares + first + k)
    tl.store(out + places, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _weighted_sum(
    addresses,
    scales,
    shares,
    outs,
    counts,
    leaves,
    begins,
    clients,
    in_flight: tl.constexpr,
    element: tl.constexpr,
    result: tl.constexpr,
    block_of_scales: tl.constexpr,
    block: tl.constexpr,
):
    """A program's elements of one leaf, as the tables of leaves and begins say."""
    leaf = tl.load(leaves + tl.program_id(0))
    begin = tl.multiple_of(tl.load(begins + tl.program_id(0)), block)
    count = tl.load(counts + leaf)
    out = tl.multiple_of(tl.load(outs + leaf).to(tl.pointer_type(result)), _ALIGNMENT)
    places = begin + tl.arange(0, block)
    addresses += leaf * clients
    scales += leaf * clients
    if begin + block <= count:
        _mean_of(addresses, scales, shares, out, places, count, clients, in_flight, element, block_of_scales, False)
    else:
        _mean_of(addresses, scales, shares, out, places, count, clients, in_flight, element, block_of_scales, True)


def weighted_sum(inputs: Updates) -> Call:
    """The mean of all leaves in one launch, in the configuration that is quickest here."""
    calls = [_launch(inputs, *configuration) for configuration in _CONFIGURATIONS]
    for call in calls:
        call()  # compiles it
    return min(calls, key=lambda call: device_seconds(call, 5))


def _launch(inputs: Updates, block: int, warps: int) -> Call:
    """A launch whose tables are on the device already."""
    first, clients = inputs.columns[0][0], inputs.case.clients
    encoded = inputs.case.kind == "int8"
    in_flight = min(clients, _MOST_IN_FLIGHT)
    assert clients % in_flight == 0, "no client may be left over"
    data = [[leaf.data if encoded else leaf for leaf in column] for column in inputs.columns]
    scales = [[leaf.scales if encoded else leaf for leaf in column] for column in inputs.columns]
    counts = [out.numel() for out in inputs.outs]
    tasks = [(leaf, begin) for leaf, count in enumerate(counts) for begin in range(0, count, block)]
    arguments = (
        _table([[tensor.data_ptr() for tensor in column] for column in data], torch.int64),
        _table([[tensor.data_ptr() for tensor in column] for column in scales], torch.int64),
        _table(inputs.shares, torch.float32),
        _table([out.data_ptr() for out in inputs.outs], torch.int64),
        _table(counts, torch.int32),
        _table([leaf for leaf, _ in tasks], torch.int32),
        _table([begin for _, begin in tasks], torch.int32),
    )
    chosen = {
        "in_flight": in_flight,
        "element": _TYPES[data[0][0].dtype],
        "result": _TYPES[inputs.outs[0].dtype],
        "block_of_scales": first.block if encoded else 0,
        "block": block,
        "num_warps": warps,
    }
    return lambda: _weighted_sum[(len(tasks),)](*arguments, clients, **chosen)


def _table(numbers: object, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(numbers, dtype=dtype, device=gpu_machine.DEVICE)
