"""One odd reply among right ones: every strategy leaves that node out, says why in few words, and goes on."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict

import fastagg.flower
import flower_messages as messages
from fastagg.flower.replies import LeftOutReply
from flower_messages import LocalGrid, arrays_of, reply_to

LONG = "n" * 100_000
MODEL = {"a": np.float32([0, 1, 2]), "b": np.int64(4)}
RIGHT = [{"a": np.float32([1, 2, 3]) * factor, "b": np.int64(5)} for factor in (1, 2, 3)]
SUMMED = ["FedAvg", "FedProx", "FedAvgM", "FedOpt", "FedAdam", "FedYogi", "FedAdagrad", "QFedAvg"]
ROBUST = ["FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan"]

Change = Callable[[Message], Any]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("gc.collect", lambda: 0)  # Flower asks for it whenever it reads a record
    level = logging.getLogger("flwr").level
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("flwr").setLevel(level)


def npy(header: bytes, data: bytes = b"", version: int = 1) -> Array:
    """An array whose header is as given."""
    size = len(header).to_bytes(2 if version == 1 else 4, "little")
    return Array("float32", (3,), "numpy.ndarray", b"\x93NUMPY" + bytes([version, 0]) + size + header + data)


def described(shape: str, data: bytes = b"", dtype: str = "'<f4'") -> Array:
    return npy(f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}\n".encode(), data)


def saved(array: np.ndarray) -> Array:
    stream = io.BytesIO()
    np.save(stream, array)
    return Array(str(array.dtype), array.shape, "numpy.ndarray", stream.getvalue())


def forged(dtype: Any, shape: Any, stype: Any, data: Any) -> Array:
    """An array that Flower's own constructor might refuse."""
    array = Array("float32", (3,), "numpy.ndarray", b"")
    for name, value in {"dtype": dtype, "shape": shape, "stype": stype, "data": data}.items():
        setattr(array, name, value)
    return array


ARRAYS = {
    "nothing": forged("float32", (3,), "numpy.ndarray", b""),
    "no header": forged("float32", (3,), "numpy.ndarray", b"\x00" * 12),
    "a header of 4 GB": forged("float32", (3,), "numpy.ndarray", b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(64)),
    "a header of nonsense": npy(b"\x1b[31m" * 1000 + b"\n"),
    "a header nested deep": npy(b"(" * 5000 + b"\n"),
    "a negative size": described("(-3,)", bytes(12)),
    "two negative sizes": described("(-1, -3)", bytes(12)),
    "a size beyond C": described(f"({10**30}, 0)"),
    "a size of 4000 digits": described(f"({'9' * 4000}, {'9' * 4000})"),
    "a size that is True": described("(True,)", bytes(4)),
    "a size that is a text": described("('3',)", bytes(12)),
    "65 dimensions": described(f"({'1, ' * 65})", bytes(4)),
    "too few bytes": described("(3,)", bytes(11)),
    "too many bytes": described("(3,)", bytes(13)),
    "a long dtype": described("(3,)", bytes(12), f"[('{'n' * 5000}', '<f4')]"),
    "an unknown dtype": described("(3,)", bytes(12), "'\\x1b[31m'"),
    "a dtype that is a number": described("(3,)", bytes(12), "4"),
    "a dtype of nested lists": described("(3,)", bytes(12), "[[]]"),
    "complex": saved(np.ones(3, np.complex64)),
    "text": saved(np.array(["a", "b", "c"])),
    "times": saved(np.zeros(3, "datetime64[s]")),
    "structured": saved(np.zeros(3, [("x", np.float32)])),
    "objects": saved(np.array([None, 1, "a"], object)),
    "no dimension": saved(np.float32(1)),
    "in Fortran's order": saved(np.asfortranarray(np.ones((3, 2), np.float32))),
    "bools that are none": described("(3,)", b"\x02\x03\xff", "'|b1'"),
    "not a text for its kind": forged("float32", (3,), 7, b""),
    "a long kind": forged("float32", (3,), LONG, bytes(12)),
    "a kind that steers": forged("float32", (3,), "\x1b[31m", bytes(12)),
    "an unknown wire": forged("float32", (3,), "fastagg.int9.256", bytes(7)),
    "a block of 5000 digits": forged("float32", (3,), f"fastagg.int8.{'9' * 5000}", bytes(7)),
    "a block of 0": forged("float32", (3,), "fastagg.int8.0", bytes(7)),
    "a block of 7": forged("float32", (3,), "fastagg.int8.7", bytes(7)),
    "many points": forged("float32", (3,), "fastagg" + "." * 100_000, bytes(7)),
    "codes for another shape": forged("float32", (300,), "fastagg.int8.256", bytes(7)),
    "codes of a negative shape": forged("float32", (-2, -128), "fastagg.int4.256", bytes(4 + 128)),
    "codes beyond C": forged("float32", (10**400, 0), "fastagg.int4.256", b""),
    "codes of a shape of texts": forged("float32", ("3",), "fastagg.int8.256", bytes(7)),
    "codes of no shape": forged("float32", None, "fastagg.int8.256", bytes(7)),
    "codes of an integer": forged("int64", (3,), "fastagg.int8.256", bytes(7)),
    "codes of a long dtype": forged(LONG, (3,), "fastagg.int8.256", bytes(7)),
    "scales that are NaN": forged(
        "float32", (3,), "fastagg.int8.256", np.float32([np.nan]).tobytes() + b"\x01\x02\x03"
    ),
    "bytes that are none": forged("float32", (3,), "numpy.ndarray", "text"),
}


