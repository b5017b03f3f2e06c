"""`all_reduce` between hosts: two network namespaces joined by a link of 1 Gbit/s."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

pytest.importorskip("torch")

from namespaces import Host, NotAvailableError, two_hosts
from ranks import Ranks, run_ranks

Hosts = tuple[Host, Host]


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Two hosts, where this machine can have them."""
    try:
        with two_hosts() as both:
            yield both
    except NotAvailableError as reason:
        pytest.skip(str(reason))


EXACT = """
from fastagg.distributed.channels import channel_of

def sent_bytes():
    return int(open(f"/sys/class/net/{os.environ['GLOO_SOCKET_IFNAME']}/statistics/tx_bytes").read())

count = 1 << 20
x = (torch.arange(count) % 7 - 3).float() * (4 if rank % 2 == 0 else -2)
for wire, bytes_per_element in (("fp32", 4), ("fp16", 2)):
    y = x.clone()
    dist.barrier()
    before = sent_bytes()
    fastagg.all_reduce(y, wire=wire)
    dist.barrier()
    print((sent_bytes() - before) / (bytes_per_element * count))
    assert torch.equal(y, (torch.arange(count) % 7 - 3).float()), wire
torch.manual_seed(rank)
for wire in ("fp32", "fp16", "int8"):
    x = torch.randn(count // 4 + 1)
    fastagg.all_reduce(x, wire=wire)
    everyone = gathered(x.view(torch.int32))
    assert all(torch.equal(everyone[0], other) for other in everyone), wire
assert ("shared memory" in channel_of(dist.group.WORLD).transport.name) is (world == 4)
"""


@pytest.mark.parametrize("world", [2, 4])
def test_answers_are_exact_and_equal_and_the_link_carries_each_value_once(hosts: Hosts, world: int) -> None:
    for out in run_ranks(EXACT, world, hosts):
        for sent in map(float, out.split()):  # of the payload as encoded: 2(H-1)/H = 1 for two hosts
            assert 1 <= sent < 1.1  # with headers and acknowledgements


UNEQUAL = """
for call in range(2):
    torch.manual_seed(call)
    values = [torch.randn(12_000_000) for _ in range(world)]
    x = values[rank].clone()
    fastagg.all_reduce(x)
    assert torch.equal(x, (values[0] + values[1]) / 2)
"""


def test_a_link_that_is_slower_in_one_direction_changes_nothing() -> None:
    try:
        with two_hosts("400mbit", "2gbit") as hosts:
            run_ranks(UNEQUAL, 2, hosts)
    except NotAvailableError as error:
        pytest.skip(str(error))


WIRE_BYTES = """
from torch.nn.parallel import DistributedDataParallel
from fastagg.ddp import AllReduceState, all_reduce_hook

model = DistributedDataParallel(torch.nn.Linear(4096, 16, bias=False))
state = AllReduceState(wire="fp16")
model.register_comm_hook(state, all_reduce_hook)
model(torch.ones(1, 4096)).sum().backward()
assert state.wire_bytes == 2 * (world - 1) * 65536 // world * 2, state.wire_bytes
assert model.module.weight.grad.eq(1).all()
"""


def test_the_hook_counts_the_bytes_that_it_sends(hosts: Hosts) -> None:
    run_ranks(WIRE_BYTES, 2, hosts)


LOST = """
x = torch.ones(1_000_000)
fastagg.all_reduce(x)
print("ready", flush=True)
try:
    while True:
        fastagg.all_reduce(x)
except fastagg.PeerError as error:
    print(error.rank, flush=True)
    if rank == 0:  # it has the store, in which the others look for who was lost first
        import time
        time.sleep(5)
    os._exit(0)
"""


@pytest.mark.parametrize("world", [3, 4])
def test_a_rank_killed_on_the_other_host_is_named_by_all_others(hosts: Hosts, world: int) -> None:
    last = world - 1
    ranks = Ranks(LOST, world, hosts, TIMEOUT="20")
    for process in ranks.processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    ranks.send(last, signal.SIGKILL)
    outputs = ranks.outputs(timeout=20)
    assert [status for status, _, _ in outputs] == [0] * last + [-signal.SIGKILL], outputs
    assert [out for _, out, _ in outputs[:last]] == [f"{last}\n"] * last
