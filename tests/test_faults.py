"""Numerical faults: skipped steps with an unchanged state, stops that name the rows, spikes; and what a resume allows."""

import json
import logging
import signal
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxtune import faults
from jaxtune.checkpoint import Checkpoints
from jaxtune.config import load_config
from jaxtune.errors import CheckpointError, JaxtuneError
from jaxtune.objectives import OBJECTIVES
from jaxtune.runlog import RunLog
from jaxtune.train import _resume, train

WORDS = "one two three hello there fox dog quick brown lazy".split()
BAD = 6  # the row that contains fox


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    tokenizer = tiny.write_chat_model(folder / "model")
    rows = [{"prompt": f"Say {word}.", "completion": f" {word} {word}"} for word in WORDS]
    tiny.write_rows(folder, rows)
    return folder, tokenizer(" fox")["input_ids"][-1]


@pytest.fixture
def config(folder, tmp_path):
    def make(**changes):
        data = {"train": str(folder[0] / "rows.jsonl"), "max_length": 32, "packing": False}
        return {
            "model": str(folder[0] / "model"), "output_dir": str(tmp_path / "run"), "data": data, "lora": {"r": 2}, "max_steps": 4,
            "per_device_train_batch_size": 1, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 1, "compilation_cache": False,
            "report_to": [],
        } | changes  # fmt: skip

    return make


@pytest.fixture
def poisoned(folder, monkeypatch):
    """The SFT loss, NaN wherever the batch contains fox: once in each epoch of two steps."""
    sft = OBJECTIVES["sft"]

    def loss(config, model_config, params, base, batch, key):
        out = sft(config, model_config, params, base, batch, key)
        return out._replace(total=jnp.where((batch.tokens == folder[1]).any(), jnp.nan, 1.0) * out.total)

    monkeypatch.setitem(OBJECTIVES, "sft", loss)


def arrays(run, step):
    checkpoints = Checkpoints(run / "checkpoints")
    state = checkpoints.manager.restore(step)["state"]
    checkpoints.manager.close()
    return {name: np.asarray(x) for name, x in state.items() if name != "step"}


@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # `arrays` requests none
def test_a_bad_step_is_passed_over_and_the_limit_holds(config, poisoned, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "jaxtune"):
        result = train(config(max_skipped_steps=2))
    said = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert len(said) == 2 and "1 of at most 2" in said[0] and "2 of at most 2" in said[1]
    assert all(f"{BAD}" in line.partition("rows.jsonl row")[2] and "fox" not in line for line in said)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(result.trainable))
    bad = int(said[1].split()[1])
    before, after = arrays(tmp_path / "run", bad - 1), arrays(tmp_path / "run", bad)
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)
    logged = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(logged) == 2 and bad not in logged
    with pytest.raises(JaxtuneError, match=rf"loss is nan .* at step \d \(1 steps were skipped before\).*rows.jsonl rows .*\b{BAD}\b"):
        train(config(max_skipped_steps=1, output_dir=str(tmp_path / "again")))


def test_spikes():
    flat = [2.0 + 0.1 * (n % 2) for n in range(50)]
    assert faults.spike(flat, 2.2, 6.0) is None and faults.spike(flat[:5], 9.0, 6.0) is None and faults.spike(flat, 9.0, 0.0) is None
    assert faults.spike(flat, 9.0, 6.0)["mean"] == pytest.approx(2.05)
    assert len(faults.remember([1.0] * 100, 2.0)) == 100
    assert faults.rows_in_words({"a.jsonl": list(range(1, 31)), "b": [4]}).endswith("20 and 10 more; b row 4")


def test_a_spike_is_told_with_its_rows(config, tmp_path, monkeypatch, caplog):
    found = {"loss": 9.0, "mean": 2.0, "deviation": 0.5}
    monkeypatch.setattr(faults, "spike", lambda losses, loss, sigma: found if len(losses) == 2 else None)
    with caplog.at_level(logging.WARNING, "jaxtune"):
        train(config())
    line = json.loads((tmp_path / "run" / "loss_spikes.jsonl").read_text())
    rows = [number for numbers in line["rows"].values() for number in numbers]
    assert line["step"] == 3 and rows == sorted(rows) and set(rows) <= set(range(1, 11)) and len(rows) in (2, 8)
    assert "loss spike at step 3: 9 is 14.0 standard deviations above the 2" in caplog.text and "Say" not in caplog.text


