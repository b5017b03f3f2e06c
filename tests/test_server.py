"""The server optimisers as users meet them: names, buffers, checkpoints, bad input; FedNova, Scaffold and FedProx."""

from __future__ import annotations

import copy
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import fastagg
from data import generator, normal
from fastagg._updates.buffers import is_buffer
from fastagg.server import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedNova,
    FedYogi,
    Scaffold,
    add_proximal_gradients,
    client_control,
    local_normalizer,
    proximal_term,
)
from reference import FLOATS, assert_same_bits

FLOAT32 = np.dtype(np.float32)
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "FedAvg": lambda **options: FedAvg(learning_rate=0.5, **options),
    "FedAvgM": lambda **options: FedAvgM(learning_rate=0.5, momentum=0.9, **options),
    "FedAdam": FedAdam,
    "FedYogi": FedYogi,
    "FedAdagrad": FedAdagrad,
}
by_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
ADAPTIVE = {name: OPTIMIZERS[name] for name in ("FedAdam", "FedYogi", "FedAdagrad")}


def network(seed: int = 0) -> dict[str, np.ndarray]:
    """A model with a layer, normalisation and a counter."""
    random = generator(seed)
    return {
        "layer.weight": normal(random, (4, 3), FLOAT32),
        "layer.bias": normal(random, 4, FLOAT32),
        "norm.running_mean": normal(random, 4, FLOAT32),
        "norm.running_var": np.full(4, 0.01, np.float32),
        "norm.num_batches_tracked": np.array(7 + seed),
    }


def assert_same_model(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert list(one) == list(other)
    for name in one:
        assert_same_bits(np.asarray(one[name]), np.asarray(other[name]))


@pytest.mark.parametrize("make", [FedAvg, FedAvgM], ids=["FedAvg", "FedAvgM"])
def test_the_defaults_take_the_mean_itself(make: Callable[[], Any]) -> None:
    optimizer = make()
    mean = network(1)
    result = optimizer.step(network(), mean)
    assert_same_model(result, mean)
    assert all(result[name] is not mean[name] for name in mean)
    assert optimizer.state_dict()["leaves"] == []


def test_momentum_by_hand() -> None:
    optimizer = FedAvgM(learning_rate=0.5, momentum=0.5)
    model = np.array([8.0])
    model = optimizer.step(model, np.array([4.0]))  # m = 4
    assert model == [6.0]
    model = optimizer.step(model, np.array([4.0]))  # m = 2 + 2
    assert model == [4.0]


def test_adam_by_hand() -> None:
    optimizer = FedAdam(learning_rate=0.5, beta_1=0.5, beta_2=0.75, tau=1.0)
    model = optimizer.step(np.array([1.0]), np.array([5.0]))  # delta 4, m 2, v 4: x = 1 + 0.5 * 2 / 3
    assert model == [1 + 0.5 * 2.0 / 3.0]


def test_yogi_by_hand() -> None:
    optimizer = FedYogi(learning_rate=0.5, beta_1=0.0, beta_2=0.75, tau=1.0)
    model = optimizer.step(np.array([0.0]), np.array([4.0]))  # v = 0 + 16 / 4 = 4
    assert model == [0.5 * 4 / 3]
    model = optimizer.step(np.array([0.0]), np.array([1.0]))  # v = 4 - 1 / 4
    assert model == [0.5 * 1 / (math.sqrt(3.75) + 1)]


def test_adagrad_by_hand() -> None:
    optimizer = FedAdagrad(learning_rate=0.5, tau=1.0)
    model = optimizer.step(np.array([0.0]), np.array([4.0]))  # v = 16
    assert model == [0.5 * 4 / 5]
    model = optimizer.step(np.array([0.0]), np.array([3.0]))  # v = 25
    assert model == [0.5 * 3 / 6]


@by_optimizer
def test_the_learning_rate_of_one_step(make: Callable[..., Any]) -> None:
    usual, other = make(), make()
    model, mean = network(), network(1)
    other.learning_rate = 0.25
    assert_same_model(usual.step(model, mean, learning_rate=0.25), other.step(model, mean))
    other.learning_rate = usual.learning_rate
    assert_same_model(usual.step(model, mean), other.step(model, mean))


@by_optimizer
def test_buffers_take_the_mean(make: Callable[..., Any]) -> None:
    model, mean = network(), network(1)
    result = make(buffers=["layer.bias"]).step(model, mean)
    for name in ("layer.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert_same_bits(result[name], mean[name])
    assert not np.array_equal(result["layer.weight"], mean["layer.weight"])


@pytest.mark.parametrize("make", ADAPTIVE.values(), ids=ADAPTIVE)
def test_a_running_variance_never_turns_negative(make: Callable[..., Any]) -> None:
    # Clients send 0.001 where the model has 0.01: a step of Adam's usual length ends below zero.
    variance = {"norm.running_var": np.full(3, 0.01, np.float32), "moved": np.full(3, 0.01, np.float32)}
    mean = {name: np.full(3, 0.001, np.float32) for name in variance}
    optimizer, lowest = make(), 1.0
    for _ in range(5):
        variance = optimizer.step(variance, mean, learning_rate=0.1)
        assert_same_bits(variance["norm.running_var"], mean["norm.running_var"])
        lowest = min(lowest, variance["moved"].min())
    assert lowest < 0


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("conv.weight", "float32", False),
        ("norm.running_mean", "float32", True),
        ("norm.running_var", torch.float16, True),
        ("running_var", np.dtype(np.float64), True),
        ("norm.num_batches_tracked", "float32", True),
        ("batch_normalization/moving_mean", "float32", True),
        ("block/batch_normalization_3/moving_variance", np.float32, True),
        ("bn/moving_variance:0", "float32", True),
        ("bn/moving_mean_1:0", "float32", True),
        ("module.norm.running_var", "float32", True),
        ("kernel:0", "float32", False),
        ("running_mean.weight", "float32", False),
        ("my_running_mean", "float32", False),
        ("steps", "int64", True),
        ("mask", "bool", True),
        ("ema", "float32", True),
        (("ema", 1), "float32", False),
        (None, ml_dtypes.bfloat16, False),
        (3, "uint8", True),
    ],
)
def test_what_a_buffer_is(name: Any, dtype: Any, expected: bool) -> None:
    assert is_buffer(name, dtype, ["ema"]) is expected


