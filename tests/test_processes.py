"""What the tests' own processes inherit."""

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

import processes


@pytest.fixture
def ignored() -> Iterator[None]:
    """As in a command that a shell has started in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ignored")
def test_an_interrupt_ends_children_of_a_suite_in_the_background() -> None:
    processes.restore_signals()
    program = "import time; print('ready', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    with child:
        assert child.stdout is not None
        child.stdout.readline()
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == -signal.SIGINT
