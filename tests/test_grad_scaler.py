"""`fastagg.ddp.GradScaler` beside torch's: what torch's allows gives torch's numbers, or is refused before a step.

Over two ranks, with powers of two as scales, plain DDP's sums are exact: the parameters must be the same bits.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from ranks import run_ranks

COMMON = """
import contextlib
from torch.nn.parallel import DistributedDataParallel
from fastagg.ddp import AllReduceState, GradScaler, all_reduce_hook

class Training:
    # A model of two layers, its optimizers and a scaler: torch's with plain DDP, or ours with the hook.
    def __init__(self, ours, optimizer=torch.optim.SGD, parts=1, scaler=None, ignored=(), model=None, **options):
        torch.manual_seed(0)
        self.module = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.module, ignored)
        self.outside = torch.nn.Linear(4, 4)  # not under DDP
        self.model = DistributedDataParallel(self.module, **(model or {}))
        self.states = []
        scaler = {"init_scale": 1024.0, "growth_interval": 2, **(scaler or {})}
        if ours:
            state = AllReduceState(wire="fp32", named_parameters=self.module.named_parameters())
            self.model.register_comm_hook(state, all_reduce_hook)
        self.scaler = GradScaler(state, "cpu", **scaler) if ours else torch.amp.GradScaler("cpu", **scaler)
        groups = [list(self.module[0].parameters()), list(self.module[1].parameters())]
        groups = groups if parts == 2 else [groups[0] + groups[1]]
        groups[-1] += self.outside.parameters()
        self.optimizers = [optimizer(group, lr=0.125, **options) for group in groups]
        self.ours = ours

    def loss(self, step, factor=1.0):
        x = torch.randint(-4, 5, (2, 6), generator=torch.Generator().manual_seed(10 * step + rank)).float() / 4
        return (self.outside(self.model(x)) * factor).sum()

    def zero_grad(self, **options):
        for optimizer in self.optimizers:
            optimizer.zero_grad(**options)

    def backward(self, step, factor=1.0):
        self.scaler.scale(self.loss(step, factor)).backward()

    def step_without_scaling(self, step):
        self.loss(step).backward()
        for optimizer in self.optimizers:
            optimizer.step()

    def step(self, *which):
        for optimizer in [self.optimizers[place] for place in which] or self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()

def plain(t):
    for step in range(6):
        t.zero_grad()
        t.backward(step, float("inf") if step == 3 else 1.0)
        t.step()

def unscaled_and_clipped(t):
    for step in range(3):
        t.zero_grad()
        t.backward(step)
        for optimizer in t.optimizers:
            t.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_value_(t.module.parameters(), 0.25)
        t.step()

def accumulated(t, synchronised=False):
    for step in range(0, 6, 2):
        t.zero_grad()
        with contextlib.nullcontext() if synchronised else t.model.no_sync():
            t.backward(step)
        t.backward(step + 1)
        t.step()

def accumulated_afterwards(t):
    for step in range(0, 4, 2):
        t.zero_grad()
        t.backward(step)
        with t.model.no_sync():
            t.backward(step + 1)
        t.step()

def never_synchronised(t):
    with t.model.no_sync():
        plain(t)

def skipped(t, **options):
    for step in range(4):
        t.zero_grad(**options)
        t.backward(step)
        if step % 2:
            t.step()

def zeroed_before_backward(t):
    for step in range(4):
        scaled = t.scaler.scale(t.loss(step))
        t.zero_grad()
        scaled.backward()
        if step % 2:
            t.step()

def sometimes_unscaled(t):
    for step in range(6):
        t.zero_grad()
        if step % 3 == 1:
            t.step_without_scaling(step)
        else:
            t.backward(step)
            t.step()

def one_infinite(t):  # one optimizer's gradients are, the other's are not
    for step in range(3):
        t.zero_grad()
        with torch.no_grad():
            t.module[0].bias.grad = torch.full((5,), float("inf") if step == 1 else 0.0)
        t.backward(step)
        t.step()

def every_second(t):  # the second optimizer's gradients add up over two iterations
    for step in range(4):
        t.optimizers[0].zero_grad()
        t.backward(step)
        t.step(*((0, 1) if step % 2 else (0,)))
        if step % 2:
            t.optimizers[1].zero_grad()

def failed(t):  # a backward pass that ends half way, before any gradient
    def fail(gradient):
        raise ValueError("out of memory")
    for step in range(6):
        t.zero_grad()
        if step % 3 == 1:
            outputs = t.module(torch.ones(2, 6))
            outputs.register_hook(fail)
            assert "out of memory" in refused(ValueError, t.scaler.scale(outputs.sum()).backward)
            t.scaler.update(256.0)
        if step % 3 == 2:
            t.step_without_scaling(step)
        else:
            t.backward(step)
            t.step()

def new_scale(t):
    for step in range(3):
        t.zero_grad()
        t.backward(step)
        for optimizer in t.optimizers:
            t.scaler.step(optimizer)
        t.scaler.update(float(2 ** (5 + step)))

def resumed(t):
    plain(t)
    state = t.scaler.state_dict()
    t.scaler.load_state_dict({**state, "scale": 64.0})
    plain(t)

