"""What is measured: the cases of every operation, at full size and at the size of a quick run."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Case:
    """One workload; its key stays the same whatever the size, so that targets find it."""

    operation: str  # "fedavg", "accumulator", "quantize" or "dequantize"
    key: str
    elements: int  # of one client; about, where the layout decides
    quick_elements: int
    clients: int = 1
    dtype: str = "float32"
    library: str = "numpy"
    layout: str = "array"  # "array", "ResNet-50" or "small leaves"
    wire: str | None = None  # how the clients encode, or what a cast encodes
    batch: int = 1
    iterations: int = 1  # calls a round: more than one where a call is too short for the clock
    measures_memory: bool = False

    @property
    def title(self) -> str:
        """The case as the report calls it."""
        size = f"{_short(self.elements)} {self.wire or _SHORT_DTYPES[self.dtype]}"
        if self.operation in ("quantize", "dequantize"):
            return f"{size}"
        if self.operation == "accumulator":
            return f"batch={self.batch}, {self.clients} clients of {size}"
        layout = "" if self.layout == "array" else f", {self.layout}"
        return f"K={self.clients}, N={size}{layout} ({self.library})"

    def at_size(self, quick: bool) -> Case:
        """The case as a run measures it."""
        return replace(self, elements=self.quick_elements) if quick else self


_SHORT_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_MILLION = 1_000_000

FEDAVG = [
    Case("fedavg", "array", 25 * _MILLION, 250_000, clients=10, measures_memory=True),
    Case("fedavg", "state_dict", 25 * _MILLION, 400_000, 10, library="torch", layout="ResNet-50", measures_memory=True),
    Case("fedavg", "small leaves", 250_000, 12_800, 10, library="torch", layout="small leaves"),
    Case("fedavg", "two clients", 25 * _MILLION, 250_000, clients=2),
    Case("fedavg", "hundred clients", 2_500_000, 25_000, clients=100, measures_memory=True),
    Case("fedavg", "thousand clients", 250_000, 2_500, clients=1000),
    Case("fedavg", "fp16", 25 * _MILLION, 250_000, 10, dtype="float16", measures_memory=True),
    Case("fedavg", "bf16", 25 * _MILLION, 250_000, 10, dtype="bfloat16", library="torch", measures_memory=True),
    Case("fedavg", "int8", 25 * _MILLION, 250_000, 10, library="torch", wire="int8", measures_memory=True),
    Case("fedavg", "small", 1000, 1000, clients=10, iterations=100),
]

ACCUMULATOR = [
    Case("accumulator", "batch=1", 25 * _MILLION, 250_000, clients=4, library="torch", batch=1),
    Case("accumulator", "batch=8", 25 * _MILLION, 250_000, clients=8, library="torch", batch=8),
]

WIRES = ("fp16", "bf16", "fp8_e4m3", "int8", "int4", "sign")

CASTS = [
    Case(operation, wire, 64 * _MILLION, 640_000, library="torch", wire=wire, measures_memory=wire == "fp16")
    for operation in ("quantize", "dequantize")
    for wire in WIRES
]

CASES = [*FEDAVG, *ACCUMULATOR, *CASTS]


def case_named(operation: str, key: str) -> Case:
    """The case of an operation with that key."""
    return next(case for case in CASES if (case.operation, case.key) == (operation, key))


def _short(count: int) -> str:
    """25000000 as "25M"."""
    for unit, letter in ((_MILLION, "M"), (1000, "k")):
        if count >= unit:
            return f"{count / unit:g}{letter}"
    return str(count)
