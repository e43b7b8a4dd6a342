"""Cross-validation: every row is evaluated once, one compilation serves all folds, and a stopped run continues."""

import json
import os
import signal
import statistics

import jax
import pytest
import tiny

from jaxtune import folds
from jaxtune.errors import CheckpointError, ConfigError, DataError
from jaxtune.runlog import RunLog
from jaxtune.train import train

ROWS = [{"prompt": f"Say {n}.", "completion": f" {n}" * (1 + n % 9)} for n in range(30)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folds")
    tiny.write_chat_model(folder / "model")
    tiny.write_rows(folder, ROWS)
    return folder


@pytest.fixture
def config(folder, tmp_path):
    def make(**changes):
        data = {"train": str(folder / "rows.jsonl"), "max_length": 64, "kfold": 3, "cache_dir": str(tmp_path / "cache")}
        return {
            "model": str(folder / "model"), "output_dir": str(tmp_path / "run"), "data": data | changes.pop("data", {}), "lora": {"r": 4},
            "num_train_epochs": 4, "per_device_train_batch_size": 1, "learning_rate": 1e-2, "compilation_cache": False, "report_to": [],
            "save_strategy": "epoch",
        } | changes  # fmt: skip

    return make


@pytest.fixture
def compiled(caplog):
    """What has been compiled, by name."""
    with jax.log_compiles():
        yield lambda: [m.split()[4] for record in caplog.records if (m := record.getMessage()).startswith("Finished XLA compilation of")]


def test_all_folds(config, folder, tmp_path, monkeypatch, capsys, compiled):
    """One compiled step; mean and spread; killed in the second fold and resumed, the same numbers and no fold twice."""
    whole = train(config(output_dir=str(tmp_path / "whole")))
    names = compiled()
    assert names.count("jit(step)") == names.count("jit(eval_step)") == 1, "compiled once for three folds"
    assert capsys.readouterr().out.count("fold ") >= 3
    record = json.loads((tmp_path / "whole" / "folds.json").read_text())
    losses = [fold["eval_loss"] for fold in record["folds"]]
    assert len(set(losses)) == 3 and record["mean"]["eval_loss"] == whole.metrics["eval_loss"] == pytest.approx(sum(losses) / 3)
    assert whole.spread["eval_loss"] == pytest.approx(statistics.stdev(losses))
    ledgers = [json.loads((tmp_path / "whole" / f"fold_{n}" / "run.json").read_text()) for n in range(3)]
    assert sum(run["counts"]["documents"] for run in ledgers) == 2 * len(ROWS), "each row is trained on in all folds but one"
    assert len({run["counts"]["steps"] for run in ledgers}) == 1

    alone = train(config(max_steps=record["steps"], output_dir=str(tmp_path / "alone"), data={"fold": 1}))
    assert alone.metrics["eval_loss"] == losses[1], "a fold can be run by itself"

    advance, begun = RunLog.advance, []

    def stop(self, step, *args):
        advance(self, step, *args)
        begun.append(self.folder.name)
        if self.folder.name == "fold_1" and step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunLog, "advance", stop)
    part = train(config())
    assert part.interrupted and len(part.folds) == 1
    monkeypatch.setattr(RunLog, "advance", lambda self, step, *args: (begun.append(self.folder.name), advance(self, step, *args)))
    begun.clear()
    resumed = train(config(resume=True))
    assert "fold_0" not in begun and not resumed.interrupted
    assert begun.count("fold_1") < begun.count("fold_2") and resumed.folds == whole.folds
    assert train(config(resume=True)).folds == whole.folds
    (tmp_path / "fewer.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[1:]))
    (folder / "rows.jsonl").replace(folder / "kept.jsonl")
    (tmp_path / "fewer.jsonl").replace(folder / "rows.jsonl")
    with pytest.raises(CheckpointError, match="the rows are not those fold 0 of"):
        train(config(resume=True))
    (folder / "kept.jsonl").replace(folder / "rows.jsonl")
    (tmp_path / "run" / "fold_0" / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match="run.json cannot be read .JSONDecodeError"):
        train(config(resume=True))


def test_a_fold_that_has_lost_its_config_is_kept(tmp_path):
    (tmp_path / "fold_0").mkdir()
    (tmp_path / "fold_0" / ".lock").touch()
    folds._clear(tmp_path / "fold_0")
    assert not (tmp_path / "fold_0").exists(), "nothing had been written"
    (tmp_path / "fold_1" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="fold_1 has files but no config.yaml"):
        folds._clear(tmp_path / "fold_1")
    assert (tmp_path / "fold_1" / "checkpoints").exists()


def test_mistakes(config, tmp_path):
    for match, error, changes in (
        ("holds no run", CheckpointError, {"resume": True}),
        ("data.kfold is there to evaluate", ConfigError, {"eval_strategy": "no"}),
        ("data.kfold 29 leaves fold .* without any of the 30 rows", DataError, {"data": {"kfold": 29}}),
    ):
        with pytest.raises(error, match=match):
            train(config(**changes))
        assert not (tmp_path / "run").exists(), "a mistake leaves nothing behind"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("")
    with pytest.raises(CheckpointError, match="not empty"):
        train(config())
