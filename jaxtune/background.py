"""Work in a thread beside the main one: weights are read while rows are tokenised and the step is compiled."""

import threading
from collections.abc import Callable
from typing import Generic, Self, TypeVar

import jax

from jaxtune import compilation

T = TypeVar("T")
_here = threading.local()


class GivenUp(Exception):  # noqa: N818
    """Ends the thread of work that nobody waits for any more."""


class Background(Generic[T]):
    """`with Background(function) as work:` begins it, `work.result()` waits for what it returns, or raises what it raised.

    Left by an exception, the block waits until the thread has heard of it (`go_on`), so that none is in JAX when Python ends.
    Of several processes the function is called in `result()`: they must all call the same collective functions in the same order.
    """

    def __init__(self, function: Callable[[], T]):
        self._function = compilation.in_32_bits(function)  # of each thread its own
        self._given_up = False
        self._value: T
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True) if jax.process_count() == 1 else None

    def __enter__(self) -> Self:
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._given_up = True
        if self._thread:
            self._thread.join()

    def result(self) -> T:
        """What the function returned, when it has; raises what it raised."""
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
        except BaseException as error:  # raised where it is waited for
            self._error = error


def go_on() -> None:
    """Called between the parts of long work: ends it where it is a thread's whose result nobody waits for."""
    work = getattr(_here, "work", None)
    if work is not None and work._given_up:
        raise GivenUp
