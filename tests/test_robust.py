"""The robust rules against the reference: every number of clients, size, dtype, structure and backend."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastagg
import robust_reference as expected
from backends import FEW, SMALL, Backend, on_scalar, threads
from data import at_offset, counts, generator, normal, whole
from fastagg import robust
from reference import FLOATS, INTEGERS, assert_same_bits
from robust_reference import assert_rule
from robust_rules import (
    COORDINATE_RULES,
    RULES,
    SELECTING_RULES,
    Rule,
    every_coordinate_rule,
    every_rule,
    most_hostile,
    rows,
    wide,
)

torch = pytest.importorskip("torch")

by_dtype = pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())
FLOAT32 = np.dtype(np.float32)


def check(rule: Rule, x: np.ndarray, f: int) -> np.ndarray:
    """The rule agrees with its reference on a matrix of one client a row."""
    result = rule.rule(list(x), f)
    assert result.dtype == x.dtype
    assert_rule(result, rule.reference(wide(x), f), wide(x))
    return result


# Numbers of clients, sizes, dtypes


@every_rule
def test_every_number_of_clients(rule: Rule) -> None:
    random = generator(1)
    for clients in [*range(rule.least(0), 34), 50, 100]:
        x = rows(random, clients, 37, FLOAT32)
        for f in {0, 1, most_hostile(rule, clients)}:
            if rule.least(f) <= clients:
                check(rule, x, f)


@every_rule
@by_dtype
def test_every_size(rule: Rule, dtype: np.dtype) -> None:
    random = generator(2)
    for size in [*SMALL, 4095, 4097]:
        check(rule, rows(random, 7, size, dtype), 1)


@every_rule
def test_sizes_around_tasks(rule: Rule) -> None:
    random = generator(3)
    for size in (65535, 65537, 2 * 16 * 4096 + 4097):
        check(rule, rows(random, 7, size, FLOAT32), 1)


@every_rule
@by_dtype
def test_many_clients_of_every_dtype(rule: Rule, dtype: np.dtype) -> None:
    x = rows(generator(4), 35, 259, dtype)
    check(rule, x, min(8, most_hostile(rule, 35)))


@every_coordinate_rule
@by_dtype
def test_values_that_often_tie(rule: Rule, dtype: np.dtype) -> None:
    random = generator(5)
    for clients in (3, 4, 7, 10, 16, 33, 64):
        x = random.integers(-2, 3, (clients, 257)).astype(dtype)
        for f in (0, 1, (clients - 1) // 2):
            check(rule, x, f)


@every_coordinate_rule
def test_sorted_and_reversed_clients(rule: Rule) -> None:
    for clients in (2, 5, 10, 31, 32, 33, 100):
        ramp = np.linspace(-1, 1, clients, dtype=np.float32)[:, None] * np.arange(1, 20, dtype=np.float32)
        assert_same_bits(check(rule, ramp, 0), check(rule, ramp[::-1].copy(), 0))


@every_rule
def test_magnitudes_of_every_size(rule: Rule) -> None:
    random = generator(6)
    scale = np.float32(10.0) ** random.integers(-18, 15, 131).astype(np.float32)
    check(rule, rows(random, 11, 131, FLOAT32) * scale, 2)


# Backends


@by_dtype
def test_coordinate_rules_on_every_backend(backend: Backend, dtype: np.dtype) -> None:
    random = generator(7)
    for clients, f, sizes in ((3, 1, FEW), (4, 1, [33]), (10, 3, [257]), (33, 8, [33])):
        for size in sizes:
            x = rows(random, clients, size, dtype)
            updates = backend.put_all(list(x))
            for name in ("median", "trimmed_mean"):
                rule = COORDINATE_RULES[name]
                result = backend.get(rule.rule(updates, f))
                assert_rule(result, rule.reference(wide(x), f), wide(x))
                assert_same_bits(result, on_scalar(lambda rule=rule, x=x, f=f: rule.rule(list(x), f)))


@by_dtype
def test_distances_on_every_backend(backend: Backend, dtype: np.dtype) -> None:
    random = generator(8)
    for clients, sizes in ((1, [3]), (2, FEW), (5, [257]), (10, [33])):
        for size in sizes:
            x = rows(random, clients, size, dtype)
            found = robust.squared_distances(backend.put_all(list(x)))
            np.testing.assert_allclose(found, expected.squared_distances(wide(x)), rtol=1e-12)
            assert_same_bits(found, on_scalar(lambda x=x: robust.squared_distances(list(x))))


@every_rule
@by_dtype
def test_the_same_bits_on_every_instruction_set_and_thread_count(cpu: Backend, rule: Rule, dtype: np.dtype) -> None:
    for clients, size in ((7, 70_001), (35, 4097)):
        x = list(rows(generator(9), clients, size, dtype))
        expected_bits = on_scalar(lambda x=x: rule.rule(x, 1))
        for count in (1, 2, 3):
            with threads(count):
                assert_same_bits(rule.rule(x, 1), expected_bits)


@every_coordinate_rule
@by_dtype
def test_arrays_that_start_anywhere(cpu: Backend, rule: Rule, dtype: np.dtype) -> None:
    random = generator(10)
    for size in (1, 17, 257):
        for offset in range(0, 9, 2):
            x = [at_offset(row, (offset + client) % 9) for client, row in enumerate(rows(random, 5, size, dtype))]
            out = at_offset(np.zeros(size + 2, dtype), offset)
            rule.rule(x, 1, out=out[1:-1])
            assert_same_bits(out[1:-1], on_scalar(lambda x=x: rule.rule(x, 1)))
            assert out[0] == 0, "wrote before the first element"
            assert out[-1] == 0, "wrote behind the last element"


# Structures, libraries, dtypes


def as_mapping(row: np.ndarray) -> dict[str, np.ndarray]:
    """A row as a model of several leaves, one of them without elements and one a scalar."""
    first, rest = row[:12].reshape(3, 4), row[12:]
    return {"weight": first, "empty": row[:0], "scale": rest[:1].reshape(()), "bias": rest[1:]}


def flat(model: dict[str, Any]) -> np.ndarray:
    """The row again."""
    return np.concatenate([np.asarray(leaf).reshape(-1) for leaf in model.values()])


@every_rule
def test_leaves_are_parts_of_one_vector(rule: Rule) -> None:
    x = rows(generator(11), 9, 300, FLOAT32)
    result = rule.rule([as_mapping(row) for row in x], 1)
    assert {name: leaf.shape for name, leaf in result.items()} == {
        name: leaf.shape for name, leaf in as_mapping(x[0]).items()
    }
    assert_rule(flat(result), rule.reference(wide(x), 1), wide(x))


@every_rule
@pytest.mark.parametrize("container", [list, tuple])
def test_sequences(rule: Rule, container: type) -> None:
    x = rows(generator(12), 7, 40, FLOAT32)
    result = rule.rule([container([row[:7], row[7:]]) for row in x], 1)
    assert type(result) is container
    assert_rule(np.concatenate(result), rule.reference(wide(x), 1), wide(x))


@every_rule
def test_state_dicts_of_torch(rule: Rule) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3))
    states = []
    for client in range(7):
        torch.manual_seed(client)
        states.append(
            OrderedDict(
                (name, torch.randn(leaf.shape) if leaf.is_floating_point() else torch.tensor(7))
                for name, leaf in model.state_dict().items()
            )
        )
    result = rule.rule(states, 1)
    assert type(result) is OrderedDict
    model.load_state_dict(result)
    floats = [name for name, leaf in states[0].items() if leaf.is_floating_point()]
    x = np.stack([np.concatenate([state[name].numpy().reshape(-1) for name in floats]) for state in states])
    found = np.concatenate([result[name].numpy().reshape(-1) for name in floats])
    assert_rule(found, rule.reference(wide(x), 1), wide(x))
    assert result["1.num_batches_tracked"].dtype == torch.int64
    if rule not in (RULES["norm_clip"], RULES["fltrust"]):  # which shorten and stretch what all agree on
        assert result["1.num_batches_tracked"] == 7


@every_rule
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_numpy_and_torch_give_the_same_bits(rule: Rule, dtype: Any) -> None:
    x = rows(generator(13), 7, 513, np.dtype(dtype))
    result = rule.rule([torch.from_numpy(row) for row in x], 1)
    assert isinstance(result, torch.Tensor)
    assert_same_bits(result.numpy(), rule.rule(list(x), 1))


@every_rule
def test_bfloat16_of_torch(rule: Rule) -> None:
    x = rows(generator(14), 7, 129, FLOATS["bf16"])
    tensors = [torch.from_numpy(row.view(np.int16)).view(torch.bfloat16) for row in x]
    result = rule.rule(tensors, 1)
    assert result.dtype == torch.bfloat16
    assert_same_bits(result.view(torch.int16).numpy().view(FLOATS["bf16"]), rule.rule(list(x), 1))


@every_rule
@pytest.mark.parametrize("wire", ["fp16", "bf16", "int8", "int4", "fp8_e4m3"])
def test_quantized_leaves(rule: Rule, wire: str) -> None:
    x = rows(generator(15), 7, 600, FLOAT32)
    codes = [fastagg.quantize(row, wire) for row in x]
    decoded = np.stack([fastagg.dequantize(code) for code in codes])
    result = rule.rule([{"a": code} for code in codes], 1)["a"]
    assert result.dtype == np.float32
    assert_rule(result, rule.reference(wide(decoded), 1), wide(decoded))


@every_rule
def test_quantized_leaves_beside_arrays(rule: Rule) -> None:
    x = rows(generator(16), 7, 300, FLOAT32)
    codes = [fastagg.quantize(row, "int8") if client % 2 else row for client, row in enumerate(x)]
    decoded = np.stack([fastagg.dequantize(code) if client % 2 else code for client, code in enumerate(codes)])
    assert_rule(rule.rule(codes, 1), rule.reference(wide(decoded), 1), wide(decoded))


@every_rule
@pytest.mark.parametrize("name", FLOATS)
def test_a_result_of_another_dtype(rule: Rule, name: str) -> None:
    x = rows(generator(17), 7, 65, FLOAT32)
    result = rule.rule(list(x), 1, dtype=FLOATS[name])
    assert result.dtype == FLOATS[name]
    exact = rule.reference(wide(x), 1)
    slack = 1e-6 * np.abs(wide(x)).max(axis=0)
    if name == "fp64":
        assert np.all(np.abs(result - exact) <= slack)
    else:
        expected.assert_rounded_once(result, exact, slack)


@every_rule
def test_clients_of_several_dtypes(rule: Rule) -> None:
    dtypes = [FLOATS[name] for name in ("fp32", "fp16", "fp64", "bf16", "fp32", "fp16", "fp32")]
    random = generator(18)
    model = random.normal(size=130)
    updates = [(model + random.normal(size=130)).astype(dtype) for dtype in dtypes]
    with pytest.raises(TypeError, match=r"client 1.*float16"):
        rule.rule(updates, 1)
    result = rule.rule(updates, 1, dtype="float32")
    assert_rule(result, rule.reference(wide(updates), 1), wide(updates))


@every_rule
def test_memory_of_every_layout(rule: Rule) -> None:
    x = rows(generator(19), 7, 60, FLOAT32)
    strange = [
        np.stack([row, row], axis=1)[:, 0] if client % 2 else row[::-1].copy()[::-1] for client, row in enumerate(x)
    ]
    assert_same_bits(rule.rule(strange, 1), rule.rule(list(x), 1))


@every_rule
def test_out_is_written_and_returned(rule: Rule) -> None:
    x = rows(generator(20), 7, 100, FLOAT32)
    models = [as_mapping(row) for row in x]
    out = {name: np.full_like(leaf, 9) for name, leaf in models[0].items()}
    assert rule.rule(models, 1, out=out) is out
    fresh = rule.rule(models, 1)
    for name, leaf in out.items():
        assert_same_bits(leaf, fresh[name])


@every_rule
def test_the_inputs_are_left_alone(rule: Rule) -> None:
    x = rows(generator(21), 7, 100, FLOAT32)
    before = x.copy()
    result = rule.rule(list(x), 1)
    result += 1  # no part of the result is a client's memory, Krum's choice included
    assert_same_bits(x, before)


@every_rule
def test_a_generator_of_updates(rule: Rule) -> None:
    x = rows(generator(22), 7, 50, FLOAT32)
    if rule is RULES["fltrust"]:
        result = robust.fltrust((row for row in x[:-1]), x[-1])
    else:
        result = rule.rule((row for row in x), 1)
    assert_same_bits(result, rule.rule(list(x), 1))


# Integer leaves


def with_integers(x: np.ndarray, integers: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Clients that send both."""
    return [{"a": row, "steps": steps} for row, steps in zip(x, integers, strict=True)]


