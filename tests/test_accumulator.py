"""`Accumulator`: the mean of updates that arrive one after another."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import subprocess
import sys
import threading
import tracemalloc
import weakref
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest

import fastagg
from backends import Backend, on_scalar
from data import counts, generator, normal
from reference import (
    FLOATS,
    LARGEST_ERROR,
    assert_fp64_mean,
    assert_mean,
    assert_rounded_once,
    assert_same_bits,
    magnitude,
    mean,
    wide,
)

by_dtype = pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())
EXPECTED = [2.5, 3.5, 4.5]


def two(dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays whose mean with weights 1 and 3 is [2.5, 3.5, 4.5]."""
    return np.array([1, 2, 3], dtype), np.array([3, 4, 5], dtype)


def filled(columns: list[Any], weights: list[float], **options: Any) -> fastagg.Accumulator:
    """An accumulator with updates added in order."""
    accumulator = fastagg.Accumulator(**options)
    for column, weight in zip(columns, weights, strict=True):
        accumulator.add(column, weight)
    return accumulator


def held(accumulator: fastagg.Accumulator) -> dict[str, Any]:
    """All that a refused update must leave as it was: the state but for the numbering of clients."""
    state = accumulator.state_dict()
    sums = state["sums"]
    return {**state, "sums": None if sums is None else sums.tobytes(), "added": None}


def pickled(accumulator: fastagg.Accumulator) -> fastagg.Accumulator:
    """Through bytes and back."""
    return pickle.loads(pickle.dumps(accumulator))


def assert_within_bound(result: np.ndarray, columns: list[np.ndarray], weights: list[float]) -> None:
    """The contract's bound for every dtype."""
    exact, scale = mean(columns, weights), magnitude(columns, weights)
    if result.dtype == np.float64:
        assert_fp64_mean(result, columns, weights)
    elif result.dtype == np.float32:
        assert np.max(np.abs(wide(result) - exact) / scale) <= LARGEST_ERROR
    else:
        assert_rounded_once(result, exact, 2.0**-22 * scale)


@by_dtype
def test_agrees_with_the_reference_at_every_size(backend: Backend, dtype: np.dtype) -> None:
    random = generator(1)
    for size in backend.sizes:
        columns, weights = [normal(random, size, dtype) for _ in range(4)], counts(random, 4)
        result = backend.get(filled(backend.put_all(columns), weights).result())
        assert result.dtype == dtype
        assert_within_bound(result, columns, weights)
        assert_same_bits(result, on_scalar(lambda c=columns, w=weights: filled(c, w).result()))


@by_dtype
def test_one_update_comes_back_as_it_was(backend: Backend, dtype: np.dtype) -> None:
    x = normal(generator(2), 333, dtype)
    for weight in (1.0, 3.0, 0.1, 2000.0):
        assert_same_bits(backend.get(filled([backend.put(x)], [weight]).result()), x)


@by_dtype
@pytest.mark.parametrize("batch", [2, 3, 8])
def test_batches_give_the_same_mean(backend: Backend, dtype: np.dtype, batch: int) -> None:
    random = generator(3)
    columns, weights = [normal(random, 333, dtype) for _ in range(7)], counts(random, 7)
    accumulator = filled(backend.put_all(columns), weights, batch=batch)
    assert accumulator.count == 7
    assert accumulator.total_weight == sum(weights)
    result = backend.get(accumulator.result())
    assert_within_bound(result, columns, weights)
    assert_same_bits(result, on_scalar(lambda: filled(columns, weights, batch=batch).result()))


def ten_thousand(kind: str) -> tuple[list[np.ndarray], list[float]]:
    """Ten thousand small fp32 clients."""
    random = generator(4)
    clients = 10_000
    values = [(0.5 + 0.02 * random.normal(size=31)).astype(np.float32) for _ in range(clients)]
    weights = random.integers(10, 2000, clients).astype(np.float64)
    if kind == "identical":
        values = [values[0]] * clients
        weights = np.ones(clients)
    elif kind == "dominating":
        weights[1234] = 1e9
    elif kind == "tenths":
        weights = random.integers(1, 100, clients) * 0.1
    return values, weights.tolist()


@pytest.mark.parametrize("kind", ["random", "identical", "dominating", "tenths"])
@pytest.mark.parametrize("batch", [1, 8])
def test_error_bound_for_ten_thousand_clients(kind: str, batch: int) -> None:
    columns, weights = ten_thousand(kind)
    result = filled(columns, weights, batch=batch).result()
    error = np.abs(wide(result) - mean(columns, weights)) / magnitude(columns, weights)
    assert error.max() <= LARGEST_ERROR


def merged(columns: list[np.ndarray], weights: list[float], leaves: int) -> fastagg.Accumulator:
    """A tree of merges over accumulators of `leaves` clients."""
    level = [
        filled(columns[start : start + leaves], weights[start : start + leaves])
        for start in range(0, len(columns), leaves)
    ]
    while len(level) > 1:
        for one, other in zip(level[::2], level[1::2], strict=False):
            one.merge(other)
        level = level[::2]
    return level[0]


