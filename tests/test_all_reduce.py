"""`all_reduce` among real processes: answers, equal bits on all ranks, faults, and nothing left behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")

import transports
from fastagg import _core
from ranks import Ranks, run_ranks
from transports import by_transport, by_transport_of_the_host, on

WORLDS = [1, 2, 3, 4]

EXACT = """
from fastagg.distributed.channels import channel_of
# Integers whose sums every wire but sign holds exactly: the extreme of a block, and the sum's, are chosen so.
for count in (0, 7, 70001) if few else (0, 1, 7, 4095, 16384, 16385, 131072, 131073, 300001):
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        for wire in ("fp32", "int8") if few else ("fp32", "bf16", "fp16", "int8"):
            for op in ("sum", "mean"):
                x = (torch.arange(count) % 7 - 3).to(dtype) * world
                y = x.clone()
                assert fastagg.all_reduce(y, op=op, wire=wire) is None
                assert torch.equal(y, x * world if op == "sum" else x), (count, dtype, wire, op)
print(channel_of(dist.group.WORLD, torch.ones(1).device).transport.name)
"""


@by_transport
@pytest.mark.parametrize("world", WORLDS)
def test_integers_are_reduced_exactly(world: int, transport: str) -> None:
    names = run_ranks(EXACT, world, **on(transport))
    assert all({"collectives": "backend"}.get(transport, transport) in name for name in names)


BITS = """
bound = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11, "fp8_e4m3": 2.0**-4, "fp8_e5m2": 2.0**-3,
         "int8": 2.0**-6, "int4": 2.0**-2}
for count in (1000, 50000) if few else (1000, 20000, 200000):
    for wire in (*bound, "sign"):
        for rounding in ("nearest", "stochastic"):
            if rounding == "stochastic" and wire in ("fp32", "sign"):
                continue
            torch.manual_seed(rank)
            x = torch.randn(count)
            exact = sum(one.double() for one in gathered(x)) / world
            fastagg.all_reduce(x, wire=wire, rounding=rounding)
            everyone = gathered(x.view(torch.int32))
            assert all(torch.equal(everyone[0], other) for other in everyone), (count, wire, rounding)
            if wire in bound:
                slack = 2 * bound[wire] * (2 if rounding == "stochastic" else 1)  # two roundings of the largest
                assert (x.double() - exact).abs().max() <= slack * 5, (count, wire, rounding)
"""


@by_transport
@pytest.mark.parametrize("world", [2, 3])
def test_all_ranks_end_with_the_same_bits_within_the_wires_error(world: int, transport: str) -> None:
    run_ranks(BITS, world, **on(transport))


NUMBERS = """
x = torch.full((40000,), 65504.0)
fastagg.all_reduce(x, wire="fp16")  # the sum is beyond fp16, the mean is not
assert torch.all(x == 65504)
x = torch.zeros(40000)
if rank == 1:
    x[7], x[30000] = float("inf"), float("nan")
for wire in ("fp32", "fp16", "bf16"):
    y = x.clone()
    fastagg.all_reduce(y, wire=wire)
    assert y[7] == float("inf") and y[30000].isnan() and y.isfinite().sum() == 39998
strided = torch.arange(60000.0).view(200, 300).t() * (rank + 1)
expected = torch.arange(60000.0).view(200, 300).t() * (sum(range(1, world + 1)) / world)
fastagg.all_reduce(strided)
assert torch.equal(strided, expected)
several = [torch.full((n,), float(rank)) for n in (3, 70000, 1)]
work = fastagg.all_reduce(several, op="sum", async_op=True)
assert work.wait(timeout)
synchronize()
assert work.is_completed() and all(one is other for one, other in zip(several, work.get_future().wait()))
assert all(torch.all(x == sum(range(world))) for x in several)
half = dist.new_group([0, 1])
if rank < 2:
    x = torch.full((5,), float(rank))
    fastagg.all_reduce(x, group=half)
    assert torch.all(x == 0.5)
