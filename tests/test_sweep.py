"""One run per combination; finished runs are skipped, failures are reported; and the comparison of runs."""

import json
from pathlib import Path

import pytest
import tiny

from jaxtune import report, sweep
from jaxtune.config import load_config
from jaxtune.errors import CheckpointError, ConfigError
from jaxtune.loop import TrainingError
from jaxtune.runfolder import write_config
from jaxtune.sweep import _axis, combinations

CONFIG = {"model": "m", "data": {"train": "x.jsonl"}, "output_dir": "runs/x"}


def test_combinations():
    over = dict(map(_axis, ["learning_rate=1e-4, 3e-4", "lora.target_modules=[q_proj],all-linear", "lr_scheduler_type=linear"]))
    runs = combinations(load_config(CONFIG), over)
    assert list(runs)[:2] == [
        "learning_rate=0.0001,lora.target_modules=[q_proj],lr_scheduler_type=linear",
        "learning_rate=0.0001,lora.target_modules=all-linear,lr_scheduler_type=linear",
    ]
    assert [run.learning_rate for run in runs.values()] == [1e-4, 1e-4, 3e-4, 3e-4]
    assert [run.lora.target_modules for run in runs.values()] == 2 * [("q_proj",), "all-linear"]
    assert [run.output_dir for run in runs.values()] == [f"runs/x/{name}" for name in runs]
    assert set(combinations(load_config(CONFIG), {"model": ["org/a", "b"]})) == {"model=org_a", "model=b"}


@pytest.mark.parametrize(
    "axes, changes, words",
    [
        ([], {}, "nothing to sweep over"),
        (["learning_rate"], {}, "write KEY=VALUE,VALUE"),
        (["lora.q=1"], {}, "lora.q is not a key; did you mean lora.r"),
        (["seed=1,1"], {}, "seed=1 is there twice"),
        (["resume=true"], {}, "before --over"),
        (["seed=1"], {"data": {"train": "x.jsonl", "kfold": 3}}, "data.fold=0,1,2"),
    ],
)
def test_what_cannot_be_swept_over(axes, changes, words):
    with pytest.raises(ConfigError, match=words):
        combinations(load_config(CONFIG | changes), dict(map(_axis, axes)))


@pytest.mark.parametrize(
    ("model", "names"), [("m", ["model=m", "model=b"]), (None, ["model=null", "model=b"]), (60 * "org/", ["runs/1", "runs/2"])]
)
def test_runs_of_a_picture_are_called_by_what_differs_while_that_is_short(monkeypatch, model, names):
    found: list[str] = []
    monkeypatch.setattr(report, "draw_runs", lambda histories, path, name: found.extend(histories))
    keys = {"runs/1": {"model": model}, "runs/2": {"model": "b"}}
    entries = [report.Entry(run, differ, 1, 1, True, {"loss": 1.0}, [{"step": 1, "loss": 1.0}]) for run, differ in keys.items()]
    report.Report(None, entries).draw("x.png")
    assert found == names
    with pytest.raises(ConfigError, match="rows.jsonl is not named like one; write rows.jsonl.png"):
        report.Report(None, entries).draw("rows.jsonl")
    with pytest.raises(CheckpointError, match="no run has logged a loss yet"):
        report.Report(None, [report.Entry("runs/3", {}, 0, 1, False, {}, [])]).draw("x.png")


def test_runs_of_two_objectives_are_compared_by_what_both_have(tmp_path):
    """Keys of an objective only where several runs have them, and the reward of those that have one."""
    for name, keys, row in (
        ("sft", {"learning_rate": 1e-3}, {"loss": 2.0}),
        ("grpo", {"objective": "grpo", "reward_funcs": "f1"}, {"loss": 0.0, "reward": 0.5}),
        ("more", {"objective": "grpo", "reward_funcs": "f1", "num_generations": 4}, {"loss": 0.0, "reward": 0.75}),
    ):
        folder = tmp_path / name
        folder.mkdir()
        write_config(folder, load_config(CONFIG | keys))
        (folder / "run.json").write_text('{"counts": {"steps": 1}}')
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1} | row))
    found = {Path(run.run).name: run for run in report(tmp_path).runs}
    assert found["more"].keys["num_generations"] == 4 and "num_generations" not in found["sft"].keys
    assert not {"reward_funcs", "epsilon"} & found["more"].keys.keys() and found["sft"].keys.keys() >= {"objective", "learning_rate"}
    assert found["more"].metrics == {"loss": 0.0, "reward": 0.75} and found["sft"].metrics == {"loss": 2.0}
    report(tmp_path, by="reward").show()


def test_a_run_that_memory_does_not_suffice_for_leaves_the_others_their_turn(monkeypatch, tmp_path):
    config = load_config(CONFIG | {"output_dir": str(tmp_path)})
    monkeypatch.setattr(sweep, "settled", lambda run: run)
    for said, error, words in (
        ("RESOURCE_EXHAUSTED: 9 bytes", TrainingError, "seed=1: out of memory .*; seed=2: out of memory"),
        ("a bug", RuntimeError, "a bug"),
    ):

        def train(config, said=said):
            raise RuntimeError(said)

        monkeypatch.setattr(sweep, "train", train)
        with pytest.raises(error, match=words):
            sweep(config, {"seed": [1, 2]})


def test_a_sweep(tmp_path, caplog):
    tiny.write_chat_model(tmp_path / "model", tiny.LLAMA | {"num_hidden_layers": 1})
    rows = [{"prompt": f"Say {word}.", "completion": f" {word}"} for word in "one two three fox dog lazy".split()]
    tiny.write_rows(tmp_path, rows)
    config = {
        "model": str(tmp_path / "model"), "output_dir": str(tmp_path / "runs"), "max_steps": 2, "logging_steps": 1, "lora": {"r": 2},
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 32, "eval": 0.3}, "report_to": "none", "max_grad_norm": 0.0,
        "per_device_train_batch_size": 1,
    }  # fmt: skip
    found = sweep(config, {"learning_rate": [1e-3, 1e35]})
    ended = [(run.keys["learning_rate"], run.step, run.finished) for run in found.runs]
    assert ended == [(1e-3, 2, True), (1e35, 1, False)]
    assert found.by == "eval_loss" and found.runs[0].metrics.keys() >= {"loss", "eval_loss"}
    assert "learning_rate=1.0e+35: " in caplog.text and (tmp_path / "runs" / "losses.png").is_file()

    with pytest.raises(CheckpointError, match="not empty"):
        sweep(config, {"learning_rate": [1e-3]})
    with pytest.raises(CheckpointError, match="max_steps: 2 -> 3"):
        sweep(config, {"learning_rate": [1e-3]}, ["resume=true", "max_steps=3"])
    with caplog.at_level("INFO"):
        assert sweep(config, {"learning_rate": [1e-3]}, ["resume=true"]).runs == found.runs
    assert "run 1 of 1: learning_rate=0.001 is done" in caplog.text

    one = report(tmp_path / "runs" / "learning_rate=0.001")
    assert [run.keys for run in one.runs] == [{}] and one.to_dict()["runs"][0]["metrics"] == one.runs[0].metrics
    assert report(tmp_path / "runs", by="loss").by == "loss"
    with pytest.raises(ConfigError, match="no run has measured it"):
        report(tmp_path / "runs", by="nothing")
    with pytest.raises(CheckpointError, match="holds no run"):
        report(tmp_path / "model")
