"""`DistributedOptimizer` among real processes: it trains as one process does on the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import fastagg  # noqa: E402
from ranks import run_ranks  # noqa: E402

SHARED = """
import contextlib, copy
from fastagg import DistributedOptimizer
def error_of(function, kind=RuntimeError):
    try:
        function()
    except kind as error:
        return str(error)
    raise AssertionError("no error")
def bits(parameters):
    return torch.cat([p.detach().double().reshape(-1) for p in parameters])
"""

EXACT = """
# Whatever the parameters are, gradients are integers, and a multiple of the ranks: sums and means have no rounding.
def start():
    torch.manual_seed(0)
    shapes = [(300, 7), (7,), (2, 3, 4, 4), (1,), (), (50, 60)]
    made = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    made[2].data = made[2].data.to(memory_format=torch.channels_last)
    made += [torch.nn.Parameter(torch.randn(40, dtype=dtype)) for dtype in (torch.float64, torch.bfloat16)]
    return {f"p{i}": p for i, p in enumerate(made)}
def loss(parameters, step, of):
    generator = torch.Generator().manual_seed(100 * step + of)
    factors = [world * torch.randint(-3, 4, p.shape, generator=generator) for p in parameters.values()]
    terms = [(p * factor).sum().double() for p, factor in zip(parameters.values(), factors)]
    return sum(terms if of % 2 else terms[::-1])  # autograd meets them in another order on every other rank
def train(optimizer_of, op, ranks, **options):
    parameters = start()
    optimizer = optimizer_of(parameters.values())
    if options:
        optimizer = DistributedOptimizer(optimizer, parameters.items(), op=op, **options)
    for step in range(6):
        for of in ranks:
            loss(parameters, step, of).backward()
        if not options and op == "mean":
            for p in parameters.values():
                p.grad /= world
        optimizer.step()
        optimizer.zero_grad(set_to_none=step % 2 == 0)
    return bits(parameters.values())
for optimizer_of in (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.Adam(p, lr=0.01)):
    for op in ("mean", "sum"):
        expected = train(optimizer_of, op, range(world))
        for fusion_bytes in (1, 4000, 2**20):
            assert torch.equal(train(optimizer_of, op, [rank], fusion_bytes=fusion_bytes), expected), (op, fusion_bytes)
"""


@pytest.mark.parametrize(("world", "transport"), [(2, ""), (3, ""), (3, "backend")])
def test_training_is_that_of_one_process_bit_for_bit(world: int, transport: str) -> None:
    run_ranks(SHARED + EXACT, world, FASTAGG_TRANSPORT=transport)


DIGITS = """
from sklearn.datasets import load_digits
digits = load_digits()
x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
torch.manual_seed(0)
start = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
def train(optimizer_of, wire, share):
    model = copy.deepcopy(start)
    optimizer = optimizer_of(model.parameters())
    if wire:
        optimizer = DistributedOptimizer(optimizer, model.named_parameters(), wire=wire, fusion_bytes=2000)
    for step in range(20):
        batch = slice(step * 24, step * 24 + 24)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[batch][share]), y[batch][share]).backward()
        optimizer.step()
    flat = bits(model.parameters())
    assert all(torch.equal(flat, other) for other in gathered(flat))
    return flat
momentum, adam = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.AdamW(p, lr=0.01)
for optimizer_of, wire, bound in (
    (momentum, "fp32", 1e-5), (adam, "fp32", 1e-4), (momentum, "fp16", 2e-3), (momentum, "bf16", 2e-2)):
    whole = train(optimizer_of, None, slice(None))
    difference = (train(optimizer_of, wire, slice(rank, None, world)) - whole).abs().max()
    assert difference < bound, (optimizer_of, wire, difference)
