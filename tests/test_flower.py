from __future__ import annotations

import inspect
import logging
import re
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import fastagg

flwr = pytest.importorskip("flwr")
torch = pytest.importorskip("torch")

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict  # noqa: E402
from flwr.serverapp import strategy as flower  # noqa: E402

import flower_messages as messages  # noqa: E402
from data import counts, generator, normal  # noqa: E402
from fastagg.flower import (  # noqa: E402
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedOpt,
    FedProx,
    FedYogi,
    NoReplyLeftError,
    QFedAvg,
    aggregate,
    aggregate_inplace,
    quantize_mod,
    to_array_record,
    to_state_dict,
)
from fastagg.flower.arrays import FreshArrays, read_leaf, write_leaf  # noqa: E402
from flower_messages import LocalGrid, arrays_of, failure, replies, reply_to  # noqa: E402
from reference import LARGEST_ERROR, assert_same_bits, magnitude, mean, wide  # noqa: E402

both_modes = pytest.mark.parametrize("streaming", [False, True], ids=["collected", "streamed"])

GOOD = [{"a": np.float32([1, 2, 3]), "b": np.int64(4)}, {"a": np.float32([3, 4, 7]), "b": np.int64(5)}]
GOOD_MEAN = {"a": np.float32([2.5, 3.5, 6]), "b": np.int64(5)}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("gc.collect", lambda: 0)  # Flower asks for it whenever it reads a record
    level = logging.getLogger("flwr").level
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("flwr").setLevel(level)


def configured(strategy: Any, model: dict[str, np.ndarray], nodes: int, server_round: int = 1) -> list[Message]:
    """The messages of a round whose model is sent to all nodes."""
    grid = LocalGrid(nodes, lambda message: message)
    requests = strategy.configure_train(server_round, messages.record_of(model), ConfigRecord(), grid)
    return sorted(requests, key=lambda request: request.metadata.dst_node_id)


def aggregated(strategy: Any, batch: list[Message], server_round: int = 1) -> dict[str, np.ndarray]:
    return arrays_of(strategy.aggregate_train(server_round, batch)[0])


def assert_equal(result: dict[str, np.ndarray], expected: dict[str, Any]) -> None:
    assert list(result) == list(expected)
    for name, array in expected.items():
        assert_same_bits(result[name], np.asarray(array))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_mean_is_fedavgs(dtype: str) -> None:
    random, dtype = generator(1), np.dtype(dtype)
    updates = [{"w": normal(random, 777, dtype), "b": normal(random, 3, dtype)} for _ in range(9)]
    weights = counts(random, 9)
    result = aggregated(FedAvg(), replies(updates, weights))
    assert_equal(result, fastagg.fedavg(updates, weights))


def test_float64_gives_flowers_mean_or_a_more_exact_one() -> None:
    random = generator(2)
    updates = [{"w": random.normal(size=(7, 3)), "b": np.array(random.normal())} for _ in range(5)]
    weights = [0.25, 0.4, 0.35, 3, 0.1]
    ours, _ = FedAvg().aggregate_train(1, replies(updates, weights))
    theirs, _ = flower.FedAvg().aggregate_train(1, replies(updates, weights))
    for name, mine, other in zip(updates[0], ours.to_numpy_ndarrays(), theirs.to_numpy_ndarrays(), strict=True):
        sizes = np.average([np.abs(update[name]) for update in updates], axis=0, weights=weights)
        assert np.all(np.abs(mine - other) <= 4 * np.spacing(sizes))  # Flower rounds at every step


def test_dtypes_stay_and_integers_follow_their_policy() -> None:
    updates = [
        {
            "count": np.int64(10),
            "flag": np.array([True, False]),
            "small": np.uint8([200]),
            "order": np.arange(6.0).reshape(2, 3),
        },
        {
            "count": np.int64(20),
            "flag": np.array([False, False]),
            "small": np.uint8([100]),
            "order": np.ones((2, 3), order="F"),
        },
    ]
    result = aggregated(FedAvg(), replies(updates, [1, 1]))
    assert_equal(
        result,
        {
            "count": np.int64(20),
            "flag": [True, False],
            "small": np.uint8([200]),
            "order": (np.arange(6.0).reshape(2, 3) + 1) / 2,
        },
    )
    rounded = aggregated(FedAvg(integer_policy="round"), replies(updates, [1, 1]))
    assert (rounded["count"], rounded["small"]) == (15, np.uint8([150]))
    assert aggregated(FedAvg(integer_policy="first"), replies(updates, [1, 1]))["count"] == 10


@both_modes
def test_leaves_are_matched_by_name(streaming: bool) -> None:
    updates = [{"a": np.float32([0]), "b": np.float32([100])}, {"b": np.float32([100]), "a": np.float32([0])}]
    strategy = FedAvg(streaming=streaming)
    configured(strategy, updates[0], 2)
    assert_equal(aggregated(strategy, replies(updates, [1, 1])), updates[0])


@pytest.fixture(scope="module")
def replies_of_1() -> list[Message]:
    """4096 of them, in fp16."""
    return replies([{"w": np.ones(2, np.float16)}] * 4096, [1] * 4096)


@both_modes
def test_half_precision_is_accumulated_wider(streaming: bool, replies_of_1: list[Message]) -> None:
    strategy = FedAvg(streaming=streaming)
    result = aggregated(strategy, replies_of_1)
    assert_equal(result, {"w": np.ones(2, np.float16)})
    large = aggregated(FedAvg(), replies([{"w": np.full(2, 100, np.float16)}] * 2, [70_000, 1000]))
    assert_equal(large, {"w": np.full(2, 100, np.float16)})


def without(update: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in update.items() if key != name}


def record_with(**changed: Any) -> ArrayRecord:
    """A good record, some of its first array's attributes changed."""
    record = messages.record_of(GOOD[0])
    array = record["a"]
    fields = {"dtype": array.dtype, "shape": array.shape, "stype": array.stype, "data": array.data, **changed}
    record["a"] = Array(*fields.values())
    return record


def header_saying(text: str) -> bytes:
    """An .npy file whose header is something else."""
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


