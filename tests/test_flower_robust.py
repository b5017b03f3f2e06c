from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import fastagg
import fastagg.robust
from fastagg import NonFiniteUpdateError

flwr = pytest.importorskip("flwr")

from flwr.app import ArrayRecord, Message, MessageType, MetricRecord, RecordDict  # noqa: E402
from flwr.serverapp import strategy as flower  # noqa: E402

import fastagg.flower as ours  # noqa: E402
from data import generator  # noqa: E402
from fastagg.flower import NoReplyLeftError, quantize_mod  # noqa: E402
from flower_messages import LocalGrid, arrays_of, failure, record_of, replies, reply_to  # noqa: E402

NODES = 12
NAMES = ["FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan"]
ARGUMENTS: dict[str, dict[str, Any]] = {
    "FedMedian": {},
    "FedTrimmedAvg": {"beta": 0.2},
    "Krum": {"num_malicious_nodes": 2},
    "MultiKrum": {"num_malicious_nodes": 2, "num_nodes_to_select": 6},
    "Bulyan": {"num_malicious_nodes": 2},
}
ROUNDING = {"float16": 2e-3, "float32": 2e-6, "float64": 1e-12}

every_strategy = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("gc.collect", lambda: 0)  # Flower asks for it whenever it reads a record
    level = logging.getLogger("flwr").level
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("flwr").setLevel(level)


def strategy_of(name: str, **more: Any) -> Any:
    return getattr(ours, name)(**ARGUMENTS[name], **more)


