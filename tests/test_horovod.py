"""`fastagg.horovod` among real processes: the lines of a Horovod user's script."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import fastagg.horovod as hvd  # noqa: E402
from ranks import run_ranks  # noqa: E402

LINES = """
import fastagg.horovod as hvd
hvd.init()
assert hvd.is_initialized() and hvd.rank() == rank and hvd.size() == world
mean = sum(range(1, world + 1)) / world

x = torch.full((5,), rank + 1.0)
assert torch.all(hvd.allreduce(x, name="loss") == mean) and torch.all(x == rank + 1)
assert torch.all(hvd.allreduce(x, average=False) == mean * world)
assert torch.all(hvd.allreduce(x, op=hvd.Sum, compression=hvd.Compression.fp16) == mean * world)
assert torch.all(hvd.allreduce(x, True, "loss", hvd.Compression.none, process_set=dist.group.WORLD) == mean)
assert hvd.allreduce_(x, op=hvd.Average) is x and torch.all(x == mean)
correct = torch.tensor(2**60 + rank)
assert hvd.allreduce(correct, op=hvd.Sum) == world * 2**60 + sum(range(world))
assert hvd.allreduce(torch.tensor([3, 5, -rank])).tolist() == [3, 5, 0]  # the mean of integers, towards zero
assert hvd.allreduce(torch.tensor(rank == 1), op=hvd.Sum).item() is True
scaled = hvd.allreduce(torch.ones(3), op=hvd.Sum, prescale_factor=0.5, postscale_factor=3.0)
assert torch.all(scaled == 1.5 * world)

# Gradients flow back as the all-reduce of the gradients.
x = torch.ones(3, requires_grad=True)
(hvd.allreduce(x * 2, op=hvd.Sum) * (rank + 1)).sum().backward()
assert torch.all(x.grad == 2 * mean * world)

x = torch.ones(3, requires_grad=True)
(hvd.broadcast(x * 2, root_rank=1) * (rank + 1)).sum().backward()
assert torch.all(x.grad == (2 * mean if rank == 1 else 0))  # Horovod's: the mean of the gradients, at the root

epoch = torch.tensor(7 + rank)
assert hvd.broadcast(epoch, root_rank=1, name="epoch").item() == 8 and epoch == 7 + rank
assert hvd.broadcast_(epoch, 0) is epoch and epoch == 7
assert hvd.broadcast_object({"rank": rank}, root_rank=1) == {"rank": 1}
everyone = hvd.global_process_set
assert hvd.broadcast(torch.tensor(rank), 1, process_set=everyone).item() == 1
assert hvd.broadcast_object(rank, 1, process_set=everyone) == 1
hvd.broadcast_parameters(params={"b": epoch} if rank else {"b": epoch}, process_set=everyone)
hvd.init(process_sets=[])

torch.manual_seed(rank)
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.5 * hvd.size() + rank, momentum=0.5)
optimizer = hvd.DistributedOptimizer(
    optimizer, named_parameters=model.named_parameters(), compression=hvd.Compression.fp16,
    backward_passes_per_step=2, op=hvd.Average, gradient_predivide_factor=1.0,
    groups=None, process_set=hvd.global_process_set)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
hvd.broadcast_optimizer_state(optimizer, root_rank=0, model=model)
assert optimizer.param_groups[0]["lr"] == 0.5 * world
before = model.bias.item()
for step in range(2):
    optimizer.zero_grad()
    for _ in range(2):
        (model(torch.ones(1, 3)) * (rank + 1)).sum().backward()
    optimizer.synchronize()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e6)
    with optimizer.skip_synchronize():
        optimizer.step()
assert abs(before - model.bias.item() - 0.5 * world * 2 * mean * 2.5) < 1e-5
assert all(torch.equal(model.weight.detach(), other) for other in gathered(model.weight.detach()))
hvd.barrier(process_set=None)
hvd.shutdown()
assert not hvd.is_initialized()
"""


@pytest.mark.parametrize("transport", ["", "backend"], ids=["shared memory", "backend"])
def test_a_scripts_lines_do_what_they_did(transport: str) -> None:
    run_ranks(LINES, 2, FASTAGG_TRANSPORT=transport)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression": type("TopK", (), {})}, "compression: expected one of fp32, .*TopK"),
        ({"compression": "fp7"}, "wire: expected one of"),
        ({"op": "Adasum"}, "op: expected Average or Sum, got 'Adasum'"),
        ({"gradient_predivide_factor": 2.0, "op": "sum"}, "gradient_predivide_factor"),
        ({"num_groups": 2}, "num_groups"),
        ({"groups": [[]]}, "groups"),
        ({"sparse_as_dense": True}, "sparse_as_dense"),
        ({"process_set": [0, 1]}, r"process_set: expected a torch.distributed.ProcessGroup, got \[0, 1\]"),
    ],
)
def test_what_is_not_there_is_refused(options: dict[str, Any], message: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.raises(ValueError, match=message):
        hvd.DistributedOptimizer(optimizer, **options)


DIFFER = """
import fastagg.horovod as hvd
hvd.init()
def differ(call, *told):
    try:
        call()
    except ValueError as error:
        assert all(one in str(error) for one in told), error
    else:
        raise AssertionError("no error")
x = torch.full((4,), rank + 1.0)
differ(lambda: hvd.allreduce(x, name=("loss", "accuracy")[rank]), "'loss'", "'accuracy'")
differ(lambda: hvd.allreduce(x.int() if rank else x, op=hvd.Sum), "int32", "float32")
differ(lambda: hvd.allreduce(x.int() if rank else x.long(), op=hvd.Sum), "int32", "int64")
differ(lambda: hvd.allreduce(torch.ones(4 + rank, dtype=torch.long), op=hvd.Sum), "(4,)", "(5,)")
differ(lambda: hvd.barrier() if rank else hvd.allreduce(x), "barrier", "mean")
differ(lambda: hvd.broadcast(x, root_rank=rank), "root_rank 0", "root_rank 1")
differ(lambda: hvd.broadcast_object(x, root_rank=rank), "root_rank 0", "root_rank 1")
assert torch.all(hvd.allreduce(x) == 1.5) and torch.all(x == rank + 1)  # nothing was written, and the group works
hvd.shutdown()
"""


@pytest.mark.parametrize("transport", ["", "backend"], ids=["shared memory", "backend"])
def test_ranks_that_differ_are_told_so(transport: str) -> None:
    run_ranks(DIFFER, 2, FASTAGG_TRANSPORT=transport)


def test_reductions_refuse_what_is_not_there() -> None:
    for options in (
        {"average": True, "op": hvd.Sum},
        {"op": "max"},
    ):
        with pytest.raises(ValueError, match="|".join(options)):
            hvd.allreduce(torch.ones(1), **options)


def test_the_environment_is_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    for function in (hvd.init, hvd.local_rank, hvd.local_size):
        with pytest.raises(RuntimeError, match="torchrun"):
            function()


def test_the_example_learns() -> None:
    pytest.importorskip("sklearn")
    example = Path(__file__).resolve().parent.parent / "examples" / "horovod_style.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(example)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    epochs = [line.split() for line in done.stdout.splitlines() if line.startswith("epoch")]
    assert float(epochs[-1][-1]) > 0.85, done.stdout