def with_array(array: Array) -> Change:
    return lambda reply: reply.content["arrays"].__setitem__("a", array)


def with_metric(name: str, value: Any) -> Change:
    """A metric that MetricRecord itself might refuse: nodes need not use it."""
    return lambda reply: dict.__setitem__(reply.content["metrics"]._data, name, value)


def with_content(content: dict[str, Any]) -> Change:
    def change(reply: Message) -> None:
        for name in list(reply.content):
            del reply.content[name]
        reply.content.update(content)

    return change


def with_metadata(name: str, value: Any) -> Change:
    return lambda reply: reply.metadata.__dict__.__setitem__(f"_{name}", value)


WEIGHTS = [True, -1, -1e-30, float("nan"), float("inf"), 10**400, 10**5000, 1e300, "1", None, [1], [], b"1", {}]
METRICS = {
    "10**400": 10**400,
    "-10**5000": -(10**5000),
    "a text": "low",
    "bytes": b"\x1b[31m",
    "None": None,
    "a list of texts": ["a", "b"],
    "a list with 10**400": [1, 10**400],
    "a list of lists": [[1.0]],
    "a list in the place of a number": [1.0],
    "a long text": LONG,
}
LEAF = messages.record_of({"a": RIGHT[0]["a"]})["a"]

ODD: dict[str, Change] = {
    **{f"array: {name}": with_array(array) for name, array in ARRAYS.items()},
    **{f"weight: {index}": with_metric("num-examples", weight) for index, weight in enumerate(WEIGHTS)},
    **{f"metric: {name}": with_metric("loss", value) for name, value in METRICS.items()},
    "metric: a long name": with_metric(LONG, 1.0),
    "metric: a name that steers": with_metric("\x1b[31m\n", 1.0),
    "metric: one more": with_metric("extra", 1.0),
    "metric: none": lambda reply: reply.content["metrics"].__delitem__("loss"),
    "group: 5000 digits": with_metadata("group_id", "9" * 5000),
    "group: another round": with_metadata("group_id", "2"),
    "content: empty": with_content({}),
    "content: metrics alone": with_content({"metrics": MetricRecord({"num-examples": 1, "loss": 1.0})}),
    "content: no metrics": with_content({"arrays": messages.record_of(RIGHT[0])}),
    "content: a config": with_content({"metrics": ConfigRecord({"num-examples": 1})}),
    "content: two models": lambda reply: reply.content.__setitem__("more", messages.record_of(RIGHT[0])),
    "content: metrics twice": lambda reply: reply.content.__setitem__("more", MetricRecord({"loss": 1.0})),
    "content: none": lambda reply: reply.__dict__.__setitem__("_content", None),
    "leaves: none": lambda reply: reply.content["arrays"].clear(),
    "leaves: one less": lambda reply: reply.content["arrays"].__delitem__("b"),
    "leaves: one more": lambda reply: reply.content["arrays"].__setitem__("c", LEAF),
    "leaves: a long name": lambda reply: reply.content["arrays"].__setitem__(LONG, LEAF),
    "leaves: a name that steers": lambda reply: reply.content["arrays"].__setitem__("\x1b[2J\r\n", LEAF),
    "leaves: many more": lambda reply: reply.content["arrays"].update({f"{k}" * 50: LEAF for k in range(100)}),
    "values: NaN": with_array(Array(np.float32([np.nan, 1, 2]))),
    "values: infinite": with_array(Array(np.float32([1, 2, -np.inf]))),
}