def updates_of(nodes: int, hostile: int = 0, dtype: str = "float32", seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Honest nodes' models around a common one, the last ones' far from it."""
    random = generator(seed)
    model = {"conv.weight": random.normal(size=(3, 5, 7)), "fc.bias": random.normal(size=11)}
    return [
        {
            name: (x + random.normal(0, 0.3, x.shape) + (9 if node >= nodes - hostile else 0)).astype(dtype)
            for name, x in model.items()
        }
        for node in range(nodes)
    ]


def batch_of(updates: list[Any], weights: Any = None) -> list[Message]:
    """Replies of nodes 1, 2, … with a loss and losses per class."""
    weights = weights or [10 * node + 3 for node in range(len(updates))]
    requests = (Message(RecordDict(), node, MessageType.TRAIN) for node in range(1, len(updates) + 1))
    return [
        reply_to(request, update, weight, loss=float(weight % 7), per_class=[1.0, float(weight)])
        for request, update, weight in zip(requests, updates, weights, strict=True)
    ]


def aggregated(strategy: Any, batch: list[Message], server_round: int = 1) -> dict[str, np.ndarray]:
    return arrays_of(strategy.aggregate_train(server_round, batch)[0])


def assert_same_model(result: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(result) == list(expected)
    for name, array in expected.items():
        assert result[name].dtype == array.dtype
        assert result[name].tobytes() == array.tobytes(), name


def assert_close(result: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(result) == list(expected)
    for name, array in expected.items():
        assert (result[name].dtype, result[name].shape) == (array.dtype, array.shape)
        rounding = ROUNDING[array.dtype.name]
        np.testing.assert_allclose(result[name], array, rtol=rounding, atol=rounding, err_msg=name)


def assert_close_metrics(result: MetricRecord, expected: MetricRecord) -> None:
    assert set(result) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize(
    ("name", "dtype"),
    # Flower's distances between fp16 models are fp16 themselves, and overflow.
    [(name, dtype) for name in NAMES for dtype in ROUNDING if dtype != "float16" or name in NAMES[:2]],
)
@pytest.mark.parametrize("nodes", [11, NODES])
def test_model_and_metrics_are_flowers(name: str, dtype: str, nodes: int) -> None:
    updates = updates_of(nodes, 2, dtype)
    theirs = getattr(flower, name)(**ARGUMENTS[name])
    arrays, metrics = strategy_of(name).aggregate_train(1, batch_of(updates))
    their_arrays, their_metrics = theirs.aggregate_train(1, batch_of(updates))
    assert_close(arrays_of(arrays), arrays_of(their_arrays))
    assert_close_metrics(metrics, their_metrics)


@every_strategy
def test_constructor_arguments_are_flowers(name: str) -> None:
    made = getattr(ours, name)(0.5, 0.25, 3, 4, 5)
    assert isinstance(made, getattr(flower, name))
    assert isinstance(made, ours.FedAvg)
    plain = vars(getattr(flower, name)(0.5, 0.25, 3, 4, 5))
    assert {key: value for key, value in vars(made).items() if key in plain} == plain
    made.summary()


@every_strategy
def test_hostile_nodes_are_withstood(name: str) -> None:
    result = aggregated(strategy_of(name), batch_of(updates_of(NODES, 2)))
    honest = np.mean([update["fc.bias"] for update in updates_of(NODES, 2)[:-2]], axis=0)
    assert np.abs(result["fc.bias"] - honest).max() < 1


@every_strategy
def test_the_order_of_arrival_changes_no_bit(name: str) -> None:
    def arriving(order: Any) -> tuple[dict[str, np.ndarray], MetricRecord]:
        batch = batch_of(updates_of(NODES, 2))
        arrays, metrics = strategy_of(name).aggregate_train(1, [batch[node] for node in order])
        return arrays_of(arrays), metrics

    result, metrics = arriving(range(NODES))
    for seed in range(3):
        again, other_metrics = arriving(generator(seed).permutation(NODES))
        assert_same_model(again, result)
        assert other_metrics == metrics


@every_strategy
def test_leaves_are_matched_by_name(name: str) -> None:
    updates = updates_of(NODES)
    expected = aggregated(strategy_of(name), batch_of(updates))
    updates[1:] = [dict(reversed(update.items())) for update in updates[1:]]
    assert_same_model(aggregated(strategy_of(name), batch_of(updates)), expected)


@every_strategy
def test_replies_that_do_not_fit_are_left_out(name: str) -> None:
    updates = updates_of(NODES)
    expected = aggregated(strategy_of(name), batch_of(updates))
    strategy = strategy_of(name)
    wrong = {"fc.bias": np.float32([1])}
    batch = [failure(99), *batch_of([*updates, wrong])]
    arrays, metrics = strategy.aggregate_train(1, batch)
    assert_same_model(arrays_of(arrays), expected)
    assert [(left.server_round, left.node) for left in strategy.left_out] == [(1, NODES + 1)]
    assert metrics["replies-left-out"] == 1


@every_strategy
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nodes_with_nan_are_left_out(name: str, value: float) -> None:
    updates = updates_of(NODES)
    strategy = strategy_of(name)
    broken = {leaf: x.copy() for leaf, x in updates[0].items()}
    broken["fc.bias"][3] = value
    arrays, metrics = strategy.aggregate_train(1, batch_of([*updates, broken]))
    expected_arrays, expected_metrics = strategy_of(name).aggregate_train(1, batch_of(updates))
    assert_same_model(arrays_of(arrays), arrays_of(expected_arrays))
    ((_, node, reason),) = strategy.left_out
    assert node == NODES + 1
    assert "leaf 'fc.bias'" in reason
    assert metrics == {**expected_metrics, "replies-left-out": 1}
    with pytest.raises(NonFiniteUpdateError, match=rf"node {NODES + 1}, leaf 'fc.bias'"):
        strategy_of(name, nan_policy="raise").aggregate_train(1, batch_of([*updates, broken]))


@every_strategy
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_withstood_where_it_is_propagated(name: str, value: float) -> None:
    updates = updates_of(NODES)
    updates[3]["fc.bias"][:] = value
    strategy = strategy_of(name, nan_policy="propagate")
    assert np.isfinite(aggregated(strategy, batch_of(updates))["fc.bias"]).all()
    assert strategy.left_out == []


@every_strategy
def test_only_nan_replies_are_an_error_that_names_the_nodes(name: str) -> None:
    broken = {"a": np.float32([np.nan])}
    with pytest.raises(NoReplyLeftError):
        strategy_of(name).aggregate_train(1, replies([broken] * NODES, [1] * NODES))


@every_strategy
def test_no_result_gives_nothing(name: str) -> None:
    for batch in ([], [failure(1), failure(2)]):
        assert strategy_of(name).aggregate_train(1, batch) == (None, None)


@every_strategy
def test_dtypes_stay_and_integers_follow_the_rule(name: str) -> None:
    random = generator()
    updates = [
        {
            "half": random.normal(size=9).astype(np.float16),
            "double": random.normal(size=()),
            "count": np.int64(100 + node),
            "mask": np.bool_([node < 9, node >= 9]),
            "empty": np.zeros((0, 4), np.float32),
        }
        for node in range(NODES)
    ]
    result = aggregated(strategy_of(name), batch_of(updates))
    assert {leaf: (x.dtype, x.shape) for leaf, x in result.items()} == {
        leaf: (np.asarray(x).dtype, np.shape(x)) for leaf, x in updates[0].items()
    }
    assert 100 < result["count"] < 100 + NODES - 1 or name == "Krum"
    assert result["mask"].tolist() == [True, False] or name == "Krum"
    assert aggregated(strategy_of(name, integer_policy="max"), batch_of(updates))["count"] in (
        [100 + NODES - 1] if name in ("FedMedian", "FedTrimmedAvg") else range(100, 100 + NODES)
    )


@every_strategy
def test_replies_are_read_in_place_and_not_altered(name: str) -> None:
    batch = batch_of(updates_of(NODES, 2))
    before = [{leaf: array.data for leaf, array in reply.content["arrays"].items()} for reply in batch]
    strategy_of(name).aggregate_train(1, batch)
    after = [{leaf: array.data for leaf, array in reply.content["arrays"].items()} for reply in batch]
    assert before == after
    assert all(one[leaf] is other[leaf] for one, other in zip(before, after, strict=True) for leaf in one)


@every_strategy
@pytest.mark.parametrize("wire", ["fp16", "bf16", "int8", "int4"])
def test_quantised_uploads_are_decoded_on_the_way(name: str, wire: str) -> None:
    updates = updates_of(NODES, 2)
    mod = quantize_mod(wire)
    request = Message(RecordDict(), 1, MessageType.TRAIN)
    left = iter(updates)
    sent = [mod(request, None, lambda message, _: reply_to(message, next(left))).content["arrays"] for _ in updates]
    decoded = [ours.to_state_dict(record) for record in sent]
    plain = [{leaf: tensor.numpy() for leaf, tensor in update.items()} for update in decoded]
    assert_close(aggregated(strategy_of(name), batch_of(sent)), aggregated(strategy_of(name), batch_of(plain)))


@every_strategy
def test_streaming_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"streaming.*{name}"):
        strategy_of(name, streaming=True)


@every_strategy
@pytest.mark.parametrize("argument", [{"nan_policy": "ignore"}, {"integer_policy": "mean"}])
def test_wrong_policies_are_refused_at_once(name: str, argument: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=next(iter(argument))):
        strategy_of(name, **argument)


@pytest.mark.parametrize("name", ["Krum", "MultiKrum", "Bulyan"])
@pytest.mark.parametrize("argument", [{"num_malicious_nodes": -1}, {"convention": "guess"}])
def test_wrong_arguments_of_distance_rules_are_refused_at_once(name: str, argument: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(argument))):
        getattr(ours, name)(**argument)


def test_no_node_to_select_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="num_nodes_to_select"):
        ours.MultiKrum(num_nodes_to_select=0)


@pytest.mark.parametrize("beta", [-0.1, 0.5, float("nan")])
def test_a_wrong_beta_is_refused_at_once(beta: float) -> None:
    with pytest.raises(ValueError, match="beta"):
        ours.FedTrimmedAvg(beta=beta)


@pytest.mark.parametrize("name", ["FedMedian", "FedTrimmedAvg"])
def test_coordinate_rules_ignore_the_number_of_examples(name: str) -> None:
    updates = updates_of(NODES)
    equal = aggregated(strategy_of(name), batch_of(updates, [1] * NODES))
    assert_same_model(aggregated(strategy_of(name), batch_of(updates)), equal)


@every_strategy
def test_a_reply_of_weight_0_has_no_part_in_anything(name: str) -> None:
    updates, weights = updates_of(NODES), [5] * NODES
    arrays, metrics = strategy_of(name).aggregate_train(1, batch_of(updates, weights))
    absent = {"other": np.float32([np.nan])}
    again, more_metrics = strategy_of(name).aggregate_train(1, batch_of([*updates, absent], [*weights, 0]))
    assert_same_model(arrays_of(again), arrays_of(arrays))
    assert more_metrics == metrics


def test_few_replies_are_not_trimmed_at_all() -> None:
    updates = updates_of(4)
    mean = aggregated(ours.FedAvg(), batch_of(updates, [1] * 4))
    assert_close(aggregated(ours.FedTrimmedAvg(beta=0.24), batch_of(updates)), mean)


def test_too_few_replies_for_bulyan_keep_the_model_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    strategy = strategy_of("Bulyan")
    with caplog.at_level(logging.WARNING, logger="flwr"):
        assert strategy.aggregate_train(4, batch_of(updates_of(10))) == (None, None)
    (record,) = caplog.records
    for part in ("Bulyan keeps the model", "at least 11 updates (4f + 3 for f = 2)", "got 10"):
        assert part in record.getMessage()
    assert strategy.selected == {}
    assert strategy.aggregate_train(5, batch_of(updates_of(11)))[0] is not None


@pytest.mark.parametrize("name", ["Krum", "MultiKrum"])
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_krum_goes_on_with_few_replies_as_flower_does_and_warns(
    name: str, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    batch = batch_of(updates_of(count))
    arguments = {"num_malicious_nodes": 2} | ({"num_nodes_to_select": 2} if name == "MultiKrum" else {})
    with caplog.at_level(logging.WARNING, logger="flwr"):
        result = aggregated(getattr(ours, name)(**arguments), batch)
    assert f"{count} replies are fewer than 7 (2f + 3 for f = 2)" in caplog.records[0].getMessage()
    if count > 2:  # of two, both are as near to each other: the smallest node id wins here, the first to come there
        assert_close(result, aggregated(getattr(flower, name)(**arguments), batch))


def test_replies_that_are_left_out_do_not_count_as_enough() -> None:
    updates = updates_of(11)
    updates[2]["fc.bias"][0] = np.nan
    strategy = strategy_of("Bulyan")
    arrays, metrics = strategy.aggregate_train(1, batch_of(updates))
    assert arrays is None
    assert metrics == {"replies-left-out": 1}
    assert [node for _, node, _ in strategy.left_out] == [3]
    with pytest.raises(NonFiniteUpdateError, match="node 3"):
        strategy_of("Bulyan", nan_policy="raise").aggregate_train(1, batch_of(updates))


def test_a_run_goes_on_after_a_round_with_too_few_replies() -> None:
    updates = updates_of(7)

    def answer(message: Message) -> Message:
        node, server_round = message.metadata.dst_node_id, int(message.metadata.group_id)
        if message.metadata.message_type != MessageType.TRAIN:
            return reply_to(message, None, 1)
        return failure(node) if server_round == 1 and node < 3 else reply_to(message, updates[node - 1])

    seen: dict[int, ArrayRecord] = {}
    strategy = ours.Bulyan(num_malicious_nodes=1)
    initial = record_of(updates[0])
    strategy.start(LocalGrid(7, answer), initial, 2, evaluate_fn=seen.__setitem__)
    assert_same_model(arrays_of(seen[1]), arrays_of(initial))
    assert len(strategy.selected[2]) == 5


def test_the_selected_nodes_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    updates = updates_of(NODES, 2)
    hostile = {NODES - 1, NODES}
    strategy = ours.MultiKrum(num_malicious_nodes=2, num_nodes_to_select=3)
    with caplog.at_level(logging.INFO, logger="flwr"):
        result = aggregated(strategy, batch_of(updates, list(range(1, NODES + 1))), 6)
    selected = strategy.selected[6]
    assert len(set(selected)) == 3
    assert not hostile & set(selected)
    assert any(str(list(selected)) in record.getMessage() for record in caplog.records)
    mean = np.average([updates[node - 1]["fc.bias"].astype(np.float64) for node in selected], axis=0, weights=selected)
    np.testing.assert_allclose(result["fc.bias"], mean, rtol=1e-6)


def test_ties_go_to_the_smallest_node_id() -> None:
    updates = [{"a": np.float32([0, 0])}] * 5 + [{"a": np.float32([9, 9])}] * 2
    batch = batch_of(updates)
    for order in (batch, batch[::-1]):
        strategy = ours.MultiKrum(num_malicious_nodes=2, num_nodes_to_select=2)
        strategy.aggregate_train(1, order)
        assert sorted(strategy.selected[1]) == [1, 2]


def test_more_nodes_to_select_than_replied_is_all() -> None:
    updates = updates_of(7)
    batch = batch_of(updates)
    strategy = ours.MultiKrum(num_nodes_to_select=50)
    assert_close(aggregated(strategy, batch), aggregated(ours.FedAvg(), batch_of(updates)))
    assert sorted(strategy.selected[1]) == list(range(1, 8))


@pytest.mark.parametrize("name", ["Krum", "MultiKrum", "Bulyan"])
def test_integers_have_no_part_in_distances(name: str) -> None:
    selected = []
    for factor in (1, 10**6):
        updates = [{**update, "step": np.int64(node * factor)} for node, update in enumerate(updates_of(NODES, 2))]
        strategy = strategy_of(name)
        strategy.aggregate_train(1, batch_of(updates))
        selected.append(strategy.selected[1])
    assert selected[0] == selected[1]


def test_krum_sees_small_updates_of_large_models() -> None:
    random = generator(3)
    model = random.normal(0, 10, 50_000)
    spread = [3e-3, 1e-3, 3e-3, 3e-3, 3e-3, 3e-3, 3e-3]
    updates = [{"w": (model + random.normal(0, one, model.size)).astype(np.float32)} for one in spread]
    strategy = ours.Krum(num_malicious_nodes=2)
    assert_same_model(aggregated(strategy, batch_of(updates)), updates[1])
    assert strategy.selected[1] == [2]


def one_leaf(*values: float) -> list[dict[str, np.ndarray]]:
    return [{"w": np.float32([value])} for value in values]


def test_bulyan_selects_one_by_one_where_it_is_asked_to() -> None:
    updates = updates_of(NODES, 2, seed=5)
    selected, models = [], []
    for one_by_one in (False, True):
        strategy = strategy_of("Bulyan", one_by_one=one_by_one)
        models.append(aggregated(strategy, batch_of(updates)))
        selected.append(strategy.selected[1])
    assert selected[0] != selected[1]
    paper = fastagg.robust.bulyan(updates, 2)
    assert_same_model(models[1], paper)


def test_conventions_choose_otherwise() -> None:
    updates = one_leaf(3, 10, 5, 4, 1, 10)
    chosen = {}
    for convention in ("paper", "byzfl", "byzantine_momentum"):
        strategy = ours.Krum(num_malicious_nodes=1, convention=convention)
        strategy.aggregate_train(1, batch_of(updates))
        chosen[convention] = strategy.selected[1]
    assert chosen == {"paper": [1], "byzfl": [3], "byzantine_momentum": [4]}


def test_bulyan_takes_a_selection_rule() -> None:
    updates = updates_of(NODES, 2)
    calls = []

    def last_ones(contents: list[RecordDict], hostile: int, count: int) -> list[RecordDict]:
        calls.append((len(contents), hostile, count))
        return contents[-count:]

    def made(module: Any) -> Any:
        return module.Bulyan(num_malicious_nodes=2, selection_rule=last_ones)

    arrays, metrics = made(ours).aggregate_train(1, batch_of(updates))
    their_arrays, their_metrics = made(flower).aggregate_train(1, batch_of(updates))
    assert calls == [(NODES, 2, NODES - 4)] * 2
    assert_close(arrays_of(arrays), arrays_of(their_arrays))
    assert_close_metrics(metrics, their_metrics)


def test_differential_privacy_with_an_accountant_does_not_take_them_for_a_mean() -> None:
    probe: dict[str, Any] = {"__name__": "flwr.serverapp.strategy.probe"}
    exec("def method(owner): return owner.aggregate_train", probe)
    assert probe["method"](ours.FedAvg) is flower.FedAvg.aggregate_train
    for name in NAMES:
        assert probe["method"](getattr(ours, name)) is not flower.FedAvg.aggregate_train
