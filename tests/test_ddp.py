"""The DDP hook among real processes: the same training as without it, within the wire's error."""

from __future__ import annotations

import signal

import pytest

pytest.importorskip("torch")

from ranks import Ranks, run_ranks
from transports import by_transport, on

TRAINING = """
import copy, pickle
from sklearn.datasets import load_digits
from torch.nn.parallel import DistributedDataParallel
from fastagg.ddp import AllReduceState, all_reduce_hook

torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
digits = load_digits()
x, y = torch.tensor(digits.data[:1600] / 16, dtype=torch.float32), torch.tensor(digits.target[:1600])
torch.manual_seed(0)
start = torch.nn.Sequential(
    torch.nn.Unflatten(1, (1, 8, 8)), torch.nn.Conv2d(1, 16, 3), torch.nn.BatchNorm2d(16), torch.nn.ReLU(),
    torch.nn.Flatten(), torch.nn.Linear(576, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))

def train(wire, **options):
    model = DistributedDataParallel(copy.deepcopy(start), bucket_cap_mb=0.05, **options)
    state = AllReduceState(wire=wire) if wire else None
    if state:
        model.register_comm_hook(state, all_reduce_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(30):
        batch = slice((step * world + rank) * 16 % 1600, (step * world + rank) * 16 % 1600 + 16)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    others = gathered(flat)
    assert all(torch.equal(others[0], other) for other in others), (wire, options)
    return flat, state

plain, _ = train(None)
for options in ({}, {"gradient_as_bucket_view": True}, {"static_graph": True}, {"find_unused_parameters": True}):
    exact, state = train("fp32", **options)
    assert torch.allclose(exact, plain, atol=2e-5), (options, (exact - plain).abs().max())
    assert state.transport == ("peer memory" if few else "shared memory")
    assert not state.found_inf and state.wire_bytes > 0
for wire, bound in (("fp16", 1e-3), ("bf16", 2e-2), ("int8", 5e-2)):
    mean, state = train(wire)
    assert (mean - plain).abs().max() < bound, (wire, (mean - plain).abs().max())
assert pickle.loads(pickle.dumps(state)).wire == "int8"
"""

FOUND_INF = """
from torch.nn.parallel import DistributedDataParallel
from fastagg.ddp import AllReduceState, all_reduce_hook

model = DistributedDataParallel(torch.nn.Linear(4, 3))
state = AllReduceState()
model.register_comm_hook(state, all_reduce_hook)
for value, expected in ((1.0, False), (float("inf"), True), (1.0, False)):
    model(torch.full((2, 4), value if rank == 1 else 1.0)).sum().backward()
    assert state.found_inf is expected
    model.zero_grad()
"""


@pytest.mark.parametrize(("world", "transport"), [(2, "shared memory"), (3, "shared memory"), (2, "peer memory")])
def test_training_is_the_same_within_the_wires_error(world: int, transport: str) -> None:
    pytest.importorskip("sklearn")
    run_ranks(TRAINING, world, **on(transport))


@by_transport
def test_found_inf_agrees_on_all_ranks(transport: str) -> None:
    run_ranks(FOUND_INF, 2, **on(transport))


LOST = """
from torch.nn.parallel import DistributedDataParallel
from fastagg.ddp import AllReduceState, all_reduce_hook

model = DistributedDataParallel(torch.nn.Linear(400, 300), bucket_cap_mb=0.1)
model.register_comm_hook(AllReduceState(), all_reduce_hook)
try:
    for step in range(100):
        if step == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        model(torch.ones(2, 400)).sum().backward()
        synchronize()
except fastagg.PeerError as error:
    print(error.rank, flush=True)
    os._exit(0)
"""


@by_transport
def test_a_lost_rank_is_a_peer_error_in_backward(transport: str) -> None:
    outputs = Ranks(LOST, 3, TIMEOUT="15", **on(transport)).outputs()
    assert [status for status, _, _ in outputs] == [0, -signal.SIGKILL, 0], outputs
    assert outputs[0][1] == outputs[2][1] == "1\n"


NO_STATE = """
from fastagg.ddp import all_reduce_hook
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
model.register_comm_hook(None, all_reduce_hook)
try:
    model(torch.ones(1, 2)).sum().backward()
except TypeError as error:
    assert "state: expected an AllReduceState, got NoneType" in str(error)
else:
    raise AssertionError
"""


def test_a_hook_without_a_state_is_told() -> None:
    run_ranks(NO_STATE, 1)
