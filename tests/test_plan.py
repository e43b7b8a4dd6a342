"""The planned batch is that of a run, for every objective; a reward model is planned with its head."""

import json

import jax
import pytest
import tiny

from jaxtune import data, parallel
from jaxtune.config import MeshConfig, load_config
from jaxtune.convert.load import open_tokenizer
from jaxtune.objectives import OBJECTIVES
from jaxtune.plan import _abstract_batch, plan

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
    assert reward.peak_bytes < sft.peak_bytes and reward.bytes["logits"] == 0 < sft.bytes["logits"]
    assert reward.flops < sft.flops < dpo.flops
