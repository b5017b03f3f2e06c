"""How ranks exchange encoded values: shared memory on one host, else their process group's own backend."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist

from fastagg import _core
from fastagg._backend import MEAN, RandomKey, backend_for
from fastagg._codes import ELEMENT_BYTES, Code
from fastagg._overlap import encoded_bytes

_log = logging.getLogger("fastagg")

_IDENTITY_BYTES = 32


class Encoding(NamedTuple):
    """How values travel."""

    wire: Code
    block_shift: int
    stochastic: bool
    key: RandomKey

    def factor(self, world: int, mean: bool) -> float:
        """The power of two that keeps a mean's terms inside float16: without it one large value would be infinite."""
        return 2.0 ** -(world - 1).bit_length() if mean and self.wire == Code.FLOAT16 else 1.0

    def codes_bytes(self, count: int) -> int:
        """Bytes of `count` elements' codes."""
        return encoded_bytes(self.wire, count)

    def scales_bytes(self, count: int) -> int:
        """Bytes of their scales."""
        return -(-count >> self.block_shift) * 4 if self.wire >= Code.WIRE_FP8_E4M3 else 0

    def bytes(self, count: int) -> int:
        """Both, each padded to 8 bytes so that what follows is aligned."""
        return _padded(self.codes_bytes(count)) + _padded(self.scales_bytes(count))


class Outcome(NamedTuple):
    """What an all-reduce found and cost."""

    finite: bool
    wire_bytes: int


class Transport(Protocol):
    """One way to reduce a tensor over a group, in place."""

    name: str
    reason: str

    def all_reduce(self, tensor: torch.Tensor, code: Code, encoding: Encoding, mean: bool) -> Outcome:
        """Reduces a contiguous CPU tensor."""
        ...


class SharedMemoryTransport:
    """Ranks of one host: csrc/comm/shared_memory.h."""

    name = "shared memory"
    reason = "all ranks are processes of one user on one host"

    def __init__(self, group: _core.SharedMemoryGroup, timeout: float) -> None:
        self._group, self._timeout = group, timeout

    def all_reduce(self, tensor: torch.Tensor, code: Code, encoding: Encoding, mean: bool) -> Outcome:
        """See `Transport`."""
        wire, shift, stochastic, key = encoding
        outcome = self._group.all_reduce(
            tensor.data_ptr(), code, tensor.numel(), wire, shift, stochastic, key, mean, self._timeout
        )
        return Outcome(*outcome)


class BackendTransport:
    """Any group, over its own backend: encoded slices go to their owners, encoded means come back."""

    def __init__(self, group: dist.ProcessGroup, reason: str) -> None:
        self._group, self._rank, self._world = group, dist.get_rank(group), dist.get_world_size(group)
        self.name, self.reason = f"{dist.get_backend(group)} backend", reason

    def all_reduce(self, tensor: torch.Tensor, code: Code, encoding: Encoding, mean: bool) -> Outcome:
        """See `Transport`."""
        self._check_alike(tensor, code, encoding, mean)
        shares = _shares(tensor.numel(), self._world)
        size = encoding.bytes(shares[0])
        sent = torch.empty((self._world, size), dtype=torch.uint8)
        begin = 0
        for row, share in zip(sent, shares, strict=True):
            _encode(tensor, code, begin, share, encoding, row, encoding.factor(self._world, mean))
            begin += share
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self._group)
        own = shares[self._rank]
        means = torch.empty(own, dtype=torch.float64 if encoding.wire == Code.FLOAT64 else torch.float32)
        divisor = (self._world if mean else 1) * encoding.factor(self._world, mean)
        _add_up(received, own, encoding, divisor, means)
        row = torch.empty(size, dtype=torch.uint8)
        keyed = encoding._replace(key=(*encoding.key[:3], 2**32 - 1))
        _encode(means, Code.FLOAT64 if means.dtype == torch.float64 else Code.FLOAT32, 0, own, keyed, row, 1.0)
        _all_gather_flat(sent.view(-1), row, self._group)
        finite, begin = True, 0
        for row, share in zip(sent, shares, strict=True):
            finite &= _decode(row, tensor, code, begin, share, encoding)
            begin += share
        return Outcome(finite, 2 * (self._world - 1) * size)

    def _check_alike(self, tensor: torch.Tensor, code: Code, encoding: Encoding, mean: bool) -> None:
        """Raises ValueError on every rank if one was called with something else."""
        own = torch.tensor([tensor.numel(), code, encoding.wire, encoding.block_shift, encoding.stochastic, mean])
        everyone = torch.empty((self._world, len(own)), dtype=own.dtype)
        _all_gather_flat(everyone.view(-1), own, self._group)
        for rank, other in enumerate(everyone.tolist()):
            if other != own.tolist():
                who = dist.get_global_rank(self._group, rank)
                names = "(elements, dtype code, wire code, log2 of the block, stochastic, mean)"
                raise ValueError(
                    f"rank {who} has {tuple(other)}, rank {dist.get_rank()} has {tuple(own.tolist())} {names}"
                )


