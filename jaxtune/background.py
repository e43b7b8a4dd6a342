"""Work in a background thread: weights are read while rows are tokenised and the step is compiled."""

import threading
from collections.abc import Callable
from typing import Generic, Self, TypeVar

import jax

from jaxtune import compilation

T = TypeVar("T")
_here = threading.local()


class Cancelled(Exception):  # noqa: N818
    """Ends a background thread whose result is no longer needed."""


class Background(Generic[T]):
    """Runs a function in a thread: `with Background(function) as work: ... work.result()` returns its value or raises its exception.

    If the block is left by an exception, it waits until the thread notices (`check_cancelled`), so that no thread is inside JAX
    when Python exits.
    With several processes, `result()` calls the function itself: all of them must call the same collective functions in the same order.
    """

    def __init__(self, function: Callable[[], T]):
        self._function = compilation.in_32_bits(function)  # the setting is per thread
        self._cancelled = False
        self._value: T
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True) if jax.process_count() == 1 else None

    def __enter__(self) -> Self:
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._cancelled = True
        if self._thread:
            self._thread.join()

    def result(self) -> T:
        """Wait for the function's return value, or raise its exception."""
        if self._thread is None:
            return self._function()
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value

    def _run(self) -> None:
        _here.work = self
        try:
            self._value = self._function()
        except BaseException as error:  # raised by result()
            self._error = error


def check_cancelled() -> None:
    """Called between the parts of long work: ends a background thread whose result is no longer needed."""
    work = getattr(_here, "work", None)
    if work is not None and work._cancelled:
        raise Cancelled
