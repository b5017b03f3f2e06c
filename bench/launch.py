"""Starts a program of this folder as ranks, and brings those together: plainly, under mpirun, or on several hosts."""

from __future__ import annotations

import datetime
import functools
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fastagg
from namespaces import Host, NotAvailableError

_HERE = Path(__file__).resolve().parent
_PORT = 29500  # in a namespace of its own nobody else has it
_TIMEOUT = datetime.timedelta(seconds=120)


def launch(
    program: str, world: int, *arguments: str, hosts: Sequence[Host] = (), mpirun: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Runs `program` as ranks, and returns the rows that rank 0 writes.

    Args:
        program: a file of this folder.
        world: how many ranks.
        arguments: of the program.
        hosts: where the ranks run, in equal shares; none: here.
        mpirun: the command that starts all ranks here; none: each is started alone.
    """
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows"
        meet = f"tcp://{hosts[0].address}:{_PORT}" if hosts else f"file://{folder}/store"
        common = {**os.environ, "WORLD_SIZE": str(world), "MEET": meet, "ROWS": str(rows), "OMP_NUM_THREADS": "1"}
        common["PROCESSORS"] = str(fastagg.build_info()["processors"])  # mpirun may leave a rank but one
        command = [sys.executable, str(_HERE / program), *arguments]
        if mpirun:
            processes = [_popen([*mpirun, "-np", str(world), *command], common)]
        else:
            processes = [_start(command, common, rank, hosts) for rank in range(world)]
        try:
            for process in processes:
                if process.wait() != 0:
                    raise RuntimeError(f"{program} {' '.join(arguments)}: ended with {process.returncode}")
        finally:
            for process in processes:
                process.terminate()  # which mpirun passes on to its ranks
            for process in processes:
                process.wait()
        return [json.loads(line) for line in rows.read_text().splitlines()]


def _start(command: list[str], common: dict[str, str], rank: int, hosts: Sequence[Host]) -> subprocess.Popen[bytes]:
    environment = {**common, "RANK": str(rank)}
    if not hosts:
        return _popen(command, environment)
    host = hosts[rank * len(hosts) // int(common["WORLD_SIZE"])]
    environment |= {**host.environment, "TORCH_CPP_LOG_LEVEL": "ERROR"}  # it warns that hosts without names have none
    return _popen([*host.command, *command], environment)


def _popen(command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Starts ranks that ignore Ctrl-C: `launch` hears it and ends them, where each would print a traceback."""
    ignore = functools.partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    return subprocess.Popen(command, env=environment, preexec_fn=ignore)


def meet() -> int:
    """Joins the other ranks in torch.distributed's default group, with one thread a rank as torchrun has it.

    Returns:
        This process's rank.
    """
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    fastagg.set_num_threads(1)
    rank = int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["RANK"])
    world = int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=os.environ["MEET"], rank=rank, world_size=world, timeout=_TIMEOUT)
    return rank


def leave() -> None:
    """Leaves the group, once Gloo's threads have let go of the last tensors: at exit they could no longer."""
    import torch.distributed as dist

    dist.barrier()
    time.sleep(0.2)
    dist.destroy_process_group()


def keep(row: dict[str, Any]) -> None:
    """Writes a row for `launch`; only rank 0 may."""
    with Path(os.environ["ROWS"]).open("a") as rows:
        rows.write(json.dumps(row) + "\n")


def open_mpi() -> tuple[str, ...]:
    """The command that starts ranks by Open MPI.

    Raises:
        NotAvailableError: it is not installed.
    """
    if shutil.which("mpirun") is None:
        raise NotAvailableError("mpirun is not installed: apt-get install openmpi-bin libopenmpi-dev")
    version = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=False).stdout
    if "Open MPI" not in version:
        raise NotAvailableError("mpirun is not Open MPI's")
    if importlib.util.find_spec("mpi4py") is None:
        raise NotAvailableError("mpi4py is not installed: pip install mpi4py")
    return ("mpirun", "--oversubscribe", "--allow-run-as-root")