"""


@pytest.mark.parametrize("world", [2, 3])
def test_digits_are_learnt_as_from_the_whole_batch(world: int) -> None:
    pytest.importorskip("sklearn")
    run_ranks(SHARED + DIGITS, world)


OVERLAP = """
class Wait(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.clone()
    @staticmethod
    def backward(context, gradient):
        # The buffer of the last layer, behind us, is averaged while backward stands here.
        given, deadline = last.grad.as_subclass(torch.Tensor), time.monotonic() + 30
        while not torch.all(given == 1.5):
            assert time.monotonic() < deadline, given
            time.sleep(0.01)
        return gradient
first, last = torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(5))
optimizer = DistributedOptimizer(torch.optim.SGD([first, last], lr=1.0), fusion_bytes=1)
(Wait.apply(first * 2) + last * (rank + 1)).sum().backward()
optimizer.step()
assert torch.all(last == -0.5) and torch.all(first == -1), (first, last)
"""


def test_buffers_travel_while_backward_goes_on() -> None:
    run_ranks(SHARED + OVERLAP, 2)


STEPS = """
def three():
    return {name: torch.nn.Parameter(torch.ones(3)) for name in ("used", "sometimes", "never")}
def gradients(parameters):
    return [None if p.grad is None else p.grad.tolist() for p in parameters.values()]
mean = sum(range(1, world + 1)) / world

# A parameter that only the last rank uses counts as zeros elsewhere; one that nobody uses has no gradient.
for fusion_bytes in (1, 1000):
    p = three()
    optimizer = DistributedOptimizer(torch.optim.Adam(p.values()), p.items(), fusion_bytes=fusion_bytes)
    for step in range(2):
        ((p["used"] + (p["sometimes"] if rank == world - 1 else 0)) * (rank + 1)).sum().backward()
        optimizer.synchronize()
        assert gradients(p) == [[mean] * 3, [torch.tensor(1.0).item()] * 3, None], gradients(p)
        optimizer.step()
        optimizer.zero_grad()
    assert len(optimizer.state) == 2 and torch.all(p["never"] == 1)
    if rank == 0:  # a rank without a batch
        p["used"].sum().backward()
    optimizer.step()
    assert gradients(p) == [[torch.tensor(1.0).div(world).item()] * 3, None, None]

# Accumulation: several passes of a step add up; a step after fewer takes what there is.
p = three()
optimizer = DistributedOptimizer(torch.optim.SGD(p.values(), lr=1.0), p.items(), backward_passes_per_step=3)
for passes in (3, 2):
    for number in range(passes):
        (p["used"] * (rank + 1) * 2.0**number).sum().backward()
    optimizer.synchronize()
    assert gradients(p) == [[mean * (2**passes - 1)] * 3, None, None]
    optimizer.step()
    optimizer.zero_grad()

# Clipping between synchronize() and step(), which does not synchronise again.
for skips in (True, False):
    p = three()
    optimizer = DistributedOptimizer(torch.optim.SGD(p.values(), lr=1.0), p.items(), op="sum")
    (p["used"] * (rank + 1) * 100).sum().backward()
    optimizer.synchronize()
    torch.nn.utils.clip_grad_norm_(p.values(), 3**0.5)
    with optimizer.skip_synchronize() if skips else contextlib.nullcontext():
        optimizer.step()
    assert p["used"].abs().max() < 1e-5

# A closure's gradients are synchronised each time it is called.
def closure():
    optimizer.zero_grad()
    loss = (p["used"] * (rank + 1)).sum()
    loss.backward()
    return loss
p = three()
optimizer = DistributedOptimizer(torch.optim.SGD(p.values(), lr=1.0), p.items())
assert optimizer.step(closure) == 3.0 * (rank + 1)
assert torch.all(p["used"] == 1 - mean)

# What is not zeroed goes on adding up, as without ranks.
p = three()
optimizer = DistributedOptimizer(torch.optim.SGD(p.values(), lr=0.0), p.items())
for step in range(3):
    (p["used"] * (rank + 1)).sum().backward()
    optimizer.step()
assert gradients(p)[0] == [3 * mean] * 3

# A frozen parameter takes no part, and neither does an optimizer that is gone.
p = three()
p["never"].requires_grad_(False)
forgotten = DistributedOptimizer(torch.optim.SGD(p.values(), lr=1.0), p.items())
del forgotten
optimizer = DistributedOptimizer(torch.optim.SGD([p["used"], p["sometimes"]], lr=1.0), p.items())
for step in range(2):
    (p["used"] + p["sometimes"]).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
