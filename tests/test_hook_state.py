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


DEFAULTS = """
# What tensors get that ask for nothing is no business of the hook's.
torch.set_default_dtype(getattr(torch, os.environ["DEFAULT"]))
torch.set_default_device("meta")
model = DistributedDataParallel(torch.nn.Linear(300, 200, device="cpu", dtype=torch.float32))
state = AllReduceState(wire="int4", error_feedback=True, named_parameters=model.module.named_parameters())
model.register_comm_hook(state, all_reduce_hook)
x = torch.full((1, 300), 1 + rank / 8, device="cpu", dtype=torch.float32) * torch.arange(300, device="cpu") / 300
total = torch.zeros(200, 300, device="cpu", dtype=torch.float64)
for step in range(3):
    model.zero_grad()
    model(x).sum().backward()
    total += model.module.weight.grad
residuals = state.state_dict()["residuals"]["weight"].view(200, 300)
assert residuals.dtype == torch.float32
exact = 3 * (1 + 1 / 16) * x / (1 + rank / 8)
owed = residuals.double().clone()
dist.all_reduce(owed)
assert (exact - total - owed / world).abs().max() < 1e-6
"""


@pytest.mark.parametrize("transport", ["shared memory", "backend"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_residuals_are_float32_whatever_the_default_dtype_and_device(dtype: str, transport: str) -> None:
    run_ranks(SETTING + DEFAULTS, 2, DEFAULT=dtype, **on(transport))


REFUSED = """
def refused(module, *given, options=()):
    model = DistributedDataParallel(module)
    state = AllReduceState(wire="int8", error_feedback=True, named_parameters=module.named_parameters())
    model.register_comm_hook(state, all_reduce_hook)
    try:
        model(*given).abs().sum().backward()
    except (TypeError, ValueError) as error:
        return str(error)
    raise AssertionError("no error")

found = refused(torch.nn.Embedding(10, 3, sparse=True), torch.tensor([rank, 2]))
assert found.startswith("parameter 'weight' of shape (10, 3) has sparse gradients") and "sparse=False" in found, found

# Complex ones are pairs of real ones.
def complex_gradient(hook):
    torch.manual_seed(0)
    module = torch.nn.Linear(30, 20, bias=False, dtype=torch.complex64)
    model = DistributedDataParallel(module)
    state = AllReduceState(wire="int8", error_feedback=True, named_parameters=module.named_parameters())
    model.register_comm_hook(state, all_reduce_hook) if hook else None
    model(torch.arange(30).to(torch.complex64) * (1 + rank)).abs().sum().backward()
    return module.weight.grad, state
expected, _ = complex_gradient(False)
found, state = complex_gradient(True)
owed = torch.view_as_complex(sum(gathered(state.state_dict()["residuals"]["weight"])).view(20, 30, 2)) / world
assert 0 < (found - expected).abs().max() and torch.allclose(found + owed, expected, atol=1e-5), (found, expected)

class Bucket:  # whose elements are not those of its parameters
    def __init__(self, elements):
        self.elements = elements
    def index(self):
        return 0
    def is_last(self):
        return True
    def buffer(self):
        return torch.zeros(self.elements)
    def parameters(self):
        return [parameter]

parameter = torch.nn.Parameter(torch.zeros(7, 3))
for elements in (0, 20, 22, 42):
    state = AllReduceState(wire="int8", error_feedback=True)
    try:
        state.begin_bucket(dist.group.WORLD, Bucket(elements))
    except ValueError as error:
        assert "21 elements" in str(error) and "(7, 3)" in str(error), error
    else:
        raise AssertionError(elements)
os._exit(0)
"""


def test_gradients_that_are_not_the_parameters_own_are_refused_by_name() -> None:
    run_ranks(SETTING + REFUSED, 2)


def test_a_residual_of_another_size_dtype_or_device_never_reaches_native_code() -> None:
    import torch

    from fastagg.distributed.exchange.exchange import Feedback

    values, right = torch.zeros(10), torch.zeros(10)
    Feedback(right, 1.0, right).check(values)
    wrong = [
        torch.zeros(9),
        torch.zeros(11),
        torch.zeros(10, dtype=torch.bfloat16),
        torch.zeros(10, dtype=torch.float64),
    ]
    for other in [*wrong, torch.zeros(10, device="meta"), torch.zeros(20)[::2], torch.zeros(2, 5)]:
        with pytest.raises(ValueError, match="residual: expected"):
            Feedback(other, 1.0, right).check(values)
        with pytest.raises(ValueError, match="error: expected"):
            Feedback(right, 1.0, other).check(values)


# A field of a state_dict, and what it is forged to.
FORGED = {
    "steps": [-1, 1.5, "3", None, True, 2**64, float("nan")],
    "world": [-1, 0, float("nan"), float("inf"), "2", None, True, 10**400],
    "loss_scale": [0.0, -1.0, float("nan"), float("inf"), "1", None, 1e300],
    "residuals": [None, [], {"no.such": "tensor"}, {"weight": [1.0]}, {3: "tensor"}, "weight"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in FORGED.items() for value in values])
def test_a_forged_field_of_a_state_is_refused_before_any_is_used(name: str, value: object) -> None:
    import torch

    from fastagg.ddp import AllReduceState

    state = AllReduceState(error_feedback=True, named_parameters=torch.nn.Linear(3, 2).named_parameters())
    right = {"steps": 3, "world": 2, "loss_scale": 1.0, "residuals": {"weight": torch.ones(6)}}
    state.load_state_dict(right)
    if isinstance(value, dict):
        value = {key: torch.ones(6) if one == "tensor" else one for key, one in value.items()}
    missing = {key: one for key, one in right.items() if key != name}
    for wrong in ({**right, name: value}, missing):
        with pytest.raises((TypeError, ValueError), match=r"\w"):
            state.load_state_dict(wrong)
        kept = state.state_dict()
        assert (kept["steps"], kept["world"], kept["loss_scale"]) == (3, 2, 1.0)
        assert torch.equal(kept["residuals"]["weight"], torch.ones(6))


def test_a_forged_residual_is_refused() -> None:
    import torch

    from fastagg.ddp import AllReduceState

    state = AllReduceState(error_feedback=True, named_parameters=torch.nn.Linear(3, 2).named_parameters())
    wrong = [
        *(torch.ones(5), torch.ones(6, dtype=torch.int64), torch.ones(6, dtype=torch.complex64), torch.ones(0)),
        *(torch.ones(6).to_sparse(), torch.ones(6, device="meta"), torch.full((6,), float("nan"))),
        *(torch.full((6,), 1e300, dtype=torch.float64), torch.ones(1).expand(10**12), torch.ones(1).expand(6)),
    ]
    for residual in wrong:
        given = {"steps": 3, "world": 2, "loss_scale": 1.0, "residuals": {"weight": residual}}
        with pytest.raises((TypeError, ValueError), match="weight"):
            state.load_state_dict(given)
    assert state.state_dict()["residuals"] == {}
    negative = torch.full((6,), -1j).conj().imag
    state.load_state_dict({"steps": 3, "world": 2, "loss_scale": 1.0, "residuals": {"weight": negative.double()}})
    assert torch.equal(state.state_dict()["residuals"]["weight"], torch.ones(6))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("wire", "fp7"), ("wire", None), ("rounding", "up"), ("error_feedback", 1), ("block", 100), ("block", "64")),
        *(("seed", "x"), ("names", None), ("names", ["a", "a"]), ("names", [1]), ("transport", 3), ("wire_bytes", -1)),
        *(("_squares", None), ("state_dict", None), ("state_dict", {"steps": 3})),
    ],
)
def test_a_forged_field_of_a_pickled_state_is_refused(name: str, value: object) -> None:
    from fastagg.ddp import AllReduceState

    right = AllReduceState(wire="int8", error_feedback=True).__getstate__()
    AllReduceState.__new__(AllReduceState).__setstate__(dict(right))
    for wrong in ({**right, name: value}, {key: one for key, one in right.items() if key != name}):
        with pytest.raises((TypeError, ValueError), match=r"\w"):
            AllReduceState.__new__(AllReduceState).__setstate__(wrong)
