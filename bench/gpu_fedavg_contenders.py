"""Who averages on a CUDA device: fastagg, and what a user would write instead."""

from __future__ import annotations

import functools
from typing import Any

import torch

import fastagg
from gpu_cases import ARRAY, FASTAGG, Case
from gpu_fedavg import Updates, decoded
from gpu_subject import Contender
from gpu_timing import Call

# More arrays than this are too much for one fused expression.
_MOST_FUSED = 10


def _fastagg(inputs: Updates) -> Call:
    return lambda: fastagg.fedavg(inputs.updates, inputs.weights, out=inputs.out, nan_policy="propagate")


def _sums_of(inputs: Updates) -> list[torch.Tensor]:
    """Where to add up in float32: the room for the mean, unless its elements are narrower."""
    return [torch.empty_like(out, dtype=torch.float32) if out.dtype != torch.float32 else out for out in inputs.outs]


def _add_loop(inputs: Updates) -> Call:
    """`add_(alpha=)` into float32, rounded at the end where the leaves are narrower; int8 codes are decoded first."""
    sums = _sums_of(inputs)

    def average() -> None:
        for column, total, out in zip(inputs.columns, sums, inputs.outs, strict=True):
            first = _plain(column[0])
            if first.dtype == total.dtype:
                torch.mul(first, inputs.shares[0], out=total)
            else:
                total.copy_(first).mul_(inputs.shares[0])
            for share, leaf in zip(inputs.shares[1:], column[1:], strict=True):
                total.add_(_plain(leaf), alpha=share)
            if total is not out:
                out.copy_(total)

    return average


def _plain(leaf: Any) -> torch.Tensor:
    return decoded(leaf, torch.float32) if isinstance(leaf, fastagg.Quantized) else leaf


def _foreach(inputs: Updates) -> Call:
    """All leaves of a client at once."""
    sums, clients = _sums_of(inputs), [list(client) for client in zip(*inputs.columns, strict=True)]

    def average() -> None:
        torch._foreach_copy_(sums, clients[0])
        torch._foreach_mul_(sums, inputs.shares[0])
        for share, leaves in zip(inputs.shares[1:], clients[1:], strict=True):
            torch._foreach_add_(sums, leaves, alpha=share)
        if sums[0] is not inputs.outs[0]:
            torch._foreach_copy_(inputs.outs, sums)

    return average


def _stack(inputs: Updates) -> Call:
    """A copy of all clients side by side, then one product."""
    shares = torch.tensor(inputs.shares, device=inputs.outs[0].device)

    def average() -> None:
        torch.tensordot(shares, torch.stack(inputs.columns[0]), dims=1, out=inputs.outs[0])

    return average


def _compiled(inputs: Updates) -> Call:
    """The whole mean as one expression."""
    shares, out = inputs.shares, inputs.outs[0]
    clients = [(leaf, None) for leaf in inputs.columns[0]]
    if inputs.case.kind == "int8":
        out = out.view(-1, inputs.columns[0][0].block)
        clients = [(leaf.data.view_as(out), leaf.scales[:, None]) for leaf in inputs.columns[0]]

    def average() -> None:
        products = [
            (values.float() if scales is None else values * scales) * share
            for share, (values, scales) in zip(shares, clients, strict=True)
        ]
        out.copy_(functools.reduce(torch.add, products))

    return torch.compile(average, fullgraph=True, dynamic=False)


def _cupy(inputs: Updates) -> Call:
    """The whole mean as one elementwise kernel."""
    import cupy  # type: ignore[import-not-found, import-untyped, unused-ignore]

    clients = range(inputs.case.clients)
    arrays = ", ".join(f"T x{client}" for client in clients)
    shares = ", ".join(f"float32 share{client}" for client in clients)
    products = " + ".join(f"share{client} * (float)x{client}" for client in clients)
    kernel = cupy.ElementwiseKernel(f"{arrays}, {shares}", "T mean", f"mean = (T)({products})", "weighted_mean")
    arguments = [*map(cupy.from_dlpack, inputs.columns[0]), *map(cupy.float32, inputs.shares)]
    out = cupy.from_dlpack(inputs.outs[0])
    return lambda: kernel(*arguments, out)


def _triton(inputs: Updates) -> Call:
    from gpu_triton import weighted_sum

    return weighted_sum(inputs)


def _is_array(case: Case) -> bool:
    return case.layout == ARRAY


def _is_few(case: Case) -> bool:
    return _is_array(case) and case.clients <= _MOST_FUSED


CONTENDERS = [
    Contender(FASTAGG, FASTAGG, _fastagg, tolerance=1.2e-7),
    Contender("torch add_(alpha=)", "torch", _add_loop, is_eager=True),
    Contender("torch._foreach_add_", "torch", _foreach, lambda case: case.kind != "int8", is_eager=True),
    Contender("torch.stack, tensordot", "torch", _stack, lambda c: _is_array(c) and c.kind == "fp32", is_eager=True),
    Contender("torch.compile", "torch", _compiled, lambda case: _is_few(case) and case.operation == "fedavg"),
    Contender("CuPy", "cupy", _cupy, lambda case: _is_few(case) and case.kind in ("fp32", "fp16")),
    Contender("Triton", "triton", _triton, lambda case: case.operation == "fedavg"),
]
