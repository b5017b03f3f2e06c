"""Distances under stress: late training, hostile magnitudes, and the attacks of the papers."""

from __future__ import annotations

import math
from itertools import combinations

import attacks
import numpy as np
import pytest

import robust_reference as expected
from data import generator
from fastagg import robust
from reference import assert_same_bits
from robust_reference import assert_rule
from robust_rules import COORDINATE_RULES, RULES, Rule, every_distance_rule, every_rule, rows, wide

TRIALS = 1000
FLOAT32 = np.dtype(np.float32)


def late_training(seed: int, clients: int, size: int, weight: float, update: float) -> np.ndarray:
    """Models that share large weights and differ by small updates."""
    random = generator(seed)
    model = random.normal(scale=weight, size=size)
    return (model + random.normal(scale=update, size=(clients, size))).astype(np.float32)


def exact_squared_distances(x: np.ndarray) -> np.ndarray:
    """float32 clients' differences and their sums, without an error but that of each square."""
    distances = np.zeros((len(x), len(x)))
    for one, other in combinations(range(len(x)), 2):
        difference = x[one].astype(np.float64) - x[other].astype(np.float64)
        distances[one, other] = distances[other, one] = math.fsum(difference * difference)
    return distances


def exact_scores(distances: np.ndarray, f: int) -> list[float]:
    """Krum's scores by the paper."""
    nearest = len(distances) - f - 2
    return [math.fsum(sorted(np.delete(row, client))[:nearest]) for client, row in enumerate(distances)]


@pytest.mark.parametrize(("weight", "update"), [(10.0, 1e-3), (10.0, 1e-4), (0.05, 1e-4)])
def test_krum_selects_as_exact_arithmetic_does(weight: float, update: float) -> None:
    differing = 0
    for trial in range(TRIALS):
        x = late_training(trial, 8, 48, weight, update)
        best = int(np.argmin(exact_scores(exact_squared_distances(x), 2)))
        differing += robust.krum(list(x), 2).tobytes() != x[best].tobytes()
    assert differing == 0, f"{differing} of {TRIALS} trials select another client"


def test_multi_krum_selects_as_exact_arithmetic_does() -> None:
    for trial in range(TRIALS):
        x = late_training(trial, 10, 32, 10.0, 1e-3)
        best = np.argsort(exact_scores(exact_squared_distances(x), 2), kind="stable")[:4]
        result = robust.multi_krum(list(x), 2, m=4, dtype="float64")
        assert np.abs(result - wide(x)[best].mean(axis=0)).max() < 1e-6  # clients are 1e-3 apart


@pytest.mark.parametrize("size", [1, 17, 4097, 70_001])
def test_distances_of_late_training(size: int) -> None:
    x = late_training(size, 6, size, 10.0, 1e-3)
    np.testing.assert_allclose(robust.squared_distances(list(x)), exact_squared_distances(x), rtol=1e-13)


def test_distances_are_symmetric_and_zero_to_oneself() -> None:
    x = rows(generator(1), 12, 999, FLOAT32)
    found = robust.squared_distances(list(x))
    assert (found.shape, found.dtype) == ((12, 12), np.float64)
    assert np.array_equal(found, found.T)
    assert not found.diagonal().any()


def test_distances_of_identical_clients_are_zero() -> None:
    x = rows(generator(2), 1, 999, FLOAT32)[0]
    assert not robust.squared_distances([x, x.copy(), x]).any()


def test_distances_beyond_float32() -> None:
    x = np.array([[3e38, -3e38], [-3e38, 3e38], [1e-38, 2e-38]], np.float32)
    np.testing.assert_allclose(robust.squared_distances(list(x)), exact_squared_distances(x), rtol=1e-13)


def test_the_distance_to_a_client_that_is_not_finite_is_not_finite() -> None:
    x = rows(generator(3), 5, 40, FLOAT32)
    for value in (np.nan, np.inf, -np.inf):
        bad = x.copy()
        bad[2, 7] = value
        found = robust.squared_distances(list(bad))
        others = [0, 1, 3, 4]
        assert not np.isfinite(found[2, others]).any()
        assert not np.isfinite(found[others, 2]).any()
        np.testing.assert_allclose(
            found[np.ix_(others, others)], expected.squared_distances(wide(x[others])), rtol=1e-12
        )


# Hostile magnitudes


