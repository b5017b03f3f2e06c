"""`merge_over_ranks` among real processes: the bits of the same tree in one process, and errors on every rank.

Programs whose ranks all live on run one after another in the same processes: starting those is what takes the time.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("torch")

from ranks import Ranks, run_ranks

CLIENTS = """
import numpy as np
import fastagg.ranks
from fastagg.ranks import merge_over_ranks

def client(number):
    random = np.random.default_rng(number)
    return {
        "single": random.normal(size=(300, 7)).astype(np.float32),
        "half": random.normal(size=33).astype(np.float16),
        "double": random.normal(size=(3, 5)),
        "count": random.integers(0, 1000, 4),
        "scalar": np.asarray(random.normal(), np.float32),
    }

def accumulator_of(rank, clients=7, **options):
    accumulator = fastagg.Accumulator(**options)
    for number in range(clients):
        accumulator.add(client(100 * rank + number), 1 + number)
    return accumulator

def bits(accumulator):
    return {name: array.tobytes() for name, array in accumulator.result().items()}

def error_of(function, kind=ValueError):
    try:
        function()
    except kind as error:
        return error
    raise AssertionError("no error")
"""

# The merges of each number of ranks, in order: left and right.
SAME_BITS = """
trees = {1: [], 2: [(0, 1)], 3: [(0, 1), (0, 2)], 5: [(0, 1), (2, 3), (0, 2), (0, 4)],
         6: [(0, 1), (2, 3), (4, 5), (0, 2), (0, 4)]}
for ranks, merges in trees.items():
    group = dist.new_group(list(range(ranks)))
    if rank >= ranks:
        continue
    for clients in (1, 7):
        everyone = [accumulator_of(other, clients) for other in range(ranks)]
        for left, right in merges:
            everyone[left].merge(everyone[right])
        for piece in (64, fastagg.ranks._PIECE):
            fastagg.ranks._PIECE = piece
            accumulator = accumulator_of(rank, clients)
            merge_over_ranks(accumulator, group)
            assert bits(accumulator) == bits(everyone[0])
            assert accumulator.count == ranks * clients
            assert accumulator.total_weight == everyone[0].total_weight
        accumulator.add(client(0))  # it goes on
        accumulator.result()
"""

ROOT = """
root = world - 1
accumulator, alone, everyone = accumulator_of(rank), accumulator_of(rank), accumulator_of(rank)
merge_over_ranks(everyone)
merge_over_ranks(accumulator, root=root)
assert bits(accumulator) == bits(everyone if rank == root else alone)
accumulator = accumulator_of(rank)
merge_over_ranks(accumulator, root=0)
assert bits(accumulator) == bits(everyone if rank == 0 else alone)

some = dist.new_group([1, 2])
if rank in (1, 2):
    pair, accumulator = accumulator_of(1), accumulator_of(rank)
    pair.merge(accumulator_of(2))
    merge_over_ranks(accumulator, some, root=2)
    assert bits(accumulator) == bits(pair if rank == 2 else alone)
    assert "root: expected a global rank of the group, one of [1, 2], got 0" in str(
        error_of(lambda: merge_over_ranks(accumulator, some, root=0)))
"""

WITHOUT_CLIENTS = """
expected = accumulator_of(1)
expected.merge(accumulator_of(3))
accumulator = accumulator_of(rank) if rank in (1, 3) else fastagg.Accumulator()
merge_over_ranks(accumulator)
assert bits(accumulator) == bits(expected) and accumulator.count == 14

nobody = fastagg.Accumulator()
merge_over_ranks(nobody)
assert nobody.count == 0 and "nothing was added" in str(error_of(nobody.result))
"""

DROPPED = """
import warnings
accumulator = fastagg.Accumulator(nan_policy="drop", batch=2)
with warnings.catch_warnings():
    warnings.simplefilter("ignore", fastagg.DroppedUpdateWarning)
    for number in range(3):
        wrong = rank == 1 and number == 2  # still waits for its batch
        accumulator.add({**client(number), "half": np.full(33, np.nan, np.float16)} if wrong else client(number))
    merge_over_ranks(accumulator)
assert [(dropped.client, dropped.leaf) for dropped in accumulator.dropped] == [(5, "half")]
assert accumulator.count == 8
"""

OWN_ARRAYS_AND_OPTIONS = """
as_tensors = rank % 2 == 1
options = {"nan_policy": ("raise", "drop", "propagate")[rank], "batch": 1 + rank, "low_memory": rank == 1}
accumulator = fastagg.Accumulator(**options)
update = {"a": np.full(3, rank, np.float32)}
accumulator.add({name: torch.from_numpy(array) for name, array in update.items()} if as_tensors else update)
merge_over_ranks(accumulator)
mean = accumulator.result()["a"]
assert type(mean) is (torch.Tensor if as_tensors else np.ndarray) and mean.tolist() == [1, 1, 1]
assert {name: getattr(accumulator, name) for name in options} == options

single = fastagg.Accumulator()
single.add(np.full(3, rank, np.float32))
merge_over_ranks(single)
assert single.result().tolist() == [1, 1, 1]
"""

DIFFERENT = """
def differing(change, **options):
    accumulator = fastagg.Accumulator(**(options if rank == 2 else {}))
    update = client(rank)
    if rank == 2:
        change(update)
    if rank > 0:  # the first has no clients: it is not what others are compared with
        accumulator.add(update)
    return accumulator

def told(accumulator, **options):
    before = accumulator.state_dict()
    message = str(error_of(lambda: merge_over_ranks(accumulator, **options)))
    after = accumulator.state_dict()
    assert str(before) == str(after)
    return message