DATA = messages.record_of(GOOD[0])["a"].data
PICKLED = DATA[:128].replace(b"'<f4'", b"'|O' ") + DATA[128:]
NO_BOOLS = DATA[:128].replace(b"'<f4'", b"'|b1'") + bytes([0, 1, 2])
BAD_MODELS = {
    "missing leaf": (without(GOOD[0], "b"), r"lacks leaf 'b' int64 \(\)"),
    "extra leaf": ({**GOOD[0], "c": np.float32(0)}, r"has leaf 'c' float32 \(\)"),
    "other shape": (
        {**GOOD[0], "a": np.float32([1])},
        r"lacks leaf 'a' float32 \(3,\) and has leaf 'a' float32 \(1,\)",
    ),
    "other dtype": ({**GOOD[0], "a": np.float64([1, 2, 3])}, "has leaf 'a' float64"),
    "no arrays": (ArrayRecord(), "an ArrayRecord without arrays"),
    "no record": (None, "exactly one ArrayRecord, got 0"),
    "truncated": (record_with(data=DATA[:-1]), r"leaf 'a': its header promises 12 bytes of float32 \(3,\), got 11"),
    "too long": (record_with(data=DATA + b"\0"), "promises 12 bytes .* got 13"),
    "cut header": (record_with(data=DATA[:60]), "leaf 'a': its header is no .npy header"),
    "no header": (record_with(data=b""), "leaf 'a': its header is no .npy header"),
    "unfinished header": (record_with(data=header_saying("((((((")), "leaf 'a': its header is no .npy header"),
    "unfinished text": (record_with(data=header_saying("'''abc")), "leaf 'a': its header is no .npy header"),
    "deep header": (record_with(data=header_saying("-" * 9000)), "leaf 'a': its header is no .npy header"),
    "other bytes": (record_with(data=bytes(200)), "leaf 'a': its header is no .npy header"),
    "pickled": (record_with(data=PICKLED), "leaf 'a': dtype object is not supported"),
    "no bools": (record_with(data=NO_BOOLS), "leaf 'a': its bytes are not those of bools"),
    "text": ({**GOOD[0], "a": np.array(["x"])}, "leaf 'a': dtype .* is not supported"),
    "other serialisation": (record_with(stype="torch"), "leaf 'a': expected an array serialised by"),
    "unknown wire": (record_with(stype="fastagg.int3.256"), "expected a stype such as"),
    "wrong block": (record_with(stype="fastagg.int8.77", data=bytes(7)), "block: expected a power of two"),
    "short codes": (record_with(stype="fastagg.int8.256", data=bytes(6)), r"expected 7 bytes of int8 codes .* got 6"),
}
BAD_WEIGHTS = {
    "negative": -1,
    "nan": float("nan"),
    "infinite": float("inf"),
    "list": [1],
    "beyond floats": 10**400,
}


@both_modes
@pytest.mark.parametrize("name", BAD_MODELS)
@pytest.mark.parametrize("position", [0, 2])
def test_a_model_that_does_not_fit_is_left_out(name: str, position: int, streaming: bool) -> None:
    update, reason = BAD_MODELS[name]
    strategy = FedAvg(streaming=streaming)
    requests = configured(strategy, GOOD[0], 3)
    updates = list(zip(GOOD, [1, 3], strict=True))
    updates.insert(position, (update, 7))
    batch = [reply_to(request, *update) for request, update in zip(requests, updates, strict=True)]
    arrays, metrics = strategy.aggregate_train(1, batch)
    assert_equal(arrays_of(arrays), GOOD_MEAN)
    assert metrics == {"replies-left-out": 1}
    ((server_round, node, why),) = strategy.left_out
    assert (server_round, node) == (1, position + 1)
    assert re.search(reason, why), why


@both_modes
@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_a_wrong_weight_leaves_the_reply_out(name: str, streaming: bool) -> None:
    strategy = FedAvg(streaming=streaming)
    batch = replies([GOOD[0], GOOD[1], GOOD[0]], [1, 3, BAD_WEIGHTS[name]])
    assert_equal(aggregated(strategy, batch), GOOD_MEAN)
    assert "num-examples" in strategy.left_out[0].reason


@both_modes
def test_a_missing_weight_names_the_key(streaming: bool) -> None:
    strategy = FedAvg(weighted_by_key="steps", streaming=streaming)
    requests = configured(strategy, GOOD[0], 2)
    batch = [reply_to(requests[0], GOOD[0], 1), reply_to(requests[1], GOOD[1], 1, steps=5)]
    assert_equal(aggregated(FedAvg(weighted_by_key="steps"), [batch[1]]), GOOD[1])
    batch[0].content["metrics"]["loss"] = 1.0
    assert strategy.aggregate_train(1, batch)[0] is not None
    assert "has no 'steps'" in strategy.left_out[0].reason


def test_replies_with_two_records_of_a_kind_are_left_out() -> None:
    strategy = FedAvg()
    batch = replies([*GOOD, *GOOD], [1, 3, 1, 1])
    batch[2].content["more"] = messages.record_of(GOOD[0])
    batch[3].content["more"] = MetricRecord({"x": 1})
    assert_equal(aggregated(strategy, batch), GOOD_MEAN)
    assert [entry.reason for entry in strategy.left_out] == [
        "expected exactly one ArrayRecord, got 2",
        "expected exactly one MetricRecord, got 2",
    ]


@both_modes
def test_a_reply_of_weight_0_contributes_nothing(streaming: bool) -> None:
    strategy = FedAvg(streaming=streaming)
    broken = {**GOOD[0], "a": np.float32([np.nan, 0, np.inf])}
    configured(strategy, GOOD[0], 3)
    assert_equal(aggregated(strategy, replies([broken, *GOOD], [0, 1, 3])), GOOD_MEAN)
    assert strategy.left_out == []


@both_modes
def test_only_weights_of_0_are_an_error_that_says_so(streaming: bool) -> None:
    with pytest.raises(NoReplyLeftError, match="round 1: no reply can be averaged; 2 of weight 0"):
        FedAvg(streaming=streaming).aggregate_train(1, replies(GOOD, [0, 0]))


@both_modes
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_policies(streaming: bool, value: float) -> None:
    broken = {**GOOD[0], "a": np.float32([1, value, 3])}
    batch = lambda: replies([GOOD[0], broken, GOOD[1]], [1, 5, 3])  # noqa: E731
    dropping = FedAvg(streaming=streaming)
    arrays, metrics = dropping.aggregate_train(1, batch())
    assert_equal(arrays_of(arrays), GOOD_MEAN)
    assert metrics["replies-left-out"] == 1
    assert dropping.left_out[0].node == 2
    assert re.search("leaf 'a'.* holds a NaN", dropping.left_out[0].reason)
    with pytest.raises(ValueError, match=r"^node 2, leaf 'a'.* holds a NaN"):
        FedAvg(nan_policy="raise", streaming=streaming).aggregate_train(1, batch())
    spread = aggregated(FedAvg(nan_policy="propagate", streaming=streaming), batch())
    assert not np.isfinite(spread["a"][1])
    assert np.isfinite(spread["a"][[0, 2]]).all()


