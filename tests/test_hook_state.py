"""What the DDP hook keeps and finds: residuals by parameter, the norm, found_inf, loss scales, random numbers."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from ranks import run_ranks
from transports import by_transport, on

SETTING = """
import copy, io, pickle
from torch.nn.parallel import DistributedDataParallel
from fastagg.ddp import AllReduceState, GradScaler, all_reduce_hook

kind = torch.get_default_device().type

def model_of(cap=25, **options):
    torch.manual_seed(0)
    linear = [torch.nn.Linear(40, 50), torch.nn.Linear(50, 60), torch.nn.Linear(60, 7)]
    layers = torch.nn.Sequential(linear[0], torch.nn.ReLU(), linear[1], torch.nn.ReLU(), linear[2])
    return DistributedDataParallel(layers, bucket_cap_mb=cap, **options)

def backward(model, step, scale=1.0):
    torch.manual_seed(1000 * step + rank)
    model.zero_grad()
    loss = model(torch.randn(8, 40)).square().mean()
    (loss * scale).backward()

def gradients(model):
    return torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters()])

def own_gradients(step, scale=1.0):
    model = model_of()
    model.register_comm_hook(None, lambda _, bucket: ready(bucket.buffer()))
    backward(model, step, scale)
    return gradients(model)

def ready(tensor):
    future = torch.futures.Future()
    future.set_result(tensor)
    return future
"""

FEEDBACK = """
# What reached the mean, and what is still owed, is all there ever was: the residuals follow their parameters through
# the buckets that DDP makes up anew after the first step.
for cap in (25, 0.005):
    for wire in ("fp16", "int8", "sign"):
        model = model_of(cap)
        state = AllReduceState(wire=wire, error_feedback=True, named_parameters=model.module.named_parameters())
        model.register_comm_hook(state, all_reduce_hook)
        sent = owed = exact = 0
        for step in range(4):
            backward(model, step)
            sent = sent + gradients(model).double()
            exact = exact + own_gradients(step).double()
        residuals = state.state_dict()["residuals"]
        assert list(residuals) and set(residuals) == {name for name, _ in model.module.named_parameters()}
        owed = torch.cat([residuals[name].reshape(-1) for name, _ in model.module.named_parameters()]).double()
        every_rank = sum(gathered(exact)) / world, sum(gathered(owed)) / world
        difference = (every_rank[0] - sent - every_rank[1]).abs().max()
        assert difference < 1e-6, (cap, wire, difference)
        assert owed.abs().max() > 100 * difference  # and something is owed
"""


@by_transport
def test_residuals_hold_what_rounding_took_whatever_the_buckets(transport: str) -> None:
    run_ranks(SETTING + FEEDBACK, 2, **on(transport))


PLACES = """
def trained(cap, named, wire, rounding):
    model = model_of(cap)
    names = model.module.named_parameters() if named else None
    state = AllReduceState(wire=wire, rounding=rounding, error_feedback=True, named_parameters=names, seed=3)
    model.register_comm_hook(state, all_reduce_hook)
    for step in range(3):
        backward(model, step)
    return gradients(model), state

expected, _ = trained(25, True, "fp16", "stochastic")
for cap in (0.005, 0.02):
    for named in (True, False):
        assert torch.equal(trained(cap, named, "fp16", "stochastic")[0], expected), (cap, named)
nearest, state = trained(25, True, "fp16", "nearest")
assert not torch.equal(expected, nearest)
norm = torch.nn.utils.get_total_norm([nearest]).item()
assert abs(state.grad_norm - norm) < 1e-5 * norm and state.steps == 3
every_norm = gathered(torch.tensor([state.grad_norm], dtype=torch.float64))
assert len({one.item() for one in every_norm}) == 1
"""


@by_transport
def test_random_numbers_belong_to_parameters_and_the_norm_is_the_gradients(transport: str) -> None:
    run_ranks(SETTING + PLACES, 2, **on(transport))


INFINITE = """
model = model_of()
state = AllReduceState(wire="int8", error_feedback=True)
model.register_comm_hook(state, all_reduce_hook)
backward(model, 0)
before = {name: residual.clone() for name, residual in state.state_dict()["residuals"].items()}
backward(model, 1, float("inf") if rank == 1 else 1.0)
assert state.found_inf
after = state.state_dict()["residuals"]
assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)
backward(model, 2)
assert not state.found_inf and gradients(model).isfinite().all()
"""


@by_transport
def test_a_step_that_found_inf_leaves_the_residuals_alone(transport: str) -> None:
    run_ranks(SETTING + INFINITE, 2, **on(transport))


RESUMED = """
def make():
    model = model_of(0.005)
    # One slice, and a wire without blocks: those depend on the buckets, which DDP makes up anew after the first step.
    state = AllReduceState(wire="fp16", rounding="stochastic", error_feedback=True)
    model.register_comm_hook(state, all_reduce_hook)
    return model, state

model, state = make()
for step in range(2):
    backward(model, step)
stored = io.BytesIO()
torch.save(state.state_dict(), stored)
pickled = pickle.dumps(state)
backward(model, 2)
expected = gradients(model)
stored.seek(0)
other, resumed = make()
resumed.load_state_dict(torch.load(stored, weights_only=True))
backward(other, 2)
assert torch.equal(gradients(other), expected) and resumed.steps == state.steps
third = model_of(0.005)
third.register_comm_hook(pickle.loads(pickled), all_reduce_hook)
backward(third, 2)
assert torch.equal(gradients(third), expected)

