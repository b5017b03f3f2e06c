"""Who is measured: for every operation, fastagg and what a user would write or call instead."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import fastagg
from cases import Case
from inputs import Inputs, leaves_of

Call = Callable[[], Any]

FASTAGG, FASTAGG_OUT = "fastagg", "fastagg, out="


@dataclass(frozen=True)
class Contender:
    """One way to do an operation."""

    name: str
    prepare: Callable[[Inputs], Any]  # all that is not timed; the call returns the answer
    package: str = "fastagg"
    tolerance: float = 1e-5  # of a mean, in weighted means of |x|: plain float32 sums
    fits: Callable[[Case], bool] = lambda case: True

    @property
    def reuses_out(self) -> bool:
        """Whether it writes into memory that is there already."""
        return self.name.endswith("out=")

    @property
    def is_fastagg(self) -> bool:
        """Whether it is ours."""
        return self.package == "fastagg"

    @property
    def is_installed(self) -> bool:
        """Whether its package is there."""
        return importlib.util.find_spec(self.package) is not None


def rival_of(contender: Contender, contenders: list[Contender]) -> Contender:
    """The fastagg row that a contender is compared with: the one that allocates as it does."""
    name = FASTAGG_OUT if contender.reuses_out else FASTAGG
    return next(candidate for candidate in contenders if candidate.name == name)


def _is_plain(case: Case) -> bool:
    return case.wire is None


def _is_float32(case: Case) -> bool:
    return case.wire is None and case.dtype == "float32"


def _is_array(case: Case) -> bool:
    return case.layout == "array"


def _is_fp16(case: Case) -> bool:
    return case.wire == "fp16"


def _average(inputs: Inputs) -> Call:
    return lambda: fastagg.fedavg(inputs.updates, inputs.weights)


def _average_into(inputs: Inputs) -> Call:
    return lambda: fastagg.fedavg(inputs.updates, inputs.weights, out=inputs.out)


def _shares(inputs: Inputs) -> list[float]:
    total = sum(inputs.weights)
    return [weight / total for weight in inputs.weights]


def _numpy_loop(inputs: Inputs) -> Call:
    """What is written by hand first: for every leaf a sum of products, in float32."""
    shares = [np.float32(share) for share in _shares(inputs)]
    clients = [[np.asarray(leaf) for leaf in leaves_of(update)] for update in inputs.updates]

    def average() -> Any:
        means = []
        for column in zip(*clients, strict=True):
            mean = column[0] * shares[0]
            for share, array in zip(shares[1:], column[1:], strict=True):
                mean += share * array
            means.append(mean.astype(column[0].dtype, copy=False))
        return _rebuild(inputs, means)

    return average


def _rebuild(inputs: Inputs, means: list[Any]) -> Any:
    first = inputs.updates[0]
    return dict(zip(first, means, strict=True)) if isinstance(first, dict) else means[0]


def _torch_clients(inputs: Inputs) -> list[list[Any]]:
    import torch

    as_tensor = torch.from_numpy if inputs.case.library == "numpy" else lambda leaf: leaf
    return [[as_tensor(leaf) for leaf in leaves_of(update)] for update in inputs.updates]


def _torch_loop(inputs: Inputs) -> Call:
    """`add_(alpha=)` into a new float32 sum, rounded at the end where the leaves are narrower."""
    import torch

    shares, clients = _shares(inputs), _torch_clients(inputs)

    def average() -> Any:
        means = []
        for column in zip(*clients, strict=True):
            first = column[0]
            if not first.is_floating_point():
                means.append(torch.stack(column).amax(0))
                continue
            mean = torch.mul(first.float() if first.dtype != torch.float32 else first, shares[0])
            for share, tensor in zip(shares[1:], column[1:], strict=True):
                mean.add_(tensor, alpha=share)
            means.append(mean.to(first.dtype))
        return _rebuild(inputs, means)

    return average


def _torch_loop_into(inputs: Inputs) -> Call:
    """The same into tensors that are there already."""
    import torch

    shares, clients = _shares(inputs), _torch_clients(inputs)
    outs = _torch_clients_of_out(inputs)

    def average() -> Any:
        for column, out in zip(zip(*clients, strict=True), outs, strict=True):
            if not out.is_floating_point():
                torch.amax(torch.stack(column), 0, out=out)
                continue
            torch.mul(column[0], shares[0], out=out)
            for share, tensor in zip(shares[1:], column[1:], strict=True):
                out.add_(tensor, alpha=share)
        return inputs.out

    return average


def _torch_clients_of_out(inputs: Inputs) -> list[Any]:
    import torch

    return [leaf if isinstance(leaf, torch.Tensor) else torch.from_numpy(leaf) for leaf in leaves_of(inputs.out)]


def _torch_decode(inputs: Inputs) -> Call:
    """int8 uploads: each is decoded to float32 by hand, then `add_(alpha=)`."""
    import torch

    shares = _shares(inputs)

    def decoded(codes: Any) -> Any:
        count = codes.data.numel()
        scales = codes.scales.repeat_interleave(codes.block)[:count]
        return codes.data.to(torch.float32).mul_(scales)

    def average() -> Any:
        mean = decoded(inputs.updates[0]).mul_(shares[0])
        for share, update in zip(shares[1:], inputs.updates[1:], strict=True):
            mean.add_(decoded(update), alpha=share)
        return mean

    return average


def _import(module: str) -> Any:
    """A framework's module; its own imports may warn of names that are going away."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


