"""The transports that the tests of ranks run on: what asks for each, and what makes a rank's process use it.

Those of devices run on GPUs where there are any, one for several ranks if need be, else as CUDA kernels on the CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import cuda_on_cpu_module

NAMES = ("shared memory", "backend", "peer memory", "collectives")
by_transport = pytest.mark.parametrize("transport", NAMES)
by_transport_of_the_host = pytest.mark.parametrize("transport", NAMES[:2])

# What a rank's program begins with, where the variable below names a device.
DEVICE_VARIABLE = "FASTAGG_TEST_DEVICE"
PROLOGUE = f"""
few = "{DEVICE_VARIABLE}" in os.environ  # calls: a kernel on the CPU starts a thread for each of its own
if few:
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    import transports
    transports.use(os.environ["{DEVICE_VARIABLE}"], rank)
def synchronize():
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()
"""


def on(transport: str) -> dict[str, str]:
    """The environment that asks for a transport."""
    environment = {"FASTAGG_TRANSPORT": "backend"} if transport in ("backend", "collectives") else {}
    return {**environment, **_device_for(transport)}


def _device_for(transport: str) -> dict[str, str]:
    if transport not in ("peer memory", "collectives"):
        return {}
    import torch

    enough = 1 if transport == "peer memory" else 4  # NCCL refuses two ranks on one device
    if torch.cuda.device_count() >= enough:
        return {DEVICE_VARIABLE: "cuda"}
    try:
        module = cuda_on_cpu_module.load()
    except cuda_on_cpu_module.NotAvailableError as error:
        pytest.skip(str(error))
    return {DEVICE_VARIABLE: "cuda-on-cpu", cuda_on_cpu_module.VARIABLE: str(Path(str(module.__file__)).parent)}


def use(device: str, rank: int) -> None:
    """Lets this process's tensors be a device's."""
    import torch

    from fastagg._native import backend
    from fastagg.distributed.transports import peer_memory

    peer_memory._SLOT_BYTES = 1 << 20  # so that large tensors take several launches
    if device == "cuda":
        index = rank % torch.cuda.device_count()
        torch.cuda.set_device(index)
        torch.set_default_device(torch.device("cuda", index))
        return
    module: Any = cuda_on_cpu_module.load()
    backend.override_cpu(module)