@pytest.mark.parametrize("kind", ["random", "identical", "dominating"])
def test_error_bound_for_any_order_and_any_tree(kind: str) -> None:
    columns, weights = ten_thousand(kind)
    exact, scale = mean(columns, weights), magnitude(columns, weights)
    order = generator(5).permutation(len(columns))
    shuffled = filled([columns[k] for k in order], [weights[k] for k in order])
    backwards = filled(columns[::-1], weights[::-1])
    for accumulator in (shuffled, backwards, merged(columns, weights, 1), merged(columns, weights, 37)):
        assert accumulator.count == len(columns)
        assert accumulator.total_weight == pytest.approx(sum(weights), rel=1e-15)
        assert np.max(np.abs(wide(accumulator.result()) - exact) / scale) <= LARGEST_ERROR


def test_zeros_and_tiny_values_survive() -> None:
    x = np.array([0.0, -0.0, 2.0**-149, -(2.0**-149), 2.0**-126, 3.4e38], np.float32)
    for weight in (1.0, 1000.0, 1e-20, 1e20):
        assert_same_bits(filled([x, x], [weight, weight]).result(), x)


@by_dtype
def test_large_values_do_not_overflow_on_the_way(dtype: np.dtype) -> None:
    largest = {"float16": 65504.0, "float64": 1e300}.get(dtype.name, 3e38)
    x = np.full(9, largest).astype(dtype)
    assert_same_bits(filled([x, x, x, x], [2000.0] * 4).result(), x)


# Counting


def test_count_and_total_weight() -> None:
    one, other = two()
    accumulator = fastagg.Accumulator()
    assert (accumulator.count, accumulator.total_weight) == (0, 0.0)
    accumulator.add(one, 2)
    accumulator.add(other, 0)
    accumulator.add(other)
    assert (accumulator.count, accumulator.total_weight) == (2, 3.0)
    accumulator.reset()
    assert (accumulator.count, accumulator.total_weight) == (0, 0.0)
    accumulator.add(np.ones((2, 2)))
    assert accumulator.result().tolist() == [[1, 1], [1, 1]]


def test_result_may_be_asked_for_at_any_time() -> None:
    one, other = two()
    accumulator = filled([one], [1])
    assert accumulator.result().tolist() == [1, 2, 3]
    accumulator.add(other, 3)
    assert accumulator.result().tolist() == EXPECTED
    assert accumulator.result().tolist() == EXPECTED


def test_nothing_added_has_no_mean() -> None:
    for accumulator in (fastagg.Accumulator(), filled([np.ones(3)], [0])):
        with pytest.raises(ValueError, match=r"nothing was added"):
            accumulator.result()


def test_weight_zero_never_contributes() -> None:
    one, other = two()
    bad = np.full(3, np.nan, np.float32)
    assert filled([one, bad, other], [1, 0, 3]).result().tolist() == EXPECTED
    assert filled([bad, one, other], [0, 1, 3]).result().tolist() == EXPECTED


# Structures and outputs


def test_structures_and_names() -> None:
    one, other = two()
    accumulator = filled([OrderedDict(a=one, b=other), {"b": other, "a": other}], [1, 3])
    result = accumulator.result()
    assert type(result) is OrderedDict
    assert result["a"].tolist() == EXPECTED
    assert filled([(one,), (other,)], [1, 3]).result()[0].tolist() == EXPECTED


def test_integers_and_bool_follow_the_policy() -> None:
    updates = [{"n": np.array([k, 10 - k]), "b": np.array([k == 2, False])} for k in (1, 2, 4)]
    expected = {"max": ([4, 9], [True, False]), "first": ([1, 9], [False, False]), "round": ([3, 7], [False, False])}
    for policy, (numbers, flags) in expected.items():
        result = filled(updates, [1, 1, 2], integer_policy=policy).result()
        assert result["n"].tolist() == numbers
        assert result["b"].tolist() == flags
        assert result["n"].dtype == np.int64


def test_quantized_updates() -> None:
    random = generator(6)
    columns = [normal(random, (4, 70), np.dtype(np.float32)) for _ in range(5)]
    quantized = [
        fastagg.quantize(x, wire) for x, wire in zip(columns, ("int8", "fp16", "sign", "int4", "fp8_e4m3"), strict=True)
    ]
    decoded = [fastagg.dequantize(q) for q in quantized]
    weights = counts(random, 5)
    result = filled(quantized, weights).result()
    assert result.dtype == np.float32
    assert_mean(result, decoded, weights)
    assert_mean(filled([columns[0], *quantized[1:]], weights).result(), [columns[0], *decoded[1:]], weights)


