"""A user's own loss function in place of an objective's."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxtune.config import load_config
from jaxtune.errors import ConfigError
from jaxtune.losses import objective_of
from jaxtune.objectives import OBJECTIVES, Loss
from jaxtune.train import train

MINE = '''
import jax.numpy as jnp
from jaxtune.objectives import Loss
from jaxtune.objectives.logprobs import token_logprobs

def focal(config, model_config, params, base, batch, key=None):
    out = token_logprobs(model_config, params, batch)
    weights = out.weights_BN * (1 - jnp.exp(out.logp_BN)) ** 2
    surest = (jnp.exp(out.logp_BN) * out.weights_BN).max()
    return Loss(-(weights * out.logp_BN).sum(), out.weights_BN.sum(), {"surest": (surest, jnp.float32(1))})

def mean(*given):
    return jnp.float32(1)

def by_row(config, model_config, params, base, batch, key=None):
    return Loss(batch.sum(1), batch.sum(), {})

def bare(config, model_config, params, base, batch, key=None):
    return Loss(batch.sum(), batch.sum(), {"accuracy": batch.sum()})

def wrong(config, model_config, params, base, batch, key=None):
    return batch.nothing

def whole(config, model_config, params, base, batch, key=None):
    return Loss(jnp.int32(3), batch.sum(), {"m": (1, 2.0)})
'''


def whole(*_):
    return Loss(3, 4, {})


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    return lambda name: objective_of(load_config({"model": "m", "loss_function": f"{tmp_path}/mine.py:{name}"}))


def test_a_run_learns_by_it(tmp_path, mine):
    tiny.write_chat_model(tmp_path / "model")
    rows = [{"prompt": f"Say {word}.", "completion": f" {word} {word}"} for word in "one two three hello".split()]
    tiny.write_rows(tmp_path, rows)
    spec = f"{tmp_path}/mine.py:focal"
    run = {
        "model": str(tmp_path / "model"), "output_dir": str(tmp_path / "run"), "loss_function": spec, "max_steps": 3, "logging_steps": 1,
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 32}, "learning_rate": 1e-2, "compilation_cache": False,
        "per_device_train_batch_size": 4,
    }  # fmt: skip
    train(run)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in logged if "loss" in line]
    # for an untrained model the focal loss is nearly the plain one
    chance = np.log(json.loads((tmp_path / "model" / "config.json").read_text())["vocab_size"])
    assert 0.8 * chance < losses[0] < 1.3 * chance and losses[-1] < losses[0] and 0 < logged[0]["surest"] < 1
    assert json.loads((tmp_path / "run" / "run.json").read_text())["function_files"].keys() == {f"{tmp_path}/mine.py"}


def test_it_is_one_function_while_its_file_is_the_same(tmp_path, mine):
    assert mine("focal") is mine("focal") is not mine("mean")
    before = mine("focal")
    (tmp_path / "mine.py").write_text(MINE + "\n")
    assert mine("focal") is not before
    assert objective_of(load_config({"model": "m"})) is OBJECTIVES["sft"]


def test_a_function_from_python(monkeypatch):
    monkeypatch.setattr(sys.modules["jaxtune.train"], "_train", lambda config, *_: config)
    found = [train({"model": "m", "output_dir": "r"}, loss_function=function) for function in (whole, lambda *_: Loss(1, 2, {}))]
    assert found[0].loss_function == f"{__name__}.whole" and "<lambda>" in found[1].loss_function
    assert [float(objective_of(config)(*[None] * 5).total) for config in found] == [3, 1]
    with pytest.raises(ConfigError, match=r"names loss_function a\.b, and .*test_losses\.whole is given"):
        train({"model": "m", "loss_function": "a.b"}, loss_function=whole)
    with pytest.raises(ConfigError, match="loss_function is of type str; give a function"):
        train({"model": "m"}, loss_function="a.b")  # type: ignore[arg-type]


def test_numbers_are_float32(mine):
    loss = mine("whole")(None, None, {}, {}, jnp.ones((2, 3)))
    assert [x.dtype for x in (loss.total, loss.weight, *loss.metrics["m"])] == [np.float32] * 4
    assert (float(loss.total), float(loss.weight)) == (3, 6)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mean", "mine.py:mean returned an array; return Loss"),
        ("by_row", r"the loss has to be two single numbers, a sum and its weight, and is \[\[2\], \[\]\]; sum over all axes"),
        ("bare", "the metric 'accuracy' has to be two single numbers"),
        ("wrong", "mine.py:wrong failed: AttributeError: .*nothing.* at line 22 of .*mine.py"),
    ],
)
def test_what_cannot_be_a_loss_is_told(mine, name, said):
    with pytest.raises(ConfigError, match=said):
        mine(name)(None, None, {}, {}, jnp.ones((2, 3)))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("focal", "loss_function: focal is not known; write your own module.function or path/file.py:function"),
        ("nowhere.py:focal", "there is no file nowhere.py"),
        ("json.focal", "json has no function focal"),
    ],
)
def test_names_without_a_function(spec, said):
    with pytest.raises(ConfigError, match=said):
        objective_of(load_config({"model": "m", "loss_function": spec}))
