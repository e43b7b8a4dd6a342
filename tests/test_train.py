"""A training run: its folder, its results, resume, best checkpoint, early stopping, errors."""

import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
import yaml

import jaxtune as jt
from jaxtune import runfolder
from jaxtune.config import load_config
from jaxtune.errors import CheckpointError, ConfigError, DataError, JaxtuneError, explain
from jaxtune.runlog import RunLog
from jaxtune.train import train

WORDS = "one two three hello there fox dog quick brown lazy".split()
ROWS = [{"prompt": f"Say {word}.", "completion": f" {word} {word}"} for word in WORDS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder and a data file."""
    folder = tmp_path_factory.mktemp("train")
    tiny.write_chat_model(folder / "model")
    tiny.write_rows(folder, ROWS)
    return folder


@pytest.fixture
def config(folder, tmp_path):
    """Make a config: LoRA, two rows per step on each device, six steps."""

    def make(**changes):
        data = {"train": str(folder / "rows.jsonl"), "max_length": 32} | changes.pop("data", {})
        return {
            "model": str(folder / "model"), "output_dir": str(tmp_path / "run"), "data": data, "lora": {"r": 4}, "max_steps": 6,
            "per_device_train_batch_size": 1, "learning_rate": 1e-2, "logging_steps": 1, "compilation_cache": False,
        } | changes  # fmt: skip

    return make


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_run_lowers_the_loss_and_leaves_its_folder(config, folder, tmp_path, method):
    ended = train(config(method=method, max_steps=8, data={"eval": 0.3}))
    run = tmp_path / "run"
    rows = [row for row in metrics(run) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 9)) and rows[-1]["loss"] < rows[0]["loss"]
    assert {"grad_norm", "learning_rate", "epoch", "num_tokens", "mean_token_accuracy", "entropy"} <= rows[0].keys()
    assert any("eval_loss" in row for row in metrics(run))
    kept = {path.name for path in run.iterdir()}
    result = "model" if method == "full" else "adapter"
    assert kept == {".lock", "config.yaml", "run.json", "metrics.jsonl", "loss.png", "tensorboard", "checkpoints", result}
    assert yaml.safe_load((run / "config.yaml").read_text())["method"] == method
    record = json.loads((run / "run.json").read_text())
    assert record["versions"]["jax"] == jax.__version__ and record["model"]["sha256"]["model.safetensors"]
    assert ended.step == 8 and ended.metrics["loss"] == rows[-1]["loss"]
    if method == "lora":  # what is on disk is what was trained
        model = jt.load(folder / "model")
        tokens = np.asarray([[5, 6, 7, 8, 9]], np.int32)
        adapters = ended.trainable, jt.load_adapter(run / "adapter", model)
        ours, disk = (jt.forward(model.config, jt.compose(model.params, adapter), tokens) for adapter in adapters)
        np.testing.assert_array_equal(ours, disk)


BEGINNINGS = {
    3: {"init_lora_weights": "eva", "eva_config": {"tau": 0.5, "use_label_mask": False}},
    4: {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 2}},
}


@pytest.fixture
def hangup():
    """SIGHUP is received, even if the tests run under nohup, which jaxtune respects."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("after", [3, 4])
def test_a_signal_saves_and_resume_is_exact(config, folder, tmp_path, monkeypatch, hangup, method, after):
    """Law 5: a run stopped after k steps and resumed ends with the same bits, in its weights and its log."""
    of = {"lora": {"lora": {"r": 4, "lora_dropout": 0.2, "target_modules": ["q_proj", "down_proj"]} | BEGINNINGS[after]},
          "full": {"optim": "adamw_8bit"}}  # whose moments are codes and scales  # fmt: skip
    of["lora"] |= {"quantization": "nf4"} if after == 4 else {}
    some = ["layers.2.", "lm_head"] if (method, after) == ("full", 4) else []  # a part of the model, in addition to what is frozen
    settings = config(method=method, save_steps=100, trainable_parameters=some, **of[method])
    whole = train(settings | {"output_dir": str(tmp_path / "whole")})
    advance = RunLog.advance

    def stop(self, step, *args):
        advance(self, step, *args)
        if step == after:
            os.kill(os.getpid(), signal.SIGTERM if after == 3 else signal.SIGHUP)

    monkeypatch.setattr(RunLog, "advance", stop)
    part = train(settings)
    assert after <= part.step < 6 and not (tmp_path / "run" / "adapter").exists()
    monkeypatch.undo()
    resumed = train(settings | {"resume": True})
    for left, right in zip(jax.tree.leaves(whole.trainable), jax.tree.leaves(resumed.trainable), strict=True):
        np.testing.assert_array_equal(left, right)
    logs = [metrics(tmp_path / name) for name in ("whole", "run")]
    if some:
        before, result = (tiny.read_all(where) for where in (folder / "model", tmp_path / "run" / "model"))
        changed = {name for name, tensor in result.items() if not np.array_equal(tensor, before[name])}
        assert result.keys() == before.keys() and changed == {name for name in before if "layers.2." in name or "lm_head" in name}
    timeless = [[{key: value for key, value in row.items() if key != "tokens_per_second"} for row in log] for log in logs]
    assert timeless[0] == timeless[1]


def test_what_is_trained_whole_is_trained_saved_and_resumed(config, folder, tmp_path):
    """Biases, whole modules and tokens in addition to the pairs: over a mesh, in checkpoints, in PEFT's folder."""
    model = jt.load(folder / "model")
    tokens = sorted({*model.tokenizer("one two hello")["input_ids"]})
    lora = {"r": 2, "target_modules": ["q_proj", "lm_head"], "bias": "lora_only", "modules_to_save": ["norm", "layers.1.mlp"],
            "trainable_token_indices": tokens, "lora_dropout": 0.1}  # fmt: skip
    settings = config(lora=lora, save_steps=3, mesh={"data": 2, "fsdp": 2, "tensor": 2})
    first = train(settings)
    fresh = jt.init_adapter(jax.random.key(0), model, first.trainable.config)
    assert {"norm", "embed", "layers/0/q_bias", "layers/0/up"} <= first.trainable.saved.keys()
    for path, leaf in first.trainable.saved.items():
        assert leaf.shape == fresh.saved[path].shape and np.abs(leaf - fresh.saved[path]).max() > 1e-3, path
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    again = train(settings | {"resume": True})
    disk = jt.load_adapter(tmp_path / "run" / "adapter", model)
    for left, middle, right in zip(*map(jax.tree.leaves, (first.trainable, again.trainable, disk)), strict=True):
        np.testing.assert_array_equal(left, middle)
        np.testing.assert_array_equal(left, right)


def test_resume_of_a_finished_run_changes_nothing(config):
    """In a thread other than the main one, as in a notebook or a server, where no signal can be handled; and with x64 on."""
    first = train(config())

    def resume():
        with jax.enable_x64(True):
            return train(config(resume=True))

    with ThreadPoolExecutor(1) as pool:
        again = pool.submit(resume).result()
    for left, right in zip(jax.tree.leaves(first.trainable), jax.tree.leaves(again.trainable), strict=True):
        np.testing.assert_array_equal(left, right)


def test_a_folder_in_use_is_refused_before_the_model_is_read(config):
    train(config())
    with pytest.raises(CheckpointError, match="not empty.*resume=true"):
        train(config(model="/no/such/model"))
    with pytest.raises(JaxtuneError, match="nowhere holds no adapter_config.json"):
        train(config(model="/no/such/model", init_adapter="nowhere"))


def test_a_disk_with_too_little_room_is_told_before_the_first_step(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(runfolder.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**9))
    runfolder.check_room(tmp_path, 10**9)
    assert not caplog.text
    runfolder.check_room(tmp_path, 3 * 10**9)
    assert "has 1.000 GB free, and the run will write 3.000 GB at least" in caplog.text


def test_a_run_that_has_taken_no_step_is_begun_anew(tmp_path):
    """For example after running out of memory: there is nothing to resume, and nothing to lose."""
    config = load_config({"model": "m", "output_dir": str(tmp_path)})
    (tmp_path / "config.yaml").write_text("of mine")
    with pytest.raises(CheckpointError, match="not empty"):
        runfolder.check_free(config)
    (tmp_path / "checkpoints").mkdir()
    runfolder.check_free(config)
    for name in ("run.json", "metrics.jsonl", ".lock"):
        (tmp_path / name).touch()
    runfolder.check_free(config)
    runfolder.let_go(config)
    (tmp_path / "metrics.jsonl").write_text("{}")
    with pytest.raises(CheckpointError, match="not empty"):
        runfolder.check_free(config)


@pytest.mark.parametrize("name", ["file", "file/run", "lost", "lost/run", "x" * 300, "a\0b", "/proc/run", "a\\b"])
def test_a_folder_that_cannot_be_made(tmp_path, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere" / "lost")
    config = load_config({"model": "m", "output_dir": str(tmp_path / name)})

    def open_folder():
        runfolder.check_free(config)
        runfolder.open_run(config)

    try:
        with pytest.raises((JaxtuneError, OSError)) as error:
            open_folder()
        assert explain(error.value)
    finally:
        runfolder.let_go(config)


@pytest.mark.parametrize("content", [b"", b"- a", b"a: [", b"\xff\xfe", b"a: !!python/name:os.system"])
def test_resume_beside_a_damaged_config(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(CheckpointError, match="config.yaml .*put it back"):
        runfolder.differences(load_config({"model": "m"}), tmp_path)


def test_resume_needs_a_run_and_the_same_settings(config, tmp_path):
    with pytest.raises(CheckpointError, match="no run"):
        train(config(resume=True))
    train(config(max_steps=2))
    with pytest.raises(CheckpointError, match="learning_rate: 0.01 -> 0.02; model: .* -> nowhere"):  # before the model is read
        train(config(max_steps=2, resume=True, learning_rate=0.02, model="nowhere"))


def test_the_best_model_is_kept_and_loaded(config, tmp_path):
    """With a learning rate that diverges, the first evaluation is the best one; its checkpoint is kept beyond the limit."""
    settings = config(learning_rate=3.0, eval_strategy="steps", eval_steps=1, save_steps=1, save_total_limit=1, data={"eval": 0.3})
    result = train(settings | {"load_best_model_at_end": True})
    evals = {row["step"]: row["eval_loss"] for row in metrics(tmp_path / "run") if "eval_loss" in row}
    best = min(evals, key=evals.get)
    assert best < 6 and result.step == best
    assert {int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()} == {best, 6}


def test_early_stopping(config, tmp_path):
    settings = config(learning_rate=1.0, max_steps=30, eval_strategy="steps", eval_steps=1, early_stopping_patience=3, data={"eval": 0.3})
    result = train(settings)
    evals = [row["eval_loss"] for row in metrics(tmp_path / "run") if "eval_loss" in row]
    assert result.step == len(evals) < 30 and min(evals[-3:]) >= min(evals[:-3])


def test_a_loss_that_is_no_number_stops_the_run(config, tmp_path):
    with pytest.raises(JaxtuneError, match="loss is (nan|inf).*at step"):
        train(config(learning_rate=1e30, max_grad_norm=0, save_steps=1))
    assert not (tmp_path / "run" / "adapter").exists()


def test_unknown_names_are_refused(config):
    with pytest.raises(ConfigError, match="method 'lorra'.*qlora"):
        train(config(method="lorra"))
    with pytest.raises(ConfigError, match="target_modules.*matches no"):
        train(config(lora={"r": 4, "target_modules": ["query"]}))
    with pytest.raises(ConfigError, match="metric exact is not known"):  # before the run, which needs it at its end
        train(config(evaluate={"metric": "exact"}, data={"eval": 0.2, "train": "nowhere.jsonl"}))


def test_the_method_is_judged_before_rows_are_read(config, caplog):
    nowhere = {"data": {"train": "nowhere.jsonl"}}
    with pytest.raises(ConfigError, match="lora.target_modules: q_porj matches no linear layer"):
        train(config(lora={"target_modules": ["q_porj"]}, **nowhere))
    with pytest.raises(ConfigError, match="trainable_parameters: 'nothing' matches none"):
        train(config(method="full", trainable_parameters=["nothing"], **nowhere))
    with pytest.raises(DataError, match="nowhere.jsonl"):
        train(config(lora={"r": 100_000}, **nowhere))
    assert "lora.r=100000 is more than the rank" in caplog.text


def test_one_compilation_serves_the_run(config, steps_compiled):
    train(config())
    assert steps_compiled() == 1
