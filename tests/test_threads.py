"""The thread pool: forks, many callers, limits, idleness."""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
import threading
import time

import numpy as np
import pytest

import fastagg
from backends import threads
from data import generator, normal
from fastagg._one_thread import OneThread
from processes import output_of
from reference import assert_same_bits

SIZE = 400_000


def large() -> list[np.ndarray]:
    """Arrays that are worth several threads."""
    random = generator(1)
    return [normal(random, SIZE, np.dtype(np.float32)) for _ in range(3)]


posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@posix
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_can_average() -> None:
    columns = large()
    with threads(3):
        expected = fastagg.fedavg(columns)
        child = os.fork()
        if child == 0:  # an exception must not reach pytest's second copy
            status = 1
            try:
                status = 0 if np.array_equal(fastagg.fedavg(columns), expected) else 2
            finally:
                os._exit(status)
        assert status_within(child, 30) == 0
        assert_same_bits(fastagg.fedavg(columns), expected)


def status_within(child: int, seconds: float) -> int:
    """A child's exit status; it is ended if it hangs."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return -9


@posix
def test_forks_while_other_threads_average() -> None:
    program = """
import os, threading, warnings, numpy as np, fastagg
warnings.simplefilter("ignore")
fastagg.set_num_threads(3)
columns = [np.full(400_000, k, np.float32) for k in (1, 3)]
stop = threading.Event()
def work():
    while not stop.is_set(): fastagg.fedavg(columns)
workers = [threading.Thread(target=work) for _ in range(2)]
for worker in workers: worker.start()
for _ in range(10):
    child = os.fork()
    if child == 0:
        good = (fastagg.fedavg(columns) == 2).all() and fastagg.quantize(columns[0]).data[7] == 1
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
for worker in workers: worker.join()
print("done")
"""
    assert output_of(program) == "done"


def average_in_child(seed: int) -> bytes:
    random = generator(seed)
    fastagg.set_num_threads(3)
    return fastagg.fedavg([normal(random, SIZE, np.dtype(np.float32)) for _ in range(2)]).tobytes()


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_multiprocessing(method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    with threads(3):
        fastagg.fedavg(large())
    with multiprocessing.get_context(method).Pool(2) as pool:
        results = pool.map_async(average_in_child, [5, 6]).get(timeout=60)
    for seed, result in zip((5, 6), results, strict=True):
        random = generator(seed)
        expected = fastagg.fedavg([normal(random, SIZE, np.dtype(np.float32)) for _ in range(2)])
        assert expected.tobytes() == result


def test_many_callers_at_once() -> None:
    columns = large()
    expected, codes = fastagg.fedavg(columns), fastagg.quantize(columns[0], "int8").data
    wrong: list[str] = []

    def work() -> None:
        for _ in range(15):
            if not np.array_equal(fastagg.fedavg(columns), expected):
                wrong.append("mean")
            if not np.array_equal(fastagg.quantize(columns[0], "int8").data, codes):
                wrong.append("codes")

    with threads(2):
        workers = [threading.Thread(target=work) for _ in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not wrong


def test_the_number_of_threads_may_change_between_calls() -> None:
    columns = large()
    expected = fastagg.fedavg(columns)
    for count in (1, 5, 2, 8, 1, 3):
        with threads(count):
            assert fastagg.get_num_threads() == count
            assert_same_bits(fastagg.fedavg(columns), expected)


def test_the_number_of_threads_may_change_while_others_average() -> None:
    program = """
import threading, numpy as np, fastagg
columns = [np.full(400_000, k, np.float32) for k in (1, 3)]
def work():
    for _ in range(60): assert (fastagg.fedavg(columns) == 2).all()
workers = [threading.Thread(target=work) for _ in range(3)]
for worker in workers: worker.start()
while any(worker.is_alive() for worker in workers):
    for count in (1, 4, 2, 6): fastagg.set_num_threads(count)