@by_optimizer
def test_leaves_are_matched_by_name(make: Callable[..., Any]) -> None:
    model, mean = network(), network(1)
    shuffled = dict(reversed(mean.items()))
    first, second = make(), make()
    straight, crossed = first.step(model, mean), second.step(model, shuffled)
    assert_same_model(straight, crossed)
    again = second.step(dict(reversed(crossed.items())), shuffled)  # and so are the moments
    assert_same_model(first.step(straight, mean), dict(reversed(again.items())))


def test_a_mean_of_the_same_model_moves_nothing() -> None:
    # Where leaves are paired by position, a model with its keys in another order pulls them together.
    model = {"a": np.zeros(1), "b": np.full(1, 100.0)}
    result = FedAvgM(learning_rate=0.5).step(model, {"b": model["b"], "a": model["a"]})
    assert (result["a"], result["b"]) == (0, 100)


@by_optimizer
def test_nothing_given_is_altered(make: Callable[..., Any]) -> None:
    model, mean = network(), network(1)
    make().step(model, mean)
    assert_same_model(model, network())
    assert_same_model(mean, network(1))


@by_optimizer
def test_out_may_be_the_model(make: Callable[..., Any]) -> None:
    model, mean = network(), network(1)
    expected = make().step(model, mean)
    assert make().step(model, mean, out=model) is model
    assert_same_model(model, expected)
    elsewhere = network(2)
    assert make().step(network(), mean, out=elsewhere) is elsewhere
    assert_same_model(elsewhere, expected)


