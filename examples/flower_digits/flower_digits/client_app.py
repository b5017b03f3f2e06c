"""What runs on the nodes."""

from __future__ import annotations

import time
from pathlib import Path

from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fastagg.flower import quantize_mod
from flower_digits import task

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Trains on the node's own images, and uploads quantised where the run's config asks for it."""
    if wire := context.run_config["wire"]:
        return quantize_mod(wire)(message, context, train_plainly)
    return train_plainly(message, context)


def train_plainly(message: Message, context: Context) -> Message:
    """Trains on the node's own images."""
    partition, partitions = int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    if partition == partitions - 1:
        straggle(context)
    pixels, labels = task.load_images(partition, partitions)
    model = {name: array.numpy() for name, array in message.content["arrays"].items()}
    model = task.train(model, pixels, labels, seed=message.content["config"]["server-round"])
    arrays = ArrayRecord({name: Array(array) for name, array in model.items()})
    metrics = MetricRecord({"num-examples": len(labels)})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def straggle(context: Context) -> None:
    """Waits where the run's config asks for it."""
    if mark := context.run_config["mark"]:
        Path(str(mark)).touch()
    time.sleep(float(context.run_config["pause"]))
