"""Runs a program as the ranks of a torch.distributed group: real processes on this host, or on several."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Sequence
from multiprocessing.connection import Connection
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

# Ranks of this host are forked from a server that has imported what takes them seconds, and has no threads yet.
_LOADED = ("fastagg.distributed.collectives", "fastagg.ddp", "pytest", "torch", "torch._dynamo", "torch.nn.parallel")
_servers = multiprocessing.get_context("forkserver")
_servers.set_forkserver_preload(list(_LOADED))


class _Forked:
    """A rank's process on this host, as far as tests use `subprocess.Popen`."""

    def __init__(self, program: str, errors: Path, environment: dict[str, str]) -> None:
        reader, writer = _servers.Pipe(duplex=False)
        self.errors = errors
        self.process = _servers.Process(target=_run, args=(program, writer, errors, environment))
        self.process.start()
        writer.close()
        self.stdout = os.fdopen(os.dup(reader.fileno()))
        reader.close()

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, a signal's number negative."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("a rank", timeout or 0)
        return self.process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for the end; what was printed fits into a pipe."""
        self.wait(timeout)
        with self.stdout:
            return self.stdout.read(), self.errors.read_text()

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless the process has ended."""
        if self.process.exitcode is None and self.process.pid is not None:
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        """Ends it."""
        self.send_signal(signal.SIGKILL)

    @property
    def returncode(self) -> int | None:
        """The exit status, once it has ended."""
        return self.process.exitcode


def _run(program: str, writer: Connection, errors: Path, environment: dict[str, str]) -> None:
    """Runs a program as its own interpreter would: with its own streams, environment and main module."""
    os.dup2(writer.fileno(), 1)
    writer.close()
    descriptor = os.open(errors, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    exec(compile(program, "<rank>", "exec"), main.__dict__)


class Ranks:
    """The processes, and what they printed."""

    def __init__(self, program: str, world: int, hosts: Sequence[Host] = (), **environment: str) -> None:
        self.folder = tempfile.TemporaryDirectory()
        folder = Path(self.folder.name)
        meet = f"tcp://{hosts[0].address}:29500" if hosts else f"file://{folder / 'store'}"
        common = {**os.environ, "WORLD_SIZE": str(world), "MEET": meet, **environment}
        whole = PROLOGUE + transports.PROLOGUE + program + EPILOGUE
        self.processes: list[_Forked | subprocess.Popen[str]] = []
        for rank in range(world):
            own = {**common, "RANK": str(rank)}
            if hosts:
                self.processes.append(_started_on(hosts[rank * len(hosts) // world], whole, own))
            else:
                self.processes.append(_Forked(whole, folder / f"{rank}.err", own))

    def outputs(self, timeout: float = 300) -> list[tuple[int | None, str, str]]:
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


def _started_on(host: Host, program: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    """A rank's process on another host."""
    return subprocess.Popen(
        [*host.command, sys.executable, "-c", program],
        env={**environment, **host.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_ranks(program: str, world: int, hosts: Sequence[Host] = (), **environment: str) -> list[str]:
    """What every rank printed; fails if one fails."""
    outputs = Ranks(program, world, hosts, **environment).outputs()
    for rank, (status, out, err) in enumerate(outputs):
        assert status == 0, f"rank {rank} of {world}: status {status}\n{out}\n{err}"
    return [out for _, out, _ in outputs]