@every_distance_rule
@pytest.mark.parametrize("magnitude", [1e3, 1e6, 1e9, 1e10])
def test_hostile_clients_far_away(rule: Rule, magnitude: float) -> None:
    x = rows(generator(4), 11, 60, FLOAT32)
    x[:2] *= np.float32(magnitude)
    # From the mean on, which they carry away, five steps do not bring centered_clip back.
    measure = wide(x) if rule is RULES["centered_clip"] else wide(x[2:])
    assert_rule(rule.rule(list(x), 2), rule.reference(wide(x), 2), measure)


@pytest.mark.parametrize("name", sorted(set(RULES) - {"centered_clip"}))
@pytest.mark.parametrize("magnitude", [1e12, 1e15, 1e18, 1e25, 1e30])
def test_hostile_clients_as_far_away_as_can_be(name: str, magnitude: float) -> None:
    # Distances' squares are up to 1e60 apart, where float64 has 1e16: what hostile clients add must stay small.
    x = rows(generator(4), 11, 60, FLOAT32)
    without = RULES[name].rule(list(x[2:]), 0 if name == "bulyan" else 1)
    x[:2] *= np.float32(magnitude)
    result = RULES[name].rule(list(x), 2)
    assert np.linalg.norm(result - without) <= 1.5 * np.linalg.norm(x[2:] - without, axis=1).mean()


@every_distance_rule
def test_float64_clients_whose_distances_overflow(rule: Rule) -> None:
    x = rows(generator(14), 11, 60, np.dtype(np.float64))
    honest = x[2:].copy()
    x[:2] *= 1e200
    result = rule.rule(list(x), 2)
    if rule is not RULES["centered_clip"]:  # which starts from the mean
        assert np.abs(result).max() <= 2 * np.abs(honest).max()
    assert np.isfinite(result).all()


@pytest.mark.parametrize("magnitude", [1e3, 1e6, 1e10])
def test_centered_clip_comes_back_from_far_away(magnitude: float) -> None:
    x = rows(generator(5), 11, 60, FLOAT32)
    x[0] *= np.float32(magnitude)
    center = np.zeros(60, np.float32)
    result = robust.centered_clip(list(x), 5.0, center=center, iterations=10)
    assert_rule(result, expected.centered_clip(wide(x), 5.0, center=wide([center])[0], iterations=10), wide(x[1:]))


def test_the_geometric_median_of_late_training() -> None:
    x = late_training(6, 9, 200, 10.0, 1e-3)
    exact = expected.geometric_median(wide(x))
    result = robust.geometric_median(list(x), dtype="float64")
    assert np.abs(result - exact).max() < 1e-6 * 1e-3  # relative to the updates, not to the weights


def test_centered_clip_of_late_training() -> None:
    x = late_training(7, 9, 200, 10.0, 1e-3)
    result = robust.centered_clip(list(x), 0.01, dtype="float64")
    assert np.abs(result - expected.centered_clip(wide(x), 0.01)).max() < 1e-6 * 1e-3


@pytest.mark.parametrize("clients", [3, 5, 11, 39])
def test_in_one_dimension_the_geometric_median_is_the_median(clients: int) -> None:
    # Weiszfeld's iteration is at its slowest there.
    for seed in range(20):
        random = generator(seed)
        x, weights = random.normal(size=(clients, 1)), random.integers(1, 50, clients)
        weights[0] += 1 - weights.sum() % 2  # an odd sum: the median is one of the values
        exact = np.median(np.repeat(x, weights))
        assert abs(robust.geometric_median(list(x), weights) - exact) < 2e-6 * np.abs(x).max()


@pytest.mark.parametrize("dimensions", [2, 3])
def test_no_neighbour_of_the_geometric_median_is_better(dimensions: int) -> None:
    def objective(v: np.ndarray) -> float:
        return float(weights @ np.linalg.norm(x - v, axis=1))

    for seed in range(30):
        random = generator(seed)
        x, weights = random.normal(size=(12, dimensions)), random.integers(1, 50, 12).astype(np.float64)
        x[:4] *= -20
        found = robust.geometric_median(list(x), weights)
        for step in 1e-3 * np.vstack([np.eye(dimensions), -np.eye(dimensions)]):
            assert objective(found) < objective(found + step)


def test_a_majority_of_identical_clients_is_the_geometric_median() -> None:
    random = generator(8)
    same, others = rows(random, 1, 50, FLOAT32), rows(random, 4, 50, FLOAT32)
    result = robust.geometric_median([*np.repeat(same, 5, axis=0), *others])
    assert_rule(result, same[0].astype(np.float64), wide(same))


