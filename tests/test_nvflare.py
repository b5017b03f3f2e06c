"""`fastagg.nvflare`: the aggregator's policies and answers, and the filters, through NVFlare's own objects."""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fastagg
from data import generator, normal
from reference import FLOATS, LARGEST_ERROR, assert_rounded_once, magnitude, wide
from reference import mean as mean_of

pytest.importorskip("nvflare")
torch = pytest.importorskip("torch")

from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable  # noqa: E402
from nvflare.apis.fl_constant import ReservedKey  # noqa: E402
from nvflare.apis.fl_context import FLContext  # noqa: E402
from nvflare.apis.fl_exception import UnsafeComponentError  # noqa: E402
from nvflare.apis.shareable import Shareable  # noqa: E402
from nvflare.apis.workspace import Workspace  # noqa: E402
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType  # noqa: E402
from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper  # noqa: E402
from nvflare.app_common.app_constant import AppConstants  # noqa: E402
from nvflare.app_common.decomposers import numpy_decomposers  # noqa: E402
from nvflare.app_common.utils.fl_model_utils import FLModelUtils  # noqa: E402
from nvflare.app_opt.pt.decomposers import TensorDecomposer  # noqa: E402
from nvflare.app_opt.pt.lazy_tensor_dict import LazyTensorDict  # noqa: E402
from nvflare.fuel.utils import fobs  # noqa: E402
from nvflare.job_config.api import FedJob  # noqa: E402
from nvflare.job_config.defs import FilterType  # noqa: E402

from fastagg.nvflare import DequantizeFilter, FedAvgAggregator, QuantizeFilter  # noqa: E402

STEPS = MetaKey.NUM_STEPS_CURRENT_ROUND
WIRES = ("bf16", "fp16", "fp8_e4m3", "fp8_e5m2", "int8", "int4", "sign")


def reply(client: str | None, params: Any, steps: Any = 1, **rest: Any) -> FLModel:
    """A client's reply as the workflow hands it to an aggregator."""
    meta = {**rest.pop("meta", {})}
    if client is not None:
        meta["client_name"] = client
    if steps is not None:
        meta[STEPS] = steps
    return FLModel(params=params, meta=meta, **rest)