"""


@by_transport
def test_overflow_nonfinite_strides_lists_and_subgroups(transport: str) -> None:
    run_ranks(NUMBERS, 3, **on(transport))


FLOAT64 = """
import hashlib
import numpy as np
from fastagg._native.codes import Code
from fastagg.distributed.exchange.exchange import Exchange
from fastagg.distributed.channels import channel_of
from fastagg.distributed.collectives import encoding_of
if "TWO_HOSTS" in os.environ:
    os.environ["FASTAGG_HOST"] = str(rank // 2)
transport = channel_of(dist.group.WORLD).transport
for count in (1000, 100000):
    torch.manual_seed(rank)
    x = torch.randn(count, dtype=torch.float64)
    exact = sum(one.numpy().astype(np.longdouble) for one in gathered(x)) / world
    magnitude = sum(np.abs(one.numpy()) for one in gathered(x)) / world
    y = x.clone()
    fastagg.all_reduce(y)
    slack = magnitude * 2.0**-53 if "TWO_HOSTS" in os.environ else 0  # each host's mean is rounded too
    assert (np.abs(y.numpy() - exact) <= np.spacing(np.abs(y.numpy())) + slack).all()
    # The factor goes into the one rounding.
    encoding = encoding_of("fp32", Code.FLOAT64, None, None)
    transport.all_reduce(Exchange(x, Code.FLOAT64, encoding, True, factor=1 / 3))
    exact = exact * np.longdouble(1 / 3)
    assert (np.abs(x.numpy() - exact) <= np.spacing(np.abs(x.numpy())) + slack).all()
    torch.manual_seed(7)
    same = torch.randn(count, dtype=torch.float64)
    same[:6] = torch.tensor([1.7e308, -1e308, 5e-324, -5e-324, 7.0, 0.1], dtype=torch.float64)
    mean = same.clone()
    fastagg.all_reduce(mean)
    assert torch.equal(mean.view(torch.int64), same.view(torch.int64))
    print(hashlib.sha256(y.numpy().tobytes() + x.numpy().tobytes()).hexdigest())
"""


def test_float64_gradients_are_added_up_exactly_and_rounded_once() -> None:
    shared = run_ranks(FLOAT64, 3)
    assert shared == [shared[0]] * 3
    assert shared == run_ranks(FLOAT64, 3, **on("backend"))
    assert len(set(run_ranks(FLOAT64, 4, TWO_HOSTS="1"))) == 1


SAME = """
import hashlib
for count in map(int, os.environ["COUNTS"].split()):
    for wire in ("fp32", "fp16", "int8", "sign"):
        for rounding in ("nearest", "stochastic"):
            if rounding == "stochastic" and wire in ("fp32", "sign"):
                continue
            torch.manual_seed(rank)
            x = torch.randn(count, device="cpu").to(torch.get_default_device())
            fastagg.all_reduce(x, wire=wire, rounding=rounding, seed=5)
            print(count, wire, rounding, hashlib.sha256(x.cpu().numpy().tobytes()).hexdigest()[:16])
"""


@pytest.mark.parametrize("world", [2, 3])
def test_all_transports_end_with_the_same_bits_and_the_seed_decides_them(world: int) -> None:
    def digests(transport: str, counts: str) -> str:
        return run_ranks(SAME, world, COUNTS=counts, **on(transport))[0]

    assert digests("shared memory", "1100000") == digests("backend", "1100000")
    shared, *others = (digests(transport, "3000 70000") for transport in transports.NAMES)
    assert others == [shared] * len(others)


EXTREMES = """
from fastagg._native.codes import Code
from fastagg.distributed.exchange.exchange import Exchange
from fastagg.distributed.channels import channel_of
from fastagg.distributed.collectives import encoding_of
if "TWO_HOSTS" in os.environ:
    os.environ["FASTAGG_HOST"] = str(rank // 2)
# Rounding up never makes a finite value infinite.
for wire in ("int8", "int4", "fp8_e4m3", "fp8_e5m2"):
    for count in (100, 70000):
        x = torch.full((count,), 65504.0, dtype=torch.float16)
        fastagg.all_reduce(x, wire=wire)
        assert x.isfinite().all() and (x >= 40000).all(), (wire, x)
transport = channel_of(dist.group.WORLD).transport
# An odd number of elements: bytes that align them are not counted; a factor that is no power of two, in float64.
if "TWO_HOSTS" not in os.environ:
    as_int8 = encoding_of("int8", Code.FLOAT32, None, None)
    outcome = transport.all_reduce(Exchange(torch.ones(1001), Code.FLOAT32, as_int8, True))
    assert outcome.wire_bytes == (world - 1) * (1001 + 4 * 4), outcome
torch.manual_seed(3 + rank)
x = torch.randn(1001, dtype=torch.float64)
everyone = gathered(x)
encoding = encoding_of("fp32", Code.FLOAT64, None, None)
outcome = transport.all_reduce(Exchange(x, Code.FLOAT64, encoding, True, factor=1 / 3, norm=True))
print(x.numpy().tobytes().hex(), outcome.squares)
"""


def test_the_largest_values_odd_sizes_and_factors_are_the_same_everywhere() -> None:
    shared = run_ranks(EXTREMES, 2)
    assert shared[0] == shared[1]
    assert shared == run_ranks(EXTREMES, 2, **on("backend"))
    assert len(set(run_ranks(EXTREMES, 4, TWO_HOSTS="1"))) == 1


CALLBACKS = """
first = fastagg.all_reduce(torch.ones(5_000_000), async_op=True)
inner = torch.full((5,), float(rank))
chained = first.get_future().then(lambda _: fastagg.all_reduce(inner))
fastagg.all_reduce(torch.ones(5_000_000), async_op=True).wait()
chained.wait()
assert torch.all(inner == 0.5)
"""


@by_transport
def test_a_callback_may_call_all_reduce(transport: str) -> None:
    run_ranks(CALLBACKS, 2, **on(transport))


UNBIASED = """
torch.manual_seed(7 + rank)
x = torch.randn(4096)
exact = sum(one.double() for one in gathered(x)) / world
for wire, step in (("fp16", 2.0**-10), ("bf16", 2.0**-7), ("int8", 2.0**-5), ("int4", 0.5)):  # the largest near 4
    total, calls = torch.zeros(4096, dtype=torch.float64), 200
    for call in range(calls):
        y = x.clone()
        fastagg.all_reduce(y, wire=wire, rounding="stochastic")
        total += y
    error = total / calls - exact
    # Rounding errs by less than four steps a call; their mean over calls by six deviations at most, over all by less.
    assert error.abs().max() < 6 * 4 * step / calls**0.5, (wire, error.abs().max())
    assert abs(error.mean()) < 6 * 4 * step / (calls * 4096) ** 0.5, (wire, error.mean())
"""


@by_transport_of_the_host
@pytest.mark.parametrize("world", [2, 3])
def test_stochastic_rounding_is_unbiased(world: int, transport: str) -> None:
    run_ranks(UNBIASED, world, **on(transport))


THREADS = """
import threading
groups = [dist.new_group(list(range(world))) for _ in range(3)]
failures, default_device = [], torch.get_default_device()
def work(number):
    torch.set_default_device(default_device)  # which is each thread's own
    try:
        for call in range(6 if few else 40):
            count = (5, 70000, 300001)[(call + number) % 3]
            x = torch.full((count,), float(rank + 10 * number + call))
            fastagg.all_reduce(x, group=groups[number], wire=("fp32", "fp16")[call % 2])
            assert torch.all(x == (world - 1) / 2 + 10 * number + call)
    except BaseException as error:
        failures.append(error)
threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failures, failures
"""


@by_transport
def test_threads_use_groups_of_their_own_at_the_same_time(transport: str) -> None:
    run_ranks(THREADS, 2, **on(transport))


HOSTS = """
os.environ["FASTAGG_HOST"] = str(rank // 2)
from fastagg.distributed.channels import channel_of
from fastagg.distributed.exchange.exchange import Exchange, Feedback
from fastagg.distributed.collectives import encoding_of
from fastagg._native.codes import Code
for dtype in (torch.float32, torch.float16, torch.float64):
    for count in (0, 1, 5000, 300001):
        for wire in ("fp32", "fp16", "int8"):
            x = (torch.arange(count) % 7 - 3).to(dtype) * world
            y = x.clone()
            fastagg.all_reduce(y, wire=wire)
            assert torch.equal(y, x), (dtype, count, wire)
transport = channel_of(dist.group.WORLD).transport
count = 100000
torch.manual_seed(rank)
x = torch.randn(count)
exact = sum(one.double() for one in gathered(x)) / world
encoding = encoding_of("fp16", Code.FLOAT32, None, None)
outcome = transport.all_reduce(Exchange(x, Code.FLOAT32, encoding, True, norm=True))
assert (x - exact).abs().max() < 2e-3
assert all(torch.equal(x, other) for other in gathered(x))
assert abs(outcome.squares - x.double().square().sum()) < 1e-9 * outcome.squares
print(transport.name, outcome.wire_bytes)
"""


def test_hosts_with_several_ranks_exchange_each_value_once() -> None:
    inside = 2 * 50000 * 4  # shared memory, float32: half of the values out, half of the host's means back
    between = 2 * 25000 * 2  # the backend, float16: a quarter of the slice's values out and back
    for out in run_ranks(HOSTS, 4):
        name, sent = out.strip().rsplit(" ", 1)
        assert name == "shared memory, and the gloo backend between hosts"
        assert abs(int(sent) - inside - between) <= 0.05 * (inside + between)  # slices are whole passes


UNEVEN = """
os.environ["FASTAGG_HOST"] = str(min(rank, 1))
x = torch.full((70000,), float(rank))
fastagg.all_reduce(x)
assert torch.all(x == 1)
from fastagg.distributed.channels import channel_of
print(channel_of(dist.group.WORLD).transport.reason)
"""


def test_uneven_hosts_use_the_backend_and_say_why() -> None:
    assert all("different numbers of ranks: 1, 2" in out for out in run_ranks(UNEVEN, 3))


WRONG = """
if "TWO_HOSTS" in os.environ:
    os.environ["FASTAGG_HOST"] = str(rank // 2)
def error_of(function):
    try:
        function()
    except (TypeError, ValueError) as error:
        return str(error)
    raise AssertionError("no error")
message = error_of(lambda: fastagg.all_reduce(torch.zeros(10 + rank)))
assert f"rank {rank} has tensor 0 of 1, shape ({10 + rank},): {10 + rank} elements of float32, mean" in message
message = error_of(lambda: fastagg.all_reduce(torch.zeros(5, dtype=torch.float32 if rank else torch.float64)))
assert "float64" in message or rank > 1
message = error_of(lambda: fastagg.all_reduce(torch.zeros(5), wire="int8" if rank == 1 else "fp16"))
assert "wire int8" in message and "wire float16" in message or "differ inside its host" in message
error_of(lambda: fastagg.all_reduce(torch.zeros((1,) * (40 + rank))))  # shapes that are long to describe
error_of(lambda: fastagg.all_reduce(torch.zeros(5), op="sum" if rank == 1 else "mean"))
error_of(lambda: fastagg.all_reduce(torch.zeros((2, 3) if rank else (3, 2))))
error_of(lambda: fastagg.all_reduce([torch.zeros(5)] * (1 + rank)))
if torch.get_default_device().type == "cpu":  # nothing is on no device
    error_of(lambda: fastagg.all_reduce([] if rank else [torch.zeros(5)]))
error_of(lambda: fastagg.all_reduce(torch.zeros(5), wire="fp16", rounding="stochastic" if rank else "nearest"))
x = torch.full((50000,), float(rank))
fastagg.all_reduce(x, op="sum")  # and the group still works
assert torch.all(x == sum(range(world)))
assert "int64" in error_of(lambda: fastagg.all_reduce(torch.zeros(5, dtype=torch.int64)))
assert "tensor 1" in error_of(lambda: fastagg.all_reduce([torch.zeros(5), None]))
assert "op" in error_of(lambda: fastagg.all_reduce(torch.zeros(5), op="max"))
assert "wire" in error_of(lambda: fastagg.all_reduce(torch.zeros(5), wire="fp7"))
"""


@by_transport
def test_ranks_that_differ_are_an_error_on_every_rank(transport: str) -> None:
    run_ranks(WRONG, 3, **on(transport))


def test_ranks_of_two_hosts_that_differ_are_an_error_on_every_rank() -> None:
    run_ranks(WRONG, 4, TWO_HOSTS="1")


ORDER = """
for count in (3000, 70000):
    fastagg.all_reduce(torch.ones(count))  # now both are known
x = torch.ones(70000 if rank == 0 else 3000)
try:
    fastagg.all_reduce(x)
    synchronize()
    assert x.isnan().all()
    fastagg.all_reduce(torch.ones(3000))
except ValueError as error:
    assert "something else" in str(error)
else:
    raise AssertionError("no error")
"""


def test_devices_find_ranks_that_call_in_another_order() -> None:
    run_ranks(ORDER, 2, **on("peer memory"))


CHOICES = """
import logging
lines = []
class Kept(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())
logging.getLogger("fastagg").addHandler(Kept())
logging.getLogger("fastagg").setLevel(logging.DEBUG)
if rank == 1:
    os.environ["FASTAGG_TRANSPORT"] = "pigeon"
try:
    fastagg.all_reduce(torch.zeros(5))
except ValueError as error:
    assert "rank 1" in str(error) and "pigeon" in str(error)
else:
    raise AssertionError("no error")
os.environ["FASTAGG_TRANSPORT"] = "backend" if rank else ""
x = torch.full((5,), float(rank))
fastagg.all_reduce(x)
assert torch.all(x == 0.5)
from fastagg.distributed.channels import channel_of
assert "asks for it" in channel_of(dist.group.WORLD).transport.reason
assert lines == ["group of 2 ranks: gloo backend, because FASTAGG_TRANSPORT=backend asks for it"]
"""


def test_a_rank_chooses_the_transport_for_all() -> None:
    run_ranks(CHOICES, 2)


FALLBACK = """
import resource
from fastagg.distributed.channels import channel_of
if rank == 0:  # whose segment may not grow
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
x = torch.full((70000,), float(rank))
fastagg.all_reduce(x)
assert torch.all(x == (world - 1) / 2)
print(channel_of(dist.group.WORLD).transport.reason)
"""


def test_ranks_without_room_for_a_segment_use_the_backend_and_say_why() -> None:
    assert all("File too large" in out for out in run_ranks(FALLBACK, 3))


STRANGER = """
from fastagg import _core
memory = _core.SharedMemoryGroup([os.getpid()], [0], 0)
descriptor = memory.descriptor()
path = f"/proc/{os.getpid()}/fd/{descriptor}"
assert os.stat(path).st_mode & 0o777 == 0o600
creator = os.getpid()
reading, writing = os.pipe()
if os.fork() == 0:
    os.setgid(65534)
    os.setuid(65534)
    answers = []
    for attempt in (lambda: open(path, "rb"),
                    lambda: _core.SharedMemoryGroup.attach([creator], [0], 0, creator, descriptor)):
        try:
            attempt()
            answers.append("let in")
        except PermissionError:
            answers.append("refused")
        except OSError as error:
            answers.append(repr(error))
    os.write(writing, " ".join(answers).encode())
    os._exit(0)
os.wait()
print(os.read(reading, 1000).decode())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_can_neither_read_nor_join() -> None:
    assert run_ranks(STRANGER, 1) == ["refused refused\n"]


def test_memory_that_cannot_be_mapped_is_an_os_error() -> None:
    no_such_descriptor = 1 << 20
    with pytest.raises(OSError, match="opening /proc"):
        _core.SharedMemoryGroup.attach([os.getpid()], [0], 0, os.getpid(), no_such_descriptor)
    with pytest.raises(OSError, match="not this user's segment"):
        _core.SharedMemoryGroup.attach([os.getpid()], [0], 0, os.getpid(), 0)


FORKED = """
fastagg.all_reduce(torch.ones(70000))
child = os.fork()
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
x = torch.full((70000,), float(rank))
fastagg.all_reduce(x)
assert torch.all(x == 0.5)
"""


@by_transport
def test_a_rank_may_fork(transport: str) -> None:
    run_ranks(FORKED, 2, **on(transport))


LOST = """
x = torch.ones(1_000_000)
fastagg.all_reduce(x)
print("ready", flush=True)
started = time.monotonic()
try:
    if rank == 2:
        time.sleep(1000)
    while True:
        fastagg.all_reduce(x)
except fastagg.PeerError as error:
    print(error.rank, flush=True)
    dist.destroy_process_group()
    survivors = os.environ["MEET"] + "-survivors"
    dist.init_process_group("gloo", init_method=survivors, rank=rank, world_size=2, timeout=timeout)
    x = torch.full((70000,), float(rank))
    fastagg.all_reduce(x)
    assert torch.all(x == 0.5)
    os._exit(0)
"""


@by_transport
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_rank_is_named_by_all_others_who_can_go_on(number: signal.Signals, transport: str) -> None:
    ranks = Ranks(LOST, 3, TIMEOUT="8", **on(transport))
    try:
        for process in ranks.processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)
        sent = time.monotonic()
        ranks.send(2, number)
        for process in ranks.processes[:2]:
            assert process.wait(30) == 0
        took = time.monotonic() - sent
    finally:
        ranks.send(2, signal.SIGKILL)
    outputs = ranks.outputs()
    assert [out.split()[0] for _, out, _ in outputs[:2]] == ["2", "2"], outputs
    if number == signal.SIGKILL and transport == "shared memory":
        assert took < 5  # at once, not after the timeout


LEAKS = """
import gc
def descriptors():
    gc.collect()
    return len(os.listdir("/proc/self/fd"))
def cycle():
    group = dist.new_group(list(range(world)))
    fastagg.all_reduce(torch.ones(20000), group=group)
    try:
        fastagg.all_reduce(torch.ones(5 + rank), group=group, async_op=True).wait()
    except ValueError:
        pass  # a group that has failed ends like any other
    dist.destroy_process_group(group)
for _ in range(3):
    cycle()
time.sleep(0.2)  # the thread that watches peers lets go of them
before, threads = descriptors(), len(os.listdir("/proc/self/task"))
for _ in range(4 if few else 12):
    cycle()
time.sleep(0.2)
left = descriptors() - before
for _ in range(50):  # a thread whose work has gone takes a moment to end
    if len(os.listdir("/proc/self/task")) <= threads:
        break
    time.sleep(0.1)
maps = open("/proc/self/maps").read().count("memfd:fastagg")
print(left, len(os.listdir("/proc/self/task")) - threads, maps)
"""


@by_transport
def test_groups_leave_nothing_behind(transport: str) -> None:
    before = set(Path("/dev/shm").glob("*fastagg*"))
    for out in run_ranks(LEAKS, 2, **on(transport)):
        descriptors, threads, maps = map(int, out.split())
        assert descriptors <= 0
        assert threads <= 0
        assert maps <= 1
    assert set(Path("/dev/shm").glob("*fastagg*")) <= before