@every_rule
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers_are_rounded_by_the_rule_itself(rule: Rule, dtype: np.dtype) -> None:
    random = generator(23)
    x, integers = (
        rows(random, 7, 40, FLOAT32),
        whole(random, (7, 19), np.dtype(np.int8 if dtype.kind == "i" else np.uint8)),
    )
    integers = integers.astype(dtype)
    result = rule.rule(with_integers(x, integers), 1, integer_policy="round")
    assert result["steps"].dtype == dtype
    exact = of_integers(rule, wide(x), integers.astype(np.float64))
    assert np.all(np.abs(result["steps"].astype(np.float64) - exact) <= 0.5 + 1e-6 * 255)
    alone = rule.rule(list(x), 1)
    assert_same_bits(result["a"], alone)  # integers do not count in distances


def of_integers(rule: Rule, x: np.ndarray, integers: np.ndarray) -> np.ndarray:
    """A rule's value on integers: of a coordinate rule its own, else what the clients' floats make of it."""
    if rule in COORDINATE_RULES.values():
        return rule.reference(integers, 1)
    if rule is SELECTING_RULES["bulyan"]:
        chosen = integers[expected.bulyan_selection(x, 1)]
        return expected.mean_near(chosen, expected.median(chosen), len(chosen) - 2)
    if rule in SELECTING_RULES.values():
        best = expected.ranking(x, 1)[: 1 if rule is SELECTING_RULES["krum"] else len(x) - 1]
        return integers[best].mean(axis=0)
    return share_of_each(rule, x) @ integers