def round_of(name: str, change: Change | None, position: int, streaming: bool = False) -> Any:
    """The model and the metrics of a round of three right replies, and an odd one; and what was left out."""
    nodes = 3 + (change is not None)
    options: dict[str, Any] = {"min_train_nodes": nodes, "min_available_nodes": nodes, "min_evaluate_nodes": nodes}
    if name in SUMMED:
        options["streaming"] = streaming
    if name == "QFedAvg":
        options |= {"client_learning_rate": 0.1, "train_loss_key": "loss"}
    strategy = getattr(fastagg.flower, name)(**options)
    grid = LocalGrid(nodes, lambda message: message)
    requests = strategy.configure_train(1, messages.record_of(MODEL), ConfigRecord(), grid)
    requests = sorted(requests, key=lambda request: request.metadata.dst_node_id)
    updates = list(RIGHT)
    if change is not None:
        updates.insert(position, RIGHT[0])
    batch = [reply_to(request, update, 10, loss=0.5) for request, update in zip(requests, updates, strict=True)]
    if change is not None:
        change(batch[position])
    arrays, metrics = strategy.aggregate_train(1, batch)
    return None if arrays is None else arrays_of(arrays), metrics, strategy.left_out


by_strategy = pytest.mark.parametrize(
    ("strategy", "streaming"),
    [*((name, streaming) for name in SUMMED for streaming in (False, True)), *((name, False) for name in ROBUST)],
    ids=lambda value: value if isinstance(value, str) else "streamed" if value else "collected",
)
ONE_OF_EACH = {name.split(":")[0]: name for name in ODD}.values()


@by_strategy
def test_an_odd_reply_is_left_out_and_the_round_goes_on(strategy: str, streaming: bool) -> None:
    assert_odd_replies_are_left_out(strategy, streaming, ODD if strategy == "FedAvg" else ONE_OF_EACH)


@pytest.mark.exhaustive
@by_strategy
def test_every_odd_reply_is_left_out_by_every_strategy(strategy: str, streaming: bool) -> None:
    assert_odd_replies_are_left_out(strategy, streaming, ODD)


def assert_odd_replies_are_left_out(strategy: str, streaming: bool, odd: Iterable[str]) -> None:
    model, metrics, nobody = round_of(strategy, None, 0, streaming)
    assert not nobody
    wrong = []
    for number, name in enumerate(odd):
        position = number % 4
        try:
            got, got_metrics, left_out = round_of(strategy, ODD[name], position, streaming)
            assert_same(got, model)
            if metrics is not None:
                assert got_metrics == {**metrics, "replies-left-out": 1}
            assert_reported(left_out, node=position + 1)
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
    assert not wrong, "\n".join(wrong)


def assert_same(got: Any, expected: Any) -> None:
    assert (got is None) == (expected is None)
    for name, array in (expected or {}).items():
        np.testing.assert_array_equal(got[name], array)


def assert_reported(left_out: list[LeftOutReply], node: int) -> None:
    [one] = left_out
    assert one.node == node
    assert 0 < len(one.reason) < 400
    assert one.reason.isprintable()
    assert max(map(one.reason.count, "9n")) <= 120  # of what is long here, at most 100 characters were sent


@by_strategy
def test_where_all_replies_are_nan_every_node_is_named(strategy: str, streaming: bool) -> None:
    options: dict[str, Any] = {"min_train_nodes": 3, "min_available_nodes": 3, "min_evaluate_nodes": 3}
    options |= {"streaming": streaming} if strategy in SUMMED else {}
    options |= {"client_learning_rate": 0.1, "train_loss_key": "loss"} if strategy == "QFedAvg" else {}
    server = getattr(fastagg.flower, strategy)(**options)
    requests = server.configure_train(1, messages.record_of(MODEL), ConfigRecord(), LocalGrid(3, lambda x: x))
    broken = {"a": np.float32([1, np.nan, 2]), "b": np.int64(1)}
    with pytest.raises(fastagg.flower.NoReplyLeftError) as caught:
        server.aggregate_train(1, [reply_to(request, broken, loss=1.0) for request in requests])
    assert all(f"node {node}: leaf 'a'" in str(caught.value) for node in (1, 2, 3))
    assert sorted(one.node for one in server.left_out) == [1, 2, 3]


