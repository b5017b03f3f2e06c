"""A thread that does one piece of work after the other."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


class OneThread:
    """Does work in the order in which it is submitted; where no thread can be started, whoever submits it does it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._executor = ThreadPoolExecutor(1, name)

    def __enter__(self) -> OneThread:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown()

    def submit(self, work: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Begins the work, or has done it; returns what tells its result."""
        try:
            return self._executor.submit(work, *arguments)
        except (RuntimeError, MemoryError):  # no thread can be started, or the interpreter is about to end
            self._executor = ThreadPoolExecutor(1, self._name)  # the other one keeps the work, and may yet begin it
        done: Future[Result] = Future()
        try:
            done.set_result(work(*arguments))
        except BaseException as error:
            done.set_exception(error)
        return done
