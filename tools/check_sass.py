"""Checks the machine code of the CUDA kernels, which needs no GPU: no local memory, and hot loops of whole vectors.

    python tools/check_sass.py FOLDER     every *.cu.o below the folder, for all architectures in it

A vector whose alignment is lost, or a struct that is copied field by field, costs much of the memory's speed, and no
test of the results would notice. What the kernels' loops must hold is in RULES.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCAL_MEMORY = ("LDL", "STL")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its opcode with all modifiers, and where a branch goes."""

    address: int
    opcode: str
    target: int | None


@dataclass
class Kernel:
    """A kernel's code for one architecture."""

    architecture: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)

    def loops(self) -> Iterator[Counter[str]]:
        """How often each loop, nested ones included, holds each opcode."""
        places = {instruction.address: place for place, instruction in enumerate(self.instructions)}
        for place, instruction in enumerate(self.instructions):
            if instruction.target is not None and instruction.target < instruction.address:
                body = self.instructions[places[instruction.target] : place + 1]
                yield Counter(each.opcode for each in body)


@dataclass(frozen=True)
class Rule:
    """In each kernel of this name one loop has, and lacks, certain instructions.

    "LDG.128" stands for every load of 128 bits, whatever its other modifiers. `ratio` names an instruction of which the
    loop has exactly so many for each of the first in `has`: with a load first, those are the elements of its vector.
    """

    kernel: str  # a regular expression
    purpose: str
    has: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    ratio: tuple[str, int] | None = None

    def faults(self, loop: Counter[str]) -> list[str]:
        """What keeps a loop from being the one."""
        found = [f"no {each}" for each in self.has if not count(loop, each)]
        found += [f"{each} in it" for each in self.lacks if count(loop, each)]
        if self.ratio is not None and not found:
            each, times = self.ratio
            if count(loop, each) != times * count(loop, self.has[0]):
                found.append(f"not {times} {each} for each {self.has[0]}")
        return found


FROM_FLOAT64 = "F2F.F32.F64"
RULES = (
    Rule("weighted_sum_kernel<sums>", "float64 clients", ("LDG.128", "DMUL"), ("I2F",), ("DADD", 2)),
    Rule("weighted_sum_kernel<sums>", "float32 clients", ("LDG.128", "F2F.F64.F32", "DMUL"), ratio=("DADD", 4)),
    Rule("weighted_sum_kernel<sums>", "float16 clients", ("LDG.128", "F2F.F64.F32", "DMUL"), ratio=("HADD2.F32", 8)),
    Rule("weighted_sum_kernel<sums>", "float16 clients for float16", ("LDG.128", "FMUL"), ratio=("HADD2.F32", 8)),
    Rule(
        "weighted_sum_kernel<sums>", "bfloat16 clients for bfloat16", ("LDG.128", "FMUL"), ("HADD2.F32",), ("FADD", 8)
    ),
    Rule("weighted_sum_kernel<sums>", "8-bit clients without conversions", ("DMUL",), ("I2F", "F2F"), ("DADD", 2)),
    Rule("weighted_sum_kernel<pairs>", "float64 clients", ("LDG.128", "DMUL", "DFMA"), ("I2F", "F2F"), ("DADD", 12)),
    Rule("encode_whole<float32, nearest, CastWork>", "from float32", ("LDG.128", "STG.128"), (FROM_FLOAT64,)),
    Rule("encode_whole<float32, nearest, CastWork>", "from float16", ("LDG.64", "HADD2.F32", "STG.128")),
    Rule("encode_whole<float16, nearest, CastWork>", "from float32", ("LDG.128", "STG.64"), (FROM_FLOAT64,)),
    Rule("encode_whole<bfloat16, nearest, CastWork>", "from float32", ("LDG.128", "STG.64"), (FROM_FLOAT64,)),
    Rule("encode_whole<wire_int8, nearest, CastWork>", "from float32", ("LDG.128", "STG.32")),
    Rule("encode_whole<float32, nearest, SumWork<Arrays> >", "sum of float32", ("LDG.128",), ratio=("FADD", 4)),
    Rule("encode_whole<float32, nearest, SumWork<Arrays> >", "store of float32", ("STG.128",)),
    Rule("encode_whole<float16, nearest, SumWork<Arrays> >", "sum of float16", ("LDG.64",), ratio=("HADD2.F32", 4)),
    Rule("encode_whole<float16, nearest, SumWork<Arrays> >", "store of float16", ("STG.64",)),
    Rule("all_reduce_kernel<float16, nearest>", "float32 published", ("LDG.128", "STG.64")),
    Rule("all_reduce_kernel<float16, nearest>", "results of float32", ("LDG.64", "HADD2.F32", "STG.128")),
    Rule("all_reduce_kernel<float32, nearest>", "float32 as it is", ("LDG.128", "STG.128")),
    Rule("server_step_kernel<adam>", "float32", ("LDG.128", "STG.128"), ("DADD", "HADD2.F32"), ("MUFU.RSQ", 1)),
    Rule("server_step_kernel<adam>", "float16", ("LDG.64", "LDG.128", "STG.64", "STG.128"), ratio=("HADD2.F32", 4)),
    Rule("server_step_kernel<momentum>", "products rounded before the sum", ("LDG.128", "FMUL", "FADD"), ("FFMA",)),
)


