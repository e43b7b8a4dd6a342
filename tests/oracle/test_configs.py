"""Configs that transformers and TRL write with `to_dict()` load as they are."""

import pytest

from jaxtune.config import load_config

trl = pytest.importorskip("trl")

# what is computed from other keys, and KTO's order of rows, have to be taken out; the error says so
NOT_HERE = {"generation_batch_size", "train_sampling_strategy"}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers 5.24, which TRL 1.16 asks by old names
@pytest.mark.parametrize("objective", ["sft", "dpo", "kto", "reward", "grpo", "rloo"])
def test_a_config_of_trl_loads(objective, tmp_path):
    kind = getattr(trl, f"{objective.capitalize() if objective == 'reward' else objective.upper()}Config")
    given = kind(output_dir=str(tmp_path), bf16=False, learning_rate=3e-5, warmup_steps=0.1).to_dict()
    keys = {key: value for key, value in given.items() if key not in NOT_HERE}
    ours = {"model": "m", "objective": objective} | ({"reward_funcs": "f1"} if objective in ("grpo", "rloo") else {})
    config = load_config(keys | ours)
    assert (config.learning_rate, config.warmup_steps, config.num_train_epochs) == (3e-5, 0.1, 3)
    if "beta" in given:
        assert config.beta == given["beta"]