def share_of_each(rule: Rule, x: np.ndarray) -> np.ndarray:
    """How much of every client (the server included, for fltrust) is in a result that lies in the span of them."""
    shares, _, _, _ = np.linalg.lstsq(x.T, rule.reference(x, 1), rcond=None)
    return shares


@every_rule
def test_bools_are_voted_on(rule: Rule) -> None:
    random = generator(24)
    x, bools = rows(random, 7, 40, FLOAT32), np.tile(random.integers(0, 2, 9).astype(bool), (7, 1))
    for policy in ("round", "max", "first"):
        result = rule.rule(with_integers(x, bools), 1, integer_policy=policy)["steps"]
        assert result.dtype == np.bool_
        if policy != "round" or rule is not RULES["norm_clip"]:  # which draws towards zero
            assert_same_bits(result, bools[0])


def test_the_median_of_integers_is_rounded_to_even() -> None:
    columns = [np.array(values, np.int32) for values in ([1, 3, -7], [2, 4, 5], [9, 9, 9], [0, 0, -9])]
    assert robust.median(columns).tolist() == [2, 4, -1]  # of 1.5, 3.5 and -1


def test_integers_are_exact_as_far_as_float64_is() -> None:
    values = [2**53 - 1, 2**53 - 5, 2**53 - 9]
    columns = [np.array([value], np.int64) for value in values]
    assert robust.median(columns).tolist() == [2**53 - 5]