@both_modes
def test_only_nan_replies_are_an_error_that_names_the_nodes(streaming: bool) -> None:
    broken = {"a": np.float32([np.nan])}
    strategy = FedAvg(streaming=streaming)
    with pytest.raises(NoReplyLeftError, match="leaf 'a'"):
        strategy.aggregate_train(1, replies([broken, broken], [1, 1]))


@both_modes
def test_no_reply_and_only_failures_give_nothing(streaming: bool) -> None:
    strategy = FedAvg(streaming=streaming)
    for server_round, batch in enumerate(([], [failure(1), failure(2)]), start=1):
        configured(strategy, GOOD[0], 2, server_round)
        assert strategy.aggregate_train(server_round, batch) == (None, None)
        assert strategy.aggregate_evaluate(server_round, batch) is None
    assert_equal(aggregated(strategy, [failure(3), *replies(GOOD, [1, 3])], 3), GOOD_MEAN)


@both_modes
def test_a_round_without_a_usable_reply_leaves_the_next_one_as_it_was(streaming: bool) -> None:
    strategy = FedAvg(streaming=streaming)
    configured(strategy, GOOD[0], 2)
    with pytest.raises(
        NoReplyLeftError, match=r"round 1: .*; node 1: expected .* 'num-examples'.*; node 2: expected exactly"
    ):
        strategy.aggregate_train(1, replies([GOOD[0], None], [-1, 1]))
    configured(strategy, GOOD[0], 2, 2)
    assert_equal(aggregated(strategy, replies(GOOD, [1, 3]), 2), GOOD_MEAN)


@both_modes
def test_a_node_counts_once(streaming: bool) -> None:
    strategy = FedAvg(streaming=streaming)
    first, second = replies(GOOD, [1, 3])
    (again,) = replies([{"a": np.float32([9, 9, 9]), "b": np.int64(9)}], [9])
    assert_equal(aggregated(strategy, [first, again, second]), GOOD_MEAN)
    assert strategy.left_out == [(1, 1, "has already replied in this round")]


@both_modes
def test_a_late_reply_of_an_older_round_is_left_out(streaming: bool) -> None:
    strategy = FedAvg(streaming=streaming)
    old = configured(strategy, GOOD[0], 3, 1)
    strategy.aggregate_train(1, [reply_to(old[0], GOOD[0])])
    new = configured(strategy, GOOD[0], 3, 2)
    late = reply_to(old[2], {"a": np.float32([9, 9, 9]), "b": np.int64(9)}, 100)
    batch = [late, reply_to(new[0], GOOD[0], 1), reply_to(new[1], GOOD[1], 3)]
    assert_equal(aggregated(strategy, batch, 2), GOOD_MEAN)
    assert strategy.left_out == [(2, 3, "is of round 1, not of round 2")]


def test_replies_unlike_the_model_never_make_a_mean() -> None:
    more = {**GOOD[0], "x": np.float32([1])}
    for strategy in (FedAvg(), FedAvg(streaming=True), FedAdam()):
        requests = configured(strategy, GOOD[0], 3)
        with pytest.raises(NoReplyLeftError, match="node 3: differs from what was expected: has leaf 'x'"):
            strategy.aggregate_train(1, [reply_to(request, more) for request in requests])


def test_where_all_nodes_send_another_dtype_theirs_is_kept() -> None:
    strategy = FedAvg()
    requests = configured(strategy, {"w": np.ones(4, np.float32)}, 2)
    halves = {"w": np.full(4, 2, np.float16)}
    assert_equal(aggregated(strategy, [reply_to(request, halves) for request in requests]), halves)


@both_modes
@pytest.mark.parametrize("dtypes", [(">f4", "<f4"), (">f4", ">f4"), ("<f4", ">f4")])
def test_orders_of_bytes_are_the_senders_own_affair(streaming: bool, dtypes: tuple[str, str]) -> None:
    strategy = FedAvg(streaming=streaming)
    configured(strategy, {"w": np.zeros(3, ">f4")}, 2)
    updates = [{"w": np.array([1, 2, value], dtype)} for value, dtype in zip((3, 5), dtypes, strict=True)]
    assert_equal(aggregated(strategy, replies(updates, [1, 1])), {"w": np.float32([1, 2, 4])})
    optimised = FedAdam()
    requests = configured(optimised, {"w": np.zeros(3, ">f4")}, 2)
    assert aggregated(optimised, [reply_to(request, updates[0]) for request in requests])["w"].dtype == np.float32


@both_modes
def test_replies_of_weight_0_have_no_part_in_forms_and_metrics(streaming: bool) -> None:
    strategy = FedAvg(streaming=streaming)
    requests = configured(strategy, GOOD[0], 3)
    batch = [
        reply_to(requests[0], {"other": np.float32(1)}, 0),
        reply_to(requests[1], GOOD[0], 0, loss=float("nan")),
        reply_to(requests[2], GOOD[1], 10, loss=1.5),
    ]
    arrays, metrics = strategy.aggregate_train(1, batch)
    assert_equal(arrays_of(arrays), GOOD[1])
    assert metrics == {"loss": 1.5}
    assert strategy.aggregate_evaluate(1, batch) == {"loss": 1.5}


def test_where_nodes_disagree_those_like_the_model_are_kept() -> None:
    stranger = {"x": np.float32([1])}
    strategy = FedAvg()
    requests = configured(strategy, GOOD[0], 3)
    batch = [reply_to(request, update) for request, update in zip(requests, [stranger, stranger, GOOD[0]], strict=True)]
    assert_equal(aggregated(strategy, batch), GOOD[0])
    unknown = FedAvg()
    assert_equal(aggregated(unknown, replies([GOOD[0], stranger, stranger], [1, 1, 1])), stranger)


def test_replies_are_read_in_place_and_not_altered() -> None:
    batch = replies(GOOD, [1, 3])
    held = [{name: bytes(array.data) for name, array in message.content["arrays"].items()} for message in batch]
    array = batch[0].content["arrays"]["a"]
    leaf = read_leaf(array)
    assert np.shares_memory(leaf, np.frombuffer(array.data, np.uint8))
    assert not leaf.flags.writeable
    FedAvg().aggregate_train(1, batch)
    assert held == [{name: array.data for name, array in message.content["arrays"].items()} for message in batch]


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (5, 7)])
@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", "bool", ">f4"])
def test_arrays_are_written_as_flower_writes_them(shape: tuple[int, ...], dtype: str) -> None:
    x = np.arange(35)[: int(np.prod(shape))].reshape(shape).astype(dtype)
    fresh = FreshArrays({"x": x})
    fresh.views["x"][...] = x
    native = x.astype(x.dtype.newbyteorder("="))
    assert fresh.record().object_id == ArrayRecord({"x": Array(native)}).object_id
    assert_same_bits(np.asarray(read_leaf(write_leaf(x))), x.astype(x.dtype.newbyteorder("=")))


