"""Strategies that know the model that was sent: quantised replies of layers that nobody trains, masks, and codes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

flwr = pytest.importorskip("flwr")

from flwr.app import ArrayRecord, ConfigRecord  # noqa: E402

import fastagg.flower as ours  # noqa: E402
import flower_messages as messages  # noqa: E402
from data import generator, normal  # noqa: E402
from fastagg.flower.arrays import read_leaf  # noqa: E402
from flower_messages import LocalGrid, arrays_of, reply_to  # noqa: E402
from reference import assert_same_bits  # noqa: E402

MASK = np.triu(np.full((4, 4), -np.inf, np.float32), 1)
OPTIMIZED: dict[str, dict[str, Any]] = {
    "FedAdam": {},
    "FedYogi": {},
    "FedAdagrad": {},
    "FedAvgM": {"server_momentum": 0.9},
    "QFedAvg": {"client_learning_rate": 0.1, "train_loss_key": "loss"},
}
MEANS: dict[str, dict[str, Any]] = {"FedAvg": {}, "FedProx": {"proximal_mu": 0.1}}
ROBUST: dict[str, dict[str, Any]] = {
    "FedMedian": {},
    "FedTrimmedAvg": {},
    "Krum": {"num_malicious_nodes": 1},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
    "Bulyan": {"num_malicious_nodes": 1},
}
FLEETS = {"int8": ["int8"] * 3, "mixed": ["int8", None, "bf16"], "low": ["int4", "fp8_e4m3", "fp16"]}


def model_of(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    random = generator(1)
    return {
        "backbone": (normal(random, (8, 64), np.dtype(np.float32)) / 16).astype(dtype),
        "head": np.ones(4, dtype),
        "mask": MASK.astype(dtype),
    }


def strategy_of(name: str, nodes: int, **options: Any) -> Any:
    counts = {"min_train_nodes": nodes, "min_evaluate_nodes": nodes, "min_available_nodes": nodes}
    return getattr(ours, name)(**counts, **options)


def next_model(strategy: Any, model: Any, updates: list[Any], number: int = 1) -> dict[str, np.ndarray]:
    grid = LocalGrid(len(updates), lambda message: message)
    requests = strategy.configure_train(number, messages.record_of(model), ConfigRecord(), grid)
    answers = [reply_to(request, update, 7, loss=1.0) for request, update in zip(requests, updates, strict=True)]
    if strategy.streaming:
        for answer in answers:
            strategy._take(answer)
        answers = []
    result = arrays_of(strategy.aggregate_train(number, answers)[0])
    assert strategy.left_out == []
    return result


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("wires", FLEETS.values(), ids=FLEETS)
@pytest.mark.parametrize(("name", "options"), OPTIMIZED.items(), ids=OPTIMIZED)
def test_a_layer_that_nobody_trains_stays(name: str, options: Any, wires: list[Any], streaming: bool) -> None:
    for dtype, rounding in ((np.float32, "nearest"), (np.float16, "stochastic"), (np.float64, "stochastic")):
        strategy, start = strategy_of(name, 3, streaming=streaming, **options), model_of(dtype)
        model = start
        for number in range(1, 4):
            trained = {**model, "head": model["head"] + dtype(1)}
            updates = [ours.to_array_record(trained, wire, rounding=rounding if wire else "nearest") for wire in wires]
            model = next_model(strategy, model, updates, number)
        assert_same_bits(model["backbone"], start["backbone"])
        assert_same_bits(model["mask"], start["mask"])
        assert (model["head"] > start["head"]).all()


@pytest.mark.parametrize("nan_policy", ["drop", "raise", "propagate"])
@pytest.mark.parametrize(
    ("name", "options"), [*OPTIMIZED.items(), *MEANS.items(), *ROBUST.items()], ids=[*OPTIMIZED, *MEANS, *ROBUST]
)
def test_a_mask_of_infinities_stays(name: str, options: Any, nan_policy: str) -> None:
    start = model_of()
    updates = [{**start, "head": start["head"] + np.float32(step)} for step in range(7)]
    result = next_model(strategy_of(name, 7, nan_policy=nan_policy, **options), start, updates)
    assert_same_bits(result["mask"], MASK)
    assert np.isfinite(result["head"]).all()


def test_one_hostile_node_cannot_move_a_mask_of_a_robust_strategy() -> None:
    start = model_of()
    updates = [start] * 6 + [{**start, "mask": np.zeros_like(MASK)}]
    assert_same_bits(next_model(strategy_of("FedMedian", 7), start, updates)["mask"], MASK)
    updates = [{**start, "mask": np.zeros_like(MASK)}] * 6 + [start]
    assert not next_model(strategy_of("FedMedian", 7), start, updates)["mask"].any()


@pytest.mark.parametrize("name", ["FedAvg", "FedAdam", "FedMedian"])
@pytest.mark.parametrize(
    "codes",
    [
        {"q.qweight": np.full((4, 4), 1 << 30, np.int32), "q.scales": np.ones(4, np.float32)},
        {"0": np.frombuffer(b'{"learner": {"gradient_booster": {}}}', np.uint8)},
    ],
    ids=["GPTQ", "booster"],
)
def test_other_quantisers_codes_end_the_run_before_its_first_round(name: str, codes: Any) -> None:
    with pytest.raises(ValueError, match=rf"leaf '{next(iter(codes))}'.*integer_policy"):
        next_model(strategy_of(name, 2), codes, [codes, codes])
    result = next_model(strategy_of(name, 2, integer_policy="first"), codes, [codes, codes])
    assert_same_bits(result[next(iter(codes))], next(iter(codes.values())))


def test_the_seed_of_stochastic_rounding_travels() -> None:
    record = ours.to_array_record({"w": np.ones(300, np.float32)}, "int8", rounding="stochastic", seed=7)
    assert record["w"].stype == "fastagg.int8.256.seed.7.0.0"
    assert read_leaf(record["w"]).seed == (7, 0, 0)
    for seed in ("7.0", "x.0.0", f"{1 << 64}.0.0", "9" * 5000 + ".0.0"):
        record["w"].stype = f"fastagg.int8.256.seed.{seed}"
        with pytest.raises(ValueError, match=r"stype such as|seed: expected"):
            read_leaf(record["w"])


def test_a_leaf_with_an_infinity_travels_as_it_is_on_wires_with_scales() -> None:
    for wire in ("int8", "int4", "fp8_e4m3", "sign", "fp16"):
        record: ArrayRecord = ours.to_array_record({"mask": MASK}, wire)
        assert_same_bits(ours.to_state_dict(record)["mask"].numpy(), MASK)


def test_the_model_that_a_strategy_keeps_cannot_be_written() -> None:
    strategy, start = strategy_of("FedAvgM", 2, server_momentum=0.9), model_of()
    next_model(strategy, start, [start, start])
    with pytest.raises(ValueError, match="read-only"):
        strategy.current_arrays["head"][0] = 5