assert torch.all(p["used"] == -1)
"""


@pytest.mark.parametrize("world", [2, 3])
def test_unused_parameters_accumulation_clipping_and_closures(world: int) -> None:
    run_ranks(SHARED + STEPS, world)


COMPANIONS = """
p = [torch.nn.Parameter(torch.ones(4))]
plain = torch.optim.SGD(p, lr=1.0, momentum=0.9)
steps = []
plain.register_step_post_hook(lambda *_: steps.append(1))
before = torch.optim.lr_scheduler.StepLR(plain, 2, gamma=0.5)
optimizer = DistributedOptimizer(plain, wire="fp16")
after = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.1)
assert optimizer is plain and isinstance(optimizer, torch.optim.SGD) and type(optimizer).__name__ == "SGD"
optimizer.load_state_dict(optimizer.state_dict())
rates = []
for step in range(4):
    (p[0] * (rank + 1)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    rates.append(optimizer.param_groups[0]["lr"])
    before.step()
    after.step()
assert len(steps) == 4
assert all(abs(rate - expected) < 1e-9 for rate, expected in zip(rates, (1.0, 1.0, 0.5, 0.05))), rates
saved = copy.deepcopy(optimizer.state_dict())
assert saved.keys() == torch.optim.SGD([torch.ones(4)], lr=1.0).state_dict().keys()
optimizer.load_state_dict(saved)
assert torch.equal(optimizer.state[p[0]]["momentum_buffer"], saved["state"][0]["momentum_buffer"])

# GradScaler: found_inf agrees on all ranks, who skip the step together.
for fused in (False, True):
    p = [torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(5))]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    optimizer = DistributedOptimizer(torch.optim.SGD(p, lr=1.0, fused=fused))
    for step in range(3):
        factor = float("inf") if step == 1 and rank == 1 else 1.0
        scaler.scale((p[0].sum() + p[1].sum()) * factor * (rank + 1)).backward()
        message = error_of(lambda: scaler.unscale_(optimizer))
        assert "synchronize()" in message, message
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == 512.0
    assert torch.all(p[0] == -2 * 1.5) and torch.all(p[1] == -2 * 1.5), p
"""


def test_schedulers_scalers_hooks_and_checkpoints_know_the_optimizer() -> None:
    run_ranks(SHARED + COMPANIONS, 2)


MISUSE = """
def new(**options):
    p = {"weight": torch.nn.Parameter(torch.ones(3)), "bias": torch.nn.Parameter(torch.ones(2))}
    return p, DistributedOptimizer(torch.optim.SGD(p.values(), lr=1.0), p.items(), **options)
def backward(p):
    sum((q * (rank + 1)).sum() for q in p.values()).backward()

p, optimizer = new()
backward(p)
assert "zero_grad() between backward and step()" in error_of(optimizer.zero_grad)
assert "synchronize()" in error_of(lambda: torch.nn.utils.clip_grad_norm_(p.values(), 1.0))
assert "synchronize()" in error_of(lambda: p["bias"].grad.zero_())
with optimizer.skip_synchronize():
    assert "not synchronised" in error_of(optimizer.step)
assert "'weight'" in error_of(lambda: p["weight"].sum().backward()) and "backward_passes_per_step=1" in error_of(
    lambda: p["weight"].sum().backward())
optimizer.step()
assert torch.all(p["weight"] == 1 - 1.5)  # one pass too many has added nothing to what was under way
assert "add_param_group" in error_of(lambda: optimizer.add_param_group({"params": []}))
assert "already" in error_of(lambda: DistributedOptimizer(optimizer), ValueError)

p, optimizer = new()
backward(p)
p["bias"].grad = None
assert "'bias'" in error_of(optimizer.step)
optimizer.zero_grad()
backward(p)
optimizer.step()  # nothing is left of it
assert torch.all(p["bias"] == 1 - 1.5)

p, optimizer = new()
assert "'weight'" in error_of(lambda: (p["weight"] ** 2).sum().backward(create_graph=True), TypeError)

p = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3), requires_grad=False)
optimizer = DistributedOptimizer(torch.optim.SGD(p, lr=1.0))
p[1].requires_grad_(True)
assert "'parameter 1'" in error_of(optimizer.step)

# Ranks that differ are told so on every rank, before anything is changed.
shapes = [(3,), (2 + rank,)]
p = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
plain = torch.optim.SGD(p, lr=1.0)
message = error_of(lambda: DistributedOptimizer(plain, [("weight", p[0]), ("bias", p[1])]), ValueError)
assert "rank 0 has 'bias', torch.float32 of shape (2,)" in message and "rank 1 has 'bias'" in message, message
assert type(plain) is torch.optim.SGD
for options in ({"wire": "fp16"}, {"op": "sum"}, {"backward_passes_per_step": 2}, {"fusion_bytes": 7}):
    message = error_of(lambda: new(**(options if rank else {})), ValueError)
    assert next(iter(options)) in message and "rank 1" in message, message
"""


def test_wrong_uses_are_told() -> None:
    run_ranks(SHARED + MISUSE, 2)


LOST = """
p = [torch.nn.Parameter(torch.ones(100))]
optimizer = DistributedOptimizer(torch.optim.SGD(p, lr=1.0))
for step in range(2):
    if rank == 1 and step == 1:
        os._exit(0)
    p[0].sum().backward()
    if step == 1:
        try:
            optimizer.step()
        except fastagg.PeerError as error:
            assert error.rank == 1
            print("told", flush=True)
            os._exit(0)
    optimizer.step()
    optimizer.zero_grad()
"""


def test_a_lost_rank_is_named_by_step() -> None:
    assert run_ranks(SHARED + LOST, 2)[0] == "told\n"


@pytest.fixture
def parameters() -> dict[str, torch.nn.Parameter]:
    return {"weight": torch.nn.Parameter(torch.ones(3)), "bias": torch.nn.Parameter(torch.ones(2))}


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (lambda p: [*p.items(), ("weight", p["weight"])], "the name 'weight' occurs twice"),
        (lambda p: [*p.items(), ("tied", p["bias"])], "'bias' and 'tied' are one parameter"),
        (lambda p: [*p.items(), ("other", torch.nn.Parameter(torch.ones(1)))], "'other' is not in the optimizer"),
        (lambda p: [("weight", p["weight"])], r"no name for 'parameter 1', torch.float32 of shape \(2,\)"),
    ],
)
def test_names_are_checked(
    parameters: dict[str, torch.nn.Parameter], named: Callable[[Any], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fastagg.DistributedOptimizer(torch.optim.SGD(parameters.values(), lr=1.0), named(parameters))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wire": "fp7"}, "wire"),
        ({"op": "max"}, "op: expected one of mean, sum, got 'max'"),
        ({"backward_passes_per_step": 0}, "backward_passes_per_step"),
        ({"fusion_bytes": 0}, "fusion_bytes"),
        ({}, "torch.distributed is not initialised"),
    ],
)
def test_arguments_are_checked(
    parameters: dict[str, torch.nn.Parameter], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fastagg.DistributedOptimizer(torch.optim.SGD(parameters.values(), lr=1.0), parameters.items(), **options)


def test_optimizers_are_checked(parameters: dict[str, torch.nn.Parameter]) -> None:
    with pytest.raises(TypeError, match=r"expected a torch.optim.Optimizer, got list"):
        fastagg.DistributedOptimizer([])
    with pytest.raises(ValueError, match="LBFGS"):
        fastagg.DistributedOptimizer(torch.optim.LBFGS(parameters.values()))
    with pytest.raises(TypeError, match="'parameter 0': expected a floating dtype"):
        fastagg.DistributedOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.ones(1, dtype=torch.complex64))]))
    replaced = torch.optim.SGD(parameters.values(), lr=1.0)
    replaced.step = lambda: None
    with pytest.raises(ValueError, match=r"step\(\) has been replaced"):
        fastagg.DistributedOptimizer(replaced)
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="none of its parameters requires a gradient"):
        fastagg.DistributedOptimizer(torch.optim.SGD(parameters.values(), lr=1.0))