def test_metrics_are_aggregated_as_flower_does() -> None:
    def batch() -> list[Message]:
        requests = [Message(RecordDict(), node, MessageType.TRAIN) for node in (1, 2)]
        return [
            reply_to(requests[0], GOOD[0], 1, loss=1.0, per_class=[1.0, 2.0]),
            reply_to(requests[1], GOOD[1], 3, loss=3.0, per_class=[5.0, 6.0]),
        ]

    ours, theirs = FedAvg(), flower.FedAvg()
    assert ours.aggregate_train(1, batch())[1] == theirs.aggregate_train(1, batch())[1]
    assert (
        ours.aggregate_evaluate(1, batch())
        == theirs.aggregate_evaluate(1, batch())
        == {"loss": 2.5, "per_class": [4.0, 5.0]}
    )
    custom = FedAvg(train_metrics_aggr_fn=lambda records, key: MetricRecord({"nodes": len(records)}))
    assert custom.aggregate_train(1, batch())[1] == {"nodes": 2}


@both_modes
def test_ones_own_function_may_aggregate_lists_of_any_length(streaming: bool) -> None:
    def longest(records: list[RecordDict], key: str) -> MetricRecord:
        return MetricRecord({"longest": max(len(record["metrics"]["curve"]) for record in records)})

    requests = [Message(RecordDict(), node, MessageType.TRAIN) for node in (1, 2)]
    batch = [
        reply_to(requests[0], GOOD[0], 1, curve=[1.0]),
        reply_to(requests[1], GOOD[1], 3, curve=[1.0, 2.0, 3.0]),
    ]
    strategy = FedAvg(train_metrics_aggr_fn=longest, evaluate_metrics_aggr_fn=longest, streaming=streaming)
    arrays, metrics = strategy.aggregate_train(1, batch)
    assert_equal(arrays_of(arrays), GOOD_MEAN)
    assert metrics == strategy.aggregate_evaluate(1, batch) == {"longest": 3}


@both_modes
def test_metrics_that_differ_leave_the_reply_out(streaming: bool) -> None:
    requests = [Message(RecordDict(), node, MessageType.TRAIN) for node in (1, 2, 3, 4)]
    batch = [
        reply_to(requests[0], GOOD[0], 1, loss=1.0, curve=[1.0]),
        reply_to(requests[1], GOOD[1], 3, loss=2.0, curve=[1.0]),
        reply_to(requests[2], GOOD[1], 3, curve=[1.0]),
        reply_to(requests[3], GOOD[1], 3, loss=2.0, curve=[1.0, 2.0]),
    ]
    strategy = FedAvg(streaming=streaming)
    assert_equal(aggregated(strategy, batch), GOOD_MEAN)
    reasons = [entry.reason for entry in strategy.left_out]
    assert reasons[0].endswith("lacks metric 'loss'")
    assert reasons[1].endswith("lacks metric 'curve' of length 1 and has metric 'curve' of length 2")
    assert strategy.aggregate_evaluate(1, batch) == {"loss": 1.75, "curve": [1.0], "replies-left-out": 2}
    assert len(strategy.left_out) == 4


def test_evaluation_without_weight_gives_no_metrics() -> None:
    assert FedAvg().aggregate_evaluate(1, replies([None, None], [0, 0])) is None
    without = FedAvg(weighted_by_key="other").aggregate_evaluate(1, replies([None, None], [1, 1]))
    assert without == {"replies-left-out": 2}


@pytest.mark.parametrize("strategy", [FedAvg, FedProx, FedAvgM, FedAdam, FedYogi, FedAdagrad, QFedAvg])
def test_constructors_take_flowers_arguments(strategy: Any) -> None:
    theirs = getattr(flower, strategy.__name__)
    parameters = list(inspect.signature(theirs.__init__).parameters.values())[1:]
    values = {p.name: 0.75 if p.annotation is float or p.default is p.empty else p.default for p in parameters}
    expected = vars(theirs(**values))
    calls = [strategy(**values)]
    if all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters):
        calls.append(strategy(*values.values()))
    for ours in calls:
        assert {name: getattr(ours, name) for name in expected} == expected
    with pytest.raises(TypeError, match="fraction_fit"):
        strategy(**values, fraction_fit=1.0)


def test_wrong_policies_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="nan_policy"):
        FedAvg(nan_policy="ignore")
    with pytest.raises(ValueError, match="integer_policy"):
        FedAdam(integer_policy="min")


MODEL = {"w": np.zeros(50, np.float32), "running_var": np.full(3, 0.01, np.float32), "steps": np.int64(0)}


def node(message: Message) -> Message:
    """A node that moves the model by its number."""
    model = to_state_dict(message.content["arrays"])
    number = message.metadata.dst_node_id
    update = {name: (tensor.numpy() + number).astype(tensor.numpy().dtype) for name, tensor in model.items()}
    return reply_to(message, update, number, loss=float(number))


@pytest.mark.parametrize("strategy", [FedAvg, FedProx, FedAvgM, FedOpt, FedAdam, FedYogi, FedAdagrad, QFedAvg])
def test_streaming_ends_with_the_same_model(strategy: Any) -> None:
    def final(streaming: bool) -> dict[str, np.ndarray]:
        options: dict[str, Any] = {"streaming": streaming, "fraction_evaluate": 0.0}
        if strategy is FedAvgM:
            options |= {"server_momentum": 0.5}
        if strategy is QFedAvg:
            options |= {"client_learning_rate": 0.1, "train_loss_key": "loss"}
        ours = strategy(**options)
        result = ours.start(LocalGrid(7, node), messages.record_of(MODEL), num_rounds=3)
        assert result.train_metrics_clientapp[3]["loss"] == pytest.approx(5)
        return arrays_of(result.arrays)

    collected, streamed = final(False), final(True)
    for name in MODEL:
        assert collected[name].dtype == MODEL[name].dtype
        np.testing.assert_allclose(collected[name], streamed[name], rtol=2e-7)


