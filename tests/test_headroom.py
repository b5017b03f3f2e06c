"""The headroom report: what it measures among real processes, and what it says of given numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from fastagg.ddp.benchmark import Report, Row, report
from ranks import run_ranks

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "headroom.py"

# 3050 gradients: multiples of 7 below 414, so fp32 and fp16 hold them and their means exactly, and int8 does not.
MEASURED = """
from fastagg.ddp import report

model = torch.nn.Linear(60, 50)
calls = []
def step(given):
    assert all(parameter.grad is None for parameter in given.parameters())
    calls.append(given)
    given(7.0 * torch.arange(60) + rank).sum().backward()

found = report(model, step, wires=("fp32", torch.float16, "int8", "half"), steps=3, warmup=2)
none, plain, fp32, fp16, int8 = found.rows
assert [row.name for row in found.rows] == ["no communication", "plain DDP", "fp32", "fp16", "int8"]
assert len(calls) == 5 * 5 and all(call is contender for call, contender in zip(calls, calls[:5] * 5))
assert (found.world, found.steps) == (world, 3)

sizes = (0, None, 3050 * 4 * (world - 1), 3050 * 2 * (world - 1), (3050 + 12 * 4) * (world - 1))
assert tuple(row.wire_bytes for row in found.rows) == sizes, found
assert [row.gradient_error for row in (plain, fp32, fp16)] == [0, 0, 0], found
assert 0 < int8.gradient_error < 0.02 and (none.gradient_error > 0) == (world > 1), found

for row in found.rows:
    assert row.seconds > 0 and row.exposed == row.seconds - none.seconds and row.gain == 1 - row.seconds / plain.seconds
seconds = gathered(torch.tensor([row.seconds for row in found.rows], dtype=torch.float64))
assert all(torch.equal(seconds[0], other) for other in seconds)
assert str(found).endswith(found.verdict) and ("one rank" in found.verdict) == (world == 1)
"""

# Parameters that differ from rank to rank, as DDP's own copies will not.
UNTOUCHED = """
import copy, random
import numpy as np
from fastagg.ddp import report

torch.manual_seed(rank)
model = torch.nn.Sequential(
    torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 3), torch.nn.Linear(3, 2))
model[3].weight.requires_grad_(False)
x = torch.randn(16, 6)
model(x).sum().backward()
gradients = [parameter.grad for parameter in model.parameters()]
def everything():
    tensors = [*model.state_dict().values(), *(one for one in gradients if one is not None), torch.get_rng_state()]
    return [tensor.clone() for tensor in tensors], random.getstate(), np.random.get_state()[1].tolist()

def step(given):
    noise = torch.rand(2) + random.random() + np.random.rand()
    (given(x) * noise).square().sum().backward()

before = everything()
found = report(model, step, wires=["fp32"], steps=2, warmup=1)
after = everything()
assert all(torch.equal(old, new) for old, new in zip(before[0], after[0], strict=True))
assert before[1:] == after[1:] and model.training
assert all(old is new.grad for old, new in zip(gradients, model.parameters(), strict=True))
assert found.rows[2].gradient_error < 1e-6, found
"""

OPTIONS = """
from fastagg.ddp import report