def _flower(inputs: Inputs) -> Call:
    """The ServerApp's own aggregation of replies, from its records to a record."""
    app, strategy = _import("flwr.app"), _import("flwr.serverapp.strategy.strategy_utils")
    names = list(inputs.updates[0]) if isinstance(inputs.updates[0], dict) else ["array"]
    records = []
    for update, weight in zip(inputs.updates, inputs.weights, strict=True):
        arrays = zip(names, leaves_of(update), strict=True)
        record = app.ArrayRecord({name: app.Array(np.asarray(leaf)) for name, leaf in arrays})
        records.append(app.RecordDict({"arrays": record, "metrics": app.MetricRecord({"num-examples": weight})}))
    return lambda: strategy.aggregate_arrayrecords(records, "num-examples")


def _nvflare(inputs: Inputs) -> Call:
    """The helper that its FedAvg adds every arriving model to."""
    aggregators = _import("nvflare.app_common.aggregators.weighted_aggregation_helper")
    updates = [update if isinstance(update, dict) else {"array": update} for update in inputs.updates]

    def average() -> Any:
        helper = aggregators.WeightedAggregationHelper()
        for client, (update, weight) in enumerate(zip(updates, inputs.weights, strict=True)):
            helper.add(update, weight, f"site-{client}", 0)
        return helper.get_result()

    return average


FEDAVG = [
    Contender(FASTAGG, _average, tolerance=1.2e-7),
    Contender(FASTAGG_OUT, _average_into, tolerance=1.2e-7),
    Contender("torch add_", _torch_loop, "torch", fits=_is_plain),
    Contender("torch add_, out=", _torch_loop_into, "torch", fits=_is_float32),
    Contender("torch decode, add_", _torch_decode, "torch", fits=lambda case: case.wire == "int8"),
    Contender("NumPy loop", _numpy_loop, "numpy", 1e-5, lambda case: _is_float32(case) and _is_array(case)),
    Contender("Flower ServerApp", _flower, "flwr", 1e-5, _is_float32),
    Contender("NVFlare", _nvflare, "nvflare", 1e-5, _is_float32),
]


class Fold:
    """Adds every client when called; `mean` is asked for outside the clock."""

    def __init__(self, add_all: Call, mean: Call) -> None:
        self._add_all, self.mean = add_all, mean

    def __call__(self) -> None:
        """Adds every client once."""
        self._add_all()


def _accumulator(inputs: Inputs) -> Fold:
    accumulator = fastagg.Accumulator(batch=inputs.case.batch)

    def add_all() -> None:
        for update, weight in zip(inputs.updates, inputs.weights, strict=True):
            accumulator.add(update, weight)

    return Fold(add_all, accumulator.result)


def _torch_accumulator(inputs: Inputs) -> Fold:
    import torch

    total = torch.zeros_like(inputs.updates[0])
    weight_sum = 0.0

    def add_all() -> None:
        nonlocal weight_sum
        for update, weight in zip(inputs.updates, inputs.weights, strict=True):
            total.add_(update, alpha=weight)
            weight_sum += weight

    return Fold(add_all, lambda: total / weight_sum)


def _nvflare_accumulator(inputs: Inputs) -> Fold:
    aggregators = _import("nvflare.app_common.aggregators.weighted_aggregation_helper")
    helper = aggregators.WeightedAggregationHelper()

    def add_all() -> None:
        for client, (update, weight) in enumerate(zip(inputs.updates, inputs.weights, strict=True)):
            helper.add({"array": update}, weight, f"site-{client}", 0)

    return Fold(add_all, lambda: {name: tensor.clone() for name, tensor in helper.get_result().items()})


ACCUMULATOR = [
    Contender(FASTAGG, _accumulator, tolerance=1.2e-7),
    Contender("torch add_", _torch_accumulator, "torch"),
    Contender("NVFlare", _nvflare_accumulator, "nvflare"),
]


def _torch_encode_into(inputs: Inputs) -> Call:
    x, out = inputs.updates[0], inputs.out.data
    return lambda: out.copy_(x)


def _torch_decode_into(inputs: Inputs) -> Call:
    codes, out = inputs.updates[0].data, inputs.out
    return lambda: out.copy_(codes)


def _torch_encode(inputs: Inputs) -> Call:
    import torch

    x = inputs.updates[0]
    return lambda: x.to(torch.float16)


def _torch_decode_half(inputs: Inputs) -> Call:
    import torch

    codes = inputs.updates[0].data
    return lambda: codes.to(torch.float32)


QUANTIZE = [
    Contender(FASTAGG, lambda inputs: lambda: fastagg.quantize(inputs.updates[0], inputs.case.wire)),
    Contender(
        FASTAGG_OUT, lambda inputs: lambda: fastagg.quantize(inputs.updates[0], inputs.case.wire, out=inputs.out)
    ),
    Contender("torch .to()", _torch_encode, "torch", fits=_is_fp16),
    Contender("torch copy_, out=", _torch_encode_into, "torch", fits=_is_fp16),
]

DEQUANTIZE = [
    Contender(FASTAGG, lambda inputs: lambda: fastagg.dequantize(inputs.updates[0])),
    Contender(FASTAGG_OUT, lambda inputs: lambda: fastagg.dequantize(inputs.updates[0], out=inputs.out)),
    Contender("torch .to()", _torch_decode_half, "torch", fits=_is_fp16),
    Contender("torch copy_, out=", _torch_decode_into, "torch", fits=_is_fp16),
]

CONTENDERS = {"fedavg": FEDAVG, "accumulator": ACCUMULATOR, "quantize": QUANTIZE, "dequantize": DEQUANTIZE}