_transports: weakref.WeakKeyDictionary[dist.ProcessGroup, Transport] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def transport_of(group: dist.ProcessGroup) -> Transport:
    """The group's transport, chosen at first use by all its ranks together."""
    with _lock:
        found = _transports.get(group)
        if found is None:
            found = _transports[group] = _choose(group)
            _log.debug("group of %d ranks: %s, because %s", dist.get_world_size(group), found.name, found.reason)
        return found


def _choose(group: dist.ProcessGroup) -> Transport:
    if dist.get_backend(group) not in ("gloo", "mpi", "cpu:gloo,cuda:nccl"):
        return BackendTransport(group, "the group's backend has no CPU tensors to meet through")
    if os.environ.get("FASTAGG_TRANSPORT") == "backend":
        return BackendTransport(group, "FASTAGG_TRANSPORT=backend asks for it")
    own = torch.frombuffer(bytearray(_identity() + os.getpid().to_bytes(8, "little")), dtype=torch.uint8)
    identities = _gather(own, group)
    if len({bytes(identity[:_IDENTITY_BYTES]) for identity in identities}) > 1:
        return BackendTransport(group, "its ranks are on several hosts, or processes of several users or containers")
    processes = [int.from_bytes(identity[_IDENTITY_BYTES:], "little") for identity in identities]
    return _meet(group, processes)


def _meet(group: dist.ProcessGroup, processes: list[int]) -> Transport:
    """Maps one segment on all ranks; if one cannot, none does."""
    rank = dist.get_rank(group)
    names = [dist.get_global_rank(group, peer) for peer in range(len(processes))]
    memory, problem, descriptor = None, "", -1
    try:
        if rank == 0:
            memory = _core.SharedMemoryGroup(processes, names, rank)
            descriptor = memory.descriptor()
    except OSError as error:
        problem = str(error)
    descriptor = int(_gather(torch.tensor([descriptor]), group)[0][0])
    try:
        if rank != 0 and descriptor >= 0:
            memory = _core.SharedMemoryGroup.attach(processes, names, rank, processes[0], descriptor)
    except OSError as error:
        problem = str(error)
    met = all(int(flag[0]) for flag in _gather(torch.tensor([int(memory is not None)]), group))
    if memory is not None:
        memory.close_descriptor()
    if not met or memory is None:
        return BackendTransport(group, f"shared memory could not be mapped on every rank {problem}".rstrip())
    return SharedMemoryTransport(memory, _timeout_of(group))


def _gather(own: torch.Tensor, group: dist.ProcessGroup) -> list[list[int]]:
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, own, group=group)
    return [one.tolist() for one in everyone]


