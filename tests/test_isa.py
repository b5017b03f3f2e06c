"""FASTAGG_ISA: the forced instruction set is the one that runs."""

from __future__ import annotations

import numpy as np
import pytest

import fastagg
from backends import isa
from fastagg import _core
from processes import output_of, run
from reference import assert_same_bits

AVAILABLE = _core.available_isas()
UNAVAILABLE = [name for name in ("avx2", "avx512", "neon") if name not in AVAILABLE]


@pytest.mark.parametrize("name", ["scalar", "avx2", "avx512", "neon"])
def test_the_forced_one_runs(name: str) -> None:
    if name not in AVAILABLE:
        pytest.skip(f"this processor or this build has no {name}")
    program = """
import numpy as np, fastagg
fastagg.fedavg([np.ones(1000, np.float32)] * 2)
print(fastagg.build_info()["isa"])
"""
    assert output_of(program, FASTAGG_ISA=name) == name


def test_the_best_one_runs_unless_forced() -> None:
    program = "import fastagg; print(fastagg.build_info()['isa'])"
    assert output_of(program) == AVAILABLE[0]
    assert output_of(program, FASTAGG_ISA="") == AVAILABLE[0]


@pytest.mark.parametrize("name", ["avx1024", "AVX2", "sse", " scalar", *UNAVAILABLE])
def test_an_unavailable_one_is_an_error_that_lists_those_available(name: str) -> None:
    program = "import numpy as np, fastagg; fastagg.fedavg([np.ones(3)])"
    done = run(program, FASTAGG_ISA=name)
    assert done.returncode == 1
    assert "ValueError" in done.stderr
    assert repr(name) in done.stderr
    for available in AVAILABLE:
        assert available in done.stderr.splitlines()[-1]
    assert "Traceback" in done.stderr


def test_an_unavailable_one_can_be_mended_in_the_same_process() -> None:
    program = """
import numpy as np, fastagg, os
for _ in range(2):
    try: fastagg.fedavg([np.ones(3)])
    except ValueError: pass
    else: raise SystemExit("no error")
fastagg._core.force_isa("scalar")
print(fastagg.fedavg([np.ones(3)]).tolist(), fastagg.build_info()["isa"])
"""
    assert output_of(program, FASTAGG_ISA="nothing") == "[1.0, 1.0, 1.0] scalar"


def test_scalar_is_always_there() -> None:
    assert AVAILABLE[-1] == "scalar"
    assert len(set(AVAILABLE)) == len(AVAILABLE)


@pytest.mark.parametrize("name", AVAILABLE)
def test_the_forced_loops_ran(name: str) -> None:
    # The one thing that may differ shows it: a processor's own conversion keeps a NaN's payload.
    x = np.full(64, 0x7FDFF000, np.uint32).view(np.float32)
    with isa(name):
        codes = fastagg.quantize(x, "fp16").data.view(np.uint16)
    assert set(codes.tolist()) == {0x7E00 if name == "scalar" else 0x7EFF}


def test_force_isa_restores() -> None:
    before = _core.isa()
    with isa("scalar"):
        assert _core.isa() == "scalar"
        one = fastagg.fedavg([np.arange(9.0), np.ones(9)])
    assert _core.isa() == before
    assert_same_bits(fastagg.fedavg([np.arange(9.0), np.ones(9)]), one)
    with pytest.raises(ValueError, match=r"available"):
        _core.force_isa("nothing")
    assert _core.isa() == before
