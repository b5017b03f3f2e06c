"""Kills a worker of train.py, and shows that training goes on and ends with the loss of an undisturbed one.

python examples/elastic/kill_a_worker.py
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TRAIN = Path(__file__).with_name("train.py")
TORCHRUN = [
    *("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"),
    *("--nproc-per-node", "2", "--max-restarts", "3"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--wire", default="int8")
    options = parser.parse_args()
    arguments = ["--steps", str(options.steps), "--every", str(options.every), "--wire", options.wire]
    with tempfile.TemporaryDirectory() as folder:
        print("undisturbed:", flush=True)
        expected = last_line(launch(Path(folder) / "undisturbed", arguments))
        print("with a worker killed:", flush=True)
        # A pause after each step leaves time to kill.
        training = launch(Path(folder) / "disturbed", [*arguments, "--pause", "0.1"])
        kill_after_a_checkpoint(training, Path(folder) / "disturbed")
        if last_line(training) != expected:
            sys.exit("the losses differ")
    print("the losses are equal, bit for bit")


def launch(folder: Path, arguments: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, *TORCHRUN, str(TRAIN), "--folder", str(folder), *arguments]
    # Without a store for each start, workers find in the old one the addresses of the dead, and fail or hang.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def kill_after_a_checkpoint(training: subprocess.Popen[str], folder: Path) -> None:
    while not any(folder.glob("step-*/model.pt")):
        if training.poll() is not None:
            sys.exit(f"training ended with {training.returncode} before its first checkpoint")
        time.sleep(0.05)
    os.kill(int((folder / "rank-1.pid").read_text()), signal.SIGKILL)
    print("  rank 1 is killed", flush=True)


def last_line(training: subprocess.Popen[str]) -> str:
    """Passes on what the training prints; its last line is the loss."""
    line = ""
    for line in training.stdout or ():
        print(" ", line, end="", flush=True)
    if training.wait() != 0:
        sys.exit(f"training ended with {training.returncode}")
    return line


if __name__ == "__main__":
    main()