@by_optimizer
def test_every_structure_and_library(make: Callable[..., Any]) -> None:
    x, y = normal(generator(1), (3, 5), FLOAT32), normal(generator(2), (3, 5), FLOAT32)
    expected = make().step(x, y)
    assert isinstance(expected, np.ndarray)
    assert_same_bits(make().step([x], (y,))[0], expected)
    assert isinstance(make().step((x,), [y]), tuple)
    ordered = make().step(OrderedDict(a=x), {"a": y})
    assert isinstance(ordered, OrderedDict)
    assert_same_bits(ordered["a"], expected)
    tensors = make().step({"a": torch.from_numpy(x)}, {"a": torch.from_numpy(y)})
    assert_same_bits(tensors["a"].numpy(), expected)
    assert_same_bits(make().step(x.T, y.T), np.ascontiguousarray(expected.T))


@by_optimizer
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())
def test_dtypes_stay(make: Callable[..., Any], dtype: np.dtype) -> None:
    x, y = normal(generator(1), 7, dtype), normal(generator(2), 7, dtype)
    optimizer = make()
    assert optimizer.step(x, y).dtype == dtype
    wide = np.float64 if dtype == np.float64 else np.float32
    assert {moment.dtype for leaf in optimizer.state_dict()["leaves"] for moment in leaf[-1]} <= {np.dtype(wide)}


@by_optimizer
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_resumes_bit_for_bit(make: Callable[..., Any], library: str) -> None:
    def put(model: dict[str, np.ndarray]) -> dict[str, Any]:
        return {name: torch.from_numpy(leaf) if library == "torch" else leaf for name, leaf in model.items()}

    optimizer, model = make(buffers=["layer.bias"]), put(network())
    for seed in (1, 2):
        model = optimizer.step(model, put(network(seed)))
    state = pickle.loads(pickle.dumps(optimizer.state_dict()))
    resumed = make()
    resumed.learning_rate = 0.125  # what was saved counts
    resumed.load_state_dict(state)
    assert resumed.buffers == ("layer.bias",)
    other = model
    for seed in (3, 4):
        model, other = optimizer.step(model, put(network(seed))), resumed.step(other, put(network(seed)))
        assert_same_model(model, other)


def test_a_state_is_a_copy() -> None:
    optimizer, model = FedAdam(), network()
    optimizer.step(model, network(1))
    state = optimizer.state_dict()
    kept = copy.deepcopy(state)
    optimizer.step(model, network(2))
    loaded = FedAdam()
    loaded.load_state_dict(state)
    loaded.step(model, network(3))
    for saved, before in zip(state["leaves"], kept["leaves"], strict=True):
        for moment, expected in zip(saved[-1], before[-1], strict=True):
            assert_same_bits(moment, expected)


def refused_states() -> dict[str, tuple[Callable[[dict[str, Any]], Any], str]]:
    def without_moments(state: dict[str, Any]) -> None:
        state["leaves"][0][-1].pop()

    def of_another_shape(state: dict[str, Any]) -> None:
        state["leaves"][0][-1][0] = np.zeros(3, np.float32)

    return {
        "no state": (lambda state: state.clear(), "version 1"),
        "another optimiser": (lambda state: state.update(optimizer="FedYogi"), "expected one of FedAdam, got one of"),
        "a moment too few": (without_moments, "leaf 'layer.weight': expected 2 moments"),
        "a moment of another shape": (of_another_shape, "leaf 'layer.weight': expected 2 moments"),
        "wrong numbers": (lambda state: state["hyperparameters"].update(beta_1=2.0), "beta_1"),
        "no leaves": (lambda state: state.pop("leaves"), "damaged"),
    }


@pytest.mark.parametrize("what", refused_states())
def test_a_wrong_state_changes_nothing(what: str) -> None:
    optimizer, untouched = FedAdam(), FedAdam()
    for each in (optimizer, untouched):
        each.step(network(), network(1))
    state = optimizer.state_dict()
    damage, message = refused_states()[what]
    damage(state)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert_same_model(optimizer.step(network(), network(2)), untouched.step(network(), network(2)))


