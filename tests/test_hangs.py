"""What used to hang, or to blame a rank that lives: first calls, ranks that die or are late, limits, Ctrl-C."""

from __future__ import annotations

import signal
import time

import pytest

pytest.importorskip("torch")

from ranks import Ranks, run_ranks
from transports import by_transport_of_the_host, on

ENDED = """
dist.barrier()
if rank == 1:
    os._exit(0)
time.sleep(0.2 * rank)
import fastagg.horovod as hvd
for call in (lambda: fastagg.all_reduce(torch.ones(5)), lambda: hvd.broadcast_object(1)):
    try:
        call()
    except fastagg.PeerError as error:
        assert error.rank == 1, error
    else:
        raise AssertionError("no error")
os._exit(0)
"""


@by_transport_of_the_host
def test_a_rank_that_ends_before_the_first_call_is_named_at_once(transport: str) -> None:
    started = time.monotonic()
    run_ranks(ENDED, 3, TIMEOUT="120", **on(transport))
    assert time.monotonic() - started < 100  # not after the timeout


FIRST_USE = """
import threading
groups = [dist.new_group([0, 1]) for _ in range(4)]
x, y = torch.ones(5), torch.ones(5)
# A rank begins on one group before the other comes to it: they meet over the default group between.
if rank == 0:
    work = fastagg.all_reduce(x, op="sum", group=groups[0], async_op=True)
fastagg.all_reduce(y)
if rank == 1:
    work = fastagg.all_reduce(x, op="sum", group=groups[0], async_op=True)
assert work.wait() and torch.all(x == 2)
# Threads of a rank use new groups in another order than the other rank's.
failures = []
def use(group):
    try:
        for count in (1, 70000):
            fastagg.all_reduce(torch.ones(count), group=group)
    except BaseException as error:
        failures.append(error)
threads = [threading.Thread(target=use, args=(group,)) for group in groups[1:][:: 1 - 2 * rank]]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failures, failures
# A callback begins another all-reduce, and waits for it.
a, b, c = torch.ones(1 << 20), torch.ones(4), torch.ones(4)
def again(_):
    fastagg.all_reduce(b, op="sum", async_op=True).wait()
    fastagg.all_reduce(c, op="sum", async_op=True).get_future().wait()
    return b + c
assert torch.all(fastagg.all_reduce(a, async_op=True).get_future().then(again).wait() == 4)
"""


@by_transport_of_the_host
def test_first_calls_wait_for_nobody_in_another_order(transport: str) -> None:
    run_ranks(FIRST_USE, 2, TIMEOUT="20", **on(transport))


GROUPS = """
def error_of(group, kind):
    try:
        fastagg.all_reduce(torch.ones(1), group=group)
    except kind as error:
        return str(error)
    raise AssertionError("no error")
first = dist.new_group([0])
if rank == 1:
    assert "not a member" in error_of(first, ValueError)
assert "got list" in error_of([0, 1], TypeError)
class Foreign(dist.ProcessGroup):
    pass
assert "does not know this Foreign" in error_of(Foreign(0, 1), ValueError)
gone = dist.new_group([0, 1])
dist.destroy_process_group(gone)
assert "was destroyed" in error_of(gone, ValueError)
"""


def test_what_is_no_group_of_this_rank_is_named() -> None:
    run_ranks(GROUPS, 2)