def test_streaming_holds_one_reply_at_a_time() -> None:
    size = 1 << 18  # 1 MB a model
    model = {f"w{index}": np.zeros(size // 4, np.float32) for index in range(4)}

    def answer(message: Message) -> Message:
        return reply_to(message, {name: np.full(x.shape, 1, np.float32) for name, x in model.items()})

    strategy = FedAvg(streaming=True, fraction_evaluate=0.0)
    initial = messages.record_of(model)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    result = strategy.start(LocalGrid(60, answer), initial, num_rounds=1)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert arrays_of(result.arrays)["w0"][0] == 1
    assert peak < 5 * 4 * size  # the sums, a reply in the making and as bytes, never sixty of them


def test_streaming_needs_a_round_that_was_begun() -> None:
    class Chooses(FedAvg):
        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
            return [Message(RecordDict({"arrays": arrays}), 1, MessageType.TRAIN)]

    assert (
        Chooses(fraction_evaluate=0.0).start(LocalGrid(1, node), messages.record_of(MODEL), num_rounds=1).arrays
        is not None
    )
    with pytest.raises(flwr.serverapp.exception.AggregationError, match=r"needs super\(\)\.configure_train"):
        Chooses(streaming=True, fraction_evaluate=0.0).start(
            LocalGrid(1, node), messages.record_of(MODEL), num_rounds=1
        )


def test_streaming_names_what_is_wrong_with_a_weight() -> None:
    strategy = FedAvg(streaming=True)
    assert_equal(aggregated(strategy, replies([*GOOD, GOOD[0]], [1, 3, 1e300])), GOOD_MEAN)
    assert strategy.left_out[0].reason.startswith("its weight: expected 0, or 2**-300 to 2**300")


def test_a_strategy_that_streams_still_gets_a_grid() -> None:
    class Checks(FedAvg):
        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
            assert isinstance(grid, flwr.serverapp.Grid)
            return super().configure_train(server_round, arrays, config, grid)

    strategy = Checks(streaming=True, fraction_evaluate=0.0)
    assert strategy.start(LocalGrid(2, node), messages.record_of(MODEL), num_rounds=1).arrays is not None


def test_streaming_leaves_replies_alone_that_it_did_not_fetch() -> None:
    strategy = FedAvg(streaming=True)
    batch = replies(GOOD, [1, 3])
    strategy.aggregate_train(1, batch)
    assert [len(message.content["arrays"]) for message in batch] == [2, 2]


def test_streaming_goes_on_without_messages_that_could_not_be_sent() -> None:
    class LossyGrid(LocalGrid):
        def push_messages(self, messages: Any) -> Any:
            return [None, *list(super().push_messages(list(messages)[1:]))]

    strategy = FedAvg(streaming=True, fraction_evaluate=0.0)
    result = strategy.start(LossyGrid(3, node), messages.record_of(MODEL), num_rounds=1)
    assert len(arrays_of(result.arrays)) == len(MODEL)


def test_streaming_ends_with_the_time_and_takes_what_came() -> None:
    def answer(message: Message) -> Message:
        return reply_to(message, GOOD[message.metadata.dst_node_id - 1], [1, 3][message.metadata.dst_node_id - 1])

    class DeafGrid(LocalGrid):
        def pull_messages(self, message_ids: Any) -> Any:
            return [reply for reply in super().pull_messages(message_ids) if reply.metadata.src_node_id < 3]

    strategy = FedAvg(streaming=True, fraction_evaluate=0.0)
    grid = DeafGrid(3, lambda m: answer(m) if m.metadata.dst_node_id < 3 else reply_to(m, None))
    result = strategy.start(grid, messages.record_of(GOOD[0]), num_rounds=1, timeout=1)
    assert_equal(arrays_of(result.arrays), GOOD_MEAN)


class _Saving(FedAvg):
    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.saved = arrays
        return arrays, metrics


class _SavingByName(FedAvg):
    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        arrays, metrics = FedAvg.aggregate_train(self, server_round, replies)
        self.saved = arrays
        return arrays, metrics


@pytest.mark.parametrize("subclass", [_Saving, _SavingByName])
def test_subclasses_of_users_can_wrap_the_aggregation(subclass: Any) -> None:
    strategy = subclass()
    assert_equal(aggregated(strategy, replies(GOOD, [1, 3])), GOOD_MEAN)
    assert_equal(arrays_of(strategy.saved), GOOD_MEAN)


OPTIMIZED = {
    "FedAvgM": (FedAvgM, flower.FedAvgM, {"server_learning_rate": 0.7, "server_momentum": 0.9}),
    "FedAdam": (FedAdam, flower.FedAdam, {"eta": 0.05, "beta_1": 0.8}),
    "FedYogi": (FedYogi, flower.FedYogi, {"eta": 0.05}),
    "FedAdagrad": (FedAdagrad, flower.FedAdagrad, {"eta": 0.05, "tau": 0.01}),
    "QFedAvg": (QFedAvg, flower.QFedAvg, {"client_learning_rate": 0.1, "q": 0.3, "train_loss_key": "loss"}),
}


@pytest.mark.parametrize("name", OPTIMIZED)
def test_optimisers_step_as_flowers_do_and_keep_the_dtype(name: str) -> None:
    ours, theirs, options = OPTIMIZED[name]
    random = generator(5)
    steps = [[random.normal(size=(4, 6)) for _ in range(3)] for _ in range(4)]

    def run(strategy: Any, dtype: str) -> np.ndarray:
        model = {"w": np.ones((4, 6), dtype)}
        for server_round, deltas in enumerate(steps, start=1):
            requests = configured(strategy, model, 3, server_round)
            batch = [
                reply_to(request, {"w": model["w"] + delta.astype(dtype)}, 1 + index, loss=0.5 + index)
                for index, (request, delta) in enumerate(zip(requests, deltas, strict=True))
            ]
            model = aggregated(strategy, batch, server_round)
        return model["w"]

    expected = run(theirs(**options), "float64")
    np.testing.assert_allclose(run(ours(**options), "float64"), expected, rtol=1e-9)
    single = run(ours(**options), "float32")
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, expected, rtol=3e-3, atol=1e-4)


@pytest.mark.parametrize("name", OPTIMIZED)
def test_optimisers_leave_buffers_to_the_mean(name: str) -> None:
    ours, _, options = OPTIMIZED[name]
    model = {
        "bn.running_var": np.full(4, 0.01, np.float32),
        "bn.num_batches_tracked": np.int64(3),
        "own": np.ones(2, np.float32),
        "w": np.ones(2, np.float32),
    }
    sent = {**model, "bn.running_var": np.full(4, 0.001, np.float32), "bn.num_batches_tracked": np.int64(9)}
    sent |= {"own": np.full(2, 5, np.float32), "w": np.full(2, 5, np.float32)}
    strategy = ours(**options, buffers=["own"])
    requests = configured(strategy, model, 2)
    result = aggregated(strategy, [reply_to(request, sent, loss=1.0) for request in requests])
    for buffer in ("bn.running_var", "bn.num_batches_tracked", "own"):
        assert_same_bits(result[buffer], np.asarray(sent[buffer]))
    assert np.all(result["w"] != sent["w"])


@pytest.mark.parametrize("name", ["FedAvgM", "FedAdam", "FedYogi", "FedAdagrad"])
def test_a_run_resumed_from_a_checkpoint_ends_as_if_it_had_gone_on(name: str) -> None:
    ours, _, options = OPTIMIZED[name]

    def run(strategy: Any, model: dict[str, np.ndarray], rounds: int) -> dict[str, np.ndarray]:
        result = strategy.start(LocalGrid(3, node), messages.record_of(model), num_rounds=rounds)
        return arrays_of(result.arrays)

    options = {**options, "fraction_evaluate": 0.0}
    straight = run(ours(**options), MODEL, 4)
    first = ours(**options)
    half = run(first, MODEL, 2)
    resumed = ours(**options)
    resumed.load_state_dict(first.state_dict())
    assert_equal(run(resumed, half, 2), straight)


def test_an_optimiser_without_a_model_says_what_is_missing() -> None:
    with pytest.raises(flwr.serverapp.exception.AggregationError, match="configure_train was not called"):
        FedAdam().aggregate_train(1, replies(GOOD, [1, 3]))


@both_modes
@pytest.mark.parametrize("name", OPTIMIZED)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", ">f4"])
def test_optimisers_read_other_floats_as_the_models(name: str, dtype: str, streaming: bool) -> None:
    ours, _, options = OPTIMIZED[name]
    dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)
    model = {"w": np.float32([[1, 2], [3, 4]]), "scalar": np.float32(1), "steps": np.int64(1)}
    values = [[[1.5, 0], [0.25, 8]], [[-1, 3], [0.5, 4]]]  # exact in all of them
    results = []
    for sent in (np.dtype(np.float32), dtype):
        strategy = ours(**options, streaming=streaming)
        requests = configured(strategy, model, 2)
        updates = [
            {"w": np.asfortranarray(value).astype(sent), "scalar": np.asarray(0.5, sent), "steps": np.int64(7)}
            for value in values
        ]
        batch = [
            reply_to(request, to_array_record(update), loss=0.5)
            for request, update in zip(requests, updates, strict=True)
        ]
        results.append(aggregated(strategy, batch))
        assert strategy.left_out == []
    assert_equal(results[1], results[0])


