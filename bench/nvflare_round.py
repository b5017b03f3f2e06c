"""One round of NVFlare: a server takes K replies of N parameters as torch tensors, and averages them.

`python nvflare_round.py [--clients 10] [--millions 25] [--rounds 9]` prints a table for 50 layers and for 2 big ones.
The contenders take turns in one process over the same replies, and their answers are checked first. Peak memory is that
of a process of its own in which replies arrive one by one and nobody else keeps them, in models beyond what was there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median

import torch
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper
from rich.console import Console
from rich.table import Table

import scripts
from fastagg.nvflare import FedAvgAggregator
from machine import seconds, use_all_processors
from memory import peak_of

LAYERS = (50, 2)
LARGEST_ERROR = 2e-6  # of a mean of ten numbers around 1 in plain float32 sums
NVFLARE = "NVFlare"
BATCHES = (1, 3, 4, 8)

Replies = Iterable[FLModel]
Round = Callable[[Replies], dict[str, torch.Tensor]]


def reply(client: int, elements: int, layers: int) -> FLModel:
    """What a client sends."""
    generator = torch.Generator().manual_seed(client)
    params = {f"layer.{index}": torch.randn(elements // layers, generator=generator) for index in range(layers)}
    return FLModel(params=params, meta={"client_name": f"site-{client}", "NUM_STEPS_CURRENT_ROUND": 100 + client})


def arriving(clients: int, elements: int, layers: int) -> Iterator[FLModel]:
    """Replies that are made when they are asked for."""
    return (reply(client, elements, layers) for client in range(clients))


def nvflare_round(replies: Replies) -> dict[str, torch.Tensor]:
    """What NVFlare's FedAvg does without an aggregator."""
    helper = WeightedAggregationHelper()
    for model in replies:
        helper.add(model.params, model.meta["NUM_STEPS_CURRENT_ROUND"], model.meta["client_name"], 0)
        del model
    return helper.get_result()


def fastagg_round(batch: int) -> Round:
    """What it does with ours."""
    aggregator = FedAvgAggregator(batch=batch)  # one for all rounds of a job

    def average(replies: Replies) -> dict[str, torch.Tensor]:
        aggregator.reset_stats()
        for model in replies:
            assert aggregator.accept_model(model)
            del model
        return aggregator.aggregate_model().params

    return average


CONTENDERS: dict[str, Round] = {NVFLARE: nvflare_round} | {
    f"fastagg, batch={batch}": fastagg_round(batch) for batch in BATCHES
}


def check(average: Round, replies: list[FLModel]) -> None:
    """Asserts that an answer is the weighted mean, against float64."""
    answer = average(replies)
    weights = torch.tensor([model.meta["NUM_STEPS_CURRENT_ROUND"] for model in replies], dtype=torch.float64)
    for name, leaf in answer.items():
        some = torch.stack([model.params[name][:1000] for model in replies]).double()
        exact = (some * weights[:, None]).sum(dim=0) / weights.sum()
        assert float((leaf[:1000].double() - exact).abs().max()) < LARGEST_ERROR, f"{average}: {name} is wrong"


def take_turns(replies: list[FLModel], rounds: int) -> dict[str, float]:
    """Every contender's median of seconds."""
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name, average in CONTENDERS.items():
            times[name].append(seconds(lambda average=average: average(replies)))
    return {name: median(one) for name, one in times.items()}


def peak_models(name: str, clients: int, elements: int, layers: int) -> float:
    """The peak memory of a round in a fresh process, in models."""
    arguments = ["--peak-of", name, "--clients", str(clients), "--millions", str(elements / 1e6)]
    command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--layers", str(layers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"memory of {name}: {done.stderr.strip()}")
    return int(done.stdout.split()[-1]) / (4 * elements)


def print_peak(name: str, clients: int, elements: int, layers: int) -> None:
    """Prints the bytes of a round at its peak."""
    average = CONTENDERS[name]
    average(arriving(clients, 10_000, layers))  # what is loaded and started once is not the round's
    print(peak_of(lambda: average(arriving(clients, elements, layers))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--millions", type=float, default=25, help="of parameters")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", type=int, help="this many only")
    parser.add_argument("--peak-of", choices=CONTENDERS, help="measure one contender's memory in this process")
    arguments = parser.parse_args()

    use_all_processors()
    clients, elements = arguments.clients, int(arguments.millions * 1e6)
    if arguments.peak_of:
        print_peak(arguments.peak_of, clients, elements, arguments.layers or LAYERS[0])
        return
    table = Table("layers", "who", "seconds", "times NVFlare's speed", "peak memory (models)")
    for layers in [arguments.layers] if arguments.layers else LAYERS:
        replies = list(arriving(clients, elements, layers))
        for average in CONTENDERS.values():
            check(average, replies)
        times = take_turns(replies, arguments.rounds)
        del replies
        for name, one in times.items():
            models = peak_models(name, clients, elements, layers)
            table.add_row(str(layers), name, f"{one:.4f}", f"{times[NVFLARE] / one:.2f}", f"{models:.2f}")
    Console().print(table)


if __name__ == "__main__":
    scripts.end_with(main)