@every_coordinate_rule
@pytest.mark.parametrize("policy", ["max", "first"])
def test_integer_policies(rule: Rule, policy: str) -> None:
    random = generator(25)
    x, integers = rows(random, 7, 40, FLOAT32), whole(random, (7, 19), np.dtype(np.int16))
    result = rule.rule(with_integers(x, integers), 1, integer_policy=policy)
    assert_same_bits(result["steps"], integers.max(axis=0) if policy == "max" else integers[0])


@pytest.mark.parametrize("policy", ["max", "first"])
def test_integer_policies_look_at_those_selected(policy: str) -> None:
    random = generator(41)
    x, integers = rows(random, 11, 40, FLOAT32), whole(random, (11, 19), np.dtype(np.int16))
    models = with_integers(x, integers)
    selections = {
        "krum": expected.ranking(wide(x), 2)[:1],
        "multi_krum": expected.ranking(wide(x), 2)[:9],
        "bulyan": expected.bulyan_selection(wide(x), 2),
    }
    for name, selected in selections.items():
        chosen = integers[sorted(selected)]
        result = RULES[name].rule(models, 2, integer_policy=policy)
        assert_same_bits(result["steps"], chosen.max(axis=0) if policy == "max" else chosen[0])


# Pre-aggregations


@every_rule
def test_nearest_neighbor_mixing_before_every_rule(rule: Rule) -> None:
    x = rows(generator(26), 11, 75, FLOAT32)
    mixed = robust.nearest_neighbor_mixing(list(x), f=2)
    exact = expected.nearest_neighbor_mixing(wide(x), 2)
    if rule is RULES["fltrust"]:
        result, reference = robust.fltrust(mixed, x[0]), expected.fltrust(exact, wide(x)[0])
    else:
        result, reference = rule.rule(mixed, 2), rule.reference(exact, 2)
    assert result.dtype == np.float32
    assert_rule(result, reference, wide(x))