def test_optimisers_leave_out_counters_of_another_kind() -> None:
    model = {"w": np.float32([1]), "steps": np.int64(3)}
    strategy = FedAdam()
    requests = configured(strategy, model, 2)
    batch = [reply_to(requests[0], {**model, "steps": np.float64(3)}), reply_to(requests[1], model)]
    assert_equal(aggregated(strategy, batch), model)
    assert strategy.left_out[0].reason.endswith(r"lacks leaf 'steps' int64 () and has leaf 'steps' float64 ()")


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        (FedAvgM, {"server_learning_rate": -1.0}, "learning_rate: expected a number of 0 or more"),
        (FedAvgM, {"server_momentum": 1.0}, "momentum: expected a number of 0 or more, below 1"),
        (FedAdam, {"eta": float("nan")}, "learning_rate"),
        (FedAdam, {"beta_1": 1.0}, "beta_1"),
        (FedYogi, {"tau": 0.0}, "tau"),
        (FedAdagrad, {"eta": -0.1}, "learning_rate"),
        (QFedAvg, {"client_learning_rate": 0.0}, "client_learning_rate"),
        (QFedAvg, {"client_learning_rate": 0.1, "q": -1.0}, "q: expected"),
    ],
)
def test_numbers_out_of_range_are_refused_before_a_round(strategy: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        strategy(**options)


def test_a_buffer_that_the_model_lacks_is_refused_before_a_round() -> None:
    with pytest.raises(ValueError, match="buffers: the model has no leaf 'mean'"):
        configured(FedAdam(buffers=["mean"]), GOOD[0], 2)


def test_a_wrong_checkpoint_is_refused() -> None:
    strategy = FedAdam()
    other = FedYogi().state_dict()
    for state in ({}, None, other, {**strategy.state_dict(), "steps": "many"}):
        with pytest.raises(ValueError, match="state: expected"):
            strategy.load_state_dict(state)


def test_the_model_of_fedavgm_outlives_what_was_sent() -> None:
    strategy = FedAvgM(server_momentum=0.5)
    updates = [{"w": np.full(5000, value, np.float32)} for value in (1, 3)]
    strategy.current_arrays = messages.record_of({"w": np.zeros(5000, np.float32)})
    strategy.aggregate_train(1, replies(updates, [1, 1]))  # nobody keeps the record
    spoilt = [bytes([7]) * len(messages.record_of(updates[0])["w"].data) for _ in range(50)]
    np.testing.assert_array_equal(strategy.current_arrays["w"], 2)
    assert len(spoilt) == 50


@both_modes
@pytest.mark.parametrize(
    ("q", "far", "loss"), [(2.0, 1.0, 1e300), (2.0, 1.0, 10**400), (1.0, 1e200, 1.0), (2.0, 1.0, 1e153)]
)
def test_q_fedavg_leaves_out_what_its_sums_cannot_hold(streaming: bool, q: float, far: float, loss: float) -> None:
    def result(losses: list[Any], updates: list[Any]) -> dict[str, np.ndarray]:
        strategy = QFedAvg(0.1, q=q, train_loss_key="loss", streaming=streaming)
        requests = configured(strategy, {"w": np.zeros(3)}, 3)[: len(losses)]
        batch = [reply_to(*each[:2], loss=each[2]) for each in zip(requests, updates, losses, strict=True)]
        arrays = aggregated(strategy, batch)
        assert [entry.node for entry in strategy.left_out] == [3][: len(losses) - 2]
        return arrays

    good = [{"w": np.float64([1, 2, 3])}, {"w": np.float64([2, 2, 2])}]
    alone = result([1.0, 2.0], good)
    assert np.all(alone["w"] != 0)
    assert_equal(result([1.0, 2.0, loss], [*good, {"w": np.full(3, far)}]), alone)


@both_modes
def test_optimisers_do_not_step_to_a_nan(streaming: bool) -> None:
    for ours, _, options in OPTIMIZED.values():
        strategy = ours(**options, nan_policy="propagate", streaming=streaming)
        requests = configured(strategy, {"w": np.zeros(2, np.float32)}, 2)
        with pytest.raises(fastagg.NonFiniteUpdateError, match="holds a NaN or an infinity"):
            strategy.aggregate_train(1, [reply_to(requests[0], {"w": np.float32([1, np.nan])}, loss=1.0)])


def test_q_fedavg_takes_no_notice_of_weight_0() -> None:
    strategies = [QFedAvg(0.1, train_loss_key="loss") for _ in range(2)]
    results = []
    for strategy, nodes in zip(strategies, (1, 2), strict=True):
        requests = configured(strategy, {"w": np.zeros(3)}, 2)[:nodes]
        far = [reply_to(request, {"w": np.full(3, 100.0)}, 0, loss=9.0) for request in requests[1:]]
        results.append(aggregated(strategy, [reply_to(requests[0], {"w": np.ones(3)}, 5, loss=1.0), *far]))
    assert_equal(results[0], results[1])


@pytest.mark.parametrize("loss", [None, float("nan"), -1.0, [1.0]])
def test_q_fedavg_leaves_out_replies_without_a_loss(loss: Any) -> None:
    strategy = QFedAvg(0.1, train_loss_key="loss")
    requests = configured(strategy, GOOD[0], 3)
    bad = {} if loss is None else {"loss": loss}
    batch = [
        reply_to(request, update, 1, **extra)
        for request, update, extra in zip(requests, [*GOOD, GOOD[1]], [{"loss": 1.0}, {"loss": 2.0}, bad], strict=True)
    ]
    assert strategy.aggregate_train(1, batch)[1]["replies-left-out"] == 1
    assert "'loss'" in strategy.left_out[0].reason


def test_prox_is_told_to_the_nodes() -> None:
    strategy = FedProx(proximal_mu=0.25)
    grid = LocalGrid(2, lambda message: message)
    requests = strategy.configure_train(1, messages.record_of(GOOD[0]), ConfigRecord(), grid)
    assert [request.content["config"]["proximal-mu"] for request in requests] == [0.25, 0.25]


WRAPPERS = {
    "server-side fixed": lambda s: flower.DifferentialPrivacyServerSideFixedClipping(s, 0.0, 10.0, 2),
    "client-side fixed": lambda s: flower.DifferentialPrivacyClientSideFixedClipping(s, 0.0, 10.0, 2),
    "server-side adaptive": lambda s: flower.DifferentialPrivacyServerSideAdaptiveClipping(
        s, 0.0, 2, initial_clipping_norm=10.0
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_flowers_differential_privacy_wraps_ours(name: str) -> None:
    model = {"w": np.zeros(6, np.float32)}
    updates = [{"w": np.full(6, value, np.float32)} for value in (1, 3)]
    strategy = WRAPPERS[name](FedAvg())
    grid = LocalGrid(2, lambda message: message)
    requests = list(strategy.configure_train(1, messages.record_of(model), ConfigRecord(), grid))
    batch = [reply_to(request, update) for request, update in zip(requests, updates, strict=True)]
    result = aggregated(strategy, batch)
    np.testing.assert_allclose(result["w"], 2, rtol=1e-6)


def test_flowers_privacy_accountant_takes_ours() -> None:
    pytest.importorskip("dp_accounting")
    if not hasattr(flwr.serverapp, "RdpAccountant"):
        pytest.skip("this version of Flower has no accountant")
    from flwr.serverapp import NeighboringRelation, PrivacyConfig, RdpAccountant, SamplingMethod

    def wrap(strategy: Any) -> Any:
        relation, sampling = NeighboringRelation.ADD_OR_REMOVE_ONE, SamplingMethod.NO_AMPLIFICATION
        accountant = RdpAccountant(PrivacyConfig(1e-5, 2, relation, sampling))
        return flower.DifferentialPrivacyServerSideFixedClipping(strategy, 1e-6, 10.0, 2, accountant=accountant)

    model = {"w": np.zeros(6, np.float32)}
    strategy = wrap(FedAvg())
    batch = [reply_to(request, {"w": np.full(6, 2, np.float32)}) for request in configured(strategy, model, 2)]
    np.testing.assert_allclose(aggregated(strategy, batch)["w"], 2, rtol=1e-4)
    assert strategy.privacy_spent().num_releases == 1
    for not_a_mean in (FedAdam(), FedAvgM(), QFedAvg(0.1)):
        with pytest.raises(ValueError, match=r"FedAvg\.aggregate_train"):
            wrap(not_a_mean)


QUANTIZED_MODEL = {
    "w": torch.linspace(-1, 1, 600).reshape(2, 300),
    "half": torch.linspace(-1, 1, 40).to(torch.float16),
    "brain": torch.linspace(-1, 1, 40).to(torch.bfloat16),
    "double": torch.linspace(-1, 1, 9, dtype=torch.float64),
    "bn.running_var": torch.full((3,), 0.001),
    "bn.num_batches_tracked": torch.tensor(7),
    "empty": torch.zeros(0, 4),
}


@pytest.mark.parametrize("wire", [None, "fp16", "bf16", "fp8_e4m3", "int8", "int4", "sign"])
def test_a_state_dict_travels_in_any_precision(wire: str | None) -> None:
    record = to_array_record(QUANTIZED_MODEL, wire)
    there = RecordDict({"arrays": record})
    back = to_state_dict(there["arrays"])
    for name, tensor in QUANTIZED_MODEL.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].shape == tensor.shape
        plain = wire is None or name.startswith("bn.")
        expected = tensor if plain else fastagg.dequantize(fastagg.quantize(tensor, wire))
        assert torch.equal(back[name], expected), name


@pytest.mark.parametrize("wire", [None, "int8"])
@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        ([1.0], "expected an array, a tensor or a Quantized, got list"),
        (1.0, "got float"),
        (np.zeros(2, np.complex64), "dtype complex64 is not supported"),
        (np.array(["text"]), "is not supported"),
        (torch.zeros(2).to(torch.float8_e4m3fn), "dtype float8_e4m3fn is not supported"),
        (torch.eye(2).to_sparse(), "[Ss]parse"),
        (torch.ones(2, device="meta"), "meta"),
    ],
)
def test_a_leaf_that_cannot_travel_is_named(leaf: Any, message: str, wire: str | None) -> None:
    with pytest.raises(TypeError, match=f"leaf 'odd': .*{message}"):
        to_array_record({"w": torch.ones(2), "odd": leaf}, wire)