REFUSED = """
import numpy
if "TWO_HOSTS" in os.environ:
    os.environ["FASTAGG_HOST"] = str(rank // 2)
import fastagg.horovod as hvd
from fastagg.distributed.broadcast import broadcast_object
from fastagg.ranks import merge_over_ranks
wrong = rank == 0  # the others make the same call rightly
whole, ones, floating = torch.ones(3, dtype=torch.long), torch.ones(3), lambda: torch.full((3,), rank + 1.0)
optimizer = torch.optim.SGD([torch.nn.Parameter(ones.clone())], lr=0.1)
def make(module=fastagg, **options):
    parameter = torch.nn.Parameter(torch.ones(3))
    return module.DistributedOptimizer(torch.optim.SGD([parameter], lr=0.1), **(options if wrong else {}))
def failing():
    yield "x", ones.clone()
    if wrong:
        raise RuntimeError("the disk is gone")
class Unreadable:
    def __reduce__(self):
        return Unreadable._read, (0,)
    @staticmethod
    def _read(_):
        if dist.get_rank() == 0:
            raise AttributeError("no such class here")
class BadState(torch.optim.SGD):
    def state_dict(self):
        raise RuntimeError("no state here")
bad = BadState([torch.nn.Parameter(ones.clone())], lr=0.1)
class Unlucky(fastagg.Accumulator):
    def state_dict(self):
        if wrong:
            raise MemoryError("no memory here")
        return super().state_dict()
calls = (
    (lambda: hvd.allreduce(floating(), op="Max" if wrong else None), "op: expected Average or Sum"),
    (lambda: hvd.allreduce_(floating(), op="Max" if wrong else None), "op: expected Average or Sum"),
    (lambda: hvd.allreduce(floating(), average=True, op=hvd.Sum if wrong else None), "average and op"),
    (lambda: hvd.allreduce(floating(), compression=3 if wrong else "fp16"), "compression"),
    (lambda: hvd.allreduce(floating(), compression="fp7" if wrong else "fp16"), "wire"),
    (lambda: hvd.allreduce(floating(), prescale_factor="2" if wrong else 1.0), "TypeError"),
    (lambda: hvd.allreduce(floating(), process_set=dist.group.WORLD, op="x" if wrong else None), "op"),
    (lambda: hvd.allreduce(whole, prescale_factor=2 if wrong else 1.0), "integers need 1"),
    (lambda: hvd.allreduce_(whole.to("meta") if wrong else whole.clone()), "meta"),
    (lambda: hvd.allreduce([1.0] if wrong else floating()), "expected a torch.Tensor, got list"),
    (lambda: hvd.allreduce_([1.0] if wrong else floating()), "expected a torch.Tensor, got list"),
    (lambda: hvd.broadcast([1.0] if wrong else floating(), 0), "expected a torch.Tensor, got list"),
    (lambda: hvd.broadcast_([1.0] if wrong else floating(), 0), "expected a torch.Tensor, got list"),
    (lambda: hvd.broadcast(floating(), "x" if wrong else 0), "root_rank: expected an integer"),
    (lambda: hvd.broadcast_(floating(), None if wrong else 0), "root_rank: expected an integer"),
    (lambda: hvd.broadcast_object(1, 0.5 if wrong else 0), "root_rank: expected an integer"),
    (lambda: hvd.broadcast_parameters({"x": ones, 1: ones} if wrong else {"x": ones}), "TypeError"),
    (lambda: hvd.broadcast_optimizer_state(None if wrong else optimizer), "torch.optim.Optimizer, got NoneType"),
    (lambda: make(hvd, num_groups=1), "num_groups"),
    (lambda: make(hvd, sparse_as_dense=True), "sparse_as_dense"),
    (lambda: make(hvd, named_parameters=failing()), "the disk is gone"),
    (lambda: make(fusion_bytes=0), "fusion_bytes: expected 1 or more, got 0"),
    (lambda: make(fusion_bytes="much"), "TypeError"),
    (lambda: fastagg.broadcast_parameters(failing()), "the disk is gone"),
    (lambda: fastagg.broadcast_parameters({"x": ones}, numpy.float64(0) if wrong else 0), "root_rank"),
    (lambda: fastagg.broadcast_optimizer_state(bad), "no state here"),
    (lambda: broadcast_object(Unreadable(), 1), "no such class here"),
    (lambda: broadcast_object(failing() if wrong else 1), "pickle"),
    (lambda: fastagg.all_reduce(failing() if wrong else floating()), "sequence of tensors"),
    (lambda: merge_over_ranks(Unlucky()), "no memory here"),
)
for place, (call, told) in enumerate(calls):
    try:
        call()
    except fastagg.PeerError:
        raise
    except Exception as error:
        assert told in str(error) or told in type(error).__name__, (place, error)
        assert wrong or isinstance(error, ValueError) and "rank 0" in str(error), (place, error)
    else:
        raise AssertionError(f"no error in call {place}")
    after = hvd.allreduce(torch.full((3,), 10.0 * (rank + 1)))
    assert torch.all(after == 5 * (world + 1)), (place, after)  # not what belongs to another call
    assert broadcast_object(place + rank, numpy.int64(1)) == place + 1
"""


