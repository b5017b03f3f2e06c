"""What runs on the server: switching to fastagg is the import of the strategy."""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp import strategy as flower

from fastagg.flower import FedAvg
from flower_digits import task

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the rounds, and writes the model."""
    config = context.run_config
    nodes = int(config["min-nodes"])
    options = {"min_train_nodes": nodes, "min_available_nodes": nodes, "fraction_evaluate": 0.0}
    if config["strategy"] == "fastagg":
        strategy = FedAvg(streaming=bool(config["streaming"]), **options)
    else:
        strategy = flower.FedAvg(**options)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord({name: Array(array) for name, array in task.new_model().items()}),
        num_rounds=int(config["num-server-rounds"]),
        timeout=float(config["timeout"]),
        evaluate_fn=lambda _, arrays: MetricRecord({"accuracy": task.accuracy(as_model(arrays))}),
    )
    if config["output"]:
        np.savez(str(config["output"]), **as_model(result.arrays))


def as_model(arrays: ArrayRecord) -> task.Model:
    """A record's arrays by their names."""
    return {name: array.numpy() for name, array in arrays.items()}