@every_rule
def test_bucketing_before_every_rule(rule: Rule) -> None:
    x = rows(generator(27), 21, 75, FLOAT32)
    buckets = buckets_of(21, 2, seed=5)
    mixed = robust.bucketing(list(x), 2, seed=5)
    exact = np.array([wide(x)[bucket].mean(axis=0) for bucket in buckets])
    if rule is RULES["fltrust"]:
        result, reference = robust.fltrust(mixed, x[0]), expected.fltrust(exact, wide(x)[0])
    else:
        result, reference = rule.rule(mixed, 2), rule.reference(exact, 2)
    assert_rule(result, reference, wide(x))


def buckets_of(clients: int, size: int, seed: int) -> list[list[int]]:
    """Which clients are in which bucket: every client sends a vector that shows its number."""
    mixed = robust.bucketing(list(np.eye(clients, dtype=np.float32)), size, seed=seed)
    return [np.flatnonzero(np.asarray(mixed[bucket])).tolist() for bucket in range(len(mixed))]


@pytest.mark.parametrize(("clients", "size"), [(1, 1), (6, 2), (7, 2), (7, 3), (10, 1), (4, 9)])
def test_every_client_is_in_one_bucket(clients: int, size: int) -> None:
    buckets = buckets_of(clients, size, seed=1)
    assert sorted(client for bucket in buckets for client in bucket) == list(range(clients))
    full, rest = divmod(clients, size)
    assert sorted(map(len, buckets)) == sorted([size] * full + [rest] * (rest > 0))


def test_buckets_depend_on_the_seed_alone() -> None:
    assert buckets_of(20, 2, seed=1) == buckets_of(20, 2, seed=1)
    assert len({str(buckets_of(20, 2, seed=seed)) for seed in range(20)}) == 20


def test_clients_meet_in_buckets_at_random() -> None:
    together = [any({0, 1} == set(bucket) for bucket in buckets_of(6, 2, seed=seed)) for seed in range(500)]
    assert 0.14 < np.mean(together) < 0.26  # 1 in 5


def test_mixed_updates_can_be_looked_at() -> None:
    x = rows(generator(28), 9, 40, FLOAT32)
    mixed = robust.nearest_neighbor_mixing([as_mapping(row) for row in x], f=2)
    exact = expected.nearest_neighbor_mixing(wide(x), 2)
    assert isinstance(mixed, robust.MixedUpdates)
    assert len(mixed) == 9
    for client, update in enumerate(mixed):
        assert list(update) == list(as_mapping(x[0]))
        assert_rule(flat(update), exact[client], wide(x))
    assert_rule(flat(mixed[-1]), exact[-1], wide(x))
    with pytest.raises(IndexError):
        mixed[9]


def test_mixing_twice() -> None:
    x = rows(generator(29), 12, 40, FLOAT32)
    twice = robust.nearest_neighbor_mixing(robust.bucketing(list(x), 2, seed=3), f=1)
    buckets = np.array([wide(x)[bucket].mean(axis=0) for bucket in buckets_of(12, 2, seed=3)])
    exact = expected.median(expected.nearest_neighbor_mixing(buckets, 1))
    assert_rule(robust.median(twice), exact, wide(x))


# Properties

seeds = st.integers(0, 2**32 - 1)
few_clients = st.integers(1, 24)
settings.register_profile("robust", deadline=None, max_examples=60, derandomize=True)
by_hypothesis = settings(settings.get_profile("robust"))


@by_hypothesis
@given(seeds, few_clients, st.integers(0, 300), st.sampled_from(list(FLOATS.values())))
def test_the_median_lies_between_the_clients(seed: int, clients: int, size: int, dtype: np.dtype) -> None:
    x = normal(generator(seed), (clients, size), dtype)
    result = robust.median(list(x))
    assert np.all((x.min(axis=0) <= result) & (result <= x.max(axis=0)))


@by_hypothesis
@given(seeds, few_clients, st.integers(0, 300))
def test_no_cut_is_the_mean(seed: int, clients: int, size: int) -> None:
    x = normal(generator(seed), (clients, size), FLOAT32)
    for rule in (robust.trimmed_mean, robust.meamed, robust.phocas):
        assert_rule(rule(list(x), 0), wide(x).mean(axis=0), wide(x))


