"""Which contender meets which case."""

from __future__ import annotations

import pytest

from cases import Case
from contenders import CONTENDERS


def matchups(cases: list[Case]) -> pytest.MarkDecorator:
    """Parametrises a test by cases and the contenders that fit them, those of a case side by side."""
    pairs = [
        pytest.param(
            case,
            contender,
            id=f"{case.operation}-{case.key}-{contender.name}",
            marks=[] if contender.is_installed else pytest.mark.skip(reason=f"{contender.package} is not installed"),
        )
        for case in cases
        for contender in CONTENDERS[case.operation]
        if contender.fits(case)
    ]
    return pytest.mark.parametrize(("subject", "contender"), pairs, indirect=["subject"])
