"""What the benchmark of a CUDA device measures, what matters most first: its time is limited."""

from __future__ import annotations

from dataclasses import dataclass

FASTAGG = "fastagg"
KINDS = ("fp32", "fp16", "bf16", "int8")  # of what clients send
WIRES = ("fp16", "int8", "int4")
CLIENTS = (2, 10, 100)
ARRAY, RESNET50, SMALL_LEAVES = "one array", "ResNet-50", "214 small leaves"

_ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
_BYTES_OF_ALL_CLIENTS = 1_000_000_000
_CAST_ELEMENTS = 1 << 29  # two gibibytes of float32: a call lasts long enough that the host keeps up
_QUICK_SHARE = 100
_MULTIPLE = 4096


@dataclass(frozen=True)
class Case:
    """One workload."""

    operation: str  # "fedavg", "call", "quantize", "dequantize" or "hook"
    kind: str = "fp32"  # of the clients' elements, or the wire of a cast
    clients: int = 1
    layout: str = ARRAY

    @property
    def key(self) -> str:
        """The case as the report calls it."""
        if self.operation in ("fedavg", "call"):
            return f"{self.operation}: K={self.clients}, {self.kind}, {self.layout}"
        if self.operation == "hook":
            return f"hook: gradients of a {self.layout}, {self.kind} wire"
        return f"{self.operation}: {self.kind}"

    def elements(self, quick: bool) -> int:
        """Elements of the one array, of one client or of a cast."""
        count = _CAST_ELEMENTS
        if self.operation == "fedavg":
            count = _BYTES_OF_ALL_CLIENTS // self.clients // _ELEMENT_BYTES[self.kind]
        return count // (_QUICK_SHARE if quick else 1) // _MULTIPLE * _MULTIPLE


def fedavg(clients: int, kind: str, layout: str) -> Case:
    """A weighted mean."""
    return Case("fedavg", kind, clients, layout)


HOOK = Case("hook", "fp16", layout=RESNET50)
CALLS = tuple(Case("call", clients=clients, layout=SMALL_LEAVES) for clients in (2, 10))
CASTS = tuple(Case(operation, wire) for operation in ("quantize", "dequantize") for wire in WIRES)
FEDAVG = tuple(
    fedavg(clients, kind, layout)
    for kind in KINDS
    for clients in sorted(CLIENTS, reverse=True)  # those with targets first
    for layout in (ARRAY, RESNET50)
)
CASES = (*FEDAVG[:6], HOOK, *CALLS, *CASTS, *FEDAVG[6:])
