"""Two hosts on one machine: network namespaces joined by a link of limited rate. They need Linux, root and iproute2."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple

_LINK = "eth0"  # what both ends are called, each in its own namespace
# How a kernel, or a container around it, says that it has no such thing. Anything else is an error here.
_REFUSALS = ("not permitted", "not supported", "Unknown device type", "qdisc kind is unknown")
_NUMBERS = itertools.count()


class NotAvailableError(Exception):
    """Why this machine cannot have such hosts."""


class Host(NamedTuple):
    """A network namespace, as ranks on it see it."""

    name: str
    address: str

    @property
    def command(self) -> list[str]:
        """What stands before a command that runs on this host."""
        return ["ip", "netns", "exec", self.name]

    @property
    def environment(self) -> dict[str, str]:
        """What Gloo and fastagg cannot see by themselves: namespaces of the network share boot and memory."""
        return {"GLOO_SOCKET_IFNAME": _LINK, "FASTAGG_HOST": self.name}


@contextmanager
def two_hosts(rate: str = "1gbit", rate_back: str | None = None) -> Iterator[tuple[Host, Host]]:
    """Two hosts that live as long as the context; what still runs on them then is ended.

    Args:
        rate: of the link, as tc writes it.
        rate_back: of what the second host sends; None for the same.

    Raises:
        NotAvailableError: not root, no iproute2, or a kernel that refuses.
    """
    if os.geteuid() != 0:
        raise NotAvailableError("network namespaces need root")
    number = next(_NUMBERS)
    first, second = (Host(f"fastagg-{os.getpid()}-{number}-{end}", f"10.0.0.{end}") for end in (1, 2))
    with ExitStack() as stack:
        for host in (first, second):
            _run("ip", "netns", "add", host.name)
            stack.callback(_remove, host)
        peer = ("peer", "name", _LINK, "netns", second.name)
        _run("ip", "link", "add", _LINK, "netns", first.name, "type", "veth", *peer)
        _connect(first, rate)
        _connect(second, rate_back or rate)
        yield first, second


def _connect(host: Host, rate: str) -> None:
    """Brings one end of the link up, and holds what leaves there to the rate."""
    _run("ip", "-n", host.name, "link", "set", "lo", "up")
    _run("ip", "-n", host.name, "address", "add", f"{host.address}/24", "dev", _LINK)
    _run("ip", "-n", host.name, "link", "set", _LINK, "up")
    bucket = ("tbf", "rate", rate, "burst", "128kb", "latency", "50ms")  # a burst holds the largest packet whole
    _run("tc", "-n", host.name, "qdisc", "add", "dev", _LINK, "root", *bucket)


def _remove(host: Host) -> None:
    for process in _run("ip", "netns", "pids", host.name).split():
        with suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)
    _run("ip", "netns", "delete", host.name)


def _run(*command: str) -> str:
    """What a command prints.

    Raises:
        NotAvailableError: it is not installed, or the kernel refuses.
        RuntimeError: it fails for another reason.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise NotAvailableError(f"{command[0]} is not installed: apt-get install iproute2") from None
    if done.returncode:
        refused = any(refusal in done.stderr for refusal in _REFUSALS)
        raise (NotAvailableError if refused else RuntimeError)(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