def test_a_module_is_not_its_state_dict() -> None:
    with pytest.raises(TypeError, match=r"got Linear: pass its state_dict\(\)"):
        to_array_record(torch.nn.Linear(2, 2))


def test_scalars_and_quantised_leaves_travel() -> None:
    already = fastagg.quantize(torch.linspace(-1, 1, 40), "int4")
    record = to_array_record({"scalar": np.float32(3), "count": np.int64(4), "already": already}, "fp16")
    assert record["already"].stype == "fastagg.int4.256"
    back = to_state_dict(record)
    assert (back["scalar"].item(), back["count"].item()) == (3, 4)
    assert torch.equal(back["already"], fastagg.dequantize(already))
    quantised = to_array_record({"w": torch.ones(5)}, "int8")
    request = Message(RecordDict({"arrays": quantised}), 1, MessageType.TRAIN)
    reply = quantize_mod("fp16")(request, None, lambda message, context: reply_to(message, quantised))
    assert reply.content["arrays"]["w"].stype == "fastagg.int8.256"


@both_modes
@pytest.mark.parametrize("wire", [None, "fp16", "bf16", "int8", "int4"])
def test_quantised_replies_are_decoded_while_they_are_added(wire: str | None, streaming: bool) -> None:
    random = torch.Generator().manual_seed(1)
    updates = [
        {
            name: x + torch.randn(x.shape, generator=random).to(x.dtype) if x.is_floating_point() else x + 1
            for name, x in QUANTIZED_MODEL.items()
        }
        for _ in range(4)
    ]
    weights = [1, 2, 3, 4]
    strategy = FedAvg(streaming=streaming)
    grid = LocalGrid(4, lambda message: message)
    requests = strategy.configure_train(1, to_array_record(QUANTIZED_MODEL), ConfigRecord(), grid)
    batch = [
        reply_to(request, to_array_record(update, wire), weight)
        for request, update, weight in zip(requests, updates, weights, strict=True)
    ]
    arrays, _ = strategy.aggregate_train(1, batch)
    assert strategy.left_out == []
    result = to_state_dict(arrays)
    decoded = [to_state_dict(to_array_record(update, wire)) for update in updates]
    expected = fastagg.fedavg(decoded, weights)
    for name, tensor in expected.items():
        assert result[name].dtype == tensor.dtype
        if tensor.is_floating_point() and tensor.numel():
            columns = [wide(one[name].to(torch.float64).numpy()) for one in decoded]
            bound = LARGEST_ERROR + {torch.float16: 2**-11, torch.bfloat16: 2**-8}.get(tensor.dtype, 0)
            error = np.abs(result[name].to(torch.float64).numpy() - mean(columns, weights))
            assert np.all(error <= bound * magnitude(columns, weights) + 1e-30)
        else:
            assert torch.equal(result[name], tensor)


