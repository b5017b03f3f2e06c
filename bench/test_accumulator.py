"""`Accumulator` beside sums that are added to client by client."""

from __future__ import annotations

from typing import Any

import memory
from answers import check_mean
from cases import ACCUMULATOR
from contenders import Contender
from matchups import matchups

CLIENTS_HELD = (2, 10, 50)


@matchups(ACCUMULATOR)
def test_accumulator(measure: Any, add_note: Any, subject: Any, contender: Contender) -> None:
    fold = contender.prepare(subject.inputs)
    fold()
    check_mean(fold.mean(), subject.inputs, contender.tolerance, integer_rule=False)
    measure(contender, fold)
    if contender.is_fastagg and subject.case.batch == 1 and memory.is_measurable():
        counts = CLIENTS_HELD[:1] if subject.quick else CLIENTS_HELD
        peaks = {clients: memory.extra_bytes(subject.case, str(clients), subject.quick) for clients in counts}
        add_note("bytes_per_element", {clients: peak / subject.case.elements for clients, peak in peaks.items()})
