"""The cost of a step: what is compiled, what is transferred, and when the host waits."""

import contextlib
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import jaxtune.train  # noqa: F401
from jaxtune import startup
from jaxtune.checkpoint import Checkpoints
from jaxtune.loop import Loop
from jaxtune.runlog import RunLog

program = sys.modules["jaxtune.train"]
WORDS = "one two three hello there fox dog quick brown lazy".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of one layer, and 88 rows of two lengths: groups of 64 and 128 tokens, the last batch of each not full."""
    folder = tmp_path_factory.mktemp("loop")
    tiny.write_chat_model(folder / "model", tiny.LLAMA | {"num_hidden_layers": 1})
    rows = [{"prompt": f"Say {word} {n}.", "completion": f" {word}" * (2 if n % 2 else 20)} for n in range(11) for word in WORDS[:8]]
    tiny.write_rows(folder, rows)
    return folder


@pytest.fixture
def config(folder, tmp_path):
    """The same settings for all tests, so that they share compiled programs."""
    data = {"train": str(folder / "rows.jsonl"), "max_length": 128, "packing": "group", "eval": 0.2, "cache_dir": str(folder / "cache")}
    return {
        "model": str(folder / "model"), "output_dir": str(tmp_path / "run"), "data": data, "lora": {"r": 2}, "max_steps": 8,
        "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "logging_steps": 1, "eval_steps": 4, "save_steps": 4,
        "compilation_cache": False, "report_to": [],
    }  # fmt: skip


@pytest.fixture
def compiled():
    """The names of the programs compiled so far."""
    names = []

    def listen(event, seconds, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(
    "strategy, every, numbers",
    [("steps", 3, [3, 6, 8]), ("steps", 0.5, [4, 8]), ("steps", 50, [8]), ("epoch", None, [5, 8]), ("no", None, [])],
)
def test_the_last_step_is_evaluated_and_saved_too(strategy, every, numbers):
    run = SimpleNamespace(total=8, rows=SimpleNamespace(train=SimpleNamespace(steps_per_epoch=5)))
    assert [number for number in range(1, 9) if Loop._due(run, number, strategy, every)] == numbers


def test_a_shape_is_compiled_once_over_a_whole_run(config, tmp_path, monkeypatch, compiled):
    """Both lengths, partly filled last batches, evaluations, checkpoints and a resumption."""
    known, advance = [], RunLog.advance

    def count(self, step, *args):
        advance(self, step, *args)
        known.append(len(compiled))

    monkeypatch.setattr(RunLog, "advance", count)
    program.train(config)
    assert compiled.count("jit(step)") == 2 and compiled.count("jit(eval_step)") == 1
    assert known[-1] == known[4]  # after the first evaluation everything has been compiled, and nothing small follows
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    assert program.train(config | {"resume": True}).step == 8
    assert compiled.count("jit(step)") == 2 and compiled.count("jit(eval_step)") == 1


@contextlib.contextmanager
def explicit_transfers_only(monkeypatch):
    """Allow transfers to and from the device only through device_put, device_get and the functions they use."""
    asked, array = [0], type(jnp.zeros(()))

    def guarded(name):
        original = getattr(array, name)

        def method(self, *args, **kwargs):
            assert asked[0], f"the host reads an array ({name}) without device_get"
            return original(self, *args, **kwargs)

        return method

    get = jax.device_get

    def device_get(tree):
        asked[0] += 1
        try:
            return get(tree)
        finally:
            asked[0] -= 1

    with monkeypatch.context() as patch, jax.transfer_guard_host_to_device("disallow"):
        patch.setattr(jax, "device_get", device_get)
        for name in ("__float__", "__int__", "__bool__", "__index__", "item", "tolist"):  # np.asarray needs no method of a CPU array
            patch.setattr(array, name, guarded(name))
        yield


def test_the_loop_moves_nothing_that_it_does_not_say(config, monkeypatch):
    """Neither to the device nor back: a hidden read would wait for the device in every step."""
    run = Loop._run

    def guarded(self, *args):
        with explicit_transfers_only(monkeypatch):
            return run(self, *args)

    monkeypatch.setattr(Loop, "_run", guarded)
    monkeypatch.setattr(Checkpoints, "prove", lambda self, number, state, *args, **kwargs: state)  # Orbax reads in its own way
    monkeypatch.setattr(Checkpoints, "save", lambda *args: None)
    assert program.train(config).step == 8


def test_the_guard_of_that_test_bites(monkeypatch):
    x = jnp.arange(3.0)
    with explicit_transfers_only(monkeypatch):
        assert jax.device_get(x)[2] == 2
        for read in (float, int, bool):
            with pytest.raises(AssertionError, match="without device_get"):
                read(x.sum())
        for write in (lambda: x + 1, lambda: x[0], lambda: jax.jit(jnp.sin)(np.ones(4, np.float32))):
            with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device"):
                write()


def test_the_next_step_is_on_its_way_before_the_last_one_is_read(config, monkeypatch):
    """While the device computes step t, the host reads the metrics of t - 1 and transfers the batch of t + 1."""
    order = []
    programs = startup.programs

    def watched(*args):
        step, eval_step = programs(*args)

        def dispatched(*args):
            order.append("dispatch")
            return step(*args)

        return dispatched, eval_step

    put, read = Loop._put, Loop._read
    monkeypatch.setattr(startup, "programs", watched)
    monkeypatch.setattr(startup, "compile_ahead", lambda *_: None)
    monkeypatch.setattr(Loop, "_put", lambda self, *args, **kwargs: order.append("put") or put(self, *args, **kwargs))
    monkeypatch.setattr(Loop, "_read", lambda self, number, metrics: order.append(f"read {number}") or read(self, number, metrics))
    program.train(config)
    begin = order.index("read 4") + 1  # then it was evaluated and saved
    evaluation = order.index("dispatch", begin) - begin
    assert order[begin + evaluation - 1 :] == [
        "put", "dispatch", "put", "dispatch", "read 5", "put", "dispatch", "read 6", "put", "dispatch", "read 7", "read 8",
    ] + ["put"] * (evaluation - 1)  # fmt: skip


@pytest.mark.parametrize(("step", "said"), [(1, "No step has changed the weights yet"), (2, "Lower learning_rate")])
def test_what_is_said_of_a_loss_that_is_no_number(step, said):
    train = SimpleNamespace(rows_at=lambda number: {"rows.jsonl": [3]})
    loop = SimpleNamespace(
        checkpoints=SimpleNamespace(steps=list), notes={"skipped_steps": 0}, rows=SimpleNamespace(train=train), folder=Path("run")
    )
    assert said in Loop._fault(loop, step, {"loss": float("nan"), "grad_norm": 1.0})
