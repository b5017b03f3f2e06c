"""How long `fastagg average` takes for large files in the page cache, and its peak memory.

`python average_files.py [--files 8] [--megabytes 500] [--rounds 5] [--folder DIRECTORY]` prints a table. The contenders
take turns in one process; the peak memory is that of the command in a process of its own. The answer is checked first.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

import fastagg
from fastagg import _core
from fastagg.files import average, open_checkpoint
from fastagg.files.mapped_file import MappedFile
from machine import use_all_processors

MEGABYTE = 1_000_000
LARGEST_ERROR = 1.2e-7  # of the mean of |x|
CHUNK = 1 << 20

# The command, and then its peak.
COMMAND = """
import sys
from pathlib import Path
from fastagg._commands import application
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


def write_inputs(folder: Path, files: int, megabytes: int) -> list[Path]:
    """Files of random numbers, which stay in the page cache."""
    from safetensors.numpy import save_file

    paths = [folder / f"{index}.safetensors" for index in range(files)]
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

    def fastagg(self) -> None:
        """`fastagg average`, the sync of its output included."""
        average(self.paths, self.output, self.weights, force=True)

    def limit(self) -> None:
        """Reads the mapped files once, on all threads, without arithmetic; writes and syncs one file of their size."""
        files = [MappedFile(path) for path in self.paths]
        _core.stream_probe([file.bytes.ctypes.data for file in files], len(files[0]), 0, 0, CHUNK)
        bytes_of_one = self._bytes_of_one()
        with self.output.with_suffix(".limit").open("wb") as file:
            for begin in range(0, len(bytes_of_one), CHUNK):
                file.write(bytes_of_one[begin : begin + CHUNK])
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

    def _bytes_of_one(self) -> memoryview:
        """As many bytes as a file has, in memory."""
        if not hasattr(self, "_one"):
            self._one = self.paths[0].read_bytes()
        return memoryview(self._one)


def peak_bytes(paths: list[Path], weights: list[float], output: Path) -> int:
    """The peak resident memory of the command, mapped pages included."""
    options = [option for weight in weights for option in ("-w", str(weight))]
    command = [sys.executable, "-c", COMMAND, *map(str, paths), "-o", str(output), "--force", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) * 1024


def seconds(call: Callable[[], None]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def report(times: dict[str, list[float]], read: int, peak: int) -> Table:
    """Times, and each contender's against fastagg's: the median of the rounds' ratios, and that of the best times."""
    table = Table("", "best s", "median s", "GB/s read, best", "time / fastagg's, median", "best")
    ours = times["fastagg average"]
    for name, own in times.items():
        ratio = median(one / other for one, other in zip(own, ours, strict=True))
        rate = read / min(own) / 1e9
        table.add_row(
            name,
            *(f"{x:.3f}" for x in (min(own), median(own))),
            f"{rate:.1f}",
            f"{ratio:.2f}",
            f"{min(own) / min(ours):.2f}",
        )
    table.caption = (
        f"peak memory of the command: {peak / MEGABYTE:.0f} MB (target: below 1000); the limit's target: 0.7"
    )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write the files; a temporary directory without")
    options = parser.parse_args()
    use_all_processors()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        paths = write_inputs(Path(folder), options.files, options.megabytes)
        weights = [float(100 + 37 * index % 91) for index in range(options.files)]
        contenders = Contenders(paths, weights)
        contenders.check()
        calls = {
            "limit: read all once, write one, sync": contenders.limit,
            "fastagg average": contenders.fastagg,
            "fedavg in memory": contenders.fedavg,
            "safetensors and torch, one by one": contenders.torch_loop,
        }
        times = {name: [] for name in calls}
        for _ in range(options.rounds):
            for name, call in calls.items():
                times[name].append(seconds(call))
        peak = peak_bytes(paths, weights, contenders.output)
        Console().print(report(times, sum(path.stat().st_size for path in paths), peak))


if __name__ == "__main__":
    main()