def test_a_state_of_another_model_is_refused() -> None:
    other = FedAdam()
    other.step({"layer.weight": np.zeros(3)}, {"layer.weight": np.ones(3)})
    optimizer = FedAdam()
    optimizer.step(network(), network(1))
    with pytest.raises(ValueError, match=r"state: leaf 'layer\.bias' is missing"):
        optimizer.load_state_dict(other.state_dict())
    fresh = FedAdam()
    fresh.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"model, leaf 'layer\.weight': expected a numpy array of float64 \(3,\)"):
        fresh.step({"layer.weight": np.zeros(4)}, {"layer.weight": np.ones(4)})


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@by_optimizer
def test_a_mean_that_is_not_finite_changes_nothing(make: Callable[..., Any], number: float) -> None:
    optimizer, untouched = make(), make()
    for each in (optimizer, untouched):
        each.step(network(), network(1))
    model, mean = network(), network(2)
    mean["layer.bias"][2] = number
    with pytest.raises(ValueError, match=r"mean, leaf 'layer\.bias': holds a NaN or an infinity"):
        optimizer.step(model, mean, out=model)
    assert_same_model(model, network())
    assert_same_model(optimizer.step(network(), network(3)), untouched.step(network(), network(3)))


def without(name: str, model: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key: leaf for key, leaf in model.items() if key != name}


WEIGHT, BIAS = "layer.weight", "layer.bias"
BAD_MEANS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a missing leaf": (lambda: without(BIAS, network(1)), ValueError, r"mean: missing leaves 'layer\.bias'"),
    "a leaf too many": (lambda: network(1) | {"x": np.ones(1)}, ValueError, "mean: unexpected leaves 'x'"),
    "a sequence": (lambda: list(network(1).values()), TypeError, "mean: expected a mapping like the model's"),
    "another shape": (
        lambda: network(1) | {BIAS: np.ones(3, "f4")},
        ValueError,
        r"'layer\.bias': expected shape \(4,\)",
    ),
    "another rank": (lambda: network(1) | {BIAS: np.ones((4, 1), "f4")}, ValueError, "mean, leaf 'layer.bias'"),
    "another dtype": (lambda: network(1) | {BIAS: np.ones(4)}, TypeError, "expected dtype float32 like the model's"),
    "another library": (lambda: network(1) | {BIAS: torch.ones(4)}, TypeError, "expected a numpy array"),
    "no array": (lambda: network(1) | {BIAS: "text"}, TypeError, r"mean, leaf 'layer\.bias': expected an array"),
}


@by_optimizer
@pytest.mark.parametrize("what", BAD_MEANS)
def test_a_mean_that_does_not_fit_changes_nothing(make: Callable[..., Any], what: str) -> None:
    mean, error, message = BAD_MEANS[what]
    optimizer, out = make(), network(5)
    with pytest.raises(error, match=message):
        optimizer.step(network(), mean(), out=out)
    assert_same_model(out, network(5))
    assert_same_model(optimizer.step(network(), network(1)), make().step(network(), network(1)))


def overlapping() -> dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]]:
    x, y, wide = np.zeros(4), np.ones(4), np.zeros(6)
    return {
        "the mean": ({"a": x}, {"a": y}, {"a": y}, "out, leaf 'a': overlaps the mean's leaf 'a'"),
        "the model, shifted": ({"a": wide[:4]}, {"a": y}, {"a": wide[2:]}, "out, leaf 'a': overlaps the model's"),
        "another leaf": (
            {"a": x, "b": wide[:4]},
            {"a": y, "b": y},
            {"a": wide[:4], "b": x},
            "out, leaf 'a': overlaps the model's leaf 'b'",
        ),
        "itself": ({"a": x, "b": y}, {"a": wide[:4], "b": wide[:4]}, {"a": x, "b": x}, "overlap"),
    }


@pytest.mark.parametrize("what", overlapping())
def test_an_out_that_overlaps_is_refused(what: str) -> None:
    model, mean, out, message = overlapping()[what]
    before = {name: leaf.copy() for name, leaf in out.items()}
    with pytest.raises(ValueError, match=message):
        FedAdam().step(model, mean, out=out)
    assert_same_model(out, before)