def test_plain_and_quantised_replies_mix() -> None:
    update = {"w": torch.ones(300)}
    batch = replies([to_array_record(update, "int8"), to_array_record({"w": torch.full((300,), 3.0)})], [1, 1])
    assert_equal(aggregated(FedAvg(), batch), {"w": np.full(300, 2, np.float32)})


def test_the_mod_quantises_uploads() -> None:
    mod = quantize_mod("int8")
    request = Message(RecordDict({"arrays": to_array_record(QUANTIZED_MODEL)}), 1, MessageType.TRAIN)

    def train(message: Message, context: Any) -> Message:
        return reply_to(message, message.content["arrays"], 5)

    reply = mod(request, None, train)
    sent, plain = reply.content["arrays"], request.content["arrays"]
    assert len(sent["w"].data) == 600 + 3 * 4 < len(plain["w"].data) / 3
    assert sent["w"].stype == "fastagg.int8.256"
    assert sent["bn.running_var"].data == plain["bn.running_var"].data
    assert reply.content["metrics"] == {"num-examples": 5}
    broken = mod(request, None, lambda message, context: failure(1))
    assert broken.has_error()
    for wrong in ({"wire": "int3"}, {"wire": "int8", "block": 7}, {"wire": "fp16", "rounding": "up"}):
        with pytest.raises(ValueError, match=r"wire|block|rounding"):
            quantize_mod(**wrong)


def test_mods_behind_ours_see_plain_arrays() -> None:
    from flwr.app import Context
    from flwr.clientapp import ClientApp
    from flwr.clientapp.mod import fixedclipping_mod

    app = ClientApp(mods=[quantize_mod("int8"), fixedclipping_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return reply_to(message, {"w": np.full(300, 5, np.float32)})

    sent = RecordDict({"arrays": messages.record_of({"w": np.zeros(300, np.float32)})})
    sent["config"] = ConfigRecord({"clipping_norm": 1.0})
    reply = app(Message(sent, 1, MessageType.TRAIN), Context(1, 1, {}, RecordDict(), {}))
    assert reply.content["arrays"]["w"].stype == "fastagg.int8.256"
    assert torch.linalg.norm(to_state_dict(reply.content["arrays"])["w"]) == pytest.approx(1, abs=0.01)


def test_stochastic_rounding_repeats_with_its_seed() -> None:
    first, again = (to_array_record(QUANTIZED_MODEL, "int4", rounding="stochastic", seed=7) for _ in range(2))
    assert first.object_id == again.object_id
    assert first.object_id != to_array_record(QUANTIZED_MODEL, "int4", rounding="stochastic", seed=8).object_id


def test_the_older_functions() -> None:
    from flwr.server.strategy.aggregate import aggregate as theirs

    random = generator(9)
    results = [([random.normal(size=(3, 2)), random.normal(size=5)], count) for count in (3, 9, 1)]
    for ours, expected in zip(aggregate(results), theirs(results), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-14)
    integers = [([np.int64([10])], 1), ([np.int64([20])], 3)]
    assert aggregate(integers) == [20]


def test_the_older_functions_read_parameters_in_place() -> None:
    from flwr.common import Code, FitRes, Status, ndarrays_to_parameters

    layers = [[np.float32([1, 2]), np.int64(3)], [np.float32([3, 6]), np.int64(5)]]
    results = [
        (None, FitRes(Status(Code.OK, ""), ndarrays_to_parameters(arrays), count, {}))
        for arrays, count in zip(layers, (1, 3), strict=True)
    ]
    first, second = aggregate_inplace(results)
    assert_same_bits(first, np.float32([2.5, 5]))
    assert_same_bits(second, np.asarray(np.int64(5)))
