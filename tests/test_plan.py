"""The planned batch is that of a run, for every objective; a reward model is planned with its head."""

import json

import jax
import pytest
import tiny

from jaxtune import data, parallel, targets
from jaxtune.config import MeshConfig, load_config
from jaxtune.convert.load import open_config, open_tokenizer
from jaxtune.errors import ConfigError
from jaxtune.objectives import OBJECTIVES
from jaxtune.plan import Plan, _abstract_batch, _settings, abstract_step, compare, errors_bytes, plan

PAIR = {"prompt": "one two", "chosen": " three", "rejected": " four"}
ROWS = {
    "sft": {"prompt": "one", "completion": " two"}, "kto": {"prompt": "one", "completion": " two", "label": True},
    "stepwise_reward": {"prompt": "one", "completions": ["two"], "labels": [True]}, "classification": {"text": "one", "label": [0.5, 1.5]},
}  # fmt: skip
KEYS = {"classification": {"num_labels": 2, "problem_type": "regression"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan") / "model"
    tiny.write_chat_model(folder, tiny.LLAMA | {"num_hidden_layers": 1})
    return folder


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_planned_batch_is_that_of_a_run(folder, tmp_path, objective):
    rows = [ROWS.get(objective, PAIR) | {"id": n} for n in range(2 if objective == "kto" else 1)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"train": str(tmp_path / "rows.jsonl"), "max_length": 16, "cache_dir": str(tmp_path / "cache"), "packing": False}
    config = load_config({"model": str(folder), "objective": objective, "data": settings} | KEYS.get(objective, {}))
    mesh = parallel.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    real = data.load(config, open_tokenizer(folder)).train.batch_at(0).replace(capacity=None)
    planned = _abstract_batch(config.replace(per_device_train_batch_size=real.tokens.shape[1]), mesh)
    assert jax.tree.structure(planned) == jax.tree.structure(real)
    T = real.tokens.shape[2]
    for one, other in zip(jax.tree.leaves(planned), jax.tree.leaves(real), strict=True):
        assert one.dtype == other.dtype and [16 if n == T else n for n in other.shape] == list(one.shape)


def test_a_reward_model_and_a_preference_run_are_planned(folder):
    def planned(**keys):
        return plan({"model": str(folder), "data": {"train": "none", "max_length": 32}, "mesh": {"data": 1, "fsdp": -1}} | keys)

    reward, sft, dpo = planned(objective="reward"), planned(), planned(objective="dpo")
    assert reward.bytes["logits"] == 0
    assert reward.flops < sft.flops < dpo.flops


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A model's config.json and nothing else."""
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(tiny.LLAMA | {"num_hidden_layers": 2}))
    return path


def run(folder, **keys):
    own = {"model": str(folder), "data": {"train": "x.jsonl", "max_length": 32}, "output_dir": "x", "per_device_train_batch_size": 4}
    return load_config(own | keys)


def test_argument_bytes_are_those_of_the_arrays(model_folder):
    """Weights, adapter and moments, against what the shapes of the trees hold."""
    config = run(model_folder, method="qlora")
    mesh = parallel.make_mesh(MeshConfig(), jax.devices()[:1])
    _, (state, base, _), _ = abstract_step(config, open_config(config.model), mesh)
    base, adapter = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) for tree in (base, state.trainable))
    found = plan(config).bytes
    assert found["weights"] + found["scales"] == base and found["trainable"] == adapter
    assert 2 * adapter <= found["optimizer"] <= 2 * adapter + 64


def test_what_does_not_fit_is_answered_by_what_does(model_folder, monkeypatch):
    config = run(model_folder, method="lora", gradient_checkpointing=False, data={"train": "x.jsonl", "max_length": 256})
    alone = jax.devices()[:1]
    needed = plan(config, target="here").peak_bytes
    chip = targets.Chip(needed - 1, 1e9, 1e12)
    monkeypatch.setattr("jaxtune.plan.find_target", lambda name: targets.Target("small", alone, chip))
    result = plan(config, target="small")
    assert result.fits is False and result.instead
    assert all(row["peak_bytes"] < needed for row in result.instead)
    for row in result.instead[:1]:
        again = plan(config, [f"{key}={json.dumps(value)}" for key, value in row["keys"].items()], target="small", alternatives=False)
        assert again.fits and again.peak_bytes == row["peak_bytes"] < needed


@pytest.mark.parametrize(("key", "value"), [("per_device_train_batch_size", 37), ("data.max_length", 256)])
def test_the_largest_setting_that_fits(model_folder, monkeypatch, key, value):
    config = run(model_folder, method="lora")
    with pytest.raises(ConfigError, match="memory of target here is not known"):
        plan(config, auto=key)

    def compiled(config, model_config, where):
        needed = 1000 + 10 * config.per_device_train_batch_size * config.data.max_length
        fits = needed <= where.chip.memory
        return Plan("small", 1, fits, needed, where.chip.memory, {}, 1.0, 1.0, 1.0, 1.0, _settings(config), [])

    monkeypatch.setattr("jaxtune.plan._compile", compiled)
    room = 1000 + 10 * (37 * 32 if key != "data.max_length" else 4 * 300)
    monkeypatch.setattr("jaxtune.plan.find_target", lambda name: targets.Target("small", [], targets.Chip(room, 1e9, 1e12)))
    result = plan(config, target="small", auto=key)
    assert result.fits and result.settings[key.rpartition(".")[2]] == value


def test_methods_side_by_side(model_folder):
    plans = compare(run(model_folder, method="lora"), "here")
    assert list(plans) == ["full", "lora", "qlora"]
    assert plans["qlora"].bytes["weights"] < plans["lora"].bytes["weights"]
    assert plans["full"].bytes["optimizer"] > plans["lora"].bytes["optimizer"]


@pytest.mark.parametrize(
    ("message", "size"),
    [
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.", 20.5),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2.00GiB.", 2.0),
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries "
            "(17.25G) exceeds available HBM (15.75G). HLO module: jit_step.",
            17.25,
        ),
    ],
)
def test_a_compiler_that_refuses_says_how_much(message, size):
    assert errors_bytes(message) == int(size * 2**30)
    assert errors_bytes("INTERNAL: something else") is None


@pytest.mark.parametrize("name", ["h1000", "v5e", "v9-8", "0"])
def test_an_unknown_target_names_those_there_are(name):
    with pytest.raises(ConfigError, match="v5e-8.*h100"):
        targets.find_target(name)
    with pytest.raises(ConfigError, match="powers of two"):
        targets.find_target("v5e-3")