def several_losses(t):
    for step in range(3):
        t.zero_grad()
        one, other = t.scaler.scale([t.loss(2 * step), t.loss(2 * step + 1)])
        with t.model.no_sync():
            one.backward()
        t.scaler.scale(t.loss(step))  # of which nobody wants the gradient
        (other + other).backward()
        t.step()

def penalised(t):
    for step in range(2):
        t.zero_grad()
        loss = t.loss(step)
        found = torch.autograd.grad(t.scaler.scale(loss), t.module[0].weight, create_graph=True)[0]
        t.scaler.scale(loss + (found / t.scaler.get_scale()).sum()).backward()
        t.step()

def same(pattern, **options):
    results = []
    for ours in (False, True):
        t = Training(ours, **options)
        pattern(t)
        parameters = [*t.module.parameters(), *t.outside.parameters()]
        results.append([torch.cat([one.detach().reshape(-1) for one in parameters]), t.scaler.get_scale()])
    (expected, scale), (actual, found) = results
    assert torch.equal(actual, expected), (pattern.__name__, options, (actual - expected).abs().max())
    assert scale == found and expected.isfinite().all(), (pattern.__name__, options, scale, found)

def refused(error, call):
    try:
        call()
    except error as found:
        return str(found)
    raise AssertionError("not refused")
"""

PATTERNS = """
mixed = {"parts": 2, "ignored": ["1.weight"], "model": {"gradient_as_bucket_view": True}}
for pattern in (plain, unscaled_and_clipped, accumulated, lambda t: accumulated(t, True), accumulated_afterwards,
                never_synchronised, skipped, lambda t: skipped(t, set_to_none=False), zeroed_before_backward,
                sometimes_unscaled, failed, new_scale, resumed, several_losses, penalised):
    same(pattern)
    same(pattern, **mixed)
same(one_infinite, parts=2)
same(every_second, parts=2)
for model in ({"static_graph": True}, {"find_unused_parameters": True}):
    same(plain, model=model)
same(accumulated, model={"find_unused_parameters": True})
"""

FUSED = """
for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad):
    same(plain, optimizer=kind, fused=True)
    same(unscaled_and_clipped, optimizer=kind, fused=True)
    same(plain, optimizer=kind, fused=True, parts=2, ignored=["0.bias"])
same(plain, optimizer=torch.optim.Adam)
"""

DISABLED = """
def finite(t):
    for step in range(3):
        t.zero_grad()
        t.backward(step)
        t.step()

same(finite, scaler={"enabled": False})
same(finite, scaler={"enabled": False}, fused=True)
"""

SEVERAL = """
# Two models with hooks of their own, of which the scaler knows one; both in one optimizer, or one each.
def trained(ours, together):
    torch.manual_seed(0)
    models = [DistributedDataParallel(torch.nn.Linear(6, 1)) for _ in range(2)]
    states = [AllReduceState(wire="fp32") for _ in models]
    for model, state in zip(models, states):
        model.register_comm_hook(state, all_reduce_hook) if ours else None
    options = {"init_scale": 256.0}
    scaler = GradScaler(states[0], "cpu", **options) if ours else torch.amp.GradScaler("cpu", **options)
    groups = [list(model.parameters()) for model in models]
    groups = [groups[0] + groups[1]] if together else groups
    optimizers = [torch.optim.SGD(group, lr=0.125) for group in groups]
    for step in range(3):
        x = torch.randint(-4, 5, (2, 6), generator=torch.Generator().manual_seed(10 * step + rank)).float()
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(models[0](x).sum() + models[1](x).sum()).backward()
        scaler.scale(models[1](x).square().sum()).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
    return torch.cat([parameter.detach().reshape(-1) for model in models for parameter in model.parameters()])

for together in (False, True):
    assert torch.equal(trained(True, together), trained(False, together)), together
"""

REFUSED = """
t = Training(True)
t.backward(0)
sgd = t.optimizers[0]
assert "closure" in refused(RuntimeError, lambda: t.scaler.step(sgd, lambda: t.loss(0)))
assert "closure" in refused(RuntimeError, lambda: t.scaler.step(sgd, closure=lambda: t.loss(0)))
lbfgs = torch.optim.LBFGS(t.module.parameters())
assert "closure" in refused(RuntimeError, lambda: t.scaler.step(lbfgs, lambda: t.loss(0)))

class Unscaling(torch.optim.SGD):
    _step_supports_amp_scaling = True
    def step(self, closure=None, *, grad_scaler=None):
        raise AssertionError("it stepped")

assert "torch.amp.GradScaler" in refused(TypeError, lambda: t.scaler.step(Unscaling(t.module.parameters())))
# What was left of a scaled loss is in the way of one that is not.
assert "scaler.step(optimizer)" in refused(RuntimeError, lambda: t.loss(1).backward())
os._exit(0)
"""


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(PATTERNS, id="patterns"),
        pytest.param(FUSED, id="fused optimizers"),
        pytest.param(DISABLED, id="a disabled scaler"),
        pytest.param(SEVERAL, id="several models"),
        pytest.param(REFUSED, id="what is refused"),
    ],
)
def test_what_torchs_scaler_allows_gives_its_numbers_or_is_refused(program: str) -> None:
    run_ranks(COMMON + program, 2)