@by_strategy
@pytest.mark.parametrize("position", [0, 3])
def test_a_mask_that_holds_codes_leaves_its_client_out(
    strategy: str, streaming: bool, position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it comes: the first reply must not decide for the others, nor end the round."""
    mask = np.eye(4, dtype=np.uint8)
    codes = messages.record_of({"mask": np.arange(16, dtype=np.uint8).reshape(4, 4)})["mask"]
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[__name__], "MODEL", {**MODEL, "mask": mask})
        patch.setattr(sys.modules[__name__], "RIGHT", [{**right, "mask": mask} for right in RIGHT])
        model, _, _ = round_of(strategy, None, 0, streaming)

        def change(reply: Message) -> None:
            reply.content["arrays"]["mask"] = codes

        got, _, left_out = round_of(strategy, change, position, streaming)
    assert_same(got, model)
    assert_reported(left_out, node=position + 1)
    assert "leaf 'mask'" in left_out[0].reason


EVALUATED = {name: change for name, change in ODD.items() if name.split(":")[0] in ("weight", "metric", "group")}


@pytest.mark.parametrize("position", range(4))
def test_an_odd_evaluation_is_left_out(position: int) -> None:
    for change in EVALUATED.values():
        strategy = fastagg.flower.FedAvg(min_available_nodes=4)
        grid = LocalGrid(4, lambda message: message)
        requests = strategy.configure_evaluate(1, ArrayRecord(), ConfigRecord(), grid)
        requests = sorted(requests, key=lambda request: request.metadata.dst_node_id)
        batch = [reply_to(request, None, 10, loss=0.5) for request in requests]
        change(batch[position])
        assert strategy.aggregate_evaluate(1, batch) == {"loss": 0.5, "replies-left-out": 1}
        assert_reported(strategy.left_out, node=position + 1)


@pytest.mark.parametrize("streaming", [False, True], ids=["collected", "streamed"])
def test_ones_own_function_of_metrics_gets_numbers_or_lists_alone(streaming: bool) -> None:
    def total(contents: list[RecordDict], key: str) -> MetricRecord:
        return MetricRecord({"loss": sum(content["metrics"]["loss"] * 2.0 for content in contents)})

    strategy = fastagg.flower.FedAvg(streaming=streaming, min_available_nodes=4, train_metrics_aggr_fn=total)
    requests = list(strategy.configure_train(1, messages.record_of(MODEL), ConfigRecord(), LocalGrid(4, lambda x: x)))
    losses: list[Any] = [[1.0], 1.0, 1.0, 1.0]
    batch = [reply_to(request, RIGHT[0], loss=loss) for request, loss in zip(requests, losses, strict=True)]
    assert strategy.aggregate_train(1, batch)[1] == {"loss": 6.0, "replies-left-out": 1}


def test_streaming_keeps_few_models_however_many_kinds_of_metrics_come() -> None:
    strategy = fastagg.flower.FedAvg(streaming=True, min_available_nodes=30)
    requests = list(strategy.configure_train(1, messages.record_of(MODEL), ConfigRecord(), LocalGrid(30, lambda x: x)))
    odd = [reply_to(request, RIGHT[2], **{f"metric {k}": 1.0}) for k, request in enumerate(requests[:27])]
    right = [reply_to(request, RIGHT[0], loss=1.0) for request in requests[27:]]
    batch = [*odd[:9], right[0], *odd[9:11], right[1], *odd[11:20], right[2], *odd[20:]]
    arrays, metrics = strategy.aggregate_train(1, batch)
    assert_same(arrays_of(arrays), RIGHT[0])
    assert metrics == {"loss": 1.0, "replies-left-out": 27}
    assert len(strategy.left_out) == 27


def test_an_error_of_a_node_is_logged_in_one_short_line(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("flwr").setLevel(logging.INFO)
    logging.getLogger("flwr").addHandler(caplog.handler)
    broken = Message(Error(0, "\x1b[2J\n" * 100_000), reply_to=Message(RecordDict(), 1, MessageType.TRAIN))
    fastagg.flower.FedAvg().aggregate_train(1, [broken])
    logging.getLogger("flwr").removeHandler(caplog.handler)
    [line] = {record.getMessage() for record in caplog.records if "Received error" in record.getMessage()}
    assert len(line) < 200
    assert line.strip("\t").isprintable()
