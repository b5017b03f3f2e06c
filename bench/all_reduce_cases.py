"""What the all-reduce benchmark measures: groups of ranks, the sizes they reduce, and the contenders by name."""

from __future__ import annotations

from dataclasses import dataclass, replace

GLOO, TORCH_HOOK, OPEN_MPI, LIMIT = "Gloo", "torch fp16 hook", "Open MPI", "limit"
PLAIN_DDP, NO_COMMUNICATION = "plain DDP", "no communication"
LINK_BITS_PER_SECOND = 10**9

KILOBYTE, MEGABYTE = 1000, 1_000_000


def fastagg_over(wire: str, transport: str = "") -> str:
    """How fastagg is called with a wire; it chooses the transport, but where one is named."""
    return f"fastagg {wire}, {transport}" if transport else f"fastagg {wire}"


@dataclass(frozen=True)
class Exchange:
    """One launch of ranks."""

    key: str
    world: int
    sizes: tuple[int, ...]  # bytes of fp32 that every rank holds
    contenders: tuple[str, ...]
    hosts: int = 1
    by_mpirun: bool = False

    def at_size(self, quick: bool) -> Exchange:
        """The exchange as a run measures it."""
        return replace(self, sizes=tuple(sorted({min(size, MEGABYTE) for size in self.sizes}))) if quick else self

    def rounds_at(self, size: int, quick: bool) -> int:
        """Rounds of every contender: fewer where one takes seconds."""
        slow = self.hosts > 1 or size > 100 * MEGABYTE
        return 3 if quick else 5 if slow else 9


_COMMON = (
    *(fastagg_over(wire) for wire in ("fp32", "fp16", "int8")),
    *(fastagg_over(wire, "backend") for wire in ("fp32", "fp16")),
    *(GLOO, TORCH_HOOK),
)
# mpirun binds each rank to a processor, which is best for Open MPI and bad for Gloo's threads: a launch of its own.
_BESIDE_OPEN_MPI = (fastagg_over("fp32"), fastagg_over("fp16"), OPEN_MPI)
_OTHER_WIRES = tuple(fastagg_over(wire) for wire in ("fp32", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2", "int4", "sign"))
_LINK_WIRES = tuple(fastagg_over(wire) for wire in ("fp32", "fp16", "int8", "int4", "sign"))
_SIZES = (
    *(kilobytes * KILOBYTE for kilobytes in (1, 4, 16, 64, 256)),
    *(megabytes * MEGABYTE for megabytes in (1, 5, 25, 100, 400)),
)
_FEW_SIZES = (64 * KILOBYTE, 25 * MEGABYTE)

TWO_RANKS = Exchange("two ranks", 2, _SIZES, _COMMON)
TWO_RANKS_OF_MPI = Exchange("two ranks of mpirun", 2, _SIZES, _BESIDE_OPEN_MPI, by_mpirun=True)
OTHER_WIRES = Exchange("other wires", 2, (25 * MEGABYTE,), _OTHER_WIRES)
FOUR_RANKS = Exchange("four ranks", 4, _FEW_SIZES, _COMMON)
FOUR_RANKS_OF_MPI = Exchange("four ranks of mpirun", 4, _FEW_SIZES, _BESIDE_OPEN_MPI, by_mpirun=True)
TWO_HOSTS = Exchange("two hosts", 2, (100 * MEGABYTE,), (GLOO, TORCH_HOOK, *_LINK_WIRES), hosts=2)
EXCHANGES = (TWO_RANKS, TWO_RANKS_OF_MPI, OTHER_WIRES, FOUR_RANKS, FOUR_RANKS_OF_MPI, TWO_HOSTS)


def exchange_named(key: str) -> Exchange:
    """The exchange with that key."""
    return next(exchange for exchange in EXCHANGES if exchange.key == key)


def short_size(size: int) -> str:
    """25000000 as "25 MB"."""
    return f"{size / MEGABYTE:g} MB" if size >= MEGABYTE else f"{size / KILOBYTE:g} kB"