def test_torch() -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).to(torch.bfloat16)
    accumulator = filled([model.state_dict(), model.state_dict()], [2, 5])
    result = accumulator.result()
    for name, tensor in model.state_dict().items():
        assert torch.equal(result[name], tensor)
        assert result[name].dtype == tensor.dtype
    model.load_state_dict(result)


def test_out() -> None:
    one, other = two()
    accumulator = filled([{"a": one}, {"a": other}], [1, 3])
    out = {"a": np.zeros(3, np.float32)}
    assert accumulator.result(out=out) is out
    assert out["a"].tolist() == EXPECTED
    for wrong in (np.zeros(4, np.float32), np.zeros(3), np.zeros(6, np.float32)[::2]):
        with pytest.raises((TypeError, ValueError), match=r"out, leaf 'a'"):
            accumulator.result(out={"a": wrong})
    with pytest.raises((TypeError, ValueError), match=r"out"):
        accumulator.result(out={"b": np.zeros(3, np.float32)})


# Refused updates


REFUSED: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "nan": ({"a": np.array([1, np.nan, 3], np.float32)}, 1, ValueError, r"client 1, leaf 'a'"),
    "infinity": ({"a": np.array([1, 2, -np.inf], np.float32)}, 1, ValueError, r"client 1, leaf 'a'"),
    "shape": ({"a": np.ones(1, np.float32)}, 1, ValueError, r"client 1, leaf 'a'.*\(3,\).*\(1,\)"),
    "dtype": ({"a": np.ones(3)}, 1, TypeError, r"client 1, leaf 'a'.*float32.*float64"),
    "strided-dtype": ({"a": np.ones(6)[::2]}, 1, TypeError, r"client 1, leaf 'a'.*float32.*float64"),
    "integer": ({"a": np.ones(3, np.int32)}, 1, TypeError, r"client 1, leaf 'a'.*float32.*int32"),
    "missing": ({"b": np.ones(3, np.float32)}, 1, ValueError, r"client 1.*missing.*'a'"),
    "sequence": ([np.ones(3, np.float32)], 1, TypeError, r"client 1.*mapping.*list"),
    "list": ({"a": [1.0, 2.0, 3.0]}, 1, TypeError, r"client 1, leaf 'a'.*list"),
    "negative": ({"a": np.ones(3, np.float32)}, -1, ValueError, r"weight.*client 1"),
    "nan-weight": ({"a": np.ones(3, np.float32)}, float("nan"), ValueError, r"weight.*client 1"),
    "infinite-weight": ({"a": np.ones(3, np.float32)}, float("inf"), ValueError, r"weight.*client 1"),
    "huge-weight": ({"a": np.ones(3, np.float32)}, 1e300, ValueError, r"weight"),
    "no-weight": ({"a": np.ones(3, np.float32)}, None, TypeError, r"."),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_update_changes_nothing(case: str) -> None:
    update, weight, error, message = REFUSED[case]
    one, other = two()
    accumulator = filled([{"a": one}], [1])
    before = held(accumulator)
    with pytest.raises(error, match=message):
        accumulator.add(update, weight)
    assert held(accumulator) == before
    accumulator.add({"a": other}, 3)
    assert accumulator.result()["a"].tolist() == EXPECTED


@by_dtype
def test_a_refused_update_leaves_the_sums_bitwise(backend: Backend, dtype: np.dtype) -> None:
    random = generator(7)
    columns = [normal(random, 1025, dtype) for _ in range(3)]
    accumulator = filled(backend.put_all(columns[:2]), [1.0, 2.0])
    before = held(accumulator)
    columns[2][-1] = np.nan
    with pytest.raises(ValueError, match=r"client 2"):
        accumulator.add(backend.put(columns[2]))
    assert held(accumulator) == before


def test_a_refused_first_update_leaves_an_empty_accumulator() -> None:
    accumulator = fastagg.Accumulator()
    with pytest.raises(ValueError, match=r"client 0"):
        accumulator.add(np.full(3, np.nan, np.float32))
    assert accumulator.count == 0
    restored = pickled(accumulator)
    for empty in (accumulator, restored):
        empty.add({"a": np.ones((2, 2), np.float64)})
        assert empty.result()["a"].tolist() == [[1, 1], [1, 1]]


def test_an_integer_leaf_does_not_mix_with_quantized() -> None:
    accumulator = filled([np.arange(4, dtype=np.int32)], [1])
    with pytest.raises(TypeError, match=r"client 1"):
        accumulator.add(fastagg.quantize(np.ones(4, np.float32), "int8"))


def test_drop_warns_and_reports() -> None:
    one, other = two()
    accumulator = fastagg.Accumulator(nan_policy="drop")
    accumulator.add({"a": one, "b": one})
    with pytest.warns(fastagg.DroppedUpdateWarning, match=r"client 1, leaf 'b'"):
        accumulator.add({"a": one, "b": np.array([1, np.inf, 3], np.float32)}, 100)
    accumulator.add({"a": other, "b": other}, 3)
    assert accumulator.count == 2
    assert accumulator.total_weight == 4
    assert accumulator.result()["b"].tolist() == EXPECTED
    (dropped,) = accumulator.dropped
    assert (dropped.client, dropped.leaf) == (1, "b")
    assert "NaN" in dropped.reason


