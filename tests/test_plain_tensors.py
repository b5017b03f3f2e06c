"""Which tensors are read and written as memory, and what is said of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.masked import masked_tensor
from torch.testing._internal.two_tensor import TwoTensor

import fastagg
from fastagg.distributed.collectives import all_reduce
from fastagg.server import FedAvg
from processes import output_of
from ranks import run_ranks

N = 1000


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(N)


def resized(size: int) -> torch.Tensor:
    """A tensor whose storage was freed, as FSDP does, or made smaller."""
    tensor = torch.ones(N).view(10, N // 10).t()  # of views every part is looked at
    tensor.untyped_storage().resize_(size)
    return tensor


def freed() -> torch.Tensor:
    tensor = torch.ones(N)
    tensor.untyped_storage().resize_(0)
    return tensor


def nested(layout: torch.layout) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)


# How each is made, and what its error says.
NOT_PLAIN: dict[str, tuple[Callable[[], Any], str]] = {
    "coo": (lambda: torch.ones(N).to_sparse(), r"layout torch.sparse_coo: pass its to_dense\(\)"),
    "csr": (lambda: torch.ones(2, N).to_sparse_csr(), r"layout torch.sparse_csr: pass its to_dense\(\)"),
    "mkldnn": (lambda: torch.ones(2, N).to_mkldnn(), r"layout torch._mkldnn: pass its to_dense\(\)"),
    "nested": (lambda: nested(torch.strided), r"a nested one: pass its to_padded_tensor\(value\)"),
    "jagged": (lambda: nested(torch.jagged), r"a NestedTensor: pass its to_padded_tensor\(value\)"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(N), 0.1, 0, torch.qint8), r"pass its dequantize\(\)"),
    "meta": (lambda: torch.ones(N, device="meta"), "got meta: it has no values"),
    "fake": (fake, "a FakeTensor: it has no values"),
    "zero": (lambda: torch._efficientzerotensor(N), "expected a tensor with memory"),
    "functional": (lambda: torch._to_functional_tensor(torch.ones(N)), "expected a tensor with memory"),
    "freed": (freed, "expected a tensor with memory"),
    "smaller": (lambda: resized(64), "expected a tensor with memory"),
    "masked": (lambda: masked_tensor(torch.ones(N), torch.ones(N, dtype=torch.bool)), r"pass its to_tensor\(value\)"),
    "wrapper": (lambda: TwoTensor(torch.ones(N), torch.ones(N)), "a TwoTensor: pass its values as one"),
    "lazy": (torch.nn.parameter.UninitializedParameter, "run the model once"),
    "complex": (lambda: torch.ones(N, dtype=torch.complex64).conj(), "complex64|resolve_conj"),
}
USES: dict[str, Callable[[Any], Any]] = {
    "fedavg": lambda x: fastagg.fedavg([{"a": x}, {"a": x}]),
    "the second": lambda x: fastagg.fedavg([{"a": torch.ones(N)}, {"a": x}]),
    "out": lambda x: fastagg.fedavg([torch.ones(N)] * 2, out=x),
    "Accumulator": lambda x: fastagg.Accumulator().add({"a": x}),
    "quantize": fastagg.quantize,
    "dequantize": lambda x: fastagg.dequantize(fastagg.quantize(torch.ones(N)), out=x),
    "median": lambda x: fastagg.robust.median([{"a": x}] * 3),
    "step": lambda x: FedAvg().step({"a": x}, {"a": x}),
    "all_reduce": all_reduce,
    "broadcast": lambda x: fastagg.broadcast_parameters({"a": x}),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.exhaustive) if case == "jagged" else case  # torch imports much for it
        for case in NOT_PLAIN
    ],
)
def test_what_is_not_plain_is_never_read(case: str, use: str) -> None:
    make, message = NOT_PLAIN[case]
    if use in ("out", "dequantize"):  # other things are wrong with it, too
        message = ""
    if (case, use) == ("complex", "broadcast"):
        message = "resolve_conj"
    with pytest.raises((TypeError, ValueError), match=message):
        USES[use](make())


def test_tensors_of_function_transforms_are_not_read() -> None:
    for use in ("fedavg", "quantize", "all_reduce", "broadcast"):
        for transform in (torch.vmap, torch.func.grad):
            with pytest.raises(TypeError, match="call this outside vmap and grad"):
                transform(USES[use])(torch.ones(N))


class Plain(torch.Tensor):
    """A subclass without operations of its own."""


@pytest.mark.parametrize(
    "make", [torch.nn.Parameter, torch.nn.Buffer, lambda x: x.as_subclass(Plain), lambda x: x.requires_grad_()]
)
def test_parameters_buffers_and_plain_subclasses_are_read(make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    ones = make(torch.ones(N))
    assert torch.equal(fastagg.fedavg([{"a": ones}] * 2)["a"].detach(), torch.ones(N))
    assert torch.equal(fastagg.dequantize(fastagg.quantize(ones)), torch.ones(N))


def negative() -> torch.Tensor:
    """A contiguous view whose values are the negatives of what lies in its memory: of minus ones, ones."""
    pairs = torch.full((N, 1), -1j, dtype=torch.complex64)
    view = torch._neg_view(torch.view_as_real(pairs)[:, 0, 1].contiguous())
    assert view.is_neg()
    assert view.is_contiguous()
    return view


def test_negative_views_are_read_as_their_values_and_not_written() -> None:
    ones = torch.ones(N)
    assert torch.equal(fastagg.fedavg([ones, negative()]), ones)
    assert torch.equal(fastagg.dequantize(fastagg.quantize(negative())), ones)
    assert torch.equal(fastagg.robust.median([ones, negative(), negative()]), ones)
    accumulator = fastagg.Accumulator()
    accumulator.add(negative())
    assert torch.equal(accumulator.result(), ones)
    for use in ("out", "dequantize"):
        with pytest.raises(ValueError, match="no negative view"):
            USES[use](negative())


def test_tensors_whose_elements_share_memory_are_not_written() -> None:
    shared = torch.ones(1).expand(N)
    for use in ("out", "dequantize", "all_reduce", "broadcast"):
        with pytest.raises(ValueError, match=r"share memory|contiguous"):
            USES[use](shared)
    with pytest.raises(ValueError, match="share memory"):
        all_reduce(torch.ones(N).as_strided((10, 10), (5, 1)))
    with pytest.raises(ValueError, match="contiguous"):
        fastagg.fedavg([np.ones(N)] * 2, out=np.broadcast_to(np.ones(1), (N,)))


RANKS = """
import pytest
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