print("done")
"""
    assert output_of(program) == "done"


def test_set_num_threads_is_checked() -> None:
    before = fastagg.get_num_threads()
    for wrong, error, words in (
        (-1, ValueError, "an integer from 0 to 2147483647, got -1"),
        (1 << 40, ValueError, "an integer from 0 to 2147483647, got 1099511627776"),
        (1.5, TypeError, "an integer, got 1.5"),
        ("2", TypeError, "an integer, got '2'"),
        (None, TypeError, "an integer, got None"),
        (True, TypeError, "an integer, got True"),
    ):
        with pytest.raises(error, match=f"^count: expected {re.escape(words)}$"):
            fastagg.set_num_threads(wrong)  # type: ignore[arg-type]
    with threads(np.int64(3)):  # type: ignore[arg-type]
        assert fastagg.get_num_threads() == 3
    assert fastagg.get_num_threads() == before
    with threads(5):
        assert fastagg.get_num_threads() == 5
    assert fastagg.get_num_threads() == before


@pytest.mark.parametrize(("value", "expected"), [("1", 1), ("3", 3), ("7", 7)])
def test_omp_num_threads_is_honoured(value: str, expected: int) -> None:
    assert output_of("import fastagg; print(fastagg.get_num_threads())", OMP_NUM_THREADS=value) == str(expected)


@pytest.mark.parametrize("value", ["", "0", "-3", "many"])
def test_a_senseless_omp_num_threads_is_ignored(value: str) -> None:
    program = "import fastagg; print(fastagg.get_num_threads() == fastagg.build_info()['processors'])"
    assert output_of(program, OMP_NUM_THREADS=value) == "True"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_affinity_is_honoured() -> None:
    program = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import numpy as np, fastagg
fastagg.fedavg([np.ones(2_000_000, np.float32)] * 2)
print(fastagg.get_num_threads(), len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1)
"""
    number, tasks = output_of(program, OPENBLAS_NUM_THREADS="1").split()
    assert number == "1"
    assert tasks == "1"


def test_no_threads_before_they_are_needed() -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("threads are counted in /proc")
    program = """
import os, numpy as np, fastagg
count = lambda: len(os.listdir("/proc/self/task"))
before = count()
fastagg.set_num_threads(4)
fastagg.fedavg([np.ones(10, np.float32)] * 2)
small = count()
fastagg.fedavg([np.ones(2_000_000, np.float32)] * 2)
print(small - before, count() - before)
"""
    assert output_of(program, OPENBLAS_NUM_THREADS="1") == "0 3"


def test_an_idle_pool_does_not_spin() -> None:
    columns = large()
    with threads(3):
        fastagg.fedavg(columns)
        time.sleep(0.05)
        before = time.process_time()
        time.sleep(1.0)
        assert time.process_time() - before < 0.05


def test_a_process_with_a_pool_ends() -> None:
    program = """
import threading, numpy as np, fastagg
fastagg.set_num_threads(4)
work = lambda: fastagg.fedavg([np.ones(400_000, np.float32)] * 2)
worker = threading.Thread(target=work)
worker.start()
work()
worker.join()
print("done")
"""
    assert output_of(program, timeout=20) == "done"


LIMITED = """
import os, resource
import numpy as np, fastagg

def used():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10

def limit(spare):
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY if spare is None else used() + spare, -1))

def tasks():
    return len(os.listdir("/proc/self/task"))

updates = [np.full(1_000_000, value, np.float16) for value in range(6)]
out = np.empty(1_000_000, np.float16)
fastagg.set_num_threads(8)
"""
WITHOUT_THREADS = """
limit(4 << 20)  # less than a thread's stack
before = tasks()
fastagg.fedavg(updates, out=out)
assert (out == 2.5).all() and tasks() == before
limit(24 << 20)  # enough for two of them
fastagg.fedavg(updates, out=out)
some = tasks()
assert (out == 2.5).all() and before <= some < before + 7
limit(None)
fastagg.fedavg(updates, out=out)
assert (out == 2.5).all() and tasks() == before + 7
"""
WITHOUT_MEMORY = """
fastagg.fedavg(updates, out=out)  # starts the threads
refused = 0
for spare in range(0, 3 << 20, 32 << 10):
    out[:] = 0
    limit(spare)
    try:
        fastagg.robust.median(updates, out=out)
    except MemoryError:
        refused += 1
        limit(None)
        fastagg.robust.median(updates, out=out)
    limit(None)
    assert (out == 2.5).all()
print(refused)
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and limits addresses")


@linux
def test_where_threads_cannot_be_started_fewer_do_the_work() -> None:
    output_of(LIMITED + WITHOUT_THREADS)


@linux
def test_memory_that_cannot_be_had_is_a_memory_error_and_the_next_call_works() -> None:
    output_of(LIMITED + WITHOUT_MEMORY)


def test_a_daemon_thread_inside_a_call_does_not_abort_the_end() -> None:
    program = """
import threading, time, numpy as np, fastagg
fastagg.set_num_threads({threads})
columns = [np.ones(3_000_000, np.float32)] * 4
inside = threading.Semaphore(0)
def average():
    while True:
        inside.release()
        fastagg.fedavg(columns)
for _ in range(3):
    threading.Thread(target=average, daemon=True).start()
for _ in range(9):
    inside.acquire()
"""
    for count in (1, 3):
        assert output_of(program.replace("{threads}", str(count))) == ""


def test_work_is_done_at_once_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    done: list[int] = []
    with OneThread("test") as thread:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            assert thread.submit(done.append, 1).result() is None
            failed = thread.submit(done.remove, 7)
        assert isinstance(failed.exception(), ValueError)
        thread.submit(done.append, 2).result()
    assert done == [1, 2]
