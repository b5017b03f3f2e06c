"""Who aggregates a federated round, from the bytes that clients sent to the bytes that go back.

Every contender is made from K serialised replies, and is called without arguments; its answer is the model's arrays.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

Model = dict[str, np.ndarray]
Call = Callable[[], Any]

CHECKED = 1000  # elements of a layer


@dataclass(frozen=True)
class Case:
    """A round of K clients and a model of N fp32 parameters.

    Attributes:
        distinct: replies that differ; the others' bytes are theirs again, where all would not fit into memory.
        calls: timed after the first, which is timed by itself: a server's first round meets fresh memory.
    """

    clients: int
    parameters: int
    layers: int = 50
    distinct: int = 10
    calls: int = 5

    @property
    def model_bytes(self) -> int:
        """Bytes of the model's arrays."""
        return 4 * (self.parameters // self.layers) * self.layers


def weights_of(case: Case) -> list[int]:
    """Numbers of examples."""
    return [100 + 7 * client for client in range(case.clients)]


def updates_of(case: Case) -> list[Model]:
    """The models that differ: every layer is one array of random numbers times a factor."""
    numbers = _numbers(case)
    clients = range(min(case.clients, case.distinct))
    return [
        {f"layer.{layer}": numbers * np.float32(_factor(client, layer)) for layer in range(case.layers)}
        for client in clients
    ]


def _numbers(case: Case) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(case.parameters // case.layers, np.float32)


def _factor(client: int, layer: int) -> float:
    return 1 + client / 10 + layer


def expected_mean(case: Case) -> Model:
    """The first elements of every layer of the clients' mean, in float64."""
    weights, distinct = np.array(weights_of(case), np.float64), min(case.clients, case.distinct)
    first = _numbers(case)[:CHECKED].astype(np.float64)
    factors = [
        np.average(_factor(np.arange(case.clients) % distinct, layer), weights=weights) for layer in range(case.layers)
    ]
    return {f"layer.{layer}": first * factor for layer, factor in enumerate(factors)}


def expected_step(case: Case) -> Model:
    """The first elements of every layer after FedAdam's first step from client 0's model towards client 1's."""
    first = _numbers(case)[:CHECKED].astype(np.float64)
    delta = 0.1 * first
    rate = 0.1 * np.sqrt(1 - 0.99**2) / (1 - 0.9**2)  # Flower's, in round 1
    step = rate * 0.1 * delta / (np.sqrt(0.01 * delta**2) + 1e-3)
    return {f"layer.{layer}": first * _factor(0, layer) + step for layer in range(case.layers)}


def _messages(case: Case) -> Any:
    """Flower's replies, each with a record of its own over the distinct bytes; made one by one when asked for."""
    from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    records = [ArrayRecord({name: Array(x) for name, x in update.items()}) for update in updates_of(case)]
    weights = weights_of(case)

    def reply(client: int) -> Message:
        request = Message(RecordDict(), client + 1, MessageType.TRAIN)
        arrays = ArrayRecord(dict(records[client % len(records)].items()))
        metrics = MetricRecord({"num-examples": weights[client]})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=request)

    return reply


def _flower_round(case: Case, strategy: Any) -> Call:
    reply = _messages(case)
    replies = [reply(client) for client in range(case.clients)]
    return lambda: strategy.aggregate_train(1, replies)[0]


def flower(case: Case) -> Call:
    """Flower's ServerApp FedAvg."""
    from flwr.serverapp.strategy import FedAvg

    return _flower_round(case, FedAvg())


def fastagg_flower(case: Case) -> Call:
    """`fastagg.flower.FedAvg` in its place."""
    from fastagg.flower import FedAvg

    return _flower_round(case, FedAvg())


def fastagg_flower_streaming(case: Case) -> Call:
    """The same, over replies that come one by one."""
    from fastagg.flower import FedAvg

    reply = _messages(case)
    strategy = FedAvg(streaming=True)
    return lambda: strategy.aggregate_train(1, (reply(client) for client in range(case.clients)))[0]


def _legacy(case: Case, aggregate: Callable[[list[Any]], list[np.ndarray]]) -> Call:
    from flwr.common import Code, FitRes, Status, ndarrays_to_parameters

    parameters = [ndarrays_to_parameters(list(update.values())) for update in updates_of(case)]
    results: list[tuple[Any, FitRes]] = [
        (None, FitRes(Status(Code.OK, ""), parameters[client % len(parameters)], weight, {}))
        for client, weight in enumerate(weights_of(case))
    ]
    return lambda: ndarrays_to_parameters(aggregate(results))


def flower_legacy(case: Case) -> Call:
    """Flower's older FedAvg, in its default mode."""
    from flwr.server.strategy.aggregate import aggregate_inplace

    return _legacy(case, aggregate_inplace)


def fastagg_flower_legacy(case: Case) -> Call:
    """`fastagg.flower.aggregate_inplace` in its place."""
    from fastagg.flower import aggregate_inplace

    return _legacy(case, aggregate_inplace)


def _nvflare(case: Case, aggregate: Callable[[Iterable[Any]], Any]) -> Call:
    """A round that takes NVFlare's messages of torch tensors apart one by one, and makes one of the mean."""
    import torch
    from nvflare.apis.utils.decomposers import flare_decomposers
    from nvflare.app_common.abstract.fl_model import FLModel
    from nvflare.app_common.decomposers import common_decomposers
    from nvflare.app_common.utils.fl_model_utils import FLModelUtils
    from nvflare.app_opt.pt.decomposers import TensorDecomposer
    from nvflare.fuel.utils import fobs

    flare_decomposers.register()
    common_decomposers.register()
    fobs.register(TensorDecomposer)
    logging.disable(logging.WARNING)

    def encoded(update: Model) -> bytes:
        tensors = {name: torch.from_numpy(x) for name, x in update.items()}
        return fobs.dumps(FLModelUtils.to_shareable(FLModel(params=tensors)))

    messages = [encoded(update) for update in updates_of(case)]

    def arriving() -> Iterator[FLModel]:
        for client, weight in enumerate(weights_of(case)):
            model = FLModelUtils.from_shareable(fobs.loads(messages[client % len(messages)]))
            model.meta |= {"client_name": f"site-{client}", "NUM_STEPS_CURRENT_ROUND": weight}
            yield model

    return lambda: fobs.dumps(FLModelUtils.to_shareable(FLModel(params=aggregate(arriving()))))


def _nvflare_aggregation(case: Case, aggregate: Callable[[Iterable[Any]], Any]) -> Call:
    """What is left of a round where all replies are tensors already."""
    import torch
    from nvflare.app_common.abstract.fl_model import FLModel

    logging.disable(logging.WARNING)
    distinct = [{name: torch.from_numpy(x) for name, x in update.items()} for update in updates_of(case)]
    replies = [
        FLModel(
            params=distinct[client % len(distinct)],
            meta={"client_name": f"site-{client}", "NUM_STEPS_CURRENT_ROUND": weight},
        )
        for client, weight in enumerate(weights_of(case))
    ]
    return lambda: aggregate(replies)


def nvflare(case: Case) -> Call:
    """NVFlare's own aggregation."""
    from nvflare_round import nvflare_round

    return _nvflare(case, nvflare_round)


def fastagg_nvflare(case: Case) -> Call:
    """`fastagg.nvflare.FedAvgAggregator` in its place."""
    from fastagg.nvflare import FedAvgAggregator
    from nvflare_round import fastagg_round

    return _nvflare(case, fastagg_round(FedAvgAggregator().batch))


def nvflare_aggregation(case: Case) -> Call:
    """NVFlare's own aggregation of tensors."""
    from nvflare_round import nvflare_round

    return _nvflare_aggregation(case, nvflare_round)


def fastagg_nvflare_aggregation(case: Case) -> Call:
    """That of `fastagg.nvflare.FedAvgAggregator`."""
    from fastagg.nvflare import FedAvgAggregator
    from nvflare_round import fastagg_round

    return _nvflare_aggregation(case, fastagg_round(FedAvgAggregator().batch))


def flower_step(case: Case) -> Call:
    """Flower's FedAdam where the mean is given: what is left of a round is the server's step."""
    from flwr.app import Array, ArrayRecord
    from flwr.serverapp.strategy import FedAdam, FedAvg

    model, mean = (ArrayRecord({name: Array(x) for name, x in update.items()}) for update in updates_of(case)[:2])

    class Given(FedAvg):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            return mean, None

    class Step(FedAdam, Given):
        pass

    strategy = Step()

    def step() -> Any:
        strategy.current_arrays = {name: array.numpy() for name, array in model.items()}  # as its configure_train does
        return strategy.aggregate_train(1, [])[0]

    return step


def fastagg_flower_step(case: Case) -> Call:
    """The step of `fastagg.flower.FedAdam`."""
    from flwr.app import Array, ArrayRecord

    from fastagg.flower import FedAdam
    from fastagg.flower.arrays import FreshArrays, read_record
    from fastagg.flower.rounds import Mean

    first, second = updates_of(case)[:2]
    model, mean = ArrayRecord({name: Array(x) for name, x in first.items()}), FreshArrays(second)
    for name, view in mean.views.items():
        view[...] = second[name]
    strategy = FedAdam()

    def step() -> Any:
        strategy.current_arrays = read_record(model)
        return strategy._next_model(1, Mean(mean, [])).record()

    return step


def read(answer: Any) -> Model:
    """Any contender's answer as arrays."""
    if isinstance(answer, bytes):
        from nvflare.app_common.utils.fl_model_utils import FLModelUtils
        from nvflare.fuel.utils import fobs

        params = FLModelUtils.from_shareable(fobs.loads(answer)).params
        return {name: tensor.numpy() for name, tensor in params.items()}
    if hasattr(answer, "tensors"):
        from flwr.common import parameters_to_ndarrays

        return {f"layer.{index}": layer for index, layer in enumerate(parameters_to_ndarrays(answer))}
    return {name: array.numpy() for name, array in answer.items()}


ROUNDS: dict[str, Callable[[Case], Call]] = {
    "Flower, legacy": flower_legacy,
    "fastagg in Flower, legacy": fastagg_flower_legacy,
    "Flower": flower,
    "fastagg in Flower": fastagg_flower,
    "fastagg in Flower, streaming": fastagg_flower_streaming,
    "NVFlare": nvflare,
    "fastagg in NVFlare": fastagg_nvflare,
    "NVFlare, tensors": nvflare_aggregation,
    "fastagg in NVFlare, tensors": fastagg_nvflare_aggregation,
}
STEPS: dict[str, Callable[[Case], Call]] = {
    "Flower, FedAdam step": flower_step,
    "fastagg in Flower, FedAdam step": fastagg_flower_step,
}
RIVALS = {
    "fastagg in Flower, legacy": "Flower, legacy",
    "fastagg in Flower": "Flower",
    "fastagg in Flower, streaming": "Flower",
    "fastagg in NVFlare": "NVFlare",
    "fastagg in NVFlare, tensors": "NVFlare, tensors",
    "fastagg in Flower, FedAdam step": "Flower, FedAdam step",
}