def _identity() -> bytes:
    """What processes that can share memory have in common: the boot, the namespaces, the user.

    The environment variable FASTAGG_HOST is a name by which to tell apart what looks like one host.
    """
    facts = [_read("/proc/sys/kernel/random/boot_id"), str(os.geteuid()), os.environ.get("FASTAGG_HOST", "")]
    facts += [_link(f"/proc/self/ns/{namespace}") for namespace in ("ipc", "pid", "user")]
    return hashlib.sha256("\n".join(facts).encode()).digest()


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return os.urandom(16).hex()  # unknown: like no other


def _link(path: str) -> str:
    try:
        return str(Path(path).readlink())
    except OSError:
        return os.urandom(16).hex()


def _timeout_of(group: dist.ProcessGroup) -> float:
    """Seconds that the group waits for a peer."""
    try:
        options = group._get_backend(torch.device("cpu")).options
        return float(options._timeout.total_seconds())
    except (AttributeError, RuntimeError):
        return float(dist.constants.default_pg_timeout.total_seconds())


# torch 2.13 has renamed it.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _all_gather_flat(out: torch.Tensor, own: torch.Tensor, group: dist.ProcessGroup) -> None:
    _all_gather_single(out, own, group=group)


_SHARE = 4096  # elements: slices begin at whole passes of the native code, and blocks of scales


def _shares(count: int, world: int) -> list[int]:
    """The elements of each rank's slice; the first is the largest."""
    largest = -(-count // (world * _SHARE)) * _SHARE
    return [max(0, min(largest, count - rank * largest)) for rank in range(world)]


def _padded(size: int) -> int:
    return -(-size // 8) * 8


def _encode(
    x: torch.Tensor, code: Code, begin: int, count: int, encoding: Encoding, row: torch.Tensor, factor: float
) -> None:
    """Elements [begin, begin + count) of x as codes, then scales, in a row of bytes."""
    address = row.data_ptr()
    source = (x.data_ptr() + begin * ELEMENT_BYTES[code], 0, code, 0)
    scales = address + _padded(encoding.codes_bytes(count))
    operands = (
        *(source, encoding.wire, encoding.block_shift, address, scales, count),
        *(encoding.stochastic, encoding.key, factor),
    )
    backend_for("cpu").cast(operands, 0, False)


def _source(row: torch.Tensor, count: int, encoding: Encoding) -> tuple[int, int, int, int]:
    address = row.data_ptr()
    return address, address + _padded(encoding.codes_bytes(count)), encoding.wire, encoding.block_shift


def _add_up(rows: torch.Tensor, count: int, encoding: Encoding, divisor: float, out: torch.Tensor) -> None:
    """The rows' values added in rank order and divided."""
    sources = [_source(row, count, encoding) for row in rows]
    code = Code.FLOAT64 if out.dtype == torch.float64 else Code.FLOAT32
    leaf = (sources, None, [1.0] * len(sources), divisor, count, MEAN, out.data_ptr(), 0, code, 0)
    backend_for("cpu").weighted_sum([leaf], 0, False)


def _decode(row: torch.Tensor, out: torch.Tensor, code: Code, begin: int, count: int, encoding: Encoding) -> bool:
    """A row of codes to out[begin ...]; whether all of it is finite."""
    address = out.data_ptr() + begin * ELEMENT_BYTES[code]
    operands = (_source(row, count, encoding), code, 0, address, 0, count, False, (0, 0, 0, 0), 1.0)
    return backend_for("cpu").cast(operands, 0, True)


def executor_of(transport: Transport) -> ThreadPoolExecutor:
    """The one thread that does a transport's calls in the order in which they were made."""
    with _lock:
        if transport not in _executors:
            _executors[transport] = ThreadPoolExecutor(1, thread_name_prefix="fastagg-all-reduce")
        return _executors[transport]


_executors: weakref.WeakKeyDictionary[Transport, ThreadPoolExecutor] = weakref.WeakKeyDictionary()