# Twice the ranks: each owes the same mean with residuals twice as large.
kept = state.state_dict()
kept["world"] = 1
resumed.load_state_dict(kept)
feedback = resumed._residuals.feedback_of(resumed._residuals.layout_of(list(other.parameters()), True), world, 1.0)
assert feedback.factor == world

def refused(load):
    try:
        load()
    except (ValueError, RuntimeError) as error:
        return str(error)
    raise AssertionError("no error")
named = AllReduceState(error_feedback=True, named_parameters=model.module.named_parameters())
assert "no.such" in refused(lambda: named.load_state_dict({**kept, "residuals": {"no.such": torch.zeros(3)}}))
wrong = model_of()
of_wrong = AllReduceState(error_feedback=True)
of_wrong.load_state_dict({**kept, "residuals": {"0": torch.zeros(3)}})
wrong.register_comm_hook(of_wrong, all_reduce_hook)
assert "7 elements" in refused(lambda: backward(wrong, 0))
"""


def test_a_state_resumes_bit_for_bit() -> None:
    run_ranks(SETTING + RESUMED, 2)


SCALED = """
# Powers of two change nothing but the range: with and without our scaler the gradients are the same bits.
def trained(scaler_of, error_feedback):
    model = model_of()
    state = AllReduceState(wire="fp16", error_feedback=error_feedback)
    model.register_comm_hook(state, all_reduce_hook)
    scaler = scaler_of(state)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for step in range(6):
        torch.manual_seed(1000 * step + rank)
        optimizer.zero_grad()
        loss = model(torch.randn(8, 40)).square().mean()
        scaler.scale(loss * (float("inf") if step == 3 and rank == 0 else 1.0)).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        assert step == 3 or abs(state.grad_norm - norm) < 1e-4 * norm or scaler_of is torchs
        scaler.step(optimizer)
        scaler.update()
        found.append((state.found_inf, scaler.get_scale()))
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()]), found

options = dict(init_scale=1024.0, growth_interval=2)
torchs = lambda state: torch.amp.GradScaler(kind, **options)
ours = lambda state: GradScaler(state, kind, **options)
for error_feedback in (False, True):
    expected, found = trained(torchs, error_feedback)
    actual, also_found = trained(ours, error_feedback)
    assert found == also_found and found[3][0] and not found[4][0], (found, also_found)
    assert torch.equal(actual, expected) or error_feedback, (actual - expected).abs().max()
    assert torch.allclose(actual, expected, atol=1e-5)
    assert all(torch.equal(actual, other) for other in gathered(actual))
"""


@by_transport
def test_our_scaler_unscales_in_the_hook_and_agrees_with_torchs(transport: str) -> None:
    run_ranks(SETTING + SCALED, 2, **on(transport))


OWED = """
# Gradients of 16 bits: what rounding the mean to them takes is fed back as well.
for dtype, wire in ((torch.bfloat16, "bf16"), (torch.float16, "int8")):
    model = DistributedDataParallel(torch.nn.Linear(16, 1, bias=False, dtype=dtype))
    state = AllReduceState(wire=wire, error_feedback=True)
    model.register_comm_hook(state, all_reduce_hook)
    x = torch.full((1, 16), 1 + rank / 128).to(dtype)
    exact = sum(gathered(x.double())) / world
    total = torch.zeros(1, 16, dtype=torch.float64)
    steps = 60 if few else 200
    for step in range(steps):
        model.zero_grad()
        model(x).sum().backward()
        total += model.module.weight.grad
    assert (total / steps - exact).abs().max() < 1e-3 / 4, (dtype, wire, total / steps, exact)
"""


@by_transport
def test_gradients_of_16_bits_lose_nothing_over_time(transport: str) -> None:
    run_ranks(SETTING + OWED, 2, **on(transport))


WIDE = """
# A loss scale that is no power of two must not cost gradients of float64 their digits.
model = DistributedDataParallel(torch.nn.Linear(100, 400, bias=False, dtype=torch.float64))
state = AllReduceState(wire="fp32")
model.register_comm_hook(state, all_reduce_hook)
scaler = GradScaler(state, kind, init_scale=3.0)
torch.manual_seed(rank)
x = torch.randn(5, 100, dtype=torch.float64)
scaler.scale(model(x).sum()).backward()
expected = sum(gathered(x.sum(0))) / world
assert (model.module.weight.grad - expected).abs().max() < 1e-14
os._exit(0)
"""


@by_transport
@pytest.mark.parametrize("world", [2, 3])
def test_gradients_of_float64_are_unscaled_in_float64(world: int, transport: str) -> None:
    run_ranks(SETTING + WIDE, world, **on(transport))


SHARED = """
state = AllReduceState()
one, other = model_of(), model_of()
one.register_comm_hook(state, all_reduce_hook)
other.register_comm_hook(state, all_reduce_hook)
backward(one, 0)
try:
    backward(other, 0)
except (ValueError, RuntimeError) as error:
    assert "one model" in str(error)
else:
    raise AssertionError("two models share a state")
os._exit(0)
"""


def test_two_models_cannot_share_a_state() -> None:
    run_ranks(SETTING + SHARED, 2)


def test_wrong_arguments_are_errors() -> None:
    from fastagg.ddp import AllReduceState

    with pytest.raises(ValueError, match="wire"):
        AllReduceState(wire="fp7")
    with pytest.raises(ValueError, match="rounding"):
        AllReduceState(rounding="up")
    with pytest.raises(ValueError, match="sign"):
        AllReduceState(wire="sign", rounding="stochastic")
    with pytest.raises(ValueError, match="block"):
        AllReduceState(wire="int8", block=100)