sharded = distribute_tensor(torch.arange(8.0), init_device_mesh("cpu", (world,)), [Shard(0)])
for call in (fastagg.all_reduce, lambda x: fastagg.broadcast_parameters({"x": x})):
    with pytest.raises(TypeError, match=r"got a DTensor: pass its full_tensor\\(\\)"):
        call(sharded)

x = torch._neg_view(torch.full((9,), -1.0)) if rank == 0 else torch.ones(9)
fastagg.all_reduce(x, op="sum")
assert torch.equal(x, torch.full((9,), float(world))), x
fastagg.broadcast_parameters({"x": x})
assert torch.equal(x, torch.full((9,), float(world))), x

embedding = torch.nn.Embedding(5, 3, sparse=True)
optimizer = fastagg.DistributedOptimizer(torch.optim.SGD(embedding.parameters(), lr=1.0), embedding.named_parameters())
with pytest.raises(TypeError, match=r"the gradient of 'weight': expected a dense tensor.*to_dense\\(\\)"):
    embedding(torch.tensor([0])).sum().backward()
"""


def test_ranks_reduce_values_and_refuse_what_is_not_plain() -> None:
    run_ranks(RANKS, 2)


MOVED = """
import torch, fastagg

def moved(x, how):
    if how == "shared":
        x.share_memory_()
    elif how == "larger":
        x.untyped_storage().resize_(2 * x.untyped_storage().nbytes())
    else:
        x.untyped_storage().resize_(0)

size = 3_000_000
for how in ("shared", "larger"):
    q = fastagg.quantize(torch.linspace(-1, 1, size), "int8")
    expected = fastagg.dequantize(q)
    moved(q.data, how), moved(q.scales, how)
    held = [torch.full((size,), float(value)) for value in (1, 3)]
    accumulator = fastagg.Accumulator(batch=4)
    codes = fastagg.Accumulator(batch=4)
    for x in held:
        accumulator.add({"w": x})
    codes.add(q), codes.add(q)
    for x in (*held, q.data):
        moved(x, how)
    others = [torch.full((size,), 77, dtype=torch.int8) for _ in range(20)]
    assert torch.equal(fastagg.dequantize(q), expected), how
    assert torch.equal(fastagg.fedavg([q, q]), expected), how
    assert torch.equal(codes.result(), expected), how
    assert torch.equal(accumulator.result()["w"], torch.full((size,), 2.0)), how
written = lambda q: fastagg.quantize(torch.ones(99), "int8", out=q)
for use in (fastagg.dequantize, lambda q: fastagg.fedavg([q]), written):
    q = fastagg.quantize(torch.ones(99), "int8")
    moved(q.data, "freed")
    try:
        use(q)
    except ValueError as error:
        assert "lost their memory" in str(error), error
    else:
        raise SystemExit("memory that is gone was used")
accumulator = fastagg.Accumulator(batch=4)
for x in held:
    accumulator.add({"w": x})
moved(held[1], "freed")
try:
    accumulator.result()
except TypeError as error:
    assert "client 1, leaf 'w': expected a tensor with memory" in str(error), error
assert accumulator.count == 1 and torch.equal(accumulator.result()["w"], held[0])
"""


def test_memory_that_torch_moves_is_found_again() -> None:
    output_of(MOVED)