@by_hypothesis
@given(seeds, st.integers(7, 24), st.sampled_from(list(FLOATS)), st.sampled_from(list(RULES)))
def test_identical_clients_are_returned(seed: int, clients: int, dtype: str, name: str) -> None:
    x = np.tile(normal(generator(seed), 20, FLOATS[dtype]), (clients, 1))
    if name == "norm_clip":  # which shortens all of them alike
        x = (x / np.asarray(8, x.dtype)).astype(x.dtype)
    assert_same_bits(RULES[name].rule(list(x), 1), x[0])


@every_rule
def test_identical_fp64_clients_are_returned_also_through_mixtures(rule: Rule) -> None:
    x = np.tile(np.append(normal(generator(7), 30, np.dtype(np.float64)) / 8, [0.1, 1 / 3, -7.0]) / 8, (12, 1))
    for updates in (
        list(x),
        robust.bucketing(list(x), 3, seed=1),
        robust.nearest_neighbor_mixing(list(x), f=2),
    ):
        if rule is RULES["fltrust"] and not isinstance(updates, list):
            continue  # its last update is the server's own
        f = most_hostile(rule, 4 if not isinstance(updates, list) else 12)
        assert_same_bits(rule.rule(updates, f), x[0])


@every_coordinate_rule
def test_windows_of_huge_fp64_values_stay_finite(rule: Rule) -> None:
    largest, smallest = np.finfo(np.float64).max, np.finfo(np.float64).smallest_subnormal
    x = np.tile([largest, -largest, smallest, 1e308], (10, 1))
    assert_same_bits(rule.rule(list(x), 2), x[0])


@by_hypothesis
@given(seeds, st.integers(1, 6), st.integers(0, 10), st.sampled_from(list(COORDINATE_RULES)), st.integers(-30, 30))
def test_hostile_values_stay_within_the_honest(seed: int, f: int, more: int, name: str, exponent: int) -> None:
    random = generator(seed)
    honest = normal(random, (f + 1 + more, 50), FLOAT32)
    hostile = normal(random, (f, 50), FLOAT32) * np.float32(10.0**exponent)
    x = random.permutation(np.concatenate([honest, hostile]))
    result = COORDINATE_RULES[name].rule(list(x), f)
    if name in ("median", "trimmed_mean"):
        assert np.all((honest.min(axis=0) <= result) & (result <= honest.max(axis=0)))
    else:  # a hostile value may be among the nearest, but no further out than the honest are apart
        spread = honest.max(axis=0) - honest.min(axis=0)
        assert np.all((honest.min(axis=0) - spread <= result) & (result <= honest.max(axis=0) + spread))


@by_hypothesis
@given(seeds, st.integers(7, 20), st.sampled_from(sorted(set(RULES) - {"fltrust", "bulyan"})))
def test_the_order_of_clients_does_not_matter(seed: int, clients: int, name: str) -> None:
    # Not Bulyan's: of its last clients two are each other's nearest, and have the same score.
    random = generator(seed)
    x = rows(random, clients, 30, FLOAT32)
    shuffled = x[random.permutation(clients)]
    one, other = (RULES[name].rule(list(order), 1) for order in (x, shuffled))
    if name in ("median", "krum"):
        assert_same_bits(one, other)
    assert_rule(other, one.astype(np.float64), wide(x))


@by_hypothesis
@given(
    seeds,
    st.integers(7, 15),
    st.floats(-4, 4),
    st.sampled_from([name for name in RULES if name not in ("norm_clip", "fltrust")]),
)
def test_a_shift_of_all_clients_shifts_the_result(seed: int, clients: int, shift: float, name: str) -> None:
    x = rows(generator(seed), clients, 30, FLOATS["fp64"])
    shifted = RULES[name].rule(list(x + shift), 1)
    assert np.allclose(shifted, RULES[name].rule(list(x), 1) + shift, rtol=1e-9, atol=1e-9)


# Options of single rules


def test_weights_of_multi_krum() -> None:
    random = generator(30)
    x, weights = rows(random, 11, 50, FLOAT32), counts(random, 11)
    for m in (1, 3, 9, 11):
        result = robust.multi_krum(list(x), 2, weights, m=m)
        assert_rule(result, expected.multi_krum(wide(x), 2, weights, m), wide(x))


@pytest.mark.parametrize("clients", [2, 5, 20, 60])
def test_weights_of_the_geometric_median(clients: int) -> None:
    random = generator(31)
    x, weights = rows(random, clients, 50, FLOAT32), counts(random, clients)
    assert_rule(robust.geometric_median(list(x), weights), expected.geometric_median(wide(x), weights), wide(x))