def test_an_out_that_cannot_be_written_is_refused() -> None:
    fixed = np.zeros(4)
    fixed.flags.writeable = False
    with pytest.raises(ValueError, match="out, the array: expected a writable"):
        FedAdam().step(np.zeros(4), np.ones(4), out=fixed)
    with pytest.raises(ValueError, match=r"out, the array: expected shape \(4,\)"):
        FedAdam().step(np.zeros(4), np.ones(4), out=np.zeros(5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: FedAvg(learning_rate=-1.0),
            "learning_rate: expected a number of 0 or more, finite in float32, got -1",
        ),
        (lambda: FedAvg(learning_rate=math.nan), "learning_rate"),
        (lambda: FedAvg(learning_rate=1e39), "learning_rate"),
        (lambda: FedAvg(learning_rate=10**400), "learning_rate"),
        (lambda: FedAvgM(momentum=1.0), "momentum: expected a number of 0 or more, below 1"),
        (lambda: FedAvgM(momentum=-0.1), "momentum"),
        (lambda: FedAdam(beta_1=1.0), "beta_1"),
        (lambda: FedYogi(beta_2=1.5), "beta_2"),
        (lambda: FedAdagrad(tau=0.0), "tau"),
        (lambda: FedAdam(tau=1e-40), "tau"),
        (lambda: FedAdam(tau=math.inf), "tau"),
    ],
)
def test_numbers_out_of_range_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_numbers_are_checked_at_each_step() -> None:
    optimizer = FedAdam()
    with pytest.raises(ValueError, match="learning_rate"):
        optimizer.step(np.zeros(1), np.ones(1), learning_rate=math.nan)
    optimizer.beta_1 = 7.0
    with pytest.raises(ValueError, match="beta_1"):
        optimizer.step(np.zeros(1), np.ones(1))
    with pytest.raises(TypeError, match="learning_rate: expected a number, got 'fast'"):
        FedAvg(learning_rate="fast")  # type: ignore[arg-type]


def test_buffers_must_be_names_of_the_model() -> None:
    with pytest.raises(ValueError, match=r"buffers: the model has no leaf 'layer\.wieght'"):
        FedAdam(buffers=["layer.wieght"]).step(network(), network(1))
    with pytest.raises(TypeError, match="buffers: expected names of leaves"):
        FedAdam(buffers="layer.weight")


def test_momentum_may_begin_and_end_between_steps() -> None:
    optimizer = FedAvgM(learning_rate=0.5)
    model, mean = np.array([8.0]), np.array([4.0])
    assert optimizer.step(model, mean) == [6.0]
    optimizer.momentum = 0.5
    assert optimizer.step(model, mean) == [6.0]  # m = 4
    assert optimizer.step(model, mean) == [5.0]  # m = 6
    optimizer.momentum = 0.0
    assert optimizer.step(model, mean) == [6.0]


def fednova(x: np.ndarray, updates: list[np.ndarray], weights: list[float], steps: list[float]) -> np.ndarray:
    """The paper's formula in float64."""
    shares = np.array(weights) / sum(weights)
    total = sum(share * count for share, count in zip(shares, steps, strict=True))
    terms = [share * (update - x) / count for share, update, count in zip(shares, updates, steps, strict=True)]
    return x + total * sum(terms)


def test_fednova_is_the_papers_formula() -> None:
    random = generator(8)
    x = random.normal(size=50)
    updates, weights, steps = [random.normal(size=50) for _ in range(3)], [10.0, 200.0, 30.0], [5, 1, 40]
    result = FedNova().step({"x": x}, [{"x": update} for update in updates], weights, steps)["x"]
    np.testing.assert_allclose(result, fednova(x, updates, weights, steps), rtol=1e-12)
    half = FedNova(learning_rate=0.5).step(x, updates, weights, steps)
    np.testing.assert_allclose(half, x + (result - x) / 2, rtol=1e-12)


def test_fednova_with_equal_steps_is_fedavg() -> None:
    x = normal(generator(9), 50, FLOAT32)
    updates = [normal(generator(seed), 50, FLOAT32) for seed in (10, 11)]
    result = FedNova().step(x, updates, [3, 1], [8, 8])
    np.testing.assert_allclose(result, fastagg.fedavg(updates, [3, 1]), rtol=1e-6, atol=1e-6)


def test_fednova_weighs_each_step_alike() -> None:
    # A client of a hundred steps has gone a hundred times as far; the objective stays the one of equal clients.
    result = FedNova().step(np.zeros(1), [np.array([100.0]), np.array([-1.0])], None, [100, 1])
    assert abs(result) < 1e-14  # the sums are exact, so that the rounding of 1 / 100 is seen


