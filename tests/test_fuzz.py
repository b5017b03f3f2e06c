"""Fuzzers: random calls and random deaths for a while. Their seed is printed; --seed=NUMBER repeats a run."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import numpy as np
import pytest

from backends import isa, on_scalar, threads
from fastagg import _core
from random_calls import bits_of, random_call

pytestmark = pytest.mark.exhaustive


def until(seconds: float) -> Iterator[int]:
    """Numbers from 0 on, for so many seconds."""
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        yield number
        number += 1


def test_random_calls_give_the_same_bits_on_every_instruction_set_and_thread_count(seed: int) -> None:
    for number in until(30):
        random = np.random.default_rng([seed, number])
        call = random_call(random)
        expected = bits_of(on_scalar(call))
        for name in _core.available_isas():
            count = int(random.choice([1, 2, 3, 7]))
            with isa(name), threads(count):
                assert bits_of(call()) == expected, f"call {number} on {name} with {count} threads: {call}"


# Every rank draws the same exchanges; whoever outlives another says who that was.
MORTAL = """
import random
dice = random.Random(os.environ["DICE"])
fastagg.all_reduce(torch.ones(3))
print("ready", flush=True)
try:
    while True:
        size, wire = int(2 ** dice.uniform(0, 20)), dice.choice(["fp32", "fp16", "int8", "sign"])
        tensors = [torch.ones(size) for _ in range(dice.randrange(1, 4))]
        if dice.random() < 0.2:
            fastagg.broadcast_parameters({str(i): x for i, x in enumerate(tensors)}, root_rank=dice.randrange(world))
        else:
            fastagg.all_reduce(tensors, wire=wire)
except fastagg.PeerError as error:
    print(error.rank, flush=True)
    os._exit(0)
"""


@pytest.mark.parametrize("transport", ["shared memory", "backend"])
def test_a_rank_killed_at_a_random_time_is_named_by_all_others(transport: str, seed: int) -> None:
    pytest.importorskip("torch")
    from ranks import Ranks
    from transports import on

    for number in until(25):
        random = np.random.default_rng([seed, number])
        world = int(random.integers(2, 5))
        victim = int(random.integers(world))
        ranks = Ranks(MORTAL, world, TIMEOUT="30", DICE=str(random.integers(2**32)), **on(transport))
        try:
            for process in ranks.processes:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
            time.sleep(random.uniform(0, 0.3))
        finally:
            ranks.send(victim, signal.SIGKILL)
        outputs = ranks.outputs(60)
        del outputs[victim]
        assert [out for _, out, _ in outputs] == [f"{victim}\n"] * (world - 1), f"round {number}: {outputs}"
