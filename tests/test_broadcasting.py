"""`broadcast_parameters` and `broadcast_optimizer_state` among real processes."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import fastagg  # noqa: E402
from ranks import run_ranks  # noqa: E402

ERROR_OF = """
def error_of(function, kind=ValueError):
    try:
        function()
    except kind as error:
        return str(error)
    raise AssertionError("no error")
"""

PARAMETERS = """
dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.float8_e4m3fn,
          torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint64, torch.bool)
def tensors(of):
    generator = torch.Generator().manual_seed(of)
    made = {}
    for dtype in dtypes:
        for shape in ((3, 5), (), (0, 4)):
            codes = torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
            made[f"{dtype} {shape}"] = codes.view(dtype).reshape(shape)
    made["strided"] = torch.randn(4, 6, generator=generator).t()
    made["large"] = torch.randn(7_000_000, generator=generator)  # more than a batch
    made["parameter"] = torch.nn.Parameter(torch.randn(9, generator=generator))
    return made
def as_bytes(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
for root in (0, 2):
    mine, expected = tensors(rank), tensors(root)
    fastagg.broadcast_parameters(mine, root_rank=root)
    for name, tensor in mine.items():
        assert torch.equal(as_bytes(tensor), as_bytes(expected[name])), name
    assert not mine["strided"].is_contiguous()

torch.manual_seed(rank)
model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
model[1].num_batches_tracked += rank
fastagg.broadcast_parameters(model.state_dict(), 1)
flat = torch.cat([tensor.double().reshape(-1) for tensor in model.state_dict().values()])
assert all(torch.equal(flat, other) for other in gathered(flat)) and model[1].num_batches_tracked == 1
with torch.no_grad():
    model[0].weight += rank
fastagg.broadcast_parameters(model.named_parameters())
fastagg.broadcast_parameters(list(model.parameters()))
assert all(torch.equal(model[0].weight.detach(), other) for other in gathered(model[0].weight.detach()))

some = dist.new_group([1, 2])
if rank:
    x = torch.tensor([rank])
    fastagg.broadcast_parameters({"x": x}, root_rank=2, group=some)
    assert x.item() == 2

# Ranks that differ are told so on every rank, and nothing is changed.
x = torch.full((2,), float(rank))
for other, told in (
    ({"x": x, "y": x}, "'y'"), ({"z": x}, "'z'"), ({"x": x[:1]}, "(1,)"), ({"x": x.double()}, "float64")):
    message = error_of(lambda: fastagg.broadcast_parameters(other if rank == 2 else {"x": x}))
    assert "rank 0" in message and "rank 2" in message and told in message, message
    assert torch.all(x == rank)
assert "one of [0, 1, 2], got 3" in error_of(lambda: fastagg.broadcast_parameters({"x": x}, root_rank=3))
"""


def test_parameters_of_every_dtype_become_the_roots() -> None:
    run_ranks(ERROR_OF + PARAMETERS, 3)


OPTIMIZER = """
import copy
def trained(kind, steps, wrap, **options):
    torch.manual_seed(0)
    p = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (2, 3, 4, 4), ())]
    p[1].data = p[1].data.to(memory_format=torch.channels_last)
    optimizer = kind([{"params": p[:2]}, {"params": p[2:], "weight_decay": 0.1}], lr=0.1, **options)
    if wrap:
        optimizer = fastagg.DistributedOptimizer(optimizer)
    for step in range(steps):
        sum((q**2).sum() for q in p).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer
def flat(state):
    if isinstance(state, dict):
        return [(key, value) for key, entry in state.items() for value in flat(entry)]
    if isinstance(state, (list, tuple)):
        return [value for entry in state for value in flat(entry)]
    return [state]
def same(one, other):
    if isinstance(one, tuple):
        return one[0] == other[0] and same(one[1], other[1])
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.stride() == other.stride() and torch.equal(one, other)
    return type(one) is type(other) and one == other
SGD, Adam, AdamW, Adagrad = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad
for kind, options in ((SGD, {"momentum": 0.9}), (SGD, {}), (Adam, {"amsgrad": True}), (AdamW, {}), (Adagrad, {})):
    for wrap in (False, True):
        # The root has trained, and has lowered a learning rate; the others have just begun, or trained otherwise.
        for others in (0, 1):
            root = trained(kind, 3, wrap, **options)
            root.param_groups[1]["lr"] = 0.025
            expected = copy.deepcopy(root.state_dict())
            beginner = trained(kind, others, wrap, **options)
            optimizer = root if rank == 1 else beginner
            groups = optimizer.param_groups
            fastagg.broadcast_optimizer_state(optimizer, root_rank=1)
            ours, theirs = flat(optimizer.state_dict()), flat(expected)
            assert len(ours) == len(theirs) and all(map(same, ours, theirs)), (kind, ours, theirs)
            assert optimizer.param_groups is groups
            sum((q**2).sum() for group in groups for q in group["params"]).backward()
            optimizer.step()

# The state keeps its dtype, whatever the parameters' is; LBFGS has lists of tensors.
p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
optimizer = SGD([p], lr=torch.tensor(0.5 + rank))
if rank == 0:
    optimizer.state[p] = {"master": torch.full((3,), 1 / 3), "name": "x", "none": None}
