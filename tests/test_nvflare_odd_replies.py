"""One odd reply among right ones: the aggregator leaves that client out, says why in few words, and goes on."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("nvflare")
torch = pytest.importorskip("torch")

from nvflare.apis.dxo import DXO, DataKind, MetaKey  # noqa: E402
from nvflare.apis.fl_constant import ReservedKey  # noqa: E402
from nvflare.apis.fl_context import FLContext  # noqa: E402
from nvflare.apis.shareable import Shareable  # noqa: E402
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType  # noqa: E402
from nvflare.app_common.abstract.model import make_model_learnable  # noqa: E402
from nvflare.app_common.app_constant import AppConstants  # noqa: E402

import fastagg  # noqa: E402
from fastagg.nvflare import FedAvgAggregator  # noqa: E402

LONG = "n" * 100_000
STEERS = "\x1b[2J\r\n"
RIGHT = [{"a": np.float32([1, 2, 3]) * factor, "b": np.int64(5)} for factor in (1, 2, 3)]
MEAN = {"a": np.float32([2, 4, 6]), "b": np.int64(5)}
STEPS = MetaKey.NUM_STEPS_CURRENT_ROUND

Change = Callable[[FLModel], Any]


class Strange:
    """What claims to be an array, and fails when it is looked at."""

    shape, dtype, ndim = (3,), np.dtype(np.float32), 1

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise RuntimeError(STEERS * 100)

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        raise BufferError(STEERS * 100)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __repr__(self) -> str:
        return STEERS * 100


def model_of(client: str, params: Any) -> FLModel:
    meta = {"client_name": client, STEPS: 10}
    return FLModel(params=dict(params), metrics={"loss": 0.5}, meta=meta, current_round=3)


def with_leaf(leaf: Any) -> Change:
    return lambda model: model.params.__setitem__("a", leaf)


def with_field(name: str, value: Any) -> Change:
    """A field after construction, which checks it: what unpacks a message need not."""
    return lambda model: setattr(model, name, value)


def with_meta(name: str, value: Any) -> Change:
    return lambda model: model.meta.__setitem__(name, value)


def with_codes(**forged: Any) -> Change:
    """A reply whose first leaf is quantised, with another description."""

    def change(model: FLModel) -> None:
        quantized = fastagg.quantize(np.float32([1, 2, 3]), "int8")
        described = {"wire": "int8", "shape": [3], "dtype": "float32", "block": 256, "nonfinite": False}
        described |= {"scales": quantized.scales, **forged}
        model.params["a"] = described.pop("codes", quantized.data)
        model.meta |= {"fastagg_quantized": {"a": described}, MetaKey.PROCESSED_ALGORITHM: "fastagg"}

    return change


class Text(str):
    """Not a plain text."""


LEAVES = {
    "None": None,
    "a text": "1",
    "a long text": LONG,
    "a list": [1.0, 2.0, 3.0],
    "a dict": {"a": np.ones(3, np.float32)},
    "10**400": 10**400,
    "True": True,
    "complex": np.ones(3, np.complex64),
    "objects": np.array([None, 1, "a"], object),
    "texts": np.array(["a", LONG[:1000], "c"]),
    "structured": np.zeros(3, [(LONG[:5000], np.float32)]),
    "times": np.zeros(3, "datetime64[s]"),
    "a masked array": np.ma.masked_array([1.0, 2.0, 3.0], [True, False, False], dtype=np.float32),
    "another shape": np.ones(4, np.float32),
    "no dimension": np.float32(1),
    "another dtype": np.ones(3),
    "strange": Strange(),
    "a sparse tensor": torch.eye(3).to_sparse(),
    "a tensor without values": torch.empty(3, device="meta"),
    "NaN": np.float32([np.nan, 1, 2]),
    "infinite": np.float32([np.inf, 1, 2]),
}
WEIGHTS = [True, -1, float("nan"), float("inf"), 10**400, 10**5000, 1e300, 5e-324, "1", LONG, [1], {}, Strange(), 1j]
CODES: dict[str, dict[str, Any]] = {
    "no description": {"more": 1},
    "a wire": {"wire": "int9"},
    "a long wire": {"wire": LONG},
    "a wire that is a list": {"wire": ["int8"]},
    "a shape of one more": {"shape": [4]},
    "a negative shape": {"wire": "int4", "shape": [-1, -3], "codes": np.zeros(2, np.uint8)},
    "a shape beyond C": {
        "wire": "int4",
        "shape": [10**400, 0],
        "codes": np.zeros(0, np.uint8),
        "scales": np.zeros(0, np.float32),
    },
    "a shape that is a number": {"shape": 3},
    "a shape that is a text": {"shape": "3"},
    "a shape of 10**5000": {"shape": [10**5000]},
    "a shape of many": {"shape": [1] * 100_000},
    "a dtype": {"dtype": "int64"},
    "a long dtype": {"dtype": LONG},
    "a dtype that is a list": {"dtype": []},
    "a block of 0": {"block": 0},
    "a block of 10**5000": {"block": 10**5000},
    "a block that is a text": {"block": "256"},
    "no block": {"block": None},
    "scales that are none": {"scales": None},
    "scales of another dtype": {"scales": np.ones(1)},
    "scales of another number": {"scales": np.ones(9, np.float32)},
    "scales of NaN": {"scales": np.float32([np.nan])},
    "scales that are a text": {"scales": LONG},
    "codes of another dtype": {"codes": np.zeros(3, np.float32)},
    "codes that are a list": {"codes": [1, 2, 3]},
    "nonfinite that is a text": {"nonfinite": LONG},
}
ODD: dict[str, Change] = {
    **{f"leaf: {name}": with_leaf(leaf) for name, leaf in LEAVES.items()},
    **{f"steps: {index}": with_meta(STEPS, weight) for index, weight in enumerate(WEIGHTS)},
    **{f"codes: {name}": with_codes(**forged) for name, forged in CODES.items()},
    **{f"params: {value!r:.20}": with_field("params", value) for value in (None, [], "a", 1, {}, {"a": 1.0})},
    "params: one less": lambda model: model.params.__delitem__("b"),
    "params: one more": lambda model: model.params.__setitem__("c", np.float32(1)),
    "params: a long name": lambda model: model.params.__setitem__(LONG, np.float32(1)),
    "params: a name that steers": lambda model: model.params.__setitem__(STEERS, np.float32(1)),
    "params: a name of 5000 digits": lambda model: model.params.__setitem__(10**5000, np.float32(1)),
    "params: names of many kinds": lambda model: model.params.update({None: np.float32(1), (1,): np.float32(1)}),
    "params: many more": lambda model: model.params.update({f"{k}" * 50: np.float32(1) for k in range(500)}),
    **{
        f"params_type: {value!r:.20}": with_field("params_type", value)
        for value in ("HALF", LONG, STEERS, 7, [1], {"a": 1}, ParamsType.DIFF, "DIFF")
    },
    **{
        f"round: {index}": with_field("current_round", value)
        for index, value in enumerate(["3", LONG, STEERS, 2, -1, 10**5000, 3.5, True, [3], Strange()])
    },
    **{f"meta: {value!r:.20}": with_field("meta", value) for value in ([], [1], "a", 1, LONG)},
    **{f"metrics: {value!r:.20}": with_field("metrics", value) for value in ([], [1.0], "a", 1, LONG)},
    "meta: processed": with_meta(MetaKey.PROCESSED_ALGORITHM, LONG),
    "meta: descriptions": with_meta("fastagg_quantized", [LONG]),
    "meta: descriptions of texts": with_meta("fastagg_quantized", {"a": LONG}),
}
# Only what they measured is odd: it is no part of the mean.
ODD_METRICS = [{"loss": value} for value in (None, LONG, [1.0], np.nan, 10**400, True, {}, Strange())]


def assert_round_goes_on(change: Change, position: int, **options: Any) -> None:
    aggregator = FedAvgAggregator(**options)
    aggregator.fl_ctx = FLContext()
    aggregator.fl_ctx.set_prop(AppConstants.CURRENT_ROUND, 3)
    models = [model_of(f"site-{k}", params) for k, params in enumerate(RIGHT)]
    odd = model_of("site-odd", RIGHT[0])
    change(odd)
    models.insert(position, odd)
    for model in models:
        aggregator.accept_model(model)
    result = aggregator.aggregate_model()
    assert_is_mean(result)
    assert result.current_round == 3
    assert result.metrics == {"loss": 0.5}
    [dropped] = aggregator.dropped
    assert dropped.client in ("site-odd", f"reply {position + 1}")
    assert 0 < len(dropped.reason) < 400
    assert dropped.reason.isprintable()
    assert dropped.reason.count("n") <= 130


def assert_is_mean(result: FLModel) -> None:
    assert result.params.keys() == MEAN.keys()
    for name, array in MEAN.items():
        np.testing.assert_array_equal(result.params[name], array)


@pytest.mark.parametrize("batch", [1, 4])
def test_an_odd_reply_is_left_out_and_the_round_goes_on(batch: int) -> None:
    wrong = []
    for number, (name, change) in enumerate(ODD.items()):
        try:
            assert_round_goes_on(change, number % 4, batch=batch)
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("metrics", ODD_METRICS, ids=range(len(ODD_METRICS)))
def test_odd_metrics_are_not_averaged(metrics: Any) -> None:
    aggregator = FedAvgAggregator()
    for k, params in enumerate(RIGHT):
        aggregator.accept_model(model_of(f"site-{k}", params))
    odd = model_of("site-odd", MEAN)
    odd.metrics = metrics
    assert aggregator.accept_model(odd)
    result = aggregator.aggregate_model()
    assert result.metrics == {"loss": 0.5}
    assert_is_mean(result)


def test_metrics_as_large_as_floats_can_be_are_no_error() -> None:
    aggregator = FedAvgAggregator()
    for k in range(5):
        model = model_of(f"site-{k}", MEAN)
        model.metrics = {"loss": np.finfo(np.float64).max}
        aggregator.accept_model(model)
    assert aggregator.aggregate_model().metrics["loss"] > 1e308


def test_a_client_cannot_reply_as_another() -> None:
    aggregator = FedAvgAggregator()
    for client, params in (("thief", MEAN), ("site-1", MEAN)):
        shareable = DXO(DataKind.WEIGHTS, data=dict(params), meta={"client_name": "site-1"}).to_shareable()
        shareable.set_peer_props({ReservedKey.IDENTITY_NAME: client})
        assert aggregator.accept(shareable, FLContext())
    assert aggregator.aggregate_model().meta["nr_aggregated"] == 2


@pytest.mark.parametrize("value", [[], "a", {"data": 1}], ids=["list", "text", "dict"])
def test_a_message_that_is_no_model_is_left_out(value: Any) -> None:
    aggregator = FedAvgAggregator()
    message = Shareable()
    message["DXO"] = value
    message.set_header(AppConstants.CURRENT_ROUND, LONG)
    message.set_peer_props({ReservedKey.IDENTITY_NAME: "site-odd"})
    assert not aggregator.accept(message, FLContext())
    assert [one.client for one in aggregator.dropped] == ["site-odd"]


@pytest.mark.parametrize("cookies", [[1], "x", 5], ids=["list", "text", "number"])
def test_headers_of_any_kind_end_no_round(cookies: Any) -> None:
    aggregator = FedAvgAggregator()
    odd = [DXO(DataKind.WEIGHTS, data=dict(RIGHT[0])).to_shareable() for _ in range(2)]
    odd[0].set_header(ReservedKey.COOKIE_JAR, cookies)
    odd[1]["__headers__"] = cookies
    for message in odd:
        assert not aggregator.accept(message, FLContext())
    for k in range(3):
        aggregator.accept_model(model_of(f"site-{k}", MEAN))
    assert_is_mean(aggregator.aggregate_model())


def test_a_round_of_5000_digits_leaves_its_client_out_even_where_nobody_tells_the_round() -> None:
    aggregator = FedAvgAggregator()
    odd = model_of("site-odd", RIGHT[0])
    odd.current_round = 10**5000
    assert not aggregator.accept_model(odd)
    for k in range(3):
        assert aggregator.accept_model(model_of(f"site-{k}", MEAN))
    assert_is_mean(aggregator.aggregate_model())


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("position", [0, 2])
def test_a_mask_that_holds_codes_leaves_its_client_out(position: int, batch: int) -> None:
    mask = np.eye(4, dtype=np.uint8)
    models = [model_of(f"site-{k}", {**MEAN, "mask": mask}) for k in range(3)]
    models.insert(position, model_of("site-odd", {**MEAN, "mask": np.arange(16, dtype=np.uint8).reshape(4, 4)}))
    aggregator = FedAvgAggregator(batch=batch)
    assert [aggregator.accept_model(model) for model in models].count(False) == 1
    np.testing.assert_array_equal(aggregator.aggregate_model().params["mask"], mask)
    assert [one.client for one in aggregator.dropped] == ["site-odd"]


@pytest.mark.parametrize("first", ["3", 4], ids=["a text", "another round"])
def test_without_a_workflow_most_replies_tell_the_round(first: Any) -> None:
    aggregator = FedAvgAggregator()
    odd = model_of("site-odd", RIGHT[0])
    odd.current_round = first
    aggregator.accept_model(odd)
    for k, params in enumerate(RIGHT):
        assert aggregator.accept_model(model_of(f"site-{k}", params))
    result = aggregator.aggregate_model()
    assert result.current_round == 3
    assert_is_mean(result)
    assert [one.client for one in aggregator.dropped] == ["site-odd"]


@pytest.mark.parametrize("known", [False, True], ids=["unknown", "known"])
def test_sites_of_a_structure_each_take_little_memory_and_decide_nothing(known: bool) -> None:
    """Without the model that was sent, the replies that agree come often enough to be told from the others."""
    aggregator = FedAvgAggregator(batch=1)
    aggregator.fl_ctx = FLContext()
    if known:
        aggregator.fl_ctx.set_prop(AppConstants.GLOBAL_MODEL, make_model_learnable(MEAN, {}))
    size, sites = 1 << 16, 60
    tracemalloc.start()
    for k in range(sites):
        assert aggregator.accept_model(model_of(f"site-odd-{k}", {f"a{k}": np.ones(size, np.float32)}))
        if k in (20, 21, 40):
            aggregator.accept_model(model_of(f"site-{k}", RIGHT[(20, 21, 40).index(k)]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * 4 * size
    assert_is_mean(aggregator.aggregate_model())
    assert len(aggregator.dropped) == sites


def test_in_a_tie_the_model_that_was_sent_decides() -> None:
    aggregator = FedAvgAggregator()
    aggregator.fl_ctx = FLContext()
    aggregator.fl_ctx.set_prop(AppConstants.GLOBAL_MODEL, make_model_learnable(MEAN, {}))
    aggregator.accept_model(model_of("site-odd", {"c": np.ones(2, np.float32)}))
    aggregator.accept_model(model_of("site-1", MEAN))
    assert_is_mean(aggregator.aggregate_model())