def test_the_geometric_median_has_the_least_sum_of_distances() -> None:
    # An iteration that compounds its weights ends at 7.162 here.
    corners = np.array([[0.0, 0.0], [4.0, 0.0], [1.0, 3.0]])

    def objective(point: np.ndarray) -> float:
        return float(np.linalg.norm(corners - point, axis=1).sum())

    found = robust.geometric_median(list(corners))
    assert objective(found) == pytest.approx(6.54099, abs=1e-5)
    for step in ([1e-3, 0], [-1e-3, 0], [0, 1e-3], [0, -1e-3]):
        assert objective(found + step) > objective(found)


def test_the_geometric_median_ends_at_a_client_that_outweighs_all() -> None:
    x = np.array([[1.0, 2.0], [5.0, -3.0], [-4.0, 8.0]])
    assert np.allclose(robust.geometric_median(list(x), [10, 1, 2]), x[0], atol=1e-6)


@pytest.mark.parametrize("iterations", [1, 2, 7])
def test_iterations_of_the_geometric_median(iterations: int) -> None:
    x = rows(generator(32), 9, 20, FLOATS["fp64"])
    result = robust.geometric_median(list(x), iterations=iterations)
    assert_rule(result, expected.geometric_median(x, iterations=iterations), x)


def test_smoothing_of_the_geometric_median() -> None:
    x = rows(generator(33), 9, 20, FLOATS["fp64"])
    for smoothing in (1e-12, 1.0, 5.0, 1e6):
        result = robust.geometric_median(list(x), smoothing=smoothing)
        assert_rule(result, expected.geometric_median(x, smoothing=smoothing), x)
    assert np.allclose(robust.geometric_median(list(x), smoothing=1e6), x.mean(axis=0))


@pytest.mark.parametrize("radius", [1e-3, 0.5, 5.0, 1e6])
def test_centered_clip_around_a_given_center(radius: float) -> None:
    random = generator(34)
    x, weights = rows(random, 9, 40, FLOAT32), counts(random, 9)
    center = normal(random, 40, FLOAT32)
    for iterations in (1, 3, 20):
        result = robust.centered_clip(list(x), radius, weights, center=center, iterations=iterations)
        exact = expected.centered_clip(wide(x), radius, weights, center.astype(np.float64), iterations)
        assert_rule(result, exact, np.concatenate([wide(x), center[None].astype(np.float64)]))


def test_centered_clip_with_weights_from_the_mean_on() -> None:
    random = generator(35)
    x, weights = rows(random, 9, 40, FLOAT32), counts(random, 9)
    assert_rule(robust.centered_clip(list(x), 2.0, weights), expected.centered_clip(wide(x), 2.0, weights), wide(x))


@pytest.mark.parametrize("radius", [1e-3, 0.5, 5.0, 1e6])
def test_norm_clip_around_a_reference(radius: float) -> None:
    random = generator(36)
    x, weights = rows(random, 9, 40, FLOAT32), counts(random, 9)
    model = normal(random, 40, FLOAT32)
    result = robust.norm_clip(list(x), radius, weights, reference=model)
    exact = expected.norm_clip(wide(x), radius, weights, model.astype(np.float64))
    assert_rule(result, exact, np.concatenate([wide(x), model[None].astype(np.float64)]))


def test_a_large_radius_clips_nothing() -> None:
    x = rows(generator(37), 9, 40, FLOAT32)
    for rule in (robust.norm_clip, robust.centered_clip):
        assert_rule(rule(list(x), 1e9), wide(x).mean(axis=0), wide(x))


def test_fltrust_around_a_reference() -> None:
    random = generator(38)
    x, model = rows(random, 9, 40, FLOAT32), normal(random, 40, FLOAT32)
    trusted = (x.mean(axis=0) + normal(random, 40, FLOAT32)).astype(np.float32)
    as_models = [as_mapping(row) for row in x]
    result = flat(robust.fltrust(as_models, as_mapping(trusted), reference=as_mapping(model)))
    exact = expected.fltrust(wide(x), trusted.astype(np.float64), model.astype(np.float64))
    assert_rule(result, exact, np.concatenate([wide(x), wide([trusted, model])]))


def test_fltrust_gives_no_trust_to_what_points_away() -> None:
    random = generator(39)
    trusted = normal(random, 40, FLOAT32)
    honest = [trusted + normal(random, 40, FLOAT32) / 4 for _ in range(3)]
    away = [-1e6 * trusted, -trusted]
    assert_rule(
        robust.fltrust([*honest, *away], trusted),
        expected.fltrust(wide(honest), trusted.astype(np.float64)),
        wide(honest),
    )