def test_fednova_leaves_out_whom_the_policy_drops() -> None:
    updates = [np.array([2.0]), np.array([np.nan]), np.array([8.0])]
    with pytest.warns(fastagg.DroppedUpdateWarning, match="client 1 dropped: the array holds a NaN"):
        result = FedNova().step(np.zeros(1), updates, [1, 5, 3], [2, 7, 4], nan_policy="drop")
    np.testing.assert_allclose(result, fednova(np.zeros(1), [updates[0], updates[2]], [1, 3], [2, 4]), rtol=1e-12)
    result = FedNova().step(np.zeros(1), updates, [1, 0, 3], [2, 0, 4])  # one of weight 0 never counts
    np.testing.assert_allclose(result, fednova(np.zeros(1), [updates[0], updates[2]], [1, 3], [2, 4]), rtol=1e-12)
    with pytest.raises(ValueError, match="client 1, the array: holds a NaN"):
        FedNova().step(np.zeros(1), updates, None, [1, 1, 1])


def test_fednova_with_an_effective_number_of_steps() -> None:
    result = FedNova().step(np.zeros(1), [np.array([6.0])], None, [3], tau_eff=5)
    assert result == [10.0]


def test_fednova_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match="updates: expected at least one, got none"):
        FedNova().step(np.zeros(1), [], None, [])
    with pytest.raises(TypeError, match="steps: expected 1 numbers, got None"):
        FedNova().step(np.zeros(1), [np.ones(1)], None, None)


def test_fednova_skips_buffers() -> None:
    model, updates = network(), [network(1), network(2)]
    result = FedNova().step(model, updates, None, [1, 3])
    mean = fastagg.fedavg(updates)
    assert_same_bits(result["norm.running_var"], mean["norm.running_var"])
    assert_same_bits(result["norm.running_mean"], mean["norm.running_mean"])
    assert result["norm.num_batches_tracked"] == 9


def test_fednova_weighs_buffers_by_clients_not_by_steps() -> None:
    start = {"w": np.float32([0]), "bn.running_var": np.float32([1.0]), "ema": np.float32([0]), "n": np.array([0])}
    one = {"w": np.float32([0.1]), "bn.running_var": np.float32([1.0]), "ema": np.float32([2]), "n": np.array([1])}
    many = {"w": np.float32([10.0]), "bn.running_var": np.float32([4.0]), "ema": np.float32([4]), "n": np.array([100])}
    result = FedNova(buffers=["ema"]).step(start, [one, many], [500, 500], [1, 100], integer_policy="round")
    assert (result["bn.running_var"], result["ema"], result["n"]) == (2.5, 3, 50)
    broken = {**many, "w": np.float32([np.nan])}
    with pytest.warns(fastagg.DroppedUpdateWarning):
        kept = FedNova().step(start, [one, broken], [500, 500], [1, 100], nan_policy="drop")
    assert kept["bn.running_var"] == 1


@pytest.mark.parametrize("steps", [[1, 0], [1, -2], [1, math.nan], [1]])
def test_fednova_refuses_wrong_steps(steps: list[float]) -> None:
    with pytest.raises(ValueError, match="steps"):
        FedNova().step(np.zeros(1), [np.ones(1), np.ones(1)], None, steps)


def test_local_normalizers() -> None:
    def norm(coefficients: list[float]) -> float:
        return sum(coefficients)

    assert local_normalizer(7) == 7
    powers = [0.9**k for k in range(7)]
    # With momentum the gradient of step k is applied in all steps from k on, each time decayed once more.
    assert local_normalizer(7, momentum=0.9) == pytest.approx(norm([sum(powers[: 7 - k]) for k in range(7)]))
    # With a proximal term it decays with every later step.
    assert local_normalizer(7, proximal=0.1) == pytest.approx(norm(powers))
    with pytest.raises(ValueError, match="both"):
        local_normalizer(7, momentum=0.9, proximal=0.1)
    with pytest.raises(ValueError, match="steps"):
        local_normalizer(0)