def test_a_dropped_first_update_leaves_an_empty_accumulator() -> None:
    accumulator = fastagg.Accumulator(nan_policy="drop")
    with pytest.warns(fastagg.DroppedUpdateWarning):
        accumulator.add(np.array([np.nan], np.float32))
    assert accumulator.count == 0
    with pytest.raises(ValueError, match=r"nothing was added"):
        accumulator.result()
    accumulator.add(np.array([5], np.float32))
    assert accumulator.result().tolist() == [5]


def test_propagate_is_plain_addition() -> None:
    rows = [np.array(row, np.float32) for row in ([1, np.inf, np.inf, 1], [1, 1, -np.inf, np.nan])]
    result = filled(rows, [1, 1], nan_policy="propagate").result()
    assert result[0] == 1
    assert result[1] == np.inf
    assert np.isnan(result[2:]).all()


def test_a_batch_finds_the_offender_when_it_is_folded() -> None:
    one, other = two()
    accumulator = fastagg.Accumulator(batch=3)
    accumulator.add(one)
    accumulator.add(np.full(3, np.nan, np.float32))
    with pytest.raises(ValueError, match=r"client 1"):
        accumulator.add(other, 3)
    assert accumulator.count == 2
    assert accumulator.result().tolist() == EXPECTED


def test_a_batch_drops_the_offenders_only() -> None:
    bad = np.full(3, np.inf, np.float32)
    one, other = two()
    accumulator = fastagg.Accumulator(batch=4, nan_policy="drop")
    for update, weight in ((one, 1), (bad, 1), (other, 3)):
        accumulator.add(update, weight)
    with pytest.warns(fastagg.DroppedUpdateWarning) as warned:
        accumulator.add(bad)
    assert [dropped.client for dropped in accumulator.dropped] == [1, 3]
    assert len(warned) == 2
    assert accumulator.result().tolist() == EXPECTED


@pytest.mark.parametrize("options", [{"nan_policy": "x"}, {"integer_policy": "x"}, {"batch": 0}], ids=str)
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        fastagg.Accumulator(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": "8"}, "batch: expected an integer, got '8'"),
        ({"batch": 1.5}, "batch: expected an integer, got 1.5"),
        ({"low_memory": "yes"}, "low_memory: expected True or False, got 'yes'"),
        ({"stats": 1}, "stats: expected True or False, got 1"),
    ],
)
def test_options_of_a_wrong_type(options: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=f"^{words}$"):
        fastagg.Accumulator(**options)


# Memory


@pytest.mark.parametrize(("name", "limit"), [("fp32", 12), ("fp16", 12), ("bf16", 12), ("fp64", 32)])
def test_memory_an_element(name: str, limit: int) -> None:
    count = 100_000
    accumulator = fastagg.Accumulator()
    for _ in range(5):
        accumulator.add(np.ones(count, FLOATS[name]))
    arrays = [array for array in vars(accumulator).values() if isinstance(array, np.ndarray)]
    blocks = [array if array.base is None else array.base for array in arrays]
    assert blocks
    assert sum(block.nbytes for block in blocks) <= limit * count + 1024


def test_memory_does_not_grow_with_the_clients() -> None:
    accumulator = fastagg.Accumulator()

    def add(clients: int) -> int:
        for client in range(clients):
            accumulator.add(np.full(100_000, client, np.float32))
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        few = add(2)
        assert add(50) - few < 100_000  # less than one update more
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("layout", ["plain", "strided", "swapped"])
def test_nothing_of_an_update_is_kept(layout: str) -> None:
    accumulator = fastagg.Accumulator()
    update = np.ones(500, ">f4" if layout == "swapped" else "f4")[:: 2 if layout == "strided" else 1]
    gone = weakref.ref(update)
    accumulator.add(update)
    update[...] = 77
    assert np.all(accumulator.result() == 1)
    del update
    gc.collect()
    assert gone() is None


def test_nothing_of_a_refused_update_is_kept() -> None:
    accumulator = filled([np.ones(5, np.float32)], [1])
    update = np.full(5, np.nan, np.float32)
    gone = weakref.ref(update)
    with pytest.raises(ValueError, match=r"client 1"):
        accumulator.add(update)
    del update
    gc.collect()
    assert gone() is None


def test_a_batch_lets_go_of_what_it_folded() -> None:
    accumulator = fastagg.Accumulator(batch=2)
    update = np.ones(5, np.float32)
    gone = weakref.ref(update)
    accumulator.add(update)
    del update
    accumulator.add(np.ones(5, np.float32))
    gc.collect()
    assert gone() is None


