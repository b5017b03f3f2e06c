"""A group's exchanges on the CPU: in a thread of their own, or at once."""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from fastagg._one_thread import OneThread

Result = TypeVar("Result")


class Line:
    """A group's exchanges one after the other, in the order in which they were asked for.

    Attributes:
        sees_signals: whether an exchange in the main thread answers Ctrl-C; where not, it is done in the line's thread.
        interrupt: ends what is under way: somebody who waited for it has left.
    """

    def __init__(self) -> None:
        self.sees_signals = True
        self.interrupt: Callable[[], None] = lambda: None
        self._thread = OneThread("fastagg-all-reduce")
        self._busy, self._counting = threading.RLock(), threading.Lock()
        self._queue = deque[tuple[Future[Any], Callable[[], Any]]]()
        self._waiting = 0
        self._thread_id: int | None = None

    def begin(self, work: Callable[[], None], tensors: Sequence[torch.Tensor]) -> Work:
        """Does the work in the line's own thread; returns what to wait for."""
        return Work(self, self.submit(work), tensors)

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

        begun = self.submit(work_and_tell)
        with contextlib.suppress(RuntimeError):  # no backward: a rank that has joined early takes part with zeros
            # Raised at backward's end as it is: through torch's future it would be a RuntimeError.
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self.wait(begun))
        return future

    def submit(self, work: Callable[[], Result]) -> Future[Result]:
        """Does the work in the line's own thread; at once where that asks for it, in a callback between two works."""
        future: Future[Result] = Future()
        if self._is_here():
            self._do(future, work)
            return future
        with self._counting:
            self._waiting += 1
            self._queue.append((future, work))
        self._thread.submit(self._do_next)
        return future

    def run(self, work: Callable[[], Result], tensors: Sequence[torch.Tensor] = ()) -> Result:
        """Does the work here and now if nothing waits: a thread takes longer to wake than a small message takes."""
        if not self._is_here() and (self._waiting or self._must_stay_awake()):
            return self.wait(self.submit(work))
        with self._busy:
            return work()

    def wait(self, future: Future[Result], timeout: float | None = None) -> Result:
        """The result of submitted work; an exception that comes from elsewhere, as Ctrl-C's, interrupts it."""
        while self._is_here() and not future.done() and self._queue:
            self._do_next()  # it waits behind the callback that waits for it
        try:
            return future.result(timeout)
        except concurrent.futures.TimeoutError:
            raise
        except BaseException:
            if not future.done():
                self.interrupt()
            raise

    def _is_here(self) -> bool:
        return threading.get_ident() == self._thread_id

    def _must_stay_awake(self) -> bool:
        return not self.sees_signals and threading.current_thread() is threading.main_thread()

    def _do_next(self) -> None:
        self._thread_id = threading.get_ident()
        with self._counting:
            if not self._queue:
                return  # a callback has done it
            future, work = self._queue.popleft()
        try:
            self._do(future, work)
        finally:
            with self._counting:
                self._waiting -= 1

    def _do(self, future: Future[Result], work: Callable[[], Result]) -> None:
        try:
            with self._busy:
                result = work()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)


def in_another_thread(work: Callable[[], Result]) -> Result:
    """Does what no signal can interrupt, so that the one who waits for it can be; then it is left to itself."""
    if threading.current_thread() is not threading.main_thread():
        return work()
    future: Future[Result] = Future()

    def do() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    try:
        threading.Thread(target=do, name="fastagg-work", daemon=True).start()
    except RuntimeError:  # no thread can be started
        return work()
    return future.result()


class Work:
    """An all-reduce that is under way."""

    def __init__(self, line: Line, future: Future[None], tensors: Sequence[torch.Tensor]) -> None:
        self._line, self._future, self._tensors = line, future, list(tensors)

    def wait(self, timeout: datetime.timedelta | None = None) -> bool:
        """Waits until the tensors hold the result; raises what went wrong, or TimeoutError if it takes longer."""
        try:
            self._line.wait(self._future, None if timeout is None else timeout.total_seconds())
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
