"""Means that know the model that was sent: roundings are taken out, and its infinities are nobody's fault."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import fastagg
from backends import Backend, on_scalar
from data import generator, normal
from fastagg.server import FedAdagrad, FedAdam, FedAvgM, FedNova, FedYogi, Scaffold
from reference import assert_same_bits

FLOAT32 = np.dtype(np.float32)
MASK = np.triu(np.full((4, 4), -np.inf, np.float32), 1)
WIRES = ["bf16", "fp16", "fp8_e4m3", "fp8_e5m2", "int8", "int4", "sign"]
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "FedAvgM": lambda: FedAvgM(momentum=0.9),
    "FedAdam": FedAdam,
    "FedYogi": FedYogi,
    "FedAdagrad": FedAdagrad,
}
by_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def roundings(wire: str) -> list[str]:
    return ["nearest"] if wire == "sign" else ["nearest", "stochastic"]


def by_accumulator(
    updates: list[Any], weights: list[float], sent: Any, batch: int = 1, low_memory: bool = False
) -> Any:
    sums = fastagg.Accumulator(sent=sent, batch=batch, low_memory=low_memory)
    for update, weight in zip(updates, weights, strict=True):
        sums.add(update, weight)
    return sums.result()


@pytest.mark.parametrize("wire", WIRES)
def test_a_model_that_nobody_changed_is_the_mean(backend: Backend, wire: str) -> None:
    x = backend.put(normal(generator(1), 700, FLOAT32))
    for rounding in roundings(wire):
        updates = [fastagg.quantize(x, wire, rounding=rounding) for _ in range(5)]
        updates += [x, fastagg.quantize(x, "int8", block=64)]  # a fleet need not agree
        weights = [3, 1, 4, 1, 5, 9, 2]
        assert_same_bits(backend.get(fastagg.fedavg(updates, weights, sent=x)), backend.get(x))
        for options in ({}, {"batch": 3}, {"low_memory": True}):
            assert_same_bits(backend.get(by_accumulator(updates, weights, x, **options)), backend.get(x))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_each_update_counts_by_its_distance_from_the_sent_model(backend: Backend, dtype: Any) -> None:
    random = generator(2)
    x = normal(random, 600, np.dtype(dtype))
    trained = [(x + normal(random, 600, np.dtype(dtype)) / 8).astype(dtype) for _ in range(3)]
    keys = [(7, 1, 2), (8, 1, 2), None]

    def coded(array: np.ndarray, key: Any) -> Any:
        rounding = "nearest" if key is None else "stochastic"
        return fastagg.quantize(backend.put(array), "int8", rounding=rounding, seed=key)

    updates = [coded(y, key) for y, key in zip(trained, keys, strict=True)]
    result = backend.get(fastagg.fedavg(updates, [1, 2, 5], sent=backend.put(x)))
    wide = [
        x.astype(np.float64)
        + backend.get(fastagg.dequantize(coded(y, key))).astype(np.float64)
        - backend.get(fastagg.dequantize(coded(x, key))).astype(np.float64)
        for y, key in zip(trained, keys, strict=True)
    ]
    expected = np.average(wide, axis=0, weights=[1, 2, 5])
    error = np.finfo(dtype).eps * (np.abs(expected) + 4 * np.abs(x))
    assert (np.abs(result - expected) <= error).all()


def test_the_bits_do_not_depend_on_the_backend(backend: Backend) -> None:
    x = normal(generator(3), 900, FLOAT32)
    trained = [x + normal(generator(seed), 900, FLOAT32) / 8 for seed in (4, 5)]

    def mean(put: Callable[[np.ndarray], Any]) -> Any:
        updates = [fastagg.quantize(put(y), "int4", rounding="stochastic", seed=9) for y in trained]
        return fastagg.fedavg([*updates, put(x)], [0.3, 0.5, 0.1], sent=put(x))

    assert_same_bits(backend.get(mean(backend.put)), on_scalar(lambda: mean(lambda array: array)))


def test_buffers_stay_the_plain_mean() -> None:
    # x + Q(y) - Q(x) could be a negative variance.
    x = {"w": np.float32([0.6, 127]), "bn.running_var": np.float32([0.6, 127])}
    coded = {name: fastagg.quantize(np.float32([0.3, 127]), "int8") for name in x}
    result = fastagg.fedavg([coded], sent=x)
    assert result["bn.running_var"].tolist() == [0, 127]
    assert result["w"][0] == np.float32(0.6) - 1


def test_who_is_dropped_or_weighs_nothing_is_not_taken_out() -> None:
    x = {"w": normal(generator(6), 300, FLOAT32)}
    good = {"w": fastagg.quantize(x["w"], "int8")}
    bad = {"w": fastagg.quantize(np.full(300, np.nan, np.float32), "int4")}
    with pytest.warns(fastagg.DroppedUpdateWarning, match="client 1"):
        result = fastagg.fedavg([good, bad, bad], [1, 2, 0], nan_policy="drop", sent=x)
    assert_same_bits(result["w"], x["w"])


def test_a_wire_on_which_the_model_overflows_is_left_as_it_is() -> None:
    result = fastagg.fedavg([fastagg.quantize(np.float32([1.0, 2.0]), "fp16")], sent=np.float32([1e6, 3.0]))
    assert result.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_an_infinity_that_was_sent_is_nobodys_fault(library: str) -> None:
    put = torch.from_numpy if library == "torch" else np.asarray
    sent = {"mask": put(MASK), "w": put(np.float32([1, 2]))}
    updates = [{**sent, "w": sent["w"] + step} for step in (1, 3)]
    for policy in ("raise", "drop", "propagate"):
        for options in ({}, {"batch": 2}, {"low_memory": True}):
            sums = fastagg.Accumulator(nan_policy=policy, sent=sent, **options)
            for update in updates:
                sums.add(update)
            assert_same_bits(np.asarray(sums.result()["mask"]), MASK)
        result = fastagg.fedavg(updates, nan_policy=policy, sent=sent)
        assert_same_bits(np.asarray(result["mask"]), MASK)
        assert result["w"].tolist() == [3, 4]


def test_another_infinity_is_the_clients_fault() -> None:
    good = {"mask": MASK, "w": np.float32([1, 2])}
    for bad in ({**good, "mask": -MASK}, {**good, "mask": MASK * np.nan}, {**good, "w": np.float32([1, np.inf])}):
        with pytest.raises(fastagg.NonFiniteUpdateError, match="client 1"):
            fastagg.fedavg([good, bad], sent=good)
        sums = fastagg.Accumulator(sent=good)
        sums.add(good)
        with pytest.raises(fastagg.NonFiniteUpdateError, match="client 1"):
            sums.add(bad)
        sums.add({**good, "mask": np.zeros_like(MASK)})  # finite, so no fault, and the mean of both is infinite
        assert_same_bits(sums.result()["mask"], MASK)


def test_without_the_sent_model_an_infinity_names_the_client() -> None:
    with pytest.raises(fastagg.NonFiniteUpdateError, match="client 0"):
        fastagg.fedavg([MASK, MASK])


@pytest.mark.parametrize(
    ("sent", "error", "message"),
    [
        ({"v": np.zeros(2, np.float32)}, ValueError, "sent: missing leaves 'w'"),
        ({"w": np.zeros(3, np.float32)}, ValueError, r"sent, leaf 'w': expected shape \(2,\)"),
        ({"w": torch.zeros(2)}, TypeError, "sent, leaf 'w': expected a numpy array"),
        ({"w": "x"}, TypeError, "sent, leaf 'w'"),
        (np.zeros(2), TypeError, "sent: expected a mapping"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(sent: Any, error: type[Exception], message: str) -> None:
    update = {"w": np.zeros(2, np.float32)}
    with pytest.raises(error, match=message):
        fastagg.fedavg([update], sent=sent)
    with pytest.raises(error, match=message):
        fastagg.Accumulator(sent=sent).add(update)


def test_the_sent_model_is_not_written_over() -> None:
    sent = {"w": np.ones(2, np.float32)}
    with pytest.raises(ValueError, match="out, leaf 'w': overlaps the sent model"):
        fastagg.fedavg([{"w": fastagg.quantize(sent["w"], "int8")}], sent=sent, out=sent)
    with pytest.raises(ValueError, match="stats=True"):
        fastagg.Accumulator(stats=True, sent=sent)


def test_a_round_has_its_own_sent_model() -> None:
    sums = fastagg.Accumulator(sent=np.float32([1, 100]))
    for model in (np.float32([0.3, 100]), np.float32([0.4, 90])):
        sums.reset(sent=model)
        sums.add(fastagg.quantize(model, "int8"))
        assert_same_bits(sums.result(), model)


# Server optimisers


@by_optimizer
def test_a_layer_that_nobody_trains_stays(make: Callable[[], Any]) -> None:
    random, optimizer = generator(7), make()
    start = {"backbone": normal(random, (8, 64), FLOAT32), "head": normal(random, 8, FLOAT32), "mask": MASK}
    model = start
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            updates = [
                {
                    "backbone": fastagg.quantize(model["backbone"], wire, rounding="stochastic"),
                    "head": fastagg.quantize(model["head"] + 1, wire),
                    "mask": MASK,
                }
                for wire in ("int8", "bf16", "int4")
            ]
            model = optimizer.step(model, fastagg.fedavg(updates, [1, 2, 3], sent=model))
    assert_same_bits(model["backbone"], start["backbone"])
    assert_same_bits(model["mask"], MASK)
    assert (model["head"] > start["head"]).all()


@by_optimizer
def test_a_mean_with_roundings_is_warned_of(make: Callable[[], Any]) -> None:
    model = {"w": normal(generator(8), 300, FLOAT32)}
    update = {"w": fastagg.quantize(model["w"], "int8")}
    sums = fastagg.Accumulator()
    sums.add(update)
    out = {"w": np.zeros(300, np.float32)}
    for mean in (fastagg.fedavg([update]), sums.result(), fastagg.fedavg([update], out=out)):
        with pytest.warns(RuntimeWarning, match=r"mean, leaf 'w': .*sent=model") as caught:
            make().step(model, mean)
        assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make().step(model, fastagg.fedavg([model, update], [1, 0], out=out, sent=model))
        make().step(model, fastagg.fedavg([{"w": fastagg.quantize(model["w"], "fp32")}]))
        make().step({"running_mean": model["w"]}, fastagg.fedavg([{"running_mean": update["w"]}]))


@by_optimizer
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_no_step_leads_away_from_infinity(make: Callable[[], Any], library: str) -> None:
    put = torch.from_numpy if library == "torch" else np.asarray
    optimizer, model = (
        make(),
        {"x": put(np.float32([-np.inf, np.inf, 1, np.inf])), "scalar": put(np.array(-np.inf, np.float32))},
    )
    mean = {"x": put(np.float32([-np.inf, np.inf, 2, 5])), "scalar": put(np.array(-np.inf, np.float32))}
    for _ in range(2):
        result = optimizer.step(model, mean)
        assert result["x"][[0, 1, 3]].tolist() == [-np.inf, np.inf, 5]  # it may become finite
        assert result["scalar"] == -np.inf
        assert result["x"][2] > 1
    before = optimizer.state_dict()
    assert all(np.isfinite(moment).all() for leaf in before["leaves"] for moment in leaf[-1])
    with pytest.raises(fastagg.NonFiniteUpdateError, match="mean, leaf 'x'"):
        optimizer.step(model, {**mean, "x": put(np.float32([np.inf, np.inf, 2, 5]))})
    optimizer.step(model, mean, out=model)
    assert model["x"][0] == -np.inf


def test_fednova_and_scaffold_take_roundings_out_and_keep_a_mask() -> None:
    model = {"w": normal(generator(9), 300, FLOAT32), "mask": MASK}
    update = {"w": fastagg.quantize(model["w"], "int8"), "mask": MASK}
    for result in (
        FedNova(learning_rate=3).step(model, [update, update], [1, 2], [1, 10]),
        Scaffold(model, 2, learning_rate=3).step(
            model, [update, update], [{"w": 0 * model["w"], "mask": 0 * model["w"][:16].reshape(4, 4)}] * 2
        ),
    ):
        assert_same_bits(result["w"], model["w"])
        assert_same_bits(result["mask"], MASK)