def test_a_batch_keeps_alive_what_it_holds() -> None:
    accumulator = fastagg.Accumulator(batch=4)
    references = []
    for k in range(3):
        update = {"a": np.full(7, k, np.float32)}
        references.append(weakref.ref(update["a"]))
        accumulator.add(update)
        del update
    gc.collect()
    assert all(reference() is not None for reference in references)
    assert accumulator.result()["a"].tolist() == [1] * 7


def test_results_do_not_share_memory() -> None:
    accumulator = filled([np.ones(5, np.float32)], [1])
    accumulator.result()[...] = 77
    assert np.all(accumulator.result() == 1)


# Merging


def test_merge_adds_everything() -> None:
    one, other = two()
    accumulator, second = filled([one], [1]), filled([other], [3])
    accumulator.merge(second)
    assert (accumulator.count, accumulator.total_weight) == (2, 4.0)
    assert accumulator.result().tolist() == EXPECTED
    assert second.result().tolist() == [3, 4, 5]
    second.add(other)
    assert accumulator.result().tolist() == EXPECTED


def test_merging_empty_accumulators() -> None:
    one, other = two()
    accumulator = fastagg.Accumulator()
    accumulator.merge(fastagg.Accumulator())
    assert accumulator.count == 0
    accumulator.merge(filled([one, other], [1, 3]))
    accumulator.merge(fastagg.Accumulator())
    assert accumulator.result().tolist() == EXPECTED


def test_merging_into_itself_doubles_the_weight() -> None:
    accumulator = filled(list(two()), [1, 3])
    accumulator.merge(accumulator)
    assert (accumulator.count, accumulator.total_weight) == (4, 8.0)
    assert accumulator.result().tolist() == EXPECTED


def test_merge_follows_the_integer_policies() -> None:
    for policy, expected in (("max", 9), ("first", 4), ("round", 6)):
        accumulator = filled([np.array([4])], [1], integer_policy=policy)
        accumulator.merge(filled([np.array([9]), np.array([5])], [1, 1], integer_policy=policy))
        assert accumulator.result().tolist() == [expected]


def test_merge_numbers_dropped_clients_as_if_added_here() -> None:
    bad = np.array([np.nan])
    accumulator = filled([np.ones(1), np.ones(1)], [1, 1], nan_policy="drop")
    other = filled([np.ones(1)], [1], nan_policy="drop")
    with pytest.warns(fastagg.DroppedUpdateWarning):
        other.add(bad)
    accumulator.merge(other)
    assert [dropped.client for dropped in accumulator.dropped] == [3]


@pytest.mark.parametrize(
    "other",
    [
        filled([np.ones(4, np.float32)], [1]),
        filled([np.ones(3)], [1]),
        filled([[np.ones(3, np.float32)]], [1]),
        filled([np.ones(3, np.float32)], [1], integer_policy="first"),
        "accumulator",
    ],
    ids=["shape", "dtype", "structure", "policy", "type"],
)
def test_merging_what_does_not_fit_changes_nothing(other: Any) -> None:
    accumulator = filled([np.ones(3, np.float32)], [1])
    before = held(accumulator)
    with pytest.raises((TypeError, ValueError), match=r"other"):
        accumulator.merge(other)
    assert held(accumulator) == before


# Saving


def test_options_stay_as_they_were_made():
    accumulator = fastagg.Accumulator()
    for name, value in (("batch", 1), ("low_memory", True), ("stats", True), ("nan_policy", "drop")):
        with pytest.raises(AttributeError):
            setattr(accumulator, name, value)
    with pytest.raises(AttributeError):
        accumulator.integer_policy = "round"  # type: ignore[misc]


@pytest.mark.parametrize("save", [pickled, copy.deepcopy, copy.copy])
@by_dtype
def test_copies_go_on_from_the_same_bits(save: Any, dtype: np.dtype) -> None:
    random = generator(8)
    columns, weights = [normal(random, 333, dtype) for _ in range(6)], counts(random, 6)
    accumulator = filled(columns[:3], weights[:3])
    other = save(accumulator)
    assert held(other) == held(accumulator)
    for column, weight in zip(columns[3:], weights[3:], strict=True):
        other.add(column, weight)
    assert_same_bits(other.result(), filled(columns, weights).result())
    assert accumulator.count == 3
    assert_same_bits(accumulator.result(), filled(columns[:3], weights[:3]).result())


def test_state_dict_is_a_copy() -> None:
    one, other = two()
    accumulator = filled([one], [1])
    state = accumulator.state_dict()
    accumulator.add(other, 3)
    restored = fastagg.Accumulator()
    restored.load_state_dict(state)
    assert restored.result().tolist() == [1, 2, 3]
    restored.add(other, 3)
    again = fastagg.Accumulator()
    again.load_state_dict(state)
    assert again.result().tolist() == [1, 2, 3]
    state["sums"][:] = 0
    assert again.result().tolist() == [1, 2, 3]
    assert accumulator.result().tolist() == EXPECTED