def test_rows_of_an_epoch_are_all_rows(config, folder):
    from jaxtune import data
    from jaxtune.config import load_config
    from jaxtune.convert.load import open_tokenizer

    source = data.load(load_config(config()), open_tokenizer(folder[0] / "model"), 8).train
    assert sorted(row for step in (0, 1) for rows in source.rows_at(step).values() for row in rows) == list(range(1, 11))


def test_a_resume_with_other_reward_functions(tmp_path, caplog):
    kept = {"fingerprint": "f", "rewards": {"mine.py": "old", "same.py": "s"}}
    checkpoints = SimpleNamespace(steps=lambda: [2], restore=lambda state: (state, kept))
    state, notes = SimpleNamespace(step=2), {"fingerprint": "f", "rewards": {"mine.py": "new", "same.py": "s"}}
    with pytest.raises(CheckpointError, match="^the functions of mine.py are not those .*resume_allow_drift=true"):
        _resume(load_config({"model": "m"}), tmp_path, checkpoints, state, notes)
    drifting = load_config({"model": "m", "resume_allow_drift": True})
    assert _resume(drifting, tmp_path, checkpoints, state, notes) == (state, notes)
    assert "mine.py are not those" in caplog.text


def test_what_a_resume_lets_pass(config, tmp_path, caplog):
    """Drift of keys and rows with resume_allow_drift, logged; a metrics.jsonl with a truncated last line."""
    train(config(max_steps=2))
    with pytest.raises(CheckpointError, match="learning_rate: 0.01 -> 0.02.*resume_allow_drift=true"):
        train(config(max_steps=3, learning_rate=0.02, resume=True))
    rows = tmp_path / "other.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Say {word}.", "completion": f" {word}"}) + "\n" for word in WORDS[::-1]))
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-20])
    changed = config(max_steps=3, learning_rate=0.02, resume=True, resume_allow_drift=True)
    with caplog.at_level(logging.WARNING, "jaxtune"):
        result = train(changed | {"data": changed["data"] | {"train": str(rows)}})
    with pytest.raises(CheckpointError, match=r"another run: data\.max_length: 32 -> 64; data\.train: \[[^;]*\]; lora\.r: 2 -> 4\. Put"):
        train(changed | {"lora": {"r": 4}, "data": changed["data"] | {"max_length": 64}, "resume_allow_drift": False})  # keys, no more
    assert "learning_rate: 0.01 -> 0.02" in caplog.text and "the training rows are not those" in caplog.text and result.step == 3
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 3]  # the truncated line is gone


def test_a_second_signal_quits(config, tmp_path, monkeypatch):
    advance = RunLog.advance

    def twice(self, step, *rest):
        advance(self, step, *rest)
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(RunLog, "advance", twice)
    with pytest.raises(KeyboardInterrupt):
        train(config())
    assert not (tmp_path / "run" / "adapter").exists() and (tmp_path / "run" / "checkpoints" / "1").is_dir()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_folder_is_one_runs_at_a_time(config, tmp_path):
    """The lock goes away with the process that holds it, so a killed run leaves none. (A run of one step, saved at each, ends with one
    save.)"""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.yaml.1.partial").touch()  # all that a run killed at its start leaves: no reason to refuse the next
    train(config(max_steps=1))
    hold = "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    argv = [sys.executable, "-c", hold, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(CheckpointError, match="another run is writing into .*run"):
            train(config(max_steps=1, resume=True))
        other.kill()
    assert train(config(max_steps=1, resume=True)).step == 1


def test_a_run_goes_on_from_before_a_damaged_checkpoint(config, tmp_path, caplog):
    """The newest is truncated: the previous one is used, with a warning, the step is saved again, and the end is the same."""
    whole = train(config()).trainable
    for file in (tmp_path / "run" / "checkpoints" / "4").rglob("*"):
        if file.is_file() and file.stat().st_size > 100:
            file.write_bytes(file.read_bytes()[:-50])
    with caplog.at_level(logging.WARNING, "jaxtune"):
        again = train(config(resume=True))
    assert "checkpoint 4 is damaged" in caplog.text and "taking the one before it" in caplog.text and again.step == 4
    assert all(np.array_equal(*pair) for pair in zip(jax.tree.leaves(whole), jax.tree.leaves(again.trainable), strict=True))
    caplog.clear()
    assert train(config(resume=True)).step == 4 and "damaged" not in caplog.text