def vector(*values: float, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    return {"w": np.array(values, dtype)}


def aggregated(*replies: FLModel, **options: Any) -> tuple[FLModel, FedAvgAggregator]:
    """The mean of replies, and who made it."""
    aggregator = FedAvgAggregator(**options)
    for one in replies:
        aggregator.accept_model(one)
    return aggregator.aggregate_model(), aggregator


def assert_left_out(bad: FLModel, reason: str, *, first: bool = False, **options: Any) -> None:
    """A bad reply between two good ones changes nothing, and is reported."""
    good = [reply("site-1", vector(1, 2), 1), reply("site-2", vector(3, 4), 3)]
    aggregator = FedAvgAggregator(**options)
    for one in [bad, *good] if first else [good[0], bad, good[1]]:
        aggregator.accept_model(one)
    result = aggregator.aggregate_model()
    np.testing.assert_array_equal(result.params["w"], np.float32([2.5, 3.5]))
    assert result.meta["nr_aggregated"] == 2
    [dropped] = aggregator.dropped
    assert dropped.client == "site-bad"
    assert reason in dropped.reason
    assert result.meta["fastagg"] == {"total_weight": 4.0, "dropped": [["site-bad", dropped.reason]]}


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


# The mean


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_equals_nvflare_s_own_mean(library: str, dtype: str, batch: int) -> None:
    random = generator()
    shapes = {"conv.weight": (8, 3, 3, 3), "conv.bias": (8,), "scale": ()}
    updates = [
        {name: np.asarray(normal(random, shape, FLOATS[dtype])) for name, shape in shapes.items()} for _ in range(10)
    ]
    if library == "torch":
        updates = [{name: torch.from_numpy(leaf) for name, leaf in update.items()} for update in updates]
    steps = [int(count) for count in random.integers(1, 2000, 10)]
    theirs = WeightedAggregationHelper()
    for client, (update, count) in enumerate(zip(updates, steps, strict=True)):
        theirs.add(update, float(count), f"site-{client}", 0)
    expected = theirs.get_result()

    replies = [reply(f"site-{client}", updates[client], steps[client]) for client in range(10)]
    result, aggregator = aggregated(*replies, batch=batch)
    assert aggregator.dropped == []
    assert result.meta["fastagg"]["total_weight"] == sum(steps)
    assert list(result.params) == list(shapes)
    for name, leaf in result.params.items():
        assert isinstance(leaf, torch.Tensor if library == "torch" else np.ndarray)
        assert leaf.dtype == expected[name].dtype
        np.testing.assert_allclose(leaf, expected[name], rtol=0, atol={"fp32": 2e-6, "fp64": 1e-14}[dtype])


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_many_fp16_clients_keep_their_value(library: str) -> None:
    """Summed in fp16, as NVFlare does, 4096 clients of 1.0 give 0.5."""
    ones = np.ones(8, np.float16)
    update = {"w": torch.from_numpy(ones) if library == "torch" else ones}
    result, _ = aggregated(*(reply(f"site-{client}", update) for client in range(4096)), batch=64)
    assert result.params["w"].dtype == update["w"].dtype
    np.testing.assert_array_equal(np.asarray(result.params["w"]), ones)


def test_fp16_weights_do_not_overflow() -> None:
    result, _ = aggregated(*(reply(f"site-{k}", vector(100.0, dtype=np.float16), 70_000) for k in range(4)))
    np.testing.assert_array_equal(result.params["w"], np.float16([100]))


def test_bf16_tensors_are_rounded_once() -> None:
    random = generator()
    arrays = [normal(random, 300, FLOATS["bf16"]) for _ in range(37)]
    tensors = [torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16) for array in arrays]
    weights = [float(k + 1) for k in range(37)]
    result, _ = aggregated(*(reply(f"site-{k}", {"w": tensors[k]}, weights[k]) for k in range(37)))
    mean = result.params["w"]
    assert mean.dtype == torch.bfloat16
    as_numpy = mean.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    columns = [wide(one) for one in arrays]
    assert_rounded_once(as_numpy, mean_of(columns, weights), LARGEST_ERROR * magnitude(columns, weights))


@pytest.mark.parametrize(("policy", "expected"), [("max", 20), ("first", 10), ("round", 18)])
def test_integers_keep_their_dtype(policy: str, expected: int) -> None:
    updates = [
        {"count": torch.tensor(10), "used": torch.tensor(False)},
        {"count": torch.tensor(20), "used": torch.tensor(True)},
    ]
    result, _ = aggregated(reply("a", updates[0], 1), reply("b", updates[1], 3), integer_policy=policy)
    assert result.params["count"].dtype == torch.int64
    assert int(result.params["count"]) == expected
    assert result.params["used"].dtype == torch.bool
    assert bool(result.params["used"]) == (policy != "first")


def test_python_numbers_are_leaves_too() -> None:
    result, _ = aggregated(*(reply(f"site-{k}", {"w": np.float32(k), "intercept": float(k)}) for k in range(3)))
    assert (result.params["w"], result.params["intercept"]) == (1, 1)


def test_inputs_stay_as_they_are() -> None:
    updates = [vector(1, 2), vector(3, 5)]
    saved = [update["w"].copy() for update in updates]
    result, _ = aggregated(*(reply(f"site-{k}", update) for k, update in enumerate(updates)))
    assert all(not np.shares_memory(result.params["w"], update["w"]) for update in updates)
    for update, before in zip(updates, saved, strict=True):
        np.testing.assert_array_equal(update["w"], before)


@pytest.mark.parametrize("params_type", [ParamsType.FULL, ParamsType.DIFF])
def test_the_result_updates_the_global_model(params_type: ParamsType) -> None:
    result, _ = aggregated(*(reply(f"site-{k}", vector(k, 2), params_type=params_type) for k in range(3)))
    updated = FLModelUtils.update_model(FLModel(params=vector(10, 10)), result)
    np.testing.assert_array_equal(updated.params["w"], [1, 2] if params_type == ParamsType.FULL else [11, 12])