def quadratic_round(server: Scaffold, x: np.ndarray, controls: list[Any], optima: np.ndarray) -> np.ndarray:
    """Clients that minimise (y - optimum)**2 * curvature / 2, with SCAFFOLD's correction."""
    updates, changes = [], []
    for client, (optimum, curvature) in enumerate(zip(optima, (1.0, 9.0), strict=True)):
        own = np.zeros(1) if controls[client] is None else controls[client]
        y = x.copy()
        for _ in range(10):
            y = y - 0.02 * (curvature * (y - optimum) - own + server.control)
        new = client_control(own, server.control, x, y, 10, 0.02)
        controls[client] = new.control
        updates.append(y)
        changes.append(new.change)
    return server.step(x, updates, changes)


def test_scaffold_finds_the_optimum_that_fedavg_misses() -> None:
    optima = np.array([0.0, 1.0])
    best = (1 * optima[0] + 9 * optima[1]) / 10
    server, x, controls = Scaffold(np.zeros(1), 2), np.zeros(1), [None, None]
    plain, y = Scaffold(np.zeros(1), 2), np.zeros(1)
    for _ in range(150):
        x = quadratic_round(server, x, controls, optima)
        y = quadratic_round(plain, y, [None, None], optima)
        plain.load_state_dict(Scaffold(np.zeros(1), 2).state_dict())  # no controls: FedAvg
    assert abs(x[0] - best) < 1e-6
    assert abs(y[0] - best) > 0.01
    assert server.control[0] == pytest.approx(np.mean([control[0] for control in controls]))


def test_scaffold_by_hand() -> None:
    model = {"w": np.array([1.0]), "n": np.array(4)}
    server = Scaffold(model, 4, learning_rate=0.5)
    first = client_control(None, server.control, model, {"w": np.array([0.0]), "n": np.array(5)}, 2, 0.25)
    assert first.control["w"] == [2.0]
    assert first.change["w"] == [2.0]
    result = server.step(
        model,
        [{"w": np.array([0.0]), "n": np.array(5)}, {"w": np.array([4.0]), "n": np.array(6)}],
        [first.change, {"w": np.array([4.0]), "n": np.array(9)}],
    )
    assert result["w"] == [1 + 0.5 * (2 - 1)]
    assert result["n"] == 6
    assert server.control["w"] == [0.25 * (2 + 4)]
    assert server.control["n"] == 0  # buffers have none
    second = client_control(first.control, server.control, result, {"w": np.array([1.0]), "n": np.array(6)}, 1, 0.5)
    assert second.control["w"] == [2 - 1.5 + (1.5 - 1) / 0.5]
    assert second.change["w"] == second.control["w"] - 2


def test_scaffolds_control_is_handed_out_as_a_copy() -> None:
    for leaf in (np.zeros(2), torch.zeros(2)):
        scaffold = Scaffold({"w": leaf}, clients=1)
        scaffold.control["w"][:] = 5
        scaffold.state_dict()["control"]["w"][:] = 5
        assert scaffold.control["w"].tolist() == [0, 0]


def test_nothing_drifts_from_a_mask() -> None:
    mask = np.float32([-np.inf, 0])
    model, trained = {"w": np.ones(2, np.float32), "mask": mask}, {"w": np.zeros(2, np.float32), "mask": mask}
    scaffold = Scaffold(model, clients=1, learning_rate=0.5)
    own = client_control(None, scaffold.control, model, trained, steps=1, learning_rate=1.0)
    assert own.control["mask"].tolist() == [0, 0]
    assert own.control["w"].tolist() == [1, 1]
    result = scaffold.step(model, [trained], [own.change])
    assert_same_bits(result["mask"], mask)
    assert result["w"].tolist() == [0.5, 0.5]


