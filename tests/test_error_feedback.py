"""Error feedback: nothing is lost, only late. All means and what is owed add up to the exact means."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from ranks import run_ranks

COMMON = """
from torch.nn.parallel import DistributedDataParallel
from fastagg.distributed.channels import channel_of
from fastagg.ddp import AllReduceState, GradScaler, all_reduce_hook

def group_on(layout):
    # A group whose ranks find themselves on these hosts.
    hosts = {"one host": "", "two hosts": str(rank // 2), "other hosts": str(rank % 2), "every rank a host": str(rank)}
    os.environ["FASTAGG_HOST"] = hosts[layout]
    group = dist.new_group()
    channel_of(group).transport  # where the ranks meet, and see the variable
    del os.environ["FASTAGG_HOST"]
    return group

class Sums(torch.nn.Module):
    # Parameters whose gradients are what is given, where it is given.
    def __init__(self, dtype=torch.float32):
        super().__init__()
        for name, size in sizes.items():
            setattr(self, name, torch.nn.Parameter(torch.zeros(size, dtype=dtype)))

    def forward(self, given):
        return sum((getattr(self, name) * x).sum() for name, x in given.items())

class Ledger:
    # Training with error feedback, and what its means were and should have been.
    def __init__(self, wire, group=None, dtype=torch.float32, model=None, **options):
        self.module, self.wire, self.dtype, self.steps = Sums(dtype), wire, dtype, 0
        self.means = {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}
        self.exact = {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}
        self.on(group, model, **options)

    def on(self, group, model=None, **options):
        named = self.module.named_parameters()
        self.state = AllReduceState(group, self.wire, error_feedback=True, named_parameters=named, **options)
        self.model = DistributedDataParallel(self.module, process_group=group, bucket_cap_mb=0.1, **(model or {}))
        self.model.register_comm_hook(self.state, all_reduce_hook)

    def given(self, who, used):
        generator = torch.Generator().manual_seed(100 * self.steps + who)
        everything = {name: torch.randn(size, generator=generator).to(self.dtype) for name, size in sizes.items()}
        return {name: everything[name] for name in used}

    def step(self, used=None, present=None, spoilt=False, scaler=None):
        used, present = used or list(sizes), present or range(world)
        self.module.zero_grad()
        loss = self.model(self.given(rank, used)) * (float("inf") if spoilt and rank == 1 else 1.0)
        if scaler is None:
            loss.backward()
        else:
            scaler.scale(loss).backward()
        if not spoilt:
            for name in used:
                self.means[name] += getattr(self.module, name).grad
                self.exact[name] += sum(self.given(who, [name])[name].double() for who in present) / len(present)
        self.steps += 1

    def check(self, *what, tolerance=3e-7):
        kept = self.state.state_dict()
        for name, size in sizes.items():
            owed = kept["residuals"].get(name, torch.zeros(size))
            owed = sum(one.double() for one in gathered(owed)) / kept["world"] / kept["loss_scale"]
            exact = self.exact[name].norm()
            lost = (self.exact[name] - self.means[name] - owed).norm() / exact
            assert lost < tolerance, (what, self.wire, name, lost)
            assert owed.norm() > 1e-5 * exact, (what, self.wire, name)
"""

# Slices that several ranks own, and blocks that reach over parameters.
LAYOUTS = """
sizes = {"a": 30_000, "b": 20_001, "c": 7_777}
layouts = ["one host", "two hosts", "other hosts", "every rank a host"]
groups = {layout: group_on(layout) for layout in layouts}
names = {"one host": "shared memory", "every rank a host": "gloo backend"}
chosen = [(0, "int4"), (1, "sign"), (2, "int8"), (3, "fp16")]
if "EVERYTHING" in os.environ:
    chosen = [(place, wire) for place in range(4) for wire in ("int8", "int4", "sign", "fp16", "bf16", "fp8_e4m3")]
for place, wire in chosen:
    # Buckets are made up anew after the first step; then it goes on elsewhere, from what was saved.
    layout, other = layouts[place], layouts[place - 1]
    for rounding in ("nearest", "stochastic")[: 1 if wire == "sign" else 2]:
        ledger = Ledger(wire, groups[layout], rounding=rounding)
        ledger.step()
        ledger.step()
        ledger.check(layout, "rebuilt")
        assert ledger.state.transport == names.get(layout, "shared memory, and the gloo backend between hosts")
        ledger.step(spoilt=True)
        ledger.check(layout, "spoilt")
        saved = ledger.state.state_dict()
        ledger.on(groups[other], rounding=rounding)
        ledger.state.load_state_dict(saved)
        ledger.check(layout, other, "loaded")
        ledger.step()
        ledger.step()
        ledger.check(layout, other, "resumed")
"""

UNUSED = """
sizes = {"a": 30_000, "b": 20_001, "c": 7_777}
for layout in ("one host", "two hosts", "every rank a host"):
    group = group_on(layout)
    for wire, options in (("int4", {}), ("sign", {"gradient_as_bucket_view": True})):
        ledger = Ledger(wire, group, model={"find_unused_parameters": True, **options})
        scaler = GradScaler(ledger.state, "cpu", init_scale=8.0)
        for step in range(6):  # b is unused in most steps, a and c in one; the loss scale comes and goes
            used = [["a", "b", "c"], ["a", "c"], ["b"]][(step > 0) * (1 + step // 5)]
            ledger.step(used, scaler=scaler if step in (1, 3) else None)
            if step in (1, 3):
                scaler.unscale_(torch.optim.SGD(ledger.module.parameters()))
                scaler.update(16.0)
            ledger.check(layout, step) if step else None
            found = [one.grad for one in ledger.module.parameters() if one.grad is not None]
            norm = torch.nn.utils.get_total_norm(found).item()
            assert abs(ledger.state.grad_norm - norm) < 1e-5 * norm, (wire, step, ledger.state.grad_norm, norm)
"""

NARROW = """
# What rounding a mean to the gradients' own 16 bits takes is owed as well, between hosts too.
sizes = {"a": 3_000, "b": 500}
for layout in ("one host", "two hosts", "every rank a host"):
    group = group_on(layout)
    for wire, dtype in (("bf16", torch.bfloat16), ("int8", torch.float16)):
        ledger = Ledger(wire, group, dtype)
        for step in range(4):
            ledger.step()
            ledger.check(layout, dtype)
"""

FEWER = """
# Three ranks' residuals, taken up by two: all that was saved is loaded once.
sizes = {"a": 30_000, "b": 20_001}
ledger = Ledger("int4")
ledger.step()
ledger.step()
saved = [None] * world
dist.all_gather_object(saved, ledger.state.state_dict())
pair = dist.new_group([0, 1])
if rank < 2:
    means, exact = ledger.means, ledger.exact
    ledger.on(pair)
    ledger.state.load_state_dict(saved[:1] if rank == 0 else saved[1:])
    for step in range(2):
        ledger.step(present=range(2))
    kept = ledger.state.state_dict()
    for name in sizes:
        both = [torch.empty(sizes[name]) for _ in range(2)]
        dist.all_gather(both, kept["residuals"][name], group=pair)
        lost = ledger.exact[name] - ledger.means[name] - sum(one.double() for one in both) / kept["world"]
        assert kept["world"] == 2 and lost.norm() < 3e-7 * ledger.exact[name].norm(), (name, lost.norm())
"""

JOIN = """
sizes = {"a": 30_000, "b": 20_001}
for divide_by_all in (True, False):
    for options in ({}, {"find_unused_parameters": True}):
        ledger = Ledger("int4", model=options)
        scaler = GradScaler(ledger.state, "cpu", init_scale=4.0)
        inputs = [2 + 2 * who for who in range(world)]
        with ledger.model.join(divide_by_initial_world_size=divide_by_all):
            for step in range(inputs[rank]):
                present = [who for who in range(world) if inputs[who] > step]
                used = ["a"] if options and step % 3 == 1 else ["a", "b"]
                before = {name: ledger.exact[name].clone() for name in used}
                ledger.step(used, present, scaler=scaler)
                if divide_by_all:
                    for name in used:
                        taken = ledger.exact[name] - before[name]
                        ledger.exact[name] = before[name] + taken * len(present) / world
                scaler.unscale_(torch.optim.SGD(ledger.module.parameters()))
                scaler.update(2.0 * scaler.get_scale())
        # The last rank has seen every step.
        for name in sizes:
            for ours in (ledger.means, ledger.exact):
                dist.broadcast(ours[name], world - 1)
        assert ledger.state.state_dict()["world"] == (world if divide_by_all else 1), ledger.state.state_dict()["world"]
        ledger.check(divide_by_all, options)
"""


@pytest.mark.parametrize(
    ("program", "world"),
    [
        pytest.param(LAYOUTS, 4, id="layouts of hosts, rebuilt buckets, resumed"),
        pytest.param(UNUSED, 4, id="unused parameters"),
        pytest.param(NARROW, 4, id="gradients of 16 bits"),
        pytest.param(FEWER, 3, id="fewer ranks"),
        pytest.param(JOIN, 3, id="ranks that run out of inputs"),
    ],
)
def test_nothing_is_lost_only_late(program: str, world: int) -> None:
    run_ranks(COMMON + program, world)


@pytest.mark.exhaustive
def test_nothing_is_lost_with_any_wire_in_any_layout() -> None:
    run_ranks(COMMON + LAYOUTS, 4, EVERYTHING="")
