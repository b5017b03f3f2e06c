"""What only a GPU shows: streams, captured graphs, other libraries' arrays, several devices, NCCL, errors."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import fastagg
from ranks import run_ranks
from reference import assert_same_bits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

LONG = 1_000_000_000  # cycles: about half a second


def clients(count: int = 3, size: int = 100_003) -> list[Any]:
    return [torch.randn(size, device="cuda") for _ in range(count)]


def on_cpu(function: Callable[..., Any], arrays: list[Any]) -> np.ndarray:
    """The same from the CPU's copies."""
    return np.asarray(function([array.cpu() for array in arrays]))


def test_work_is_queued_on_the_current_stream_and_nobody_waits() -> None:
    updates, out = clients(), torch.empty(100_003, device="cuda")
    expected = on_cpu(lambda given: fastagg.fedavg(given, [1, 2, 3]) * 2, updates)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        for update in updates:
            update.mul_(2)  # the mean must come behind these
        fastagg.fedavg(updates, [1, 2, 3], out=out, nan_policy="propagate")
        encoded = fastagg.quantize(out, "int8")
        decoded = fastagg.dequantize(encoded)
        done = torch.cuda.Event()
        done.record()
    assert not done.query(), "the host has waited for the device"
    stream.synchronize()
    assert_same_bits(out.cpu().numpy(), expected)
    assert not encoded.nonfinite
    assert (decoded - out).abs().max() < 0.1