def test_scaffolds_control_survives_a_checkpoint_and_bad_input() -> None:
    server = Scaffold(np.zeros(2), 3)
    server.step(np.zeros(2), [np.ones(2)], [np.full(2, 3.0)])
    assert server.control.tolist() == [1, 1]
    for changes, message in (
        ([np.full(2, np.nan)], "changes: client 0"),
        ([np.ones(3)], "expected shape"),
        ([np.ones(2), np.ones(2)], "changes: expected 1"),
    ):
        with pytest.raises(ValueError, match=message):
            server.step(np.zeros(2), [np.ones(2)], changes)
    with pytest.raises(ValueError, match="client 0"):
        server.step(np.zeros(2), [np.full(2, np.nan)], [np.ones(2)])
    with pytest.raises(ValueError, match="at most 3 clients"):
        server.step(np.zeros(2), [np.ones(2)] * 4, [np.ones(2)] * 4)
    assert server.control.tolist() == [1, 1]
    other = Scaffold(np.zeros(2), 3)
    other.load_state_dict(pickle.loads(pickle.dumps(server.state_dict())))
    assert other.control.tolist() == [1, 1]
    with pytest.raises(ValueError, match="of 2 clients, got 3"):
        Scaffold(np.zeros(2), 2).load_state_dict(server.state_dict())
    with pytest.raises(ValueError, match="of another model"):
        Scaffold(np.zeros(5), 3).load_state_dict(server.state_dict())
    with pytest.raises(ValueError, match="above 0"):
        client_control(None, np.zeros(2), np.zeros(2), np.zeros(2), 0, 0.1)


def test_the_proximal_term_and_its_gradient() -> None:
    torch.manual_seed(0)
    layer, mu = torch.nn.Linear(3, 2), 0.5
    sent = [torch.randn_like(parameter) for parameter in layer.parameters()]
    term = proximal_term(layer.parameters(), sent, mu)
    squares = sum(((own - other) ** 2).sum() for own, other in zip(layer.parameters(), sent, strict=True))
    torch.testing.assert_close(term, mu / 2 * squares)
    term.backward()
    for own, other in zip(layer.parameters(), sent, strict=True):
        torch.testing.assert_close(own.grad, mu * (own - other).detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_proximal_term_of_half_precision_is_summed_wider(dtype: torch.dtype) -> None:
    own = torch.full((1000,), 300.0, dtype=dtype, requires_grad=True)
    term = proximal_term([own], [torch.zeros_like(own)], 0.5)
    assert term.item() == 0.25 * 1000 * 300**2
    term.backward()
    assert torch.equal(own.grad, torch.full_like(own, 150))


def test_proximal_gradients_in_place_are_those_of_the_term() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    named = dict(layer.named_parameters())
    sent = {name: torch.randn_like(parameter) for name, parameter in reversed(named.items())}
    (layer(torch.ones(3)).sum() + proximal_term(named, sent, 0.5)).backward()
    expected = layer.weight.grad.clone()
    layer.zero_grad()
    layer(torch.ones(3)).sum().backward()
    add_proximal_gradients(named, sent, 0.5)
    torch.testing.assert_close(layer.weight.grad, expected)
    assert layer.bias.grad is None


def test_the_proximal_term_refuses_other_parameters() -> None:
    own = {"a": torch.zeros(2), "b": torch.zeros(3)}
    with pytest.raises(ValueError, match="missing 'b'"):
        proximal_term(own, {"a": torch.zeros(2)}, 1.0)
    with pytest.raises(ValueError, match=r"parameter 'b': expected shape \(3,\), got \(4,\)"):
        proximal_term(own, {"a": torch.zeros(2), "b": torch.zeros(4)}, 1.0)
    with pytest.raises(ValueError, match="expected 2, got 1"):
        proximal_term(own.values(), [torch.zeros(2)], 1.0)
    with pytest.raises(ValueError, match="both with names"):
        proximal_term(own, list(own.values()), 1.0)
    with pytest.raises(ValueError, match="mu"):
        proximal_term(own, own, -1.0)


def test_an_optimizer_tells_its_numbers() -> None:
    assert repr(FedAdam(tau=0.5)) == "FedAdam(learning_rate=0.1, beta_1=0.9, beta_2=0.99, tau=0.5)"
    assert repr(FedNova(learning_rate=0.5)) == "FedNova(learning_rate=0.5)"
    assert repr(Scaffold(np.zeros(3), 10)) == "Scaffold(clients=10, learning_rate=1.0)"