@pytest.mark.parametrize("name", ["paper", "byzfl", "byzantine_momentum"])
def test_conventions_of_krum(name: str) -> None:
    for seed in range(20):
        x = rows(generator(seed), 9, 12, FLOAT32)
        for f in (0, 1, 3):
            scores = robust.krum_scores(list(x), f, name)
            assert scores.dtype == np.float64
            np.testing.assert_allclose(scores, expected.krum_scores(wide(x), f, name), rtol=1e-12)
            assert_same_bits(robust.krum(list(x), f, convention=name), x[scores.argmin()])
            exact = expected.multi_krum(wide(x), f, convention=name)
            assert_rule(robust.multi_krum(list(x), f, convention=name), exact, wide(x))
        exact = expected.bulyan(wide(x), 1, name)
        assert_rule(robust.bulyan(list(x), 1, convention=name), exact, wide(x))


def test_conventions_choose_differently() -> None:
    choices = []
    for seed in range(100):
        x = rows(generator(seed), 7, 3, FLOAT32)
        conventions = ("paper", "byzfl", "byzantine_momentum")
        choices.append(tuple(robust.krum(list(x), 1, convention=name).tobytes() for name in conventions))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert 0 < sum(choice[one] != choice[other] for choice in choices) < 60


def test_ties_of_krum_go_to_the_smallest_key() -> None:
    # Three pairs, mirrored at zero: all six have the same score.
    corners = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]], np.float32)
    assert_same_bits(robust.krum(list(corners), 1), corners[0])
    for keys in (["f", "e", "d", "c", "b", "a"], [5, 4, 3, 2, 1, 0], [9.0, 8.5, 7, 3, 2.5, 2]):
        assert_same_bits(robust.krum(list(corners), 1, keys=keys), corners[5])
    keys = ["d", "a", "e", "b", "f", "c"]
    best = robust.multi_krum(list(corners), 1, m=3, keys=keys)
    assert_rule(best, corners[[1, 3, 5]].astype(np.float64).mean(axis=0), corners.astype(np.float64))


def test_with_keys_the_order_of_arrival_does_not_matter() -> None:
    random = generator(40)
    x = random.integers(-1, 2, (11, 3)).astype(np.float32)  # equal scores and equal clients
    names = [f"client {number:02}" for number in range(11)]
    for name, rule in SELECTING_RULES.items():
        first = rule.rule(list(x), 2, keys=names)
        for _ in range(10):
            order = random.permutation(11)
            again = rule.rule(list(x[order]), 2, keys=[names[client] for client in order])
            assert_rule(again, first.astype(np.float64), wide(x)) if name == "multi_krum" else assert_same_bits(
                again, first
            )


def test_bulyan_scores_those_who_are_left_anew() -> None:
    for seed in range(20):
        x = rows(generator(seed), 15, 6, FLOAT32)
        assert_rule(robust.bulyan(list(x), 3), expected.bulyan(wide(x), 3), wide(x))


# Flower


def test_flower_agrees() -> None:
    aggregate = pytest.importorskip("flwr.server.strategy.aggregate")
    for seed in range(5):
        x = rows(generator(seed), 11, 64, FLOATS["fp64"])
        layers = [[row[:40], row[40:]] for row in x]
        weights = [int(weight) for weight in counts(generator(seed), 11)]
        results = list(zip(layers, weights, strict=True))
        pairs: list[tuple[Any, Callable[[], Any]]] = [
            (robust.median(layers), lambda r=results: aggregate.aggregate_median(r)),
            (robust.trimmed_mean(layers, 2), lambda r=results: aggregate.aggregate_trimmed_avg(r, 2.5 / 11)),
            (robust.krum(layers, 2), lambda r=results: aggregate.aggregate_krum(r, 2, 0)),
            (robust.multi_krum(layers, 2, weights, m=5), lambda r=results: aggregate.aggregate_krum(r, 2, 5)),
            (
                robust.bulyan(layers, 2),
                lambda r=results: aggregate.aggregate_bulyan(list(r), 2, aggregate.aggregate_krum, to_keep=0),
            ),
        ]
        for ours, theirs in pairs:
            assert np.allclose(np.concatenate(ours), np.concatenate(theirs()), rtol=1e-12, atol=1e-12)
