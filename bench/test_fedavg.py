"""`fedavg` beside the loops that a user would write and the frameworks' own aggregation."""

from __future__ import annotations

from typing import Any

import fastagg
from answers import check_mean
from cases import FEDAVG
from contenders import FASTAGG_OUT, Contender
from matchups import matchups


@matchups(FEDAVG)
def test_fedavg(measure: Any, subject: Any, contender: Contender) -> None:
    call = contender.prepare(subject.inputs)
    check_mean(call(), subject.inputs, contender.tolerance, integer_rule=contender.is_fastagg)
    asks_for_twin = subject.case.layout == "ResNet-50" and contender.name == FASTAGG_OUT
    measure(contender, call, twin=_as_one_array(subject) if asks_for_twin else None)


def _as_one_array(subject: Any) -> Any:
    """The same mean with each client's elements in one array: what a state_dict of them is compared with."""
    buffers, out, weights = subject.limit.buffers, subject.limit.out, subject.inputs.weights
    return lambda: fastagg.fedavg(buffers, weights, out=out)
