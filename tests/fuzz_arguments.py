"""A fuzzer for an interpreter whose _core is under sanitizers: random calls with arguments that are mostly wrong.

Every call may answer or raise; it may not crash, nor may the native code break the interpreter's rules. What was raised
is counted. The seed is printed.
"""

from __future__ import annotations

import argparse
import collections
import pickle
import secrets
import time
import warnings
from typing import Any

import numpy as np

import fastagg
from fastagg import _core
from random_calls import Call, random_call


def junk(random: np.random.Generator, like: Any) -> Any:
    """Something in an argument's place: of another kind, or nearly right."""
    if isinstance(like, np.ndarray) and random.random() < 0.7:
        return _spoilt_array(random, like)
    if isinstance(like, fastagg.Quantized) and random.random() < 0.7:
        return _spoilt_codes(random, like)
    if isinstance(like, dict) and like and random.random() < 0.8:
        spoilt, name = dict(like), str(random.choice(list(like)))
        if random.random() < 0.2:
            del spoilt[name]
        else:
            spoilt[name] = junk(random, like[name])
        return spoilt
    if isinstance(like, (list, tuple)) and like and random.random() < 0.9:
        items, place = list(like), int(random.integers(len(like)))
        if random.random() < 0.2:
            del items[place]
        else:
            items[place] = junk(random, items[place])
        return items
    others = [None, "", "int8", "\x00", b"abc", 0, -1, 2**31, 2**63, 2**70, -(2**70), 0.0, -0.0, 1e308, 1e-320]
    others += [float("nan"), float("inf"), True, (), [], {}, [[]], object(), np.zeros(0), np.array(3.0), np.float16(2)]
    return others[random.integers(len(others))]


def _spoilt_array(random: np.random.Generator, array: np.ndarray) -> Any:
    """An array of another dtype, shape, layout, alignment or writability."""
    flat = np.ascontiguousarray(array).reshape(-1)
    ways = [
        lambda: flat[:-1],
        lambda: flat[::-1],
        lambda: np.repeat(flat, 2)[::2],
        lambda: flat.reshape(1, -1),
        lambda: flat.astype(object),
        lambda: flat.astype(str),
        lambda: flat.astype(np.complex64),
        lambda: flat.astype(array.dtype.newbyteorder()),
        lambda: np.broadcast_to(flat[:1], array.shape),
        lambda: np.frombuffer(b"\0" + flat.tobytes(), np.uint8)[1:].view(array.dtype),
        lambda: np.lib.stride_tricks.as_strided(flat[:1], (2**20,), (0,)),
        lambda: np.ma.masked_array(flat),
        lambda: flat.astype(np.float64),
        lambda: flat.tolist(),
    ]
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ways[random.integers(len(ways))]()


def _spoilt_codes(random: np.random.Generator, codes: fastagg.Quantized) -> Any:
    """Codes whose fields or pickle were tampered with, where that is allowed."""
    rebuild, (data, scales) = codes.__reduce__()
    fields: list[Any] = [data, scales, *rebuild.keywords.values()]
    data, scales, *described = (junk(random, field) if random.random() < 0.2 else field for field in fields)
    return rebuild.func(data, scales, **dict(zip(rebuild.keywords, described, strict=True)))


def _spoilt_state(random: np.random.Generator, call: Call) -> None:
    """An accumulator's state with something in a field's place, loaded, used and merged."""
    accumulator = fastagg.Accumulator()
    updates = call.arguments[0]
    accumulator.add(updates[0])
    state = accumulator.state_dict()
    forged = junk(random, junk(random, state) if random.random() < 0.3 else state)
    other = fastagg.Accumulator()
    other.load_state_dict(forged)
    other.add(updates[-1])
    accumulator.merge(pickle.loads(pickle.dumps(other)))
    accumulator.result()


def attack(random: np.random.Generator) -> None:
    """One call whose arguments are mostly wrong."""
    call = random_call(random)
    if call.arguments and isinstance(call.arguments[0], list) and random.random() < 0.2:
        _spoilt_state(random, call)
        return
    arguments, options = list(call.arguments), dict(call.options)
    for _ in range(random.integers(1, 3)):
        place = int(random.integers(len(arguments) + len(options)))
        if place < len(arguments):
            arguments[place] = junk(random, arguments[place])
        else:
            name = list(options)[place - len(arguments)]
            options[name] = junk(random, options[name])
    if random.random() < 0.3:
        first = arguments[0]
        model = first[0] if isinstance(first, (list, tuple)) and first else first
        options["out"] = junk(random, model) if random.random() < 0.5 else model  # which overlaps
    call.function(*arguments, **options)


def main() -> None:
    """Attacks for a while; a fault ends the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    chosen = parser.parse_args()
    print(f"seed {chosen.seed}", flush=True)
    warnings.simplefilter("ignore")
    found, number = collections.Counter[str](), 0
    end = time.monotonic() + chosen.seconds
    while time.monotonic() < end:
        random = np.random.default_rng([chosen.seed, number])
        _core.force_isa(_core.available_isas()[random.integers(len(_core.available_isas()))])
        answer = "answered"
        try:
            attack(random)
        except SystemError as error:  # an answer with an error set, or none without
            raise SystemExit(f"call {number} of seed {chosen.seed}: {error}") from error
        except Exception as error:
            answer = type(error).__name__
        found[answer] += 1
        number += 1
    print(f"{number} calls: {dict(found)}")


if __name__ == "__main__":
    main()
