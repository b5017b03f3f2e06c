"""Runs a program as the ranks of a torch.distributed group: real processes on this host, or on several."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import transports
from namespaces import Host

PROLOGUE = """
import datetime, os, signal, sys, time
import torch, torch.distributed as dist
import fastagg
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.set_num_threads(1)
fastagg.set_num_threads(1)
timeout = datetime.timedelta(seconds=float(os.environ.get("TIMEOUT", "60")))
backend = "cpu:gloo,cuda:nccl" if torch.cuda.device_count() >= world else "gloo"  # NCCL wants a device for each
dist.init_process_group(backend, init_method=os.environ["MEET"], rank=rank, world_size=world, timeout=timeout)
def gathered(x):
    everyone = [torch.empty_like(x, device="cpu") for _ in range(world)]
    dist.all_gather(everyone, x.cpu())
    return [one.to(x.device) for one in everyone]
"""

EPILOGUE = """
# A model or an optimizer keeps its group, and so torch's threads, until the interpreter ends; one that lets go of a
# tensor after that would abort the process. So it ends without the interpreter's leave-taking.
if dist.is_initialized():
    dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)
"""


class Ranks:
    """The processes, and what they printed."""

    def __init__(self, program: str, world: int, hosts: Sequence[Host] = (), **environment: str) -> None:
        self.folder = tempfile.TemporaryDirectory()
        meet = f"tcp://{hosts[0].address}:29500" if hosts else f"file://{Path(self.folder.name) / 'store'}"
        common = {**os.environ, "WORLD_SIZE": str(world), "MEET": meet, **environment}
        self.processes = []
        for rank in range(world):
            host = hosts[rank * len(hosts) // world] if hosts else None
            self.processes.append(
                subprocess.Popen(
                    [
                        *(host.command if host else ()),
                        sys.executable,
                        "-c",
                        PROLOGUE + transports.PROLOGUE + program + EPILOGUE,
                    ],
                    env={**common, **(host.environment if host else {}), "RANK": str(rank)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def outputs(self, timeout: float = 300) -> list[tuple[int, str, str]]:
        """Exit status, standard output and errors of every rank, which are ended if they do not end."""
        found = []
        for process in self.processes:
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                out, err = process.communicate()
                err += f"\nended after {timeout} s"
            found.append((process.returncode, out, err))
        self.folder.cleanup()
        return found

    def send(self, rank: int, number: signal.Signals) -> None:
        """Sends a signal to one rank."""
        self.processes[rank].send_signal(number)


def run_ranks(program: str, world: int, hosts: Sequence[Host] = (), **environment: str) -> list[str]:
    """What every rank printed; fails if one fails."""
    outputs = Ranks(program, world, hosts, **environment).outputs()
    for rank, (status, out, err) in enumerate(outputs):
        assert status == 0, f"rank {rank} of {world}: status {status}\n{out}\n{err}"
    return [out for _, out, _ in outputs]