def test_a_second_round_starts_anew() -> None:
    aggregator = FedAvgAggregator()
    for current_round in (0, 1):
        aggregator.reset_stats()
        for client in ("a", "b"):
            aggregator.accept_model(reply(client, vector(current_round), current_round=current_round))
        result = aggregator.aggregate_model()
        assert aggregator.dropped == []
        assert result.current_round == result.meta["current_round"] == current_round
        np.testing.assert_array_equal(result.params["w"], [current_round])


@pytest.mark.parametrize("late", [[], [Shareable()]], ids=["clean", "damaged"])
def test_a_workflow_need_not_reset_what_was_aggregated(late: list[Shareable]) -> None:
    _, aggregator = aggregated(reply("site-1", vector(1)), reply("site-2", vector(np.nan)))
    for shareable in late:
        aggregator.accept(shareable, FLContext())
    assert aggregator.accept_model(reply("site-1", vector(3)))
    assert aggregator.accept_model(reply("site-2", vector(4)))
    assert aggregator.aggregate_model().params["w"] == 3.5
    assert len(aggregator.dropped) == len(late)


def test_reset_forgets_what_was_accepted() -> None:
    aggregator = FedAvgAggregator()
    aggregator.accept_model(reply("a", vector(1)))
    aggregator.reset_stats()
    with pytest.raises(ValueError, match="there was none"):
        aggregator.aggregate_model()


# Weights


def test_missing_steps_weigh_one() -> None:
    result, _ = aggregated(reply("a", vector(0), None), reply("b", vector(4), 3))
    np.testing.assert_array_equal(result.params["w"], [3])


@pytest.mark.parametrize("three", [np.int64(3), np.float32(3), np.array(3), torch.tensor(3)], ids=repr)
def test_steps_are_numbers_of_any_library(three: Any) -> None:
    result, _ = aggregated(reply("site-1", vector(0), None, meta={STEPS: None}), reply("site-2", vector(4), three))
    assert result.params["w"] == 3


def test_a_client_of_weight_zero_never_contributes() -> None:
    nan = reply("b", {"w": np.float32([np.nan])}, 0, metrics={"loss": 9.0})
    result, aggregator = aggregated(reply("a", vector(1), 2, metrics={"loss": 1.0}), nan)
    np.testing.assert_array_equal(result.params["w"], [1])
    assert (result.metrics, aggregator.dropped, result.meta["nr_aggregated"]) == ({"loss": 1.0}, [], 1)


@pytest.mark.parametrize("steps", [-1, np.nan, np.inf, True, np.True_, "5", [5], 10**400], ids=repr)
def test_a_weight_that_is_none_is_left_out(steps: Any) -> None:
    assert_left_out(reply("site-bad", vector(9, 9), steps), STEPS)


def test_a_weight_out_of_the_accumulators_range_is_left_out() -> None:
    result, aggregator = aggregated(reply("a", vector(1)), reply("b", vector(9), 1e300))
    assert result.params["w"] == [1]
    assert aggregator.dropped == [("b", "its weight: expected 0, or 2**-300 to 2**300, got 1e+300")]


def test_aggregation_weights_are_factors() -> None:
    replies = [reply("a", vector(0), 2), reply("b", vector(4), 3), reply("c", vector(8), 7)]
    result, _ = aggregated(*replies, aggregation_weights={"b": 2.0, "c": 0})
    np.testing.assert_array_equal(result.params["w"], [3])


