"""Robust rules on bad input: a clear error, or the answer that the documentation states."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastagg
from data import generator, normal
from fastagg import robust
from reference import assert_same_bits
from robust_reference import assert_rule, median
from robust_rules import (
    COORDINATE_RULES,
    RULES,
    Rule,
    any_number,
    every_coordinate_rule,
    every_distance_rule,
    every_rule,
    every_selecting_rule,
    rows,
    wide,
)

FLOAT32 = np.dtype(np.float32)
CONDITIONAL = {name: rule for name, rule in RULES.items() if rule.least not in (any_number, RULES["fltrust"].least)}
every_rule_with_a_condition = pytest.mark.parametrize("rule", CONDITIONAL.values(), ids=CONDITIONAL.keys())


def clients(count: int, size: int = 20) -> list[np.ndarray]:
    """Honest float32 clients."""
    return list(rows(generator(count), count, size, FLOAT32))


# Numbers of clients


@every_rule_with_a_condition
@pytest.mark.parametrize("f", [0, 1, 2, 5])
def test_too_many_hostile_clients(rule: Rule, f: int) -> None:
    least = rule.least(f)
    rule.rule(clients(least), f)
    if least > 1:
        with pytest.raises(ValueError, match=rf"\b{least}\b.*\b{least - 1}\b"):
            rule.rule(clients(least - 1), f)


@every_coordinate_rule
def test_one_client_is_the_result(rule: Rule) -> None:
    x = clients(1)
    assert_same_bits(rule.rule(x, 0), x[0])


@every_coordinate_rule
def test_two_clients_give_their_mean(rule: Rule) -> None:
    x = clients(2)
    assert_rule(rule.rule(x, 0), wide(x).mean(axis=0), wide(x))


@every_selecting_rule
@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_clients_are_too_few_to_select_from(rule: Rule, count: int) -> None:
    with pytest.raises(ValueError, match=rf"\b3\b.*\b{count}\b"):
        rule.rule(clients(count), 0)


@pytest.mark.parametrize("name", ["geometric_median", "centered_clip", "norm_clip"])
@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_clients_are_weighed(name: str, count: int) -> None:
    x = clients(count)
    assert_rule(RULES[name].rule(x, 0), RULES[name].reference(wide(x), 0), wide(x))


def test_one_client_is_trusted_or_not() -> None:
    x = clients(2)
    assert_rule(robust.fltrust([x[0]], x[0]), wide(x)[0], wide(x))
    assert_rule(robust.fltrust(x[:1], x[1]), RULES["fltrust"].reference(wide(x), 0), wide(x))


@every_rule
def test_no_clients(rule: Rule) -> None:
    if rule is RULES["fltrust"]:
        with pytest.raises(ValueError, match="updates"):
            robust.fltrust([], clients(1)[0])
    else:
        with pytest.raises(ValueError, match="updates"):
            rule.rule([], 0)


@pytest.mark.parametrize("name", CONDITIONAL)
@pytest.mark.parametrize(
    ("f", "error"), [(-1, ValueError), (1.5, TypeError), ("1", TypeError), (None, TypeError), (True, TypeError)]
)
def test_wrong_f(name: str, f: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"\bf\b"):
        CONDITIONAL[name].rule(clients(9), f)


def test_f_may_be_an_integer_of_numpy() -> None:
    x = clients(7)
    assert_same_bits(robust.krum(x, np.int64(1)), robust.krum(x, 1))


# Values that are not finite


@every_rule
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_client_that_is_not_finite_is_named(rule: Rule, value: float) -> None:
    updates = [{"a": row, "b": row.copy()} for row in clients(9)]
    updates[4]["b"][3] = value
    with pytest.raises(fastagg.NonFiniteUpdateError, match=r"client 4, leaf 'b'"):
        rule.rule(updates, 1)


@every_rule
def test_a_dropped_client_leaves_the_rule_of_the_others(rule: Rule) -> None:
    updates = clients(9)
    bad = [row.copy() for row in updates]
    bad[4][3] = np.nan
    with pytest.warns(fastagg.DroppedUpdateWarning, match="client 4 dropped"):
        result = rule.rule(bad, 1, nan_policy="drop")
    others = updates[:4] + updates[5:]
    assert_rule(result, rule.reference(wide(others), 1), wide(others))


@every_rule
def test_a_drop_changes_nothing_where_all_are_finite(rule: Rule) -> None:
    updates = clients(9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_bits(rule.rule(updates, 1, nan_policy="drop"), rule.rule(updates, 1))


@every_rule_with_a_condition
def test_those_who_remain_must_be_enough(rule: Rule) -> None:
    updates = clients(rule.least(2))
    updates[1][0] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fastagg.DroppedUpdateWarning)
        with pytest.raises(ValueError, match=rf"\b{rule.least(2)}\b.*\b{rule.least(2) - 1}\b"):
            rule.rule(updates, 2, nan_policy="drop")


@every_coordinate_rule
def test_not_a_number_sorts_last(rule: Rule) -> None:
    honest = clients(6)
    x = [np.full(20, np.nan, np.float32), *honest]
    as_infinite = np.concatenate([np.full((1, 20), 3e38), wide(honest)])
    result = rule.rule(x, 1, nan_policy="propagate")
    assert_rule(result, rule.reference(as_infinite, 1), wide(honest))


def test_the_median_of_infinities() -> None:
    columns = [np.array([value, value], np.float32) for value in (np.nan, -np.inf, 1.0, 2.0)]
    assert robust.median(columns, nan_policy="propagate").tolist() == [1.5, 1.5]
    assert robust.median([*columns, columns[0]], nan_policy="propagate").tolist() == [2.0, 2.0]
    assert np.isinf(robust.median([columns[0]] * 2 + columns[2:3], nan_policy="propagate")).all()


@every_selecting_rule
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_client_that_is_not_finite_is_never_selected(rule: Rule, value: float) -> None:
    # Flower's legacy Krum and ByzFL's select it.
    x = clients(9)
    for bad in range(9):
        updates = [row.copy() for row in x]
        updates[bad][5] = value
        result = rule.rule(updates, 1, nan_policy="propagate")
        assert np.isfinite(result).all()


def test_krum_with_a_nan_client_chooses_among_the_others() -> None:
    x = wide(clients(9))
    x[4] = np.nan
    distances = np.array([[np.sum((one - other) ** 2) for other in x] for one in x])
    distances[np.isnan(distances)] = np.inf
    scores = [np.sort(np.delete(row, client))[:6].sum() for client, row in enumerate(distances)]
    result = robust.krum(list(x), 1, nan_policy="propagate")
    assert_same_bits(result, x[int(np.argmin(scores))])


@every_distance_rule
def test_a_client_that_is_not_finite_has_no_part(rule: Rule) -> None:
    x = clients(9)
    updates = [row.copy() for row in x]
    updates[0][5] = np.nan
    result = rule.rule(updates, 1, nan_policy="propagate")
    assert np.isfinite(result).all()


@every_rule
def test_nothing_but_nan(rule: Rule) -> None:
    updates = [np.full(20, np.nan, np.float32) for _ in range(9)]
    if rule is RULES["fltrust"]:
        updates[-1] = clients(1)[0]  # the server's own
    with pytest.raises(fastagg.NonFiniteUpdateError, match="client 0"):
        rule.rule(updates, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fastagg.DroppedUpdateWarning)
        with pytest.raises(ValueError, match="client 0, the array; client 1, the array"):
            rule.rule(updates, 1, nan_policy="drop")


@every_coordinate_rule
def test_nothing_but_nan_propagates(rule: Rule) -> None:
    result = rule.rule([np.full(20, np.nan, np.float32)] * 5, 1, nan_policy="propagate")
    assert not np.isfinite(result).any()


@every_distance_rule
def test_nothing_but_nan_leaves_nobody(rule: Rule) -> None:
    updates = [np.full(20, np.nan, np.float32) for _ in range(9)]
    if rule is RULES["fltrust"]:
        updates[-1] = clients(1)[0]
    with pytest.raises(ValueError, match="client"):
        rule.rule(updates, 1, nan_policy="propagate")


@every_rule
def test_an_unknown_policy(rule: Rule) -> None:
    with pytest.raises(ValueError, match=r"nan_policy.*'skip'"):
        rule.rule(clients(9), 1, nan_policy="skip")
    with pytest.raises(ValueError, match=r"integer_policy.*'mean'"):
        rule.rule(clients(9), 1, integer_policy="mean")


# Identical clients, weights of zero, no elements, integers alone


@every_rule
def test_identical_clients(rule: Rule) -> None:
    x = clients(1, 9)[0] / 4  # within the radius of norm_clip
    result = rule.rule([x.copy() for _ in range(9)], 1)
    assert_rule(result, x.astype(np.float64), wide([x]))


@every_rule
def test_all_zeros(rule: Rule) -> None:
    zeros = [np.zeros(20, np.float32) for _ in range(9)]
    assert not rule.rule(zeros, 1).any()


def test_identical_clients_score_zero() -> None:
    x = clients(1)[0]
    assert robust.krum_scores([x] * 5, 1).tolist() == [0.0] * 5


WEIGHTED: dict[str, Callable[..., Any]] = {
    "multi_krum": lambda x, weights: robust.multi_krum(x, 1, weights, m=3),
    "geometric_median": robust.geometric_median,
    "centered_clip": lambda x, weights: robust.centered_clip(x, 3.0, weights),
    "norm_clip": lambda x, weights: robust.norm_clip(x, 3.0, weights),
}
every_weighted_rule = pytest.mark.parametrize("rule", WEIGHTED.values(), ids=WEIGHTED.keys())


@every_weighted_rule
def test_a_client_of_weight_zero_has_no_part(rule: Callable[..., Any]) -> None:
    x = clients(7)
    result = rule(x, [1, 2, 0, 1, 3, 0, 1])
    kept = [client for client in range(7) if client not in (2, 5)]
    assert_rule(result, rule([x[client] for client in kept], [1, 2, 1, 3, 1]).astype(np.float64), wide(x))


@every_weighted_rule
@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([0] * 7, ValueError, "weights: all are zero"),
        ([1] * 6, ValueError, "weights: expected 7"),
        ([1, 1, -1, 1, 1, 1, 1], ValueError, "the weight of client 2"),
        ([1, 1, 1, 1, float("nan"), 1, 1], ValueError, "the weight of client 4"),
        ("1111111", TypeError, "weights"),
    ],
)
def test_wrong_weights(rule: Callable[..., Any], weights: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rule(clients(7), weights)


@every_rule
def test_leaves_without_elements(rule: Rule) -> None:
    result = rule.rule([{"a": row, "none": np.zeros((0, 3), np.float32)} for row in clients(9)], 1)
    assert result["none"].shape == (0, 3)
    assert_same_bits(result["a"], rule.rule(clients(9), 1))


@every_rule
def test_nothing_but_leaves_without_elements(rule: Rule) -> None:
    result = rule.rule([np.zeros((0,), np.float32) for _ in range(9)], 1)
    assert (result.shape, result.dtype) == ((0,), FLOAT32)


@every_coordinate_rule
def test_nothing_but_integers(rule: Rule) -> None:
    result = rule.rule([np.array([3, -5], np.int64)] * 9, 1)
    assert result.dtype == np.int64
    assert result.tolist() == [3, -5]


@every_distance_rule
def test_integers_alone_have_no_distances(rule: Rule) -> None:
    with pytest.raises(ValueError, match="floating leaf"):
        rule.rule([np.array([3, -5], np.int64)] * 9, 1)


# Structures and dtypes


@every_rule
def test_wrong_structures(rule: Rule) -> None:
    x = clients(9)
    for change, error, message in [
        ({"b": x[3]}, ValueError, "client 3: missing leaves 'a'"),
        ({"a": x[3][:-1]}, ValueError, r"client 3, leaf 'a': expected shape \(20,\)"),
        ({"a": x[3].astype(np.float64)}, TypeError, "client 3, leaf 'a': expected dtype float32"),
        ({"a": "text"}, TypeError, "client 3, leaf 'a'"),
        ([x[3]], TypeError, "client 3: expected a mapping"),
    ]:
        updates: list[Any] = [{"a": row} for row in x]
        updates[3] = change
        out = {"a": np.full(20, 7, np.float32)}
        with pytest.raises(error, match=message):
            rule.rule(updates, 1, out=out)
        assert (out["a"] == 7).all()


@every_rule
def test_a_single_mapping_is_no_sequence_of_updates(rule: Rule) -> None:
    if rule is not RULES["fltrust"]:
        with pytest.raises(TypeError, match="updates"):
            rule.rule({"a": clients(1)[0]}, 0)


@every_rule
def test_an_out_that_does_not_fit(rule: Rule) -> None:
    x = clients(9)
    for out, error in [
        (np.zeros(19, np.float32), ValueError),
        (np.zeros(20, np.float64), TypeError),
        ([1.0], TypeError),
    ]:
        with pytest.raises(error, match="out"):
            rule.rule(x, 1, out=out)
    with pytest.raises(ValueError, match="overlap"):
        rule.rule(x, 1, out=x[2])


@every_rule
def test_unsupported_dtypes(rule: Rule) -> None:
    with pytest.raises(TypeError, match=r"client 0.*complex64"):
        rule.rule([np.zeros(3, np.complex64)] * 9, 1)
    with pytest.raises((TypeError, ValueError), match="int32"):
        rule.rule(clients(9), 1, dtype="int32")


# Options of single rules


@pytest.mark.parametrize("rule", [robust.centered_clip, robust.norm_clip])
@pytest.mark.parametrize(
    ("radius", "error"),
    [(0, ValueError), (-1.0, ValueError), (float("nan"), ValueError), ("1", TypeError), (None, TypeError)],
)
def test_wrong_radius(rule: Callable[..., Any], radius: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="radius"):
        rule(clients(5), radius)


@pytest.mark.parametrize(("m", "error"), [(0, ValueError), (8, ValueError), (-1, ValueError), (1.5, TypeError)])
def test_wrong_m(m: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"\bm\b"):
        robust.multi_krum(clients(7), 1, m=m)


@pytest.mark.parametrize("rule", [robust.krum, robust.multi_krum, robust.bulyan, robust.krum_scores])
def test_wrong_convention(rule: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"convention.*paper.*byzfl.*byzantine_momentum.*'flower'"):
        rule(clients(7), 1, convention="flower")


@every_selecting_rule
def test_wrong_keys(rule: Rule) -> None:
    with pytest.raises(ValueError, match=r"keys: expected 7.*6"):
        rule.rule(clients(7), 1, keys=list("abcdef"))
    with pytest.raises(TypeError, match="keys"):
        rule.rule(clients(7), 1, keys=["a", 1, "b", 2, "c", 3, "d"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smoothing": 0.0}, "smoothing"),
        ({"smoothing": -1.0}, "smoothing"),
        ({"smoothing": float("nan")}, "smoothing"),
        ({"iterations": 0}, "iterations"),
        ({"tolerance": -1.0}, "tolerance"),
    ],
)
def test_wrong_options_of_the_geometric_median(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        robust.geometric_median(clients(5), **options)


def test_wrong_iterations_of_centered_clip() -> None:
    with pytest.raises(ValueError, match="iterations"):
        robust.centered_clip(clients(5), 1.0, iterations=0)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x, other: robust.centered_clip(x, 1.0, center=other), "center"),
        (lambda x, other: robust.norm_clip(x, 1.0, reference=other), "reference"),
        (lambda x, other: robust.fltrust(x, other), "trusted"),
        (lambda x, other: robust.fltrust(x, x[0], reference=other), "reference"),
    ],
)
def test_points_beside_the_clients_must_fit_and_be_finite(call: Callable[..., Any], name: str) -> None:
    x = clients(5)
    with pytest.raises(ValueError, match=name):
        call(x, np.zeros(19, np.float32))
    with pytest.raises(ValueError, match=name):
        call(x, np.full(20, np.nan, np.float32))
    with pytest.raises(TypeError, match=name):
        call(x, {"a": x[0]})


def test_fltrust_without_an_update_of_the_servers_own_is_refused() -> None:
    with pytest.raises(TypeError, match="trusted: expected an update of the server's own, got None"):
        robust.fltrust(clients(5), None)


def test_fltrust_without_anyone_to_trust_stays_at_the_reference() -> None:
    trusted, model = normal(generator(1), 20, FLOAT32), normal(generator(2), 20, FLOAT32)
    assert not robust.fltrust([-trusted, -2 * trusted], trusted).any()
    assert_same_bits(robust.fltrust([model - trusted], model + trusted, reference=model), model)


@pytest.mark.parametrize(("size", "error"), [(0, ValueError), (-2, ValueError), (1.5, TypeError)])
def test_wrong_bucket_sizes(size: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="size"):
        robust.bucketing(clients(6), size, seed=1)


def test_a_bucket_needs_a_seed() -> None:
    with pytest.raises(TypeError, match="seed"):
        robust.bucketing(clients(6), 2)


@pytest.mark.parametrize(("f", "error"), [(-1, ValueError), (5, ValueError), (1.5, TypeError)])
def test_wrong_f_of_mixing(f: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"\bf\b"):
        robust.median(robust.nearest_neighbor_mixing(clients(5), f=f))


def test_a_rule_on_too_few_buckets() -> None:
    mixed = robust.bucketing(clients(10), 2, seed=1)
    with pytest.raises(ValueError, match=r"\b7\b.*\b5\b"):
        robust.krum(mixed, 2)


@every_coordinate_rule
def test_a_nan_client_and_mixing(rule: Rule) -> None:
    x = clients(11)
    x[3][:] = np.nan
    with pytest.raises(fastagg.NonFiniteUpdateError, match="client 3"):
        rule.rule(robust.nearest_neighbor_mixing(x, f=2), 2)


def test_ties_at_a_coordinate_keep_the_smaller_value() -> None:
    x = [np.array([value], np.float32) for value in (-1, 0, 1)]
    assert robust.meamed(x, 1).tolist() == [-0.5]
    assert robust.phocas(x, 1).tolist() == [-0.5]


def test_minus_zero_and_zero_are_equal() -> None:
    x = [np.array([value], np.float32) for value in (-0.0, 0.0, 0.0)]
    assert robust.median(x).tolist() == [0.0]
    assert median(wide(x)).tolist() == [0.0]


def test_the_result_names_of_every_rule() -> None:
    assert set(RULES) <= set(robust.__all__)
    assert {"nearest_neighbor_mixing", "bucketing", "MixedUpdates", "squared_distances", "krum_scores"} <= set(
        robust.__all__
    )
    assert set(COORDINATE_RULES) == {"median", "trimmed_mean", "meamed", "phocas"}


def test_the_documented_example(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / "robust.md").read_text()
    names: dict[str, Any] = {}
    exec(compile(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], "docs/robust.md", "exec"), names)
    assert capsys.readouterr().out.count(".") >= 20
    assert abs(float(names["model"]["layer"].mean()) - 1) < 0.02
    scores = robust.krum_scores(names["updates"], f=4)
    assert set(np.argsort(scores)[-4:].tolist()) == {0, 1, 2, 3}


# What has gone wrong once


def test_a_client_beyond_float64s_squares_does_not_spoil_mixtures() -> None:
    updates = [np.full(5, 1e200), *(normal(generator(k), 5, np.dtype(np.float64)) for k in range(1, 10))]
    mixed = robust.nearest_neighbor_mixing(robust.bucketing(updates, 1, seed=1), 1)
    assert np.abs(robust.median(mixed)).max() < 10
    assert np.abs(robust.krum(robust.nearest_neighbor_mixing(updates, 1), 1)).max() < 10
    assert np.abs(robust.krum(robust.bucketing(updates, 2, seed=0), 1)).max() < 10


def test_mixtures_of_finite_updates_whose_sum_overflows() -> None:
    updates = [np.full(4, 1.5e308)] * 3
    assert len(robust.bucketing(updates, 1, seed=0)) == len(robust.nearest_neighbor_mixing(updates, 1)) == 3


@pytest.mark.parametrize("rule", [robust.median, robust.geometric_median])
def test_no_mixtures_are_an_error(rule: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="updates: expected at least one, got none"):
        rule(robust.bucketing(clients(4), 2, seed=0)[:0])


def test_a_mixture_is_asked_for_by_an_integer() -> None:
    with pytest.raises(TypeError, match="integer"):
        robust.bucketing(clients(4), 2, seed=0)[[0, 1]]  # type: ignore[index]


def test_weights_whose_sum_overflows() -> None:
    updates, weights = clients(10), [1e308] * 10
    np.testing.assert_array_equal(robust.multi_krum(updates, 1, weights), robust.multi_krum(updates, 1))
    np.testing.assert_array_equal(robust.geometric_median(updates, weights), robust.geometric_median(updates))


@pytest.mark.parametrize("count", [93, 95, 101, 107, 119])
def test_phocas_keeps_the_smaller_of_two_values_as_far(count: int) -> None:
    assert robust.phocas([np.array([float(client)]) for client in range(count)], 1) == [(count - 2) / 2]


def test_an_integer_beyond_float64_is_copied_where_one_update_is_selected() -> None:
    update = {"weight": np.ones(2), "count": np.array([2**60 + 1])}
    assert robust.krum([update] * 3, 0)["count"] == 2**60 + 1


@pytest.mark.parametrize(
    ("rule", "name"), [(robust.fltrust, "trusted"), (robust.centered_clip, "center"), (robust.norm_clip, "reference")]
)
def test_a_point_beside_the_updates_beyond_float64s_squares(rule: Callable[..., Any], name: str) -> None:
    updates = [client.astype(np.float64) for client in clients(5, 3)]
    arguments = {name: np.full(3, 1e200)} | ({} if rule is robust.fltrust else {"radius": 1.0})
    with pytest.raises(ValueError, match=f"{rule.__name__}: the squared distances of {name} from all updates overflow"):
        rule(updates, **arguments)


def test_what_overlaps_out_is_named() -> None:
    reference = clients(1)[0]
    with pytest.raises(ValueError, match="overlaps reference's"):
        robust.norm_clip(clients(5), 1.0, reference=reference, out=reference)


def test_arguments_that_a_rule_does_not_take() -> None:
    with pytest.raises(TypeError, match="median takes no weights; its options are out, dtype"):
        robust.median(clients(3), weights=[1, 1, 1])  # type: ignore[call-arg]
    for seed, error in ((-1, ValueError), (None, TypeError), ("a", TypeError)):
        with pytest.raises(error, match="seed: expected"):
            robust.bucketing(clients(3), 2, seed=seed)  # type: ignore[arg-type]
    for keys in (5, np.eye(5)):
        with pytest.raises(TypeError, match="keys: expected"):
            robust.krum(clients(5), 1, keys=keys)  # type: ignore[arg-type]