def test_state_dict_keeps_policies_and_dropped() -> None:
    accumulator = fastagg.Accumulator(nan_policy="drop", integer_policy="round", batch=2)
    accumulator.add(np.ones(2))
    with pytest.warns(fastagg.DroppedUpdateWarning):
        accumulator.add(np.full(2, np.nan))
    restored = fastagg.Accumulator()
    restored.load_state_dict(pickle.loads(pickle.dumps(accumulator.state_dict())))
    assert (restored.nan_policy, restored.integer_policy, restored.batch) == ("drop", "round", 2)
    assert restored.dropped == accumulator.dropped
    assert restored.count == 1


def test_an_empty_accumulator_can_be_saved() -> None:
    restored = pickle.loads(pickle.dumps(fastagg.Accumulator()))
    restored.add(np.ones(2))
    assert restored.result().tolist() == [1, 1]


@pytest.mark.parametrize(
    "spoiled",
    ["empty", "version", "none", "incomplete", "cut", "no sums", "wide sums", "library", "larger leaf", "policy"],
)
def test_a_wrong_state_changes_nothing(spoiled: str) -> None:
    accumulator = filled(list(two()), [1, 3])
    state = accumulator.state_dict()
    without_sums = {name: value for name, value in state.items() if name != "sums"}
    leaf = state["leaves"][0]
    state = {
        "empty": {},
        "version": {**state, "version": 99},
        "none": None,
        "incomplete": without_sums,
        "cut": {**state, "sums": state["sums"][:64]},
        "no sums": {**state, "sums": None},
        "wide sums": {**state, "sums": state["sums"].astype(np.uint16)},
        "library": {**state, "leaves": [["pandas", *leaf[1:]], *state["leaves"][1:]]},
        "larger leaf": {**state, "leaves": [[*leaf[:3], [10**9], *leaf[4:]], *state["leaves"][1:]]},
        "policy": {**state, "nan_policy": "hope"},
    }[spoiled]
    before = held(accumulator)
    with pytest.raises(ValueError, match=r"state"):
        accumulator.load_state_dict(state)
    assert held(accumulator) == before


# Threads