def test_calls_can_be_captured_into_a_graph_and_replayed() -> None:
    updates, out = clients(), torch.empty(100_003, device="cuda")
    encoded = fastagg.quantize(out, "fp16")
    decoded = torch.empty_like(out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fastagg.fedavg(updates, [1, 2, 3], out=out, nan_policy="propagate")
        fastagg.quantize(out, "fp16", out=encoded)
        fastagg.dequantize(encoded, out=decoded)
    for _ in range(3):
        for update in updates:
            update.normal_()
        graph.replay()
        expected = on_cpu(lambda given: fastagg.fedavg(given, [1, 2, 3]), updates)
        assert_same_bits(out.cpu().numpy(), expected)
        assert_same_bits(decoded.cpu().numpy(), expected.astype(np.float16).astype(np.float32))


def test_looking_for_nan_cannot_be_captured_and_says_so() -> None:
    updates = clients()
    with pytest.raises(fastagg.CudaError, match="CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        fastagg.fedavg(updates)
    torch.cuda.synchronize()
    assert torch.isfinite(fastagg.fedavg(updates)).all()  # and the next call works


def test_arrays_on_different_devices_are_refused() -> None:
    on_device = torch.ones(5, device="cuda")
    with pytest.raises(ValueError, match=r"client 1.*expected device cuda:0.*got cpu"):
        fastagg.fedavg([on_device, torch.ones(5)])
    with pytest.raises(ValueError, match="out"):
        fastagg.fedavg([on_device, on_device], out=torch.empty(5))
    with pytest.raises(ValueError, match="expected shape"):
        fastagg.dequantize(fastagg.quantize(on_device), out=torch.empty(5))


def test_strided_and_misaligned_tensors() -> None:
    base = torch.randn(300, 401, device="cuda")
    for given in ([base.t(), base.t() * 2], [base[:, 1:], base[:, :-1]], [base.view(-1)[1:], base.view(-1)[:-1]]):
        assert_same_bits(fastagg.fedavg(given).cpu().numpy(), on_cpu(fastagg.fedavg, given))


def test_cupy_arrays_on_cupys_stream() -> None:
    cupy = pytest.importorskip("cupy")
    updates = [cupy.random.standard_normal(10_001, dtype=cupy.float32) for _ in range(3)]
    expected = fastagg.fedavg([cupy.asnumpy(update) for update in updates])
    with cupy.cuda.Stream(non_blocking=True) as stream:
        mean = fastagg.fedavg(updates)
        assert isinstance(mean, cupy.ndarray)
        stream.synchronize()
    assert_same_bits(cupy.asnumpy(mean), expected)
    assert not fastagg.quantize(updates[0], "int4").nonfinite


class Bare:
    """An array that has nothing but the CUDA array interface, and the stream on which it is written."""

    def __init__(self, tensor: Any, stream: Any) -> None:
        self._kept = tensor
        self.__cuda_array_interface__ = {**tensor.__cuda_array_interface__, "version": 3, "stream": stream.cuda_stream}


def test_the_stream_of_the_array_interface_is_waited_for() -> None:
    stream, tensor = torch.cuda.Stream(), torch.zeros(100_003, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        tensor.fill_(3)
    mean = fastagg.fedavg([Bare(tensor, stream), Bare(tensor, stream)])
    values = mean.get() if hasattr(mean, "get") else mean.cpu().numpy()
    assert (values == 3).all()


def test_a_device_that_is_not_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    updates = [torch.randn(10_001, device="cuda:1") for _ in range(3)]
    mean = fastagg.fedavg(updates)
    assert mean.device == updates[0].device
    assert torch.cuda.current_device() == 0
    assert_same_bits(mean.cpu().numpy(), on_cpu(fastagg.fedavg, updates))


def test_an_error_names_the_call_and_leaves_everything_usable() -> None:
    from fastagg import _cuda
    from fastagg._native.codes import Code

    on_host = np.ones(64, np.float32)
    source = (on_host.ctypes.data, 0, Code.FLOAT32, 0)
    with pytest.raises(fastagg.CudaError, match="array"):
        _cuda.cast((source, Code.FLOAT32, 0, on_host.ctypes.data, 0, 64, False, (0, 0, 0, 0), 1.0), 0, 0)
    assert fastagg.fedavg([on_host, on_host])[0] == 1
    assert float(fastagg.fedavg([torch.ones(5, device="cuda")] * 2)[0]) == 1


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python's own, of a process with threads
def test_a_forked_child_can_use_the_cpu_and_is_told_about_cuda() -> None:
    update = torch.ones(5, device="cuda")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        answers = [str(fastagg.fedavg([np.ones(5), np.ones(5)])[0])]
        try:
            fastagg.fedavg([update, update])
        except Exception as error:
            answers.append(type(error).__name__)
        os.write(writing, " ".join(answers).encode())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert os.read(reading, 1000).decode() in ("1.0 CudaError", "1.0 RuntimeError")


NCCL = """
from torch.nn.parallel import DistributedDataParallel
from fastagg.ddp import AllReduceState, GradScaler, all_reduce_hook
torch.cuda.set_device(rank)
group = dist.new_group(list(range(world)), backend="nccl")
def trained(state):
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(100, 400), torch.nn.ReLU(), torch.nn.Linear(400, 10)).cuda()
    model = DistributedDataParallel(layers, bucket_cap_mb=0.05, process_group=group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    if state is not None:
        model.register_comm_hook(state, all_reduce_hook)
        scaler = GradScaler(state, "cuda", init_scale=1024.0)
    for step in range(8):
        optimizer.zero_grad()
        torch.manual_seed(step * world + rank)
        loss = model(torch.randn(16, 100, device="cuda")).square().mean()
        scaler.scale(loss * (float("inf") if step == 5 and rank == 0 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()]), scaler.get_scale()
plain = trained(None)
for wire, bound in (("fp32", 1e-5), ("fp16", 1e-3), ("int8", 2e-2)):
    state = AllReduceState(process_group=group, wire=wire, error_feedback=True)
    found = trained(state)
    assert (found[0] - plain[0]).abs().max() < bound and found[1] == plain[1] == 512.0, (wire, found[1])
    assert not state.found_inf and state.grad_norm > 0
print(state.transport)
"""


@pytest.mark.parametrize("transport", ["nccl backend", "peer memory"])
def test_ddp_over_nccl_and_over_peer_memory(transport: str) -> None:
    environment = {"FASTAGG_TRANSPORT": "backend"} if transport == "nccl backend" else {}
    for out in run_ranks(NCCL, torch.cuda.device_count(), **environment):
        assert out == f"{transport}\n"


CAPTURED = """
torch.cuda.set_device(rank % torch.cuda.device_count())
x = torch.ones(70000, device="cuda")
fastagg.all_reduce(x, op="sum", wire="fp16")  # once outside: ranks agree
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    fastagg.all_reduce(x, op="sum", wire="fp16")
for step in range(3):
    x.fill_(rank + step)
    graph.replay()
    assert torch.all(x == sum(range(world)) + step * world)
x.zero_()
torch.cuda.synchronize()
torch.cuda._sleep(1_000_000_000)
done = torch.cuda.Event()
fastagg.all_reduce(x, op="sum", wire="fp16")
done.record()
assert not done.query()  # the host goes on
"""


def test_an_all_reduce_is_captured_and_does_not_wait() -> None:
    run_ranks(CAPTURED, 2)
