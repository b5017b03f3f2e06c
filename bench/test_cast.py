"""`quantize` and `dequantize`, fp16 beside torch's casts."""

from __future__ import annotations

from typing import Any

from answers import check_codes, check_values
from cases import CASTS
from contenders import Contender
from matchups import matchups


@matchups(CASTS)
def test_cast(measure: Any, subject: Any, contender: Contender) -> None:
    call = contender.prepare(subject.inputs)
    given = subject.inputs.updates[0]
    check = check_codes if subject.case.operation == "quantize" else check_values
    check(call(), given)
    measure(contender, call)