def test_threads_may_add_at_once() -> None:
    columns = [np.full(20_000, k, np.float32) for k in range(8)]
    accumulator = fastagg.Accumulator()

    def add(k: int) -> None:
        for _ in range(25):
            accumulator.add(columns[k], k + 1)

    workers = [threading.Thread(target=add, args=(k,)) for k in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert accumulator.count == 200
    assert accumulator.total_weight == 25 * 36
    expected = sum(k * (k + 1) for k in range(8)) / 36
    assert np.allclose(accumulator.result(), expected, rtol=2e-7, atol=0)


def test_two_accumulators_may_merge_each_other_at_once() -> None:
    # Two locks taken in opposite orders would wait for each other forever.
    program = """
import threading, numpy as np, fastagg
one, other = fastagg.Accumulator(), fastagg.Accumulator()
for accumulator in (one, other):
    accumulator.add(np.ones(200_000, np.float32), 2.0**-60)
def merge(target, source):
    for _ in range(50):
        target.merge(source)
workers = [threading.Thread(target=merge, args=pair, daemon=True) for pair in ((one, other), (other, one))]
for worker in workers: worker.start()
for worker in workers: worker.join(timeout=5)
raise SystemExit(any(worker.is_alive() for worker in workers))
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0, "they wait for each other"


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("weights", [[3.0] * 49, [0.1, 0.2, 0.7], [1 / 3] * 10, [1e80, 1e-80, 1.0]], ids=str)
def test_equal_fp64_models_are_their_own_mean_in_any_tree(backend: Backend, weights: list[float], batch: int) -> None:
    x = np.array([7.0, -0.1, 1 / 3, 1e200, 1e-200, -0.0, 0.0, 1.5])
    total, trees = fastagg.Accumulator(batch=batch), []
    for first in range(0, len(weights), 5):
        part = weights[first : first + 5]
        trees.append(filled(backend.put_all([x] * len(part)), part, batch=batch, low_memory=bool(first % 2)))
    for tree in reversed(trees):
        total.merge(pickled(tree))
    assert_same_bits(backend.get(total.result()), x)
    assert total.total_weight == math.fsum(weights)


def test_fp64_means_are_exact_in_any_order() -> None:
    random = generator(9)
    columns, weights = [random.normal(size=39) for _ in range(40)], random.uniform(0.1, 9, 40).tolist()
    for order in (range(40), random.permutation(40).tolist()):
        result = filled([columns[k] for k in order], [weights[k] for k in order], batch=3).result()
        assert_within_bound(result, columns, weights)


# What a reader found


def test_every_call_of_add_has_a_number() -> None:
    accumulator = fastagg.Accumulator()
    accumulator.add(np.ones(3, np.float32))
    wrong_ones = [np.ones(4, np.float32), np.full(3, np.nan, np.float32), np.ones(2, np.float32)]
    for client, wrong in enumerate(wrong_ones, start=1):
        with pytest.raises(ValueError, match=rf"client {client}"):
            accumulator.add(wrong)
    assert accumulator.count == 1


@pytest.mark.parametrize("weight", ["5", None, 10**400, 1e-100, -1, float("nan")])
def test_a_wrong_weight_names_its_client(weight: object) -> None:
    accumulator = fastagg.Accumulator()
    with pytest.raises((TypeError, ValueError), match=r"weight of client 0"):
        accumulator.add(np.ones(3, np.float32), weight)  # type: ignore[arg-type]


def test_a_client_of_weight_0_fixes_nothing() -> None:
    accumulator = fastagg.Accumulator()
    accumulator.add(np.ones(7, np.float32), 0)
    accumulator.add(np.full(3, 2, np.float32), 1)
    assert np.all(accumulator.result() == 2)


def test_sums_beyond_float64_are_refused() -> None:
    accumulator = fastagg.Accumulator()
    accumulator.add(np.ones(3), 1)
    with pytest.raises(ValueError, match=r"client 1"):
        accumulator.add(np.full(3, 1e308), 1000)
    assert np.all(accumulator.result() == 1)


def test_mappings_of_any_kind_merge() -> None:
    one, other = fastagg.Accumulator(), fastagg.Accumulator()
    one.add({"a": np.ones(3, np.float32)})
    other.add(OrderedDict(a=np.full(3, 3, np.float32)))
    one.merge(other)
    one.merge(pickle.loads(pickle.dumps(other)))
    assert np.allclose(one.result()["a"], 7 / 3)


@pytest.mark.parametrize("low_memory", [False, True])
def test_leaves_are_merged_by_name(low_memory: bool) -> None:
    random = generator(32)
    names = {"a": np.float32, "i": np.int64, "b": np.float64, "c": np.float16}
    updates = [
        {name: np.asarray(random.normal(size=5) * 9).astype(dtype) for name, dtype in names.items()} for _ in "123"
    ]
    reordered = [updates[0], *({name: update[name] for name in "cbia"} for update in updates[1:])]
    totals = []
    for one, *others in (updates, reordered):
        accumulator = fastagg.Accumulator(stats=True, low_memory=low_memory)
        accumulator.add(one, 2)
        other = fastagg.Accumulator(stats=True)
        for update in others:
            other.add(update, 3)
        accumulator.merge(other)
        totals.append(accumulator)
    expected, result = (accumulator.result() for accumulator in totals)
    assert list(result) == list(names)
    for name in names:
        assert_same_bits(result[name], expected[name])
    assert totals[1].statistics.as_dict() == totals[0].statistics.as_dict()
    for other in ({"a": np.ones(5, np.float32)}, {**updates[0], "z": np.ones(1)}, list(updates[0].values())):
        accumulator = fastagg.Accumulator(stats=True)
        accumulator.add(other)
        with pytest.raises(ValueError, match="other: its leaves have other names"):
            totals[0].merge(accumulator)


@by_dtype
def test_low_memory_gives_the_same_bits_from_half_the_memory(backend: Backend, dtype: np.dtype) -> None:
    random = generator(31)
    columns, weights = [normal(random, 333, dtype) for _ in range(5)], counts(random, 5)
    frugal = filled(backend.put_all(columns), weights, low_memory=True, batch=2)
    usual = filled(backend.put_all(columns), weights, batch=np.int64(2))
    assert_same_bits(backend.get(frugal.result()), backend.get(usual.result()))
    for accumulator in (frugal, usual):
        accumulator.merge(filled(backend.put_all(columns), weights))
    assert_same_bits(backend.get(frugal.result()), backend.get(usual.result()))
    assert (frugal._spare is None) == (dtype != np.float64)  # float64 sums can overflow, so they are kept twice
    assert usual._spare is not None


@pytest.mark.parametrize("policy", ["raise", "drop"])
def test_low_memory_is_untouched_by_a_refused_update(backend: Backend, policy: str) -> None:
    good = {"a": np.arange(100, dtype=np.float32), "b": np.arange(3)}
    wrong = {"a": np.where(np.arange(100) == 99, np.inf, 0).astype(np.float32), "b": np.arange(3) + 7}
    put = lambda update: {name: backend.put(x) for name, x in update.items()}  # noqa: E731
    accumulator = fastagg.Accumulator(low_memory=True, nan_policy=policy)
    accumulator.add(put(good), 2)
    before = accumulator.state_dict()["sums"].copy()
    if policy == "raise":
        with pytest.raises(ValueError, match=r"client 1, leaf 'a': holds a NaN"):
            accumulator.add(put(wrong))
    else:
        with pytest.warns(fastagg.DroppedUpdateWarning, match="client 1, leaf 'a'"):
            accumulator.add(put(wrong))
    assert_same_bits(accumulator.state_dict()["sums"], before)
    assert accumulator.count == 1


def test_low_memory_looks_through_only_what_could_spoil_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_through = []
    monkeypatch.setattr(
        "fastagg.averaging.accumulator.nonfinite_leaves",
        lambda inputs, client, stream: looked_through.append(inputs) or [],
    )
    accumulator = fastagg.Accumulator(low_memory=True, batch=3)
    for _ in range(3):
        accumulator.add(np.ones(5, np.float32))
    assert not looked_through  # there was nothing to lose
    for _ in range(3):
        accumulator.add(np.ones(5, np.float32))
    assert len(looked_through) == 3


@pytest.mark.parametrize("policy", ["raise", "drop"])
def test_low_memory_starts_with_a_batch_that_is_refused(backend: Backend, policy: str) -> None:
    good, wrong = np.arange(5, dtype=np.float32), np.array([0, 0, np.nan, 0, 0], np.float32)
    accumulator = fastagg.Accumulator(low_memory=True, nan_policy=policy, batch=2)
    accumulator.add(backend.put(good), 2)
    if policy == "raise":
        with pytest.raises(ValueError, match=r"client 1, the array: holds a NaN"):
            accumulator.add(backend.put(wrong))
    else:
        with pytest.warns(fastagg.DroppedUpdateWarning, match="client 1, the array"):
            accumulator.add(backend.put(wrong))
    accumulator.add(backend.put(good + 3))
    assert_same_bits(backend.get(accumulator.result()), good + 1)
    assert accumulator.count == 2


# Codes and scales that are finite, and values that are not
OVERFLOWING = {
    "int8": np.full(2, 127, np.int8),
    "int4": np.full(1, 0x77, np.uint8),
    "fp8_e4m3": np.full(2, 0x7E, np.uint8),
    "fp8_e5m2": np.full(2, 0x7B, np.uint8),
}


def overflowing(backend: Backend, wire: str, scale: float, dtype: str = "float32") -> fastagg.Quantized:
    """A client whose codes times their scale are infinite in float32."""
    codes, scales = backend.put(OVERFLOWING[wire]), backend.put(np.float32([scale]))
    return fastagg.Quantized(codes, scales, wire=wire, shape=(2,), dtype=dtype, block=256)


def added_up(updates: list[Any], weights: list[float], **options: Any) -> tuple[fastagg.Accumulator, Any]:
    """An accumulator of updates, and its result."""
    accumulator = filled(updates, weights, **options)
    return accumulator, accumulator.result()


@pytest.mark.parametrize("scale", [3e38, 2.0**127])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("wire", OVERFLOWING)
def test_codes_times_a_scale_beyond_float32_are_infinite_everywhere(
    backend: Backend, wire: str, dtype: str, scale: float
) -> None:
    odd = {"w": overflowing(backend, wire, scale, dtype)}
    assert np.isinf(backend.get(fastagg.dequantize(odd["w"])).astype(np.float64)).all()
    good = {"w": backend.put(np.asarray([1, 2], dtype))}
    updates, weights = [odd, *[good] * 4], [1.0, 1000.0, 1000.0, 1000.0, 1000.0]
    for options in ({"batch": 1}, {"batch": 8}, {"low_memory": True}):
        with pytest.warns(fastagg.DroppedUpdateWarning, match="client 0, leaf 'w'"):
            accumulator, result = added_up(updates, weights, nan_policy="drop", **options)
        assert [one.client for one in accumulator.dropped] == [0]
        assert backend.get(result["w"]).tolist() == [1, 2]
        with pytest.raises(ValueError, match="client 0, leaf 'w'"):
            added_up(updates, weights, **options)
        plain = filled(updates, weights, nan_policy="propagate", **options)
        assert np.isposinf(backend.get(plain.result()["w"]).astype(np.float64)).all()
    with pytest.warns(fastagg.DroppedUpdateWarning, match="client 0"):
        result = fastagg.fedavg(updates, weights, nan_policy="drop")
    assert backend.get(result["w"]).tolist() == [1, 2]
    with pytest.raises(ValueError, match="client 0, leaf 'w'"):
        fastagg.fedavg(updates, weights)
    with pytest.raises(ValueError, match="client 0, leaf 'w'"):
        fastagg.robust.median(updates)
    with pytest.raises(ValueError, match="client 0, leaf 'w'"):
        fastagg.robust.geometric_median(updates)


def test_statistics_and_sketches_count_values_beyond_float32(cpu: Backend) -> None:
    updates = [np.ones(2, np.float32)] * 3 + [overflowing(cpu, "int8", 3e38)]
    _, statistics = fastagg.fedavg(updates, nan_policy="propagate", stats=True)
    assert statistics.nonfinite.tolist() == [[0], [0], [0], [2]]
    assert fastagg.outliers.sketch(updates).nonfinite.tolist() == [[0], [0], [0], [2]]