# Bad replies


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({}, "expected at least one array, got none"),
        ({"v": np.ones(2, np.float32)}, "missing leaves 'w'"),
        ({"w": np.ones(2, np.float32), "v": np.ones(2, np.float32)}, "unexpected leaves 'v'"),
        ({"w": np.ones(3, np.float32)}, "leaf 'w': expected float32 (2,) like most replies', got float32 (3,)"),
        ({"w": np.ones((1, 2), np.float32)}, "got float32 (1, 2)"),
        ({"w": np.ones(2)}, "got float64 (2,)"),
        ({"w": np.ones(2, complex)}, "leaf 'w': dtype complex128 is not supported"),
        ({"w": [1.0, 2.0]}, "leaf 'w'"),
        ({"w": None}, "leaf 'w'"),
        ([np.ones(2, np.float32)], "params: expected a dict of arrays, got list"),
        ({"w": np.float32([1, np.nan])}, "leaf 'w' holds a NaN"),
        ({"w": np.float32([np.inf, 1])}, "leaf 'w' holds a NaN, an infinity"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
@pytest.mark.parametrize("first", [False, True], ids=["between", "first"])
def test_bad_parameters_are_left_out(params: Any, reason: str, first: bool) -> None:
    assert_left_out(reply("site-bad", params), reason, first=first)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_nan_is_dropped_whenever_its_batch_is_added(batch: int) -> None:
    values = [0, np.nan, 2, 3, 4]
    replies = [reply(f"site-{k}", {"w": np.float32([values[k]])}, metrics={"loss": float(k)}) for k in range(5)]
    result, aggregator = aggregated(*replies, batch=batch)
    np.testing.assert_array_equal(result.params["w"], [2.25])
    assert result.metrics == {"loss": 2.25}
    assert [one.client for one in aggregator.dropped] == ["site-1"]


def test_nan_under_raise_ends_the_round() -> None:
    with pytest.raises(ValueError, match="b: leaf 'w' holds a NaN"):
        aggregated(reply("a", vector(1)), reply("b", {"w": np.float32([np.nan])}), nan_policy="raise")


def test_nan_under_propagate_reaches_the_result() -> None:
    result, _ = aggregated(reply("a", vector(1)), reply("b", {"w": np.float32([np.nan])}), nan_policy="propagate")
    assert np.isnan(result.params["w"]).all()


def test_a_round_that_mixes_full_and_diff_leaves_the_odd_ones_out() -> None:
    bad = reply("site-bad", vector(9, 9), params_type=ParamsType.DIFF)
    assert_left_out(bad, "expected params_type FULL like most replies', got DIFF", first=True)


def test_a_tie_goes_to_the_last_round_s_structure() -> None:
    aggregator = FedAvgAggregator()
    aggregator.accept_model(reply("a", vector(1)))
    aggregator.aggregate_model()
    aggregator.reset_stats()
    aggregator.accept_model(reply("b", vector(1, 2)))
    aggregator.accept_model(reply("a", vector(3)))
    np.testing.assert_array_equal(aggregator.aggregate_model().params["w"], [3])
    assert [one.client for one in aggregator.dropped] == ["b"]


def test_a_reply_of_another_round_is_left_out() -> None:
    aggregator = FedAvgAggregator()
    aggregator.fl_ctx = FLContext()
    aggregator.fl_ctx.set_prop(AppConstants.CURRENT_ROUND, 7)
    assert not aggregator.accept_model(reply("late", vector(9), current_round=6))
    assert aggregator.accept_model(reply("a", vector(1), current_round=7))
    assert aggregator.accept_model(reply("b", vector(2)))  # states none
    result = aggregator.aggregate_model()
    assert aggregator.dropped == [("late", "expected a reply of round 7, got one of round 6")]
    assert result.current_round == 7


def test_without_a_workflow_the_first_reply_tells_the_round() -> None:
    result, aggregator = aggregated(*(reply(f"site-{k}", vector(k), current_round=k // 2) for k in range(3)))
    assert result.current_round == 0
    assert [one.client for one in aggregator.dropped] == ["site-2"]


def test_a_second_reply_of_a_client_is_left_out() -> None:
    result, aggregator = aggregated(reply("a", vector(1)), reply("a", vector(9)), reply("b", vector(3)))
    np.testing.assert_array_equal(result.params["w"], [2])
    assert aggregator.dropped == [("a", "a second reply in one round")]


def test_a_client_may_mend_a_refused_reply() -> None:
    result, _ = aggregated(reply("a", vector(9), -1), reply("a", vector(1)))
    np.testing.assert_array_equal(result.params["w"], [1])


def test_replies_without_a_name_are_different_clients() -> None:
    result, _ = aggregated(reply(None, vector(1)), reply(AppConstants.CLIENT_UNKNOWN, vector(3)))
    assert result.meta["nr_aggregated"] == 2


def test_no_reply_left_is_an_error_that_names_the_causes() -> None:
    with pytest.raises(ValueError, match=r"(?s)no reply is left.*a: .*expected at least one array.*b: its weight is 0"):
        aggregated(reply("a", {}), reply("b", vector(1), 0))


def test_what_is_left_out_is_logged(warned: Callable[[], list[str]]) -> None:
    aggregated(reply("a", vector(1)), reply("b", {}))
    assert any("the reply of b is left out: params: expected at least one array" in line for line in warned())


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"nan_policy": "skip"}, ValueError),
        ({"integer_policy": "mean"}, ValueError),
        ({"batch": 0}, ValueError),
        ({"aggregation_weights": {"a": -1}}, ValueError),
        ({"aggregation_weights": {"a": "1"}}, TypeError),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        FedAvgAggregator(**options)


# Metrics


def test_metrics_have_the_weights_of_the_parameters() -> None:
    replies = [
        reply("a", vector(1), 1, metrics={"accuracy": 0.5, "loss": np.float32(2.0)}),
        reply("b", vector(1), 3, metrics={"accuracy": 1, "samples": torch.tensor(6.0)}),
    ]
    result, _ = aggregated(*replies)
    assert result.metrics == {"accuracy": 0.875, "loss": 2.0, "samples": 6.0}


def test_metrics_need_all_clients() -> None:
    result, _ = aggregated(reply("a", vector(1), metrics={"accuracy": 0.5}), reply("b", vector(1)))
    assert result.metrics is None


def test_metrics_that_are_no_numbers_are_reported_once(warned: Callable[[], list[str]]) -> None:
    metrics = {"accuracy": 0.5, "done": True, "name": "x", "matrix": {"a": 1}, "loss": np.nan, "count": 10**400}
    result, _ = aggregated(*(reply(client, vector(1), metrics=dict(metrics)) for client in ("a", "b")))
    assert result.metrics == {"accuracy": 0.5}
    lines = [line for line in warned() if "is not averaged" in line]
    assert len(lines) == 5
    assert any("metric 'loss' is not averaged: expected a finite number, got nan" in line for line in lines)


# How NVFlare hands replies over


def test_an_empty_pattern_excludes_nothing() -> None:
    result, _ = aggregated(reply("a", vector(1)), exclude_vars="")
    assert list(result.params) == ["w"]


def test_excluded_leaves_are_not_averaged() -> None:
    updates = [{"body.w": np.float32([k]), "head.w": np.ones(k + 1, np.float32)} for k in range(3)]
    result, aggregator = aggregated(*(reply(f"{k}", one) for k, one in enumerate(updates)), exclude_vars=r"^head\.")
    assert list(result.params) == ["body.w"]
    assert aggregator.dropped == []


def on_disk(folder: Path, client: int, values: np.ndarray) -> dict[str, Any]:
    """Parameters as NVFlare's tensor disk offload leaves them."""
    from safetensors.torch import save_file

    place = folder / f"client-{client}"
    place.mkdir()
    save_file({"t": torch.from_numpy(values)}, place / "w.safetensors")
    return {"w": LazyTensorDict({"w": (str(place / "w.safetensors"), "t")}, str(place)).make_lazy_ref("w")}


def test_tensors_on_disk_are_read(tmp_path: Path) -> None:
    replies = [reply(f"{k}", on_disk(tmp_path, k, np.full(9, k, np.float32))) for k in range(4)]
    result, _ = aggregated(*replies)
    assert torch.equal(result.params["w"], torch.full((9,), 1.5))


def test_a_file_that_is_gone_leaves_its_reply_out(tmp_path: Path) -> None:
    params = on_disk(tmp_path, 0, np.ones(2, np.float32))
    (tmp_path / "client-0" / "w.safetensors").unlink()
    assert_left_out(reply("site-bad", params), "leaf 'w': its file cannot be read")


def test_scatter_and_gather_s_calls() -> None:
    aggregator, context = FedAvgAggregator(), FLContext()
    context.set_prop(AppConstants.CURRENT_ROUND, 2)
    accepted = []
    for client, value, contribution_round in (("a", 1, 2), ("b", 3, 2), ("b", 9, 2), ("c", 9, 1)):
        dxo = DXO(DataKind.WEIGHT_DIFF, data=vector(value), meta={STEPS: 1})
        shareable = dxo.to_shareable()
        shareable.set_peer_props({ReservedKey.IDENTITY_NAME: client})
        shareable.set_cookie_jar({AppConstants.CONTRIBUTION_ROUND: contribution_round})
        accepted.append(aggregator.accept(shareable, context))
    assert accepted == [True, True, False, False]
    dxo = from_shareable(aggregator.aggregate(context))
    assert dxo.data_kind == DataKind.WEIGHT_DIFF
    np.testing.assert_array_equal(dxo.data["w"], [2])
    aggregator.reset(context)
    assert aggregator.dropped == []


def test_job_export_reads_the_arguments(tmp_path: Path) -> None:
    job = FedJob(name="job", min_clients=1)
    job.set_app_packages(["fastagg"])
    job.to_server(FedAvgAggregator(integer_policy="first", batch=8, aggregation_weights={"site-1": 2.0}), id="mean")
    job.to_server(QuantizeFilter(wire="int8", block=64), filter_type=FilterType.TASK_DATA, tasks=["train"])
    job.export_job(str(tmp_path))
    [config] = tmp_path.rglob("config_fed_server.json")
    text = config.read_text()
    assert '"path": "fastagg.nvflare.FedAvgAggregator"' in text
    assert '"path": "fastagg.nvflare.QuantizeFilter"' in text
    arguments = {one["id"]: one["args"] for one in json.loads(text)["components"]}
    assert arguments["mean"] == {"integer_policy": "first", "batch": 8, "aggregation_weights": {"site-1": 2.0}}
    assert not list(tmp_path.rglob("fastagg"))  # the package's code does not travel with the job


def test_the_class_allow_list_takes_the_prefix_of_the_docs(tmp_path: Path) -> None:
    authorizer = pytest.importorskip("nvflare.app_common.widgets.component_path_authorizer").ComponentPathAuthorizer()
    for folder in ("startup", "local"):
        (tmp_path / folder).mkdir()
    resources = tmp_path / "local" / "resources.json"
    for allowed in (["nvflare."], ["nvflare.", "fastagg.nvflare."]):
        resources.write_text(json.dumps({"format_version": 2, "class_allow_list": allowed}))
        for one in (FedAvgAggregator, QuantizeFilter, DequantizeFilter):
            config = {"path": f"{one.__module__}.{one.__name__}"}
            if len(allowed) == 1:
                with pytest.raises(UnsafeComponentError, match="is not in allow_list"):
                    authorizer.authorize_component_config(config, workspace=Workspace(str(tmp_path)))
            else:
                authorizer.authorize_component_config(config, workspace=Workspace(str(tmp_path)))


# Filters


def sent(dxo: DXO) -> DXO:
    """A DXO after NVFlare's serialisation."""
    numpy_decomposers.register()
    fobs.register(TensorDecomposer)
    return from_shareable(fobs.loads(fobs.dumps(dxo.to_shareable())))


def filtered(one: QuantizeFilter | DequantizeFilter, dxo: DXO) -> DXO:
    """A DXO after a filter."""
    return from_shareable(one.process(dxo.to_shareable(), FLContext()))


def mixed_model(library: str) -> dict[str, Any]:
    """Floats, integers and bools."""
    random = generator()
    arrays = {
        "w": normal(random, (30, 70), np.dtype(np.float32)),
        "b": normal(random, 7, np.dtype(np.float32)),
        "scalar": np.array(0.5, np.float32),
        "count": np.array(12),
        "used": np.array([True, False]),
    }
    return arrays if library == "numpy" else {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("wire", WIRES)
def test_filters_restore_what_quantize_makes(wire: str, library: str) -> None:
    model = mixed_model(library)
    saved = {name: np.asarray(leaf).copy() for name, leaf in model.items()}
    dxo = DXO(DataKind.WEIGHTS, data=model, meta={STEPS: 5})
    there = sent(filtered(QuantizeFilter(wire=wire), dxo))
    assert there.get_meta_prop(MetaKey.PROCESSED_ALGORITHM) == "fastagg"
    back = filtered(DequantizeFilter(), there)
    assert back.meta.keys() == {STEPS, MetaKey.FILTER_HISTORY}
    for name, leaf in model.items():
        expected = leaf if name in ("count", "used") else fastagg.dequantize(fastagg.quantize(leaf, wire))
        assert type(back.data[name]) is type(leaf)
        assert back.data[name].dtype == leaf.dtype
        np.testing.assert_array_equal(np.asarray(back.data[name]), np.asarray(expected))
        np.testing.assert_array_equal(np.asarray(leaf), saved[name])  # the filter changes no input
    assert dxo.meta == {STEPS: 5}


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("wire", WIRES)
def test_the_aggregator_decodes_what_arrives(wire: str, library: str) -> None:
    models = [{"w": leaf * (k + 1)} for k, leaf in enumerate([mixed_model(library)["w"]] * 3)]
    replies, decoded = [], []
    for k, model in enumerate(models):
        there = sent(filtered(QuantizeFilter(wire=wire), DXO(DataKind.WEIGHTS, data=model, meta={STEPS: k + 1})))
        received = FLModelUtils.from_shareable(there.to_shareable())
        received.meta["client_name"] = f"site-{k}"
        replies.append(received)
        decoded.append({"w": fastagg.dequantize(fastagg.quantize(model["w"], wire))})
    result, aggregator = aggregated(*replies)
    assert aggregator.dropped == []
    expected = fastagg.Accumulator(batch=3)
    for k, one in enumerate(decoded):
        expected.add(one, k + 1)
    assert type(result.params["w"]) is type(models[0]["w"])
    np.testing.assert_array_equal(np.asarray(result.params["w"]), np.asarray(expected.result()["w"]))


def test_codes_stay_until_they_are_added() -> None:
    codes = np.ones(4, np.float16)
    kept = weakref.ref(codes)
    aggregator = FedAvgAggregator(batch=2)
    aggregator.accept_model(reply("a", {"w": fastagg.Quantized(codes, None, wire="fp16", shape=(4,))}))
    del codes
    assert kept() is not None
    np.testing.assert_array_equal(aggregator.aggregate_model().params["w"], np.ones(4, np.float32))
    assert kept() is None


def test_quantized_leaves_and_arrays_mix() -> None:
    result, _ = aggregated(reply("a", {"w": fastagg.quantize(np.float32([1, 2]), "fp16")}), reply("b", vector(3, 4)))
    np.testing.assert_array_equal(result.params["w"], np.float32([2, 3]))


def test_narrow_arrays_pass_as_they_are() -> None:
    data = {"half": np.ones(4, np.float16), "wide": np.ones(4)}
    there = filtered(QuantizeFilter(wire="fp16"), DXO(DataKind.WEIGHT_DIFF, data=data))
    assert there.data["half"] is data["half"]
    assert there.data["wide"].dtype == np.float16
    assert filtered(DequantizeFilter(), there).data["wide"].dtype == np.float64


def test_metrics_pass_both_filters() -> None:
    dxo = DXO(DataKind.METRICS, data={"accuracy": 0.5})
    for one in (QuantizeFilter(), DequantizeFilter()):
        assert filtered(one, dxo).data == {"accuracy": 0.5}
    assert filtered(DequantizeFilter(), DXO(DataKind.WEIGHTS, data=vector(1))).data["w"].dtype == np.float32


def test_quantising_twice_is_refused() -> None:
    once = filtered(QuantizeFilter(), DXO(DataKind.WEIGHTS, data=vector(1)))
    with pytest.raises(ValueError, match="already processed by 'fastagg'"):
        QuantizeFilter(wire="int8").process(once.to_shareable(), FLContext())


def test_one_model_for_many_clients_is_quantised_for_each() -> None:
    """A server filters a shallow copy of the same task data for every client."""
    dxo = DXO(DataKind.WEIGHTS, data=vector(1, 2), meta={MetaKey.FILTER_HISTORY: ["Before"]})
    for _ in range(3):
        there = filtered(QuantizeFilter(), dxo)
        assert there.get_filter_history() == ["Before", "QuantizeFilter"]
    assert dxo.meta == {MetaKey.FILTER_HISTORY: ["Before"]}
    assert dxo.data["w"].dtype == np.float32


def test_parameters_that_others_processed_are_left_out() -> None:
    bad = reply("site-bad", vector(9, 9), meta={MetaKey.PROCESSED_ALGORITHM: "float16"})
    assert_left_out(bad, "processed by 'float16'")


def test_an_overflow_is_logged_and_left_out(warned: Callable[[], list[str]]) -> None:
    there = filtered(QuantizeFilter(), DXO(DataKind.WEIGHTS, data=vector(1e6, 1)))
    assert any("a NaN or an infinity after fp16 quantisation in w" in line for line in warned())
    bad = reply("site-bad", there.data, meta=there.meta)
    assert_left_out(bad, "leaf 'w' holds a NaN, an infinity")


def damaged(field: str, value: Any) -> DXO:
    """A quantised DXO of which one thing is not as its description says."""
    dxo = filtered(QuantizeFilter(wire="int8"), DXO(DataKind.WEIGHTS, data=vector(1, 2)))
    if field == "codes":
        dxo.data["w"] = value
    else:
        dxo.meta["fastagg_quantized"]["w"][field] = value
    return dxo


DAMAGES = [
    ("codes", np.zeros(1, np.int8), "leaf 'w': data: expected shape (2,) for int8 of (2,), got (1,)"),
    ("codes", np.zeros(2, np.uint8), "leaf 'w': data: expected int8 for int8, got uint8"),
    ("codes", b"12", "leaf 'w': data: expected an array, got bytes"),
    ("shape", [3], "leaf 'w': data: expected shape (3,)"),
    ("shape", [np.inf], "leaf 'w': 'float' object cannot be interpreted as an integer"),
    ("shape", [2.5], "leaf 'w': 'float' object cannot be interpreted as an integer"),
    ("shape", [10**400], "leaf 'w': shape: expected sizes of 0 or more that can be held in memory"),
    ("scales", np.ones(2, np.float32), "leaf 'w': scales: expected 1 float32"),
    ("scales", None, "leaf 'w': scales: expected a numpy float32 array"),
    ("block", 7, "leaf 'w': block: expected a power of two"),
    ("wire", "fp17", "leaf 'w'"),
    ("unknown", 1, "leaf 'w': expected a description of"),
]


@pytest.mark.parametrize(("field", "value", "reason"), DAMAGES, ids=[f"{one[0]}-{i}" for i, one in enumerate(DAMAGES)])
def test_damaged_codes_are_refused_by_name(field: str, value: Any, reason: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        DequantizeFilter().process(damaged(field, value).to_shareable(), FLContext())
    assert reason in str(caught.value)
    bad = damaged(field, value)
    assert_left_out(reply("site-bad", bad.data, meta=bad.meta), reason)


@pytest.mark.parametrize("options", [{"wire": "fp17"}, {"rounding": "up"}, {"wire": "int8", "block": 7}, {"block": 64}])
def test_wrong_filter_arguments_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"wire|rounding|block"):
        QuantizeFilter(**options)


def test_stochastic_rounding_is_unbiased() -> None:
    values = np.full(200_000, 1 + 2**-12, np.float32)  # a quarter of the way to the next fp16
    dxo = DXO(DataKind.WEIGHTS, data={"w": values})
    there = filtered(QuantizeFilter(rounding="stochastic"), dxo)
    mean = filtered(DequantizeFilter(), there).data["w"].mean(dtype=np.float64)
    assert abs(mean - values[0]) < 5 * 2**-10 * np.sqrt(3 / 16 / len(values))