def matches(opcode: str, pattern: str) -> bool:
    """Whether an opcode is the pattern's and has its modifiers, in their order; 32 means an access without a size."""
    name, *modifiers = opcode.split(".")
    wanted_name, *wanted = pattern.split(".")
    if wanted == ["32"]:
        return name == wanted_name and not {"64", "128", "U8", "S8", "U16", "S16"} & set(modifiers)
    rest = iter(modifiers)
    return name == wanted_name and all(each in rest for each in wanted)


def count(opcodes: Counter[str], pattern: str) -> int:
    """How many opcodes match a pattern."""
    return sum(number for opcode, number in opcodes.items() if matches(opcode, pattern))


def parse(listing: Iterable[str]) -> list[Kernel]:
    """The kernels of what `cuobjdump -sass` prints, under the names that it prints."""
    kernels: list[Kernel] = []
    architecture = "an unknown architecture"
    for line in listing:
        if found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*);", line):
            address, opcode, operands = found.groups()
            target = re.search(r"\b0x([0-9a-f]+)\s*$", operands) if opcode.startswith("BRA") else None
            kernels[-1].instructions.append(Instruction(int(address, 16), opcode, target and int(target[1], 16)))
        elif found := re.match(r"\s*code for (\w+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function : (\S.*?)\s*$", line):
            kernels.append(Kernel(architecture, found[1]))
    return kernels


def complaints(kernels: list[Kernel], rules: Iterable[Rule] = RULES) -> list[str]:
    """What is wrong with the kernels, each with its architecture, its name and the instruction."""
    found = []
    for kernel in kernels:
        opcodes = Counter(instruction.opcode for instruction in kernel.instructions)
        bad = sorted(opcode for opcode in opcodes if opcode.split(".")[0] in LOCAL_MEMORY)
        found += [f"{kernel.architecture}: {kernel.name}: {opcode}, an access to local memory" for opcode in bad]
    for rule in rules:
        ruled = [kernel for kernel in kernels if re.fullmatch(rule.kernel, kernel.name)]
        if not ruled:
            found.append(f"{rule.kernel}: no kernel has this name")
        for kernel in ruled:
            nearest = min((rule.faults(loop) for loop in kernel.loops()), key=len, default=["there is no loop"])
            if nearest:
                missed = f"no loop for {rule.purpose}; the nearest: {', '.join(nearest)}"
                found.append(f"{kernel.architecture}: {kernel.name}: {missed}")
    return found


def enumerators(name: str) -> list[str]:
    """The enumerators of an enum of the kernels' vocabulary."""
    source = "".join((ROOT / "csrc" / path).read_text() for path in ("core/types.h", "cuda/operations.h"))
    found = re.search(rf"enum class {name} : \w+ {{([^}}]*)}}", source)
    assert found is not None, f"no enum {name}"
    return re.findall(r"^\s*(\w+)", re.sub(r",\s*(?=\w)", ",\n", found[1]), flags=re.MULTILINE)


def readable(name: str) -> str:
    """A demangled kernel's name without namespaces and parameters, with the names of its codes."""
    short = re.sub(r"^void |fastagg::|cuda::|\(anonymous namespace\)::", "", name)
    for enum in ("Code", "Rounding", "Rule", "Part"):
        for value, enumerator in enumerate(enumerators(enum)):
            short = re.sub(rf"\({enum}\){value}\b", enumerator, short)
    return re.sub(r"\(.*\)$", "", short)


def tools() -> str | None:
    """The folder with cuobjdump and nvdisasm: that of the environment's packages, else one on the PATH."""
    try:
        files = importlib.metadata.files("nvidia-cuda-cuobjdump") or []
        return next(str(Path(str(file.locate())).parent) for file in files if file.name == "cuobjdump")
    except (importlib.metadata.PackageNotFoundError, StopIteration):
        found = shutil.which("cuobjdump")
        return found and str(Path(found).parent)


def disassembled(folder: str, path: Path) -> list[Kernel]:
    """The kernels of an object file, under readable names."""
    environment = dict(os.environ, PATH=f"{folder}{os.pathsep}{os.environ['PATH']}")  # cuobjdump calls nvdisasm
    command = [str(Path(folder) / "cuobjdump"), "-sass", str(path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        kernels = parse(process.stdout)
    if process.returncode != 0:
        raise SystemExit(f"{path}: cuobjdump failed")
    names = "\n".join(kernel.name for kernel in kernels)
    done = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True)
    for kernel, name in zip(kernels, done.stdout.splitlines(), strict=True):
        kernel.name = readable(name)
    return kernels


def main(arguments: list[str]) -> int:
    """Checks all objects below a folder; returns the exit status."""
    objects = sorted(Path(arguments[0]).rglob("*.cu.o"))
    if not objects:
        print("skipped: no CUDA kernels in this build")
        return 0
    folder = tools()
    if folder is None:
        print("no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
        return int(platform.machine() == "x86_64")  # elsewhere it may not be had
    with ThreadPoolExecutor(2) as pool:
        kernels = [kernel for each in pool.map(lambda path: disassembled(folder, path), objects) for kernel in each]
    found = complaints(kernels)
    print("\n".join(found) or f"{len(kernels)} kernels: no local memory, whole vectors in {len(RULES)} hot loops")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
