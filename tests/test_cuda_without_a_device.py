"""The CUDA backend on a machine without a driver: it imports, and says what is missing when it is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastagg
from fastagg._native.codes import Code

_cuda: Any = pytest.importorskip("fastagg._cuda", reason="a build without CUDA")

pytestmark = pytest.mark.skipif(_cuda.device_count() > 0, reason="there is a device")

ON_HOST = np.ones(64, np.float32)
SOURCE = (ON_HOST.ctypes.data, 0, Code.FLOAT32, 0)
CAST = (SOURCE, Code.FLOAT32, 0, ON_HOST.ctypes.data, 0, 64, False, (0, 0, 0, 0), 1.0)
LEAF = ([ON_HOST.ctypes.data], Code.FLOAT32, [1.0], 1.0, 64, 0, ON_HOST.ctypes.data, 0, Code.FLOAT32, 0, 0.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: _cuda.weighted_sum([LEAF], 0, True),
        lambda: _cuda.cast(CAST, 0, 0),
        lambda: _cuda.reduce(([SOURCE], 1.0, 0, 0.0, 0, 0.0, False, CAST, 0, ()), 0, 0, 0),
        lambda: _cuda.reduce_float64([ON_HOST.ctypes.data], 1.0, 1.0, ON_HOST.ctypes.data, 8, 0, 0, 0),
        lambda: _cuda.peer_blocks(0),
    ],
    ids=["weighted_sum", "cast", "reduce", "reduce_float64", "peer_blocks"],
)
def test_a_missing_driver_is_named_and_the_cpu_goes_on(call: Callable[[], object]) -> None:
    with pytest.raises(fastagg.CudaError, match=r"asking .*needs a driver of CUDA"):
        call()
    assert fastagg.fedavg([ON_HOST, ON_HOST])[0] == 1


def test_versions_can_be_asked_for() -> None:
    assert _cuda.driver_version() >= 0
    assert _cuda.runtime_version() >= 11000