@pytest.mark.parametrize(
    ("world", "environment"),
    [(2, {}), (2, {"FASTAGG_TRANSPORT": "backend"}), (4, {"TWO_HOSTS": "1"})],
    ids=["memory", "backend", "both"],
)
def test_a_call_that_one_rank_refuses_is_an_error_of_all(world: int, environment: dict[str, str]) -> None:
    run_ranks(REFUSED, world, TIMEOUT="30", **environment)


LATE = """
fastagg.all_reduce(torch.ones(10))
time.sleep(1.6 * rank)
try:
    fastagg.all_reduce(torch.ones(70000))
except fastagg.PeerError as error:
    assert error.rank == 1, error
else:
    raise AssertionError("no error")
os._exit(0)
"""


@by_transport_of_the_host
def test_a_rank_that_comes_later_than_the_timeout_is_named(transport: str) -> None:
    run_ranks(LATE, 2, TIMEOUT="0.8", **on(transport))


NO_FILES = """
import resource
if rank == 1:
    own = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (own + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
try:
    fastagg.all_reduce(torch.ones(10))
except OSError as error:
    assert "rank 1 cannot open the files" in str(error) and "ulimit -n" in str(error), error
else:
    raise AssertionError("no error")
"""


@by_transport_of_the_host
def test_a_rank_that_cannot_open_more_files_is_named(transport: str) -> None:
    run_ranks(NO_FILES, 2, **on(transport))


INTERRUPTED = """
if "TWO_HOSTS" in os.environ:
    os.environ["FASTAGG_HOST"] = str(rank // 2)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which may be ignored, as in the background
if os.environ["WHEN"] == "later":
    fastagg.all_reduce(torch.ones(5))
if rank == world - 1:  # the one that does not come
    print("ready", flush=True)
    time.sleep(1.2)
    try:
        fastagg.all_reduce(torch.ones(5))
    except fastagg.PeerError as error:
        assert error.rank == 0, error
        os._exit(0)
    raise AssertionError("no error")
print("ready", flush=True)
try:
    work = fastagg.all_reduce(torch.ones(5), async_op=os.environ["CALL"] == "async")
    work.wait()
except KeyboardInterrupt:
    assert rank == 0
except fastagg.PeerError as error:
    assert error.rank == 0, error
else:
    raise AssertionError("no error")
"""


@pytest.mark.parametrize(("when", "call"), [("first", "async"), ("later", "at once"), ("later", "async")])
@pytest.mark.parametrize(
    ("world", "environment"),
    [
        (2, {}),
        (2, {"FASTAGG_TRANSPORT": "backend"}),
        pytest.param(4, {"TWO_HOSTS": "1"}, marks=pytest.mark.exhaustive),
    ],
    ids=["memory", "backend", "both"],
)
def test_ctrl_c_ends_a_wait_and_the_others_are_told(
    world: int, environment: dict[str, str], when: str, call: str
) -> None:
    ranks = Ranks(INTERRUPTED, world, TIMEOUT="120", WHEN=when, CALL=call, **environment)
    for process in ranks.processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    time.sleep(0.4)
    ranks.send(0, signal.SIGINT)
    outputs = ranks.outputs(timeout=60)
    assert [status for status, _, _ in outputs] == [0] * world, outputs