def change(name, array):
    return lambda update: update.update({name: array})

assert told(differing(change("half", np.zeros(34, np.float16)))) == (
    "ranks differ: rank 1 has leaf 'half', float16 (33,), rank 2 has leaf 'half', float16 (34,)")
assert "rank 2 has leaf 'double', float32 (3, 5)" in told(differing(change("double", np.zeros((3, 5), np.float32))))
assert "rank 1 has no more leaves, rank 2 has leaf 'extra'" in told(differing(change("extra", np.zeros(2))))
assert "rank 2 has leaf 'count'" in told(differing(lambda update: update.pop("double")))
assert "rank 2 has integer_policy 'round'" in told(differing(lambda update: None, integer_policy="round"))
for one in (0, 2):  # statistics would be lost, or missing
    assert f"rank {one} has stats=True" in told(accumulator_of(rank, stats=rank == one))
assert "rank 0 has root None, rank 1 has root 0" in told(accumulator_of(rank), **({"root": 0} if rank == 1 else {}))

root = "first" if rank == 1 else 0
assert "rank 1: root: expected a global rank of the group, one of [0, 1, 2], got 'first'" in told(
    accumulator_of(rank), root=root)
wrong = {} if rank == 2 else accumulator_of(rank)
assert str(error_of(lambda: merge_over_ranks(wrong), TypeError)) == (
    "rank 2: accumulator: expected an Accumulator, got dict")

accumulator = accumulator_of(rank)  # and the ranks are still together
merge_over_ranks(accumulator)
assert accumulator.count == 7 * world
assert "got dict" in str(error_of(lambda: merge_over_ranks({}), TypeError))
"""

NOT_A_NUMBER = """
accumulator = accumulator_of(rank, 2, batch=8)
if rank == 1:
    accumulator.add({**client(2), "single": np.full((300, 7), np.inf, np.float32)})
assert str(error_of(lambda: merge_over_ranks(accumulator))).startswith("rank 1: client 2, leaf 'single': holds a NaN")
assert bits(accumulator) == bits(accumulator_of(rank, 2, batch=8))
merge_over_ranks(accumulator)  # what was wrong is left out
assert accumulator.count == 2 * world
"""

# The last rank dies when all have agreed.
DEATH = """
if rank == world - 1:
    fastagg.ranks._gathered = lambda *_: os._exit(0)
accumulator = accumulator_of(rank)
assert error_of(lambda: merge_over_ranks(accumulator), fastagg.PeerError).rank == world - 1
assert bits(accumulator) == bits(accumulator_of(rank))
print("told")
os._exit(0)
"""

DEATH_ON_THE_WAY_TO_THE_ROOT = """
if rank == 3:
    fastagg.ranks._gathered = lambda *_: os._exit(0)
accumulator = accumulator_of(rank)
if rank == 1:  # it has passed on what it had
    merge_over_ranks(accumulator, root=0)
else:
    assert error_of(lambda: merge_over_ranks(accumulator, root=0), fastagg.PeerError).rank == 3
assert bits(accumulator) == bits(accumulator_of(rank))
print("told")
os._exit(0)
"""


Outcome = Callable[[str], None]


def _outcome_of(programs: dict[str, str], world: int) -> Outcome:
    """Runs programs in turn on the same ranks; what it returns fails for a program that did not end on every rank."""
    text = "".join(
        f"exec(compile({program!r}, {name!r}, 'exec'))\nprint({name!r})\n" for name, program in programs.items()
    )
    outputs = Ranks(CLIENTS + text, world).outputs()

    def check(name: str) -> None:
        for rank, (_, out, err) in enumerate(outputs):
            assert name in out.splitlines(), f"rank {rank} of {world}:\n{out}\n{err}"

    return check


@pytest.fixture(scope="module")
def six_ranks() -> Outcome:
    return _outcome_of({"same bits": SAME_BITS, "without clients": WITHOUT_CLIENTS}, 6)


@pytest.fixture(scope="module")
def three_ranks() -> Outcome:
    programs = {
        "root": ROOT,
        "dropped": DROPPED,
        "own arrays": OWN_ARRAYS_AND_OPTIONS,
        "different": DIFFERENT,
        "not a number": NOT_A_NUMBER,
    }
    return _outcome_of(programs, 3)


def test_the_bits_are_those_of_the_same_tree_in_one_process(six_ranks: Outcome) -> None:
    six_ranks("same bits")


def test_ranks_without_clients(six_ranks: Outcome) -> None:
    six_ranks("without clients")


def test_only_the_root_changes(three_ranks: Outcome) -> None:
    three_ranks("root")


def test_dropped_clients_are_numbered_over_all_ranks(three_ranks: Outcome) -> None:
    three_ranks("dropped")


def test_each_rank_keeps_its_arrays_and_options(three_ranks: Outcome) -> None:
    three_ranks("own arrays")


def test_ranks_that_differ_are_told_on_every_rank(three_ranks: Outcome) -> None:
    three_ranks("different")


def test_a_nan_that_waited_is_told_on_every_rank(three_ranks: Outcome) -> None:
    three_ranks("not a number")


@pytest.mark.parametrize("world", [4, 5])
def test_a_dead_rank_is_named_to_all_others(world: int) -> None:
    printed = run_ranks(CLIENTS + DEATH, world)
    assert [output.strip() for output in printed] == ["told"] * (world - 1) + [""]


def test_a_dead_rank_is_named_to_the_root_and_to_those_who_met_it() -> None:
    printed = run_ranks(CLIENTS + DEATH_ON_THE_WAY_TO_THE_ROOT, 4)
    assert [output.strip() for output in printed] == ["told"] * 3 + [""]
