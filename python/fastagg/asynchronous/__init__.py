"""Asynchronous aggregation: servers that take each update as it arrives, whatever version its client started from.

A server written by hand:

    server = FedAsync(model, mixing=0.6, staleness=polynomial(0.5))
    model, version = server.latest()  # for each client that asks for work
    server.add(trained_model, version)  # for each one that is done
"""

from fastagg._public import name_publicly
from fastagg.asynchronous.fedasync import FedAsync
from fastagg.asynchronous.fedbuff import FedBuff
from fastagg.asynchronous.staleness import Staleness, constant, hinge, polynomial
from fastagg.asynchronous.versioned_server import DroppedContribution

__all__ = ["DroppedContribution", "FedAsync", "FedBuff", "Staleness", "constant", "hinge", "polynomial"]

name_publicly(globals())
