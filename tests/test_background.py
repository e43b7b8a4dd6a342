"""Background work: its result, its error, and its end if its result is not needed."""

import threading
import time

import jax
import jax.numpy as jnp
import pytest

from jaxtune.background import Background, check_cancelled


def test_what_it_returns_and_raises():
    with jax.enable_x64(True), Background(lambda: (threading.current_thread(), jnp.arange(2.0).dtype)) as work:
        thread, dtype = work.result()
    assert thread is not threading.main_thread() and dtype == jnp.float32  # x64 is set per thread; what is read has 32 bits
    with Background(lambda: 1 / 0) as work, pytest.raises(ZeroDivisionError):
        work.result()


def test_it_ends_when_the_block_is_left():
    ended, count = [], 0

    def read():
        nonlocal count
        try:
            while True:
                count += 1
                time.sleep(0.001)
                check_cancelled()
        finally:
            ended.append(True)

    with pytest.raises(ValueError, match="a bad row"), Background(read):
        raise ValueError("a bad row")
    assert ended and count
    check_cancelled()  # the main thread continues


def test_of_several_processes_it_is_done_when_asked_for(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    order = []
    with Background(lambda: order.append(threading.current_thread())) as work:
        order.append("first")
        work.result()
    assert order == ["first", threading.main_thread()]
