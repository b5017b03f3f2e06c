"""Server optimisers: what a federated server makes of its model and the clients' mean, each round.

A loop written by hand:

    optimizer = FedAdam(learning_rate=0.1)
    for _ in range(rounds):
        updates, counts = train_clients(model)
        model = optimizer.step(model, fastagg.fedavg(updates, counts, sent=model))
"""

from fastagg._public import name_publicly
from fastagg.server.fednova import FedNova, local_normalizer
from fastagg.server.optimizers import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi
from fastagg.server.proximal import add_proximal_gradients, proximal_term
from fastagg.server.scaffold import ClientControl, Scaffold, client_control

__all__ = [
    "ClientControl",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedNova",
    "FedYogi",
    "Scaffold",
    "add_proximal_gradients",
    "client_control",
    "local_normalizer",
    "proximal_term",
]

name_publicly(globals())