class Branches(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    def forward(self, x):
        return self.used(x)

def step(model):
    model(torch.full((4,), float(rank))).sum().backward()

for options in ({"find_unused_parameters": True}, {"static_graph": True},
                {"find_unused_parameters": True, "gradient_as_bucket_view": True}):
    rows = report(Branches(), step, wires=["fp32"], steps=1, warmup=2, **options).rows
    assert [row.gradient_error for row in rows[1:]] == [0, 0], (options, rows)
assert len(report(torch.nn.Linear(4, 3), step, wires=[], steps=1, warmup=1).rows) == 2

try:
    report(torch.nn.Linear(4, 3), step, steps=1 + rank)
except ValueError as error:
    assert "steps=1" in str(error) and "steps=2" in str(error)
else:
    raise AssertionError("no error")

groups = [dist.new_group([one]) for one in range(world)]
found = report(torch.nn.Linear(4, 3), step, process_group=groups[rank], steps=1, warmup=1)
assert found.world == 1 and found.rows[0].gradient_error == 0
"""

UNFIT = """
import itertools
from fastagg.ddp import report

def refused(step, wrap=lambda model: model):
    try:
        report(wrap(model), step, wires=[], steps=1)
    except ValueError as error:
        return str(error)

model, numbers = torch.nn.Linear(4, 3), itertools.count()
def another_batch(given):
    given(torch.eye(4)[next(numbers) % 4]).sum().backward()

assert "step: no gradients" in refused(lambda given: given(torch.ones(4)))
assert "step: no gradients" in refused(lambda given: model(torch.ones(4)).sum().backward())
wrapped = refused(another_batch, torch.nn.parallel.DistributedDataParallel)
assert wrapped == "model: expected a torch.nn.Module that is not yet under DDP, got DistributedDataParallel"
assert "step: plain DDP's gradients are 1 (relative L2) off" in refused(another_batch)
"""


@pytest.mark.parametrize("world", [1, 2])
def test_every_contender_is_measured(world: int) -> None:
    run_ranks(MEASURED, world)


def test_the_model_and_the_generators_are_left_as_they_were() -> None:
    run_ranks(UNTOUCHED, 2)


def test_options_of_ddp_and_groups() -> None:
    run_ranks(OPTIONS, 2)


def test_unfit_steps_and_models_are_refused() -> None:
    run_ranks(UNFIT, 2)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"model": "resnet50"}, "model: expected a torch.nn.Module that is not yet under DDP, got str"),
        ({"model": torch.nn.ReLU()}, "model: no parameter of ReLU requires a gradient"),
        ({"step": None}, "step: expected a function"),
        ({"wires": "fp16"}, "wires: expected a sequence of wires, got 'fp16'"),
        ({"wires": 16}, "wires: expected a sequence of wires, got 16"),
        ({"wires": ["fp16", "fp12"]}, "wire: .* got 'fp12'"),
        ({"steps": 0}, "steps: expected an integer of 1 or more, got 0"),
        ({"warmup": 1.5}, "warmup: expected an integer of 1 or more, got 1.5"),
        ({}, "torch.distributed is not initialised"),
    ],
)
def test_wrong_arguments_are_named(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        report(**{"model": torch.nn.Linear(2, 2), "step": print, **given})


def reported(none: float, *wires: tuple[str, float, float], world: int = 2) -> Report:
    """A report of a second's step without communication, with plain DDP, and with wires and their errors."""
    measured = (("no communication", none, 1.0), ("plain DDP", 1.0, 0.0), *wires)
    rows = (Row(name, seconds, seconds - none, 1 - seconds, 1234567, error) for name, seconds, error in measured)
    return Report(tuple(rows), world, steps=10)


FP32, FP16, INT8, SIGN = ("fp32", 0.9, 1e-8), ("fp16", 0.7, 2e-4), ("int8", 0.6, 0.02), ("sign", 0.5, 0.8)


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [
        (reported(0.2, FP16, world=1), "There is one rank, so nothing is communicated: no wire can gain anything."),
        (reported(0.97, FP16), "Communication is 3% of your step: no wire can gain more than that."),
        (reported(1.04, FP16), "Communication is 0% of your step: no wire can gain more than that."),
        (
            reported(0.4, ("fp16", 0.96, 2e-4), ("int8", 1.3, 0.02)),
            "Communication is 60% of your step, but no wire measured here makes a step notably shorter: "
            "stay with plain DDP.",
        ),
        (
            reported(0.4, ("fp16", 0.5, float("nan"))),
            "Communication is 60% of your step, but no wire measured here makes a step notably shorter: "
            "stay with plain DDP.",
        ),
        (
            reported(0.4, FP32, FP16, INT8, SIGN),
            "Communication is 60% of your step: the int8 wire makes a step 40% shorter, with a gradient error of 0.02.",
        ),
        (  # nearly as fast, and nearer to the truth
            reported(0.4, FP32, ("fp16", 0.62, 0.01), INT8),
            "Communication is 60% of your step: the fp16 wire makes a step 38% shorter, with a gradient error of 0.01.",
        ),
        (
            reported(0.4, SIGN),
            "Communication is 60% of your step: the sign wire makes a step 50% shorter, with a gradient error of 0.8, "
            "which needs error feedback.",
        ),
    ],
)
def test_the_verdict(measured: Report, verdict: str) -> None:
    assert measured.verdict == verdict


def test_the_table() -> None:
    rows = (
        Row("no communication", 0.0123, 0.0, 0.25, 0, 1.2),
        Row("plain DDP", 0.0164, 0.0041, 0.0, None, 0.0),
        Row("fp16", 0.0135, 0.0012, 0.176829, 21594920, 0.000234),
    )
    assert str(Report(rows, world=4, steps=10)).splitlines() == [
        "World size 4; medians of 10 steps, each as long as its slowest rank's.",
        "",
        "                       step   exposed    gain   wire bytes   gradient error",
        "no communication   12.30 ms   0.00 ms   25.0%            0              1.2",
        "plain DDP          16.40 ms   4.10 ms    0.0%            -                0",
        "fp16               13.50 ms   1.20 ms   17.7%   21,594,920          0.00023",
        "",
        "Communication is 25% of your step: the fp16 wire makes a step 18% shorter, with a gradient error of 0.00023.",
    ]


def test_one_rank_has_no_gain_to_show() -> None:
    table = str(reported(0.8, FP16, world=1))
    assert "%" not in table
    assert "gain" in table.splitlines()[2]


def test_the_example_prints_the_table_once() -> None:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    sizes = ("--width", "16", "--batch", "4", "--steps", "2", "--wires", "fp16", "sign")
    done = subprocess.run(
        [*launcher, str(EXAMPLE), *sizes],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[3:7]] == ["no communication", "plain DDP", "fp16", "sign"]
    assert len(lines) == 9
    assert lines[0].startswith("World size 2")
    assert lines[-1].startswith("Communication is")
