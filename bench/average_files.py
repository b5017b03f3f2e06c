"""The benchmark of `fastagg average`: `python bench/average_files.py [--quick] [--results FOLDER]`.

Large checkpoints in the page cache, averaged by the command and by what people write instead, beside the streaming
limit of the machine; and the command's peak memory. The contenders take turns in one process. The answer is checked
before it is timed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import average_report
import fastagg
import scripts
from average_report import Row
from fastagg import _core
from fastagg.files import average, open_checkpoint
from fastagg.files.mapped_file import MappedFile
from machine import seconds, use_all_processors

MEGABYTE = 1_000_000
FILES, MEGABYTES, ROUNDS = 8, 500, 11
QUICK_MEGABYTES, QUICK_ROUNDS = 8, 1
LARGEST_ERROR = 1.2e-7  # of the mean of |x|
CHUNK = 1 << 20

# The command, and then its peak.
COMMAND = """
import sys
from pathlib import Path
from fastagg.cli.commands import application
try:
    application(["average", *sys.argv[1:]])
finally:
    status = Path("/proc/self/status").read_text().splitlines()
    print(next(line.split()[1] for line in status if line.startswith("VmHWM:")))
"""


def shapes(megabytes: int) -> dict[str, tuple[int, ...]]:
    """An embedding of a sixth of the file, and layers of a transformer: matrices of 2 to 9 MB and vectors."""
    leaves: dict[str, tuple[int, ...]] = {"embedding": (megabytes * MEGABYTE // 6 // 4 // 768, 768)}
    left = megabytes * MEGABYTE - 4 * int(np.prod(leaves["embedding"]))
    layer = {"qkv": (768, 2304), "out": (768, 768), "up": (768, 3072), "down": (3072, 768), "norm": (768,)}
    for index in range(max(left // (4 * sum(int(np.prod(shape)) for shape in layer.values())), 1)):
        leaves |= {f"layer.{index}.{name}": shape for name, shape in layer.items()}
    return leaves


def write_inputs(folder: Path, megabytes: int) -> list[Path]:
    """Files of random numbers, which stay in the page cache."""
    from safetensors.numpy import save_file

    paths = [folder / f"{index}.safetensors" for index in range(FILES)]
    for index, path in enumerate(paths):
        generator = np.random.default_rng(index)
        save_file({name: generator.random(shape, np.float32) - 0.5 for name, shape in shapes(megabytes).items()}, path)
    os.sync()
    return paths


class Contenders:
    """What takes turns, each over the same files."""

    def __init__(self, paths: list[Path], weights: list[float]) -> None:
        self.paths, self.weights = paths, weights
        self.output = paths[0].with_name("output.safetensors")
        opened = [open_checkpoint(path) for path in paths]
        self.updates = [{name: np.array(array) for name, array in checkpoint.items()} for checkpoint in opened]
        self.out = {name: np.ones_like(array) for name, array in self.updates[0].items()}
        self.one_file = paths[0].read_bytes()
        self.calls = {
            average_report.LIMIT: self.limit,
            average_report.FASTAGG: self.fastagg,
            "fedavg in memory": self.fedavg,
            "safetensors and torch, one by one": self.torch_loop,
        }

    def fastagg(self) -> None:
        """`fastagg average`, the sync of its output included."""
        average(self.paths, self.output, self.weights, force=True)

    def limit(self) -> None:
        """Reads the mapped files once, on all threads, without arithmetic; writes and syncs one file of their size."""
        files = [MappedFile(path) for path in self.paths]
        _core.stream_probe([file.bytes.ctypes.data for file in files], len(files[0]), 0, 0, CHUNK)
        with self.output.with_suffix(".limit").open("wb") as file:
            for begin in range(0, len(self.one_file), CHUNK):
                file.write(memoryview(self.one_file)[begin : begin + CHUNK])
            file.flush()
            os.fsync(file.fileno())

    def fedavg(self) -> None:
        """The mean of the same arrays in memory, into memory."""
        fastagg.fedavg(self.updates, self.weights, out=self.out)

    def torch_loop(self) -> None:
        """What people write: load a file, add it up, go on; then save. Nothing is synced."""
        from safetensors.torch import load_file, save_file

        total = sum(self.weights)
        result = {name: tensor.mul_(self.weights[0] / total) for name, tensor in load_file(self.paths[0]).items()}
        for path, weight in zip(self.paths[1:], self.weights[1:], strict=True):
            for name, tensor in load_file(path).items():
                result[name].add_(tensor, alpha=weight / total)
        save_file(result, self.output.with_suffix(".torch"))

    def check(self) -> None:
        """Holds the answer to its bound, against NumPy in float64."""
        self.fastagg()
        with open_checkpoint(self.output) as result:
            for name in (next(iter(result)), list(result)[-1]):
                columns = [update[name].astype(np.float64) for update in self.updates]
                expected = np.average(columns, axis=0, weights=self.weights)
                scale = np.average(np.abs(columns), axis=0, weights=self.weights)
                assert np.all(np.abs(result[name] - expected) <= LARGEST_ERROR * scale), name


def peak_bytes(paths: list[Path], weights: list[float], output: Path) -> int:
    """The peak resident memory of the command, mapped pages included."""
    options = [option for weight in weights for option in ("-w", str(weight))]
    command = [sys.executable, "-c", COMMAND, *map(str, paths), "-o", str(output), "--force", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) * 1024


def measure(folder: Path, megabytes: int, rounds: int) -> tuple[list[Row], int, int]:
    """Every contender's times, the bytes of all files, and the command's peak."""
    paths = write_inputs(folder, megabytes)
    weights = [float(100 + 37 * index % 91) for index in range(len(paths))]
    contenders = Contenders(paths, weights)
    contenders.check()
    rows = [Row(name) for name in contenders.calls]
    for _ in range(rounds):
        for row in rows:
            row.seconds.append(seconds(contenders.calls[row.contender]))
    return rows, sum(path.stat().st_size for path in paths), peak_bytes(paths, weights, contenders.output)


def main() -> None:
    """Measures, and writes the report."""
    parser = argparse.ArgumentParser(description="Time `fastagg average` beside what people write instead.")
    parser.add_argument("--results", type=Path, default=Path("fastagg-bench"), help="folder of the report")
    parser.add_argument("--quick", action="store_true", help="small files: a smoke test")
    options = parser.parse_args()
    use_all_processors()
    megabytes, rounds = (QUICK_MEGABYTES, QUICK_ROUNDS) if options.quick else (MEGABYTES, ROUNDS)
    print(f"average: {FILES} files of {megabytes} MB", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        rows, read, peak = measure(Path(folder), megabytes, rounds)
    command = shlex.join(["python", "bench/average_files.py", *sys.argv[1:]])
    print(average_report.write(rows, read, peak, options.results, command, options.quick))


if __name__ == "__main__":
    scripts.end_with(main)