fastagg.broadcast_optimizer_state(optimizer)
assert optimizer.state[p]["master"].dtype == torch.float32 and optimizer.state[p]["name"] == "x"
assert optimizer.param_groups[0]["lr"] == 0.5
p = torch.nn.Parameter(torch.ones(3))
optimizer = torch.optim.LBFGS([p])
def closure():
    optimizer.zero_grad()
    loss = ((p - torch.arange(3)) ** 4).sum()
    loss.backward()
    return loss
if rank == 0:
    optimizer.step(closure)
torch.set_default_device("meta")  # of no account to what is received
fastagg.broadcast_optimizer_state(optimizer)
torch.set_default_device(None)
steps = torch.stack(optimizer.state[p]["old_dirs"])
assert len(steps) > 1 and all(torch.equal(steps, other) for other in gathered(steps))

# Ranks that differ are told so on every rank.
def optimizer_of(kind, *shapes):
    return kind([torch.ones(shape) for shape in shapes], lr=0.1)
for told, kind, *shapes in (("Adam", Adam, 2), ("(3,)", SGD, 3), ("parameter 1", SGD, 2, 2)):
    optimizer = optimizer_of(kind, *shapes) if rank == 1 else optimizer_of(SGD, 2)
    message = error_of(lambda: fastagg.broadcast_optimizer_state(optimizer))
    assert "rank 1" in message and told in message, message
try:
    fastagg.broadcast_optimizer_state(None)
except (TypeError, ValueError) as error:
    assert "expected a torch.optim.Optimizer, got NoneType" in str(error), error
else:
    raise AssertionError
"""


def test_optimizers_get_the_roots_state_and_options() -> None:
    run_ranks(ERROR_OF + OPTIMIZER, 2)


DIFFER = """
if "TWO_HOSTS" in os.environ:
    os.environ["FASTAGG_HOST"] = str(rank // 2)
from fastagg.distributed.broadcast import broadcast_object
optimizer = torch.optim.SGD([torch.ones(3)], lr=0.1 + rank)
x = torch.full((3,), float(rank))
last = rank == world - 1
for call in (
    lambda root: fastagg.broadcast_parameters({"x": x}, root),
    lambda root: fastagg.broadcast_optimizer_state(optimizer, root),
    lambda root: broadcast_object(rank, root),
):
    assert "root_rank 1" in error_of(lambda: call(int(last)))
# One rank's wrong arguments are an error of all; so is another collective.
calls = (
    (lambda: fastagg.broadcast_parameters({"x": None if last else x}), (TypeError, ValueError)),
    (lambda: fastagg.broadcast_parameters({"x": x}, 99 if last else 0), ValueError),
    (lambda: fastagg.all_reduce(x.int() if last else x), (TypeError, ValueError)),
    (lambda: fastagg.all_reduce(x) if last else fastagg.broadcast_parameters({"x": x}), ValueError),
)
for call, kind in calls:
    error_of(call, kind)
# What cannot be pickled, or read where it arrives, is an error of all too.
class Unreadable:
    def __reduce__(self):
        return Unreadable._read, (0,)
    @staticmethod
    def _read(_):
        raise AttributeError("no such class here")
import threading
for value, told in ((threading.Lock(), "pickle"), (Unreadable(), "no such class here")):
    assert told in error_of(lambda: broadcast_object(value), Exception)
assert broadcast_object({"of": rank}, 1) == {"of": 1} and broadcast_object(b"", 0) == b""
assert torch.all(x == rank)
fastagg.all_reduce(x)
assert torch.all(x == (world - 1) / 2)  # and the group still works
"""


@pytest.mark.parametrize(
    "environment", [{}, {"FASTAGG_TRANSPORT": "backend"}, {"TWO_HOSTS": "1"}], ids=["memory", "backend", "both"]
)
def test_ranks_that_differ_are_told_so_and_nothing_is_written(environment: dict[str, str]) -> None:
    run_ranks(ERROR_OF + DIFFER, 4 if environment.get("TWO_HOSTS") else 2, **environment)


def test_what_cannot_be_broadcast_is_named() -> None:
    x = torch.ones(1)
    for given, message in (
        ([("x", x), ("x", x)], "'x' occurs twice"),
        ({"wide": x.expand(3)}, "'wide': expected an element at each place"),
        ({"x": x}, "torch.distributed is not initialised"),
    ):
        with pytest.raises(ValueError, match=message):
            fastagg.broadcast_parameters(given)
    for given, message in (
        ({"text": "1"}, "'text': expected a torch.Tensor, got str"),
        ([1], "pairs .* got int"),
        (None, "expected a state_dict or pairs .*, got NoneType"),
        ({"far": torch.empty(1, device="meta")}, "'far': expected a tensor on a CPU or CUDA device, got meta"),
        ({"thin": x.to_sparse()}, r"'thin': expected a dense tensor, .*: pass its to_dense\(\)"),
    ):
        with pytest.raises(TypeError, match=message):
            fastagg.broadcast_parameters(given)