@pytest.mark.parametrize("magnitude", [1.0, 1e3, 1e9])
def test_distances_of_many_mixtures(magnitude: float) -> None:
    x = generator(12).normal(size=(300, 10))
    x[:20] *= magnitude
    for mixed in (robust.nearest_neighbor_mixing(list(x), 5), robust.nearest_neighbor_mixing(list(x), 30)):
        exact = np.array([(((row - mixed.mixing) @ x) ** 2).sum(axis=1) for row in mixed.mixing])
        found = robust.squared_distances(mixed)
        assert not found[exact == 0].any()
        near = exact < 1e3  # what the far ones have no part in, or the same
        np.testing.assert_allclose(found[near], exact[near], rtol=1e-6)


@pytest.mark.parametrize("name", ["geometric_median", "centered_clip"])
def test_clients_without_a_part_change_no_bit(name: str) -> None:
    # Sums in BLAS's order do, and differ between processors.
    rule = {"geometric_median": robust.geometric_median, "centered_clip": lambda x, w: robust.centered_clip(x, 3.0, w)}
    for clients in range(2, 40):
        random = generator(clients)
        x, weights = random.normal(size=(clients, 20)), random.integers(1, 50, clients)
        weights[random.permutation(clients)[: clients // 2]] = 0
        kept = weights > 0
        assert_same_bits(rule[name](list(x), weights), rule[name](list(x[kept]), weights[kept]))


# Attacks

ATTACKS = {
    "sign flip": attacks.sign_flip,
    "sign flip, 10 times as long": lambda honest, hostile: attacks.sign_flip(honest, hostile, 10.0),
    "large noise": attacks.large_noise,
    "inner-product manipulation": attacks.inner_product_manipulation,
    "ALIE": attacks.a_little_is_enough,
    "mimic": attacks.mimic,
}


def attacked(name: str, clients: int, hostile: int, size: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """The honest clients around a common direction, and all clients, the hostile ones first."""
    random = generator(9)
    honest = (random.normal(size=size) + 0.5 * random.normal(size=(clients - hostile, size))).astype(np.float32)
    return honest, np.concatenate([ATTACKS[name](honest, hostile).astype(np.float32), honest])


@every_rule
@pytest.mark.parametrize("attack", ATTACKS)
def test_rules_under_attack_equal_the_reference(rule: Rule, attack: str) -> None:
    _, x = attacked(attack, 20, 4)
    if rule is RULES["fltrust"]:
        x = np.concatenate([x, x[-1:]])
    assert_rule(rule.rule(list(x), 4), rule.reference(wide(x), 4), wide(x))


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name", [*COORDINATE_RULES, "krum", "multi_krum", "bulyan", "geometric_median"])
def test_rules_withstand_attacks(name: str, attack: str) -> None:
    honest, x = attacked(attack, 20, 4)
    spread = np.linalg.norm(honest - honest.mean(axis=0), axis=1).mean()
    result = RULES[name].rule(list(x), 4)
    assert np.linalg.norm(result - honest.mean(axis=0)) <= 1.1 * spread


@every_rule
def test_not_a_number_is_left_out(rule: Rule) -> None:
    honest = rows(generator(10), 16, 60, FLOAT32)
    x = [*attacks.not_a_number(honest, 4), *honest]
    with pytest.warns(UserWarning, match="client [0-3] dropped"):
        result = rule.rule(x, 3, nan_policy="drop")
    assert_rule(result, rule.reference(wide(honest), 3), wide(honest))


def test_attacks_are_what_the_papers_say() -> None:
    honest = rows(generator(11), 14, 30, np.dtype(np.float64))
    mean, deviation = honest.mean(axis=0), honest.std(axis=0)
    assert np.array_equal(attacks.sign_flip(honest, 3, 2.0), -2 * honest[:3])
    assert np.allclose(attacks.inner_product_manipulation(honest, 3, 0.5), -0.5 * mean)
    # 20 clients of which 6 are hostile: 5 supporters of 14, so Phi(z) = 9/14.
    assert np.allclose(attacks.a_little_is_enough(honest, 6), mean - 0.366106 * deviation, atol=1e-6)
    copies = attacks.mimic(honest, 3)
    assert any(np.array_equal(copies[0], row) for row in honest)
    assert np.array_equal(copies[0], copies[2])
    noise = attacks.large_noise(honest, 500, 3.0) - mean
    assert abs(noise.std() - 3.0) < 0.1
    assert abs(noise.mean()) < 0.1
    assert np.isnan(attacks.not_a_number(honest, 2)).all()
    assert attacks.flipped_labels(np.array([0, 1, 9]), 10).tolist() == [9, 8, 0]
