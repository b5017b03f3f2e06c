"""A group's exchanges on the CPU: in a thread of their own, or at once."""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch

from fastagg._one_thread import OneThread

Result = TypeVar("Result")


class Line:
    """A group's exchanges one after the other, in the order in which they were asked for."""

    def __init__(self) -> None:
        self._thread = OneThread("fastagg-all-reduce")
        self._busy, self._counting = threading.Lock(), threading.Lock()
        self._waiting = 0
        self._thread_id: int | None = None

    def begin(self, work: Callable[[], None], tensors: Sequence[torch.Tensor]) -> Work:
        """Does the work in the line's own thread; returns what to wait for."""
        return Work(self.submit(work), tensors)

    def begin_future(self, work: Callable[[], object], result: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
        """The same, for torch: its future tells of the work's error, and so does backward if it is under way."""
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()

        def work_and_tell() -> None:
            try:
                work()
                future.set_result(result)
            except Exception as error:
                future.set_exception(error)  # type: ignore[arg-type]
                raise

        _raise_from_backward(self.submit(work_and_tell))
        return future

    def submit(self, work: Callable[[], Result]) -> Future[Result]:
        """Does the work in the line's own thread."""
        with self._counting:
            self._waiting += 1
        return self._thread.submit(self._do_waiting, work)

    def run(self, work: Callable[[], Result], tensors: Sequence[torch.Tensor] = ()) -> Result:
        """Does the work here and now if nothing waits: a thread takes longer to wake than a small message takes."""
        if threading.get_ident() == self._thread_id:
            return work()  # called back from the line itself, between two exchanges
        if self._waiting:
            return self.submit(work).result()
        with self._busy:
            return work()

    def _do_waiting(self, work: Callable[[], Result]) -> Result:
        self._thread_id = threading.get_ident()
        try:
            with self._busy:
                return work()
        finally:
            with self._counting:
                self._waiting -= 1


class Work:
    """An all-reduce that is under way."""

    def __init__(self, future: Future[None], tensors: Sequence[torch.Tensor]) -> None:
        self._future, self._tensors = future, list(tensors)

    def wait(self, timeout: datetime.timedelta | None = None) -> bool:
        """Waits until the tensors hold the result; raises what went wrong, or TimeoutError if it takes longer."""
        try:
            self._future.result(None if timeout is None else timeout.total_seconds())
        except concurrent.futures.TimeoutError as error:  # a TimeoutError from Python 3.11 on only
            raise TimeoutError(f"the all-reduce has taken longer than {timeout}") from error
        return True

    def is_completed(self) -> bool:
        """Whether the tensors hold the result, or something went wrong."""
        return self._future.done()

    def get_future(self) -> torch.futures.Future[list[torch.Tensor]]:
        """Torch's future of the tensors, for `then` and `torch.futures.wait_all`."""
        future: torch.futures.Future[list[torch.Tensor]] = torch.futures.Future()

        def tell(done: Future[None]) -> None:
            error = done.exception()
            if error is None:
                future.set_result(self._tensors)
            else:
                future.set_exception(error)  # type: ignore[arg-type]

        self._future.add_done_callback(tell)
        return future


def _raise_from_backward(work: Future[None]) -> None:
    """Raises what went wrong as it is, at the end of backward: through torch's future it would be a RuntimeError."""
    with contextlib.suppress(RuntimeError):  # there is no backward: a rank that has joined early takes part with zeros
        torch.autograd.Variable._execution_engine.queue_callback(work.result)
