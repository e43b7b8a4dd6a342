"""Known failures of preference tuning, each planted into a log, and a healthy run without warnings."""

import math

import pytest

from jaxtune.config import load_config
from jaxtune.objectives.symptoms import WINDOW, symptoms


def config(**keys):
    return load_config({"model": "none", "objective": "dpo"} | keys)


def series(steps=30, **metrics):
    """A healthy DPO run, with the named metrics replaced: by numbers, or by functions of the run's progress from 0 to 1."""
    healthy = {
        "loss": lambda t: math.log(2) * (1 - 0.7 * t), "rewards/chosen": lambda t: 0.5 * t, "rewards/rejected": lambda t: -1.5 * t,
        "rewards/margins": lambda t: 2 * t, "rewards/accuracies": lambda t: 0.5 + 0.4 * t, "logps/chosen": lambda t: -60 + 5 * t,
        "logps/rejected": lambda t: -60 - 15 * t, "lengths/chosen": 20.0, "lengths/rejected": 21.0,
    } | metrics  # fmt: skip
    values = [{name: made(n / (steps - 1)) if callable(made) else made for name, made in healthy.items()} for n in range(steps)]
    rows = [{"step": n + 1} | row for n, row in enumerate(values)]
    return [row for n, row in enumerate(rows) for row in ([row, {"step": n + 1, "eval_loss": 9.0}] if n % 7 == 0 else [row])]


BOTH_FALL = {"rewards/chosen": lambda t: -1.5 * t, "logps/chosen": lambda t: -60 - 15 * t}
PLANTED = {
    "both_fall": BOTH_FALL,
    "margin_without_accuracy": {"rewards/accuracies": 0.5},
    "stuck": {"loss": math.log(2) + 1e-3},
    "length": {"lengths/chosen": 40.0},
}


POLICY = {
    "reward": 0.4, "frac_reward_zero_std": 0.3, "completions/clipped_ratio": 0.1, "kl": 0.2, "clip_ratio/region_mean": 0.02,
}  # fmt: skip
PPO = {"reward": 0.4, "completions/clipped_ratio": 0.1, "policy/clipfrac_avg": 0.02, "val/var_explained": lambda t: t - 0.7}
PLANTED_IN_POLICY = {
    "no_signal": {"frac_reward_zero_std": 0.97}, "cut_off": {"completions/clipped_ratio": 0.9}, "far": {"kl": lambda t: 4 * t},
}  # fmt: skip


def test_a_healthy_run_is_let_alone():
    assert symptoms(config(), series()) == {}
    assert symptoms(config(objective="grpo"), series(**POLICY)) == {}
    assert symptoms(config(objective="ppo"), series(**PPO)) == {}


@pytest.mark.parametrize("name", PLANTED_IN_POLICY)
def test_each_failure_of_drawn_answers_is_told_by_its_name_alone(name):
    found = symptoms(config(objective="grpo"), series(**POLICY | PLANTED_IN_POLICY[name]))
    assert list(found) == [name]
    clipped = symptoms(config(objective="grpo"), series(**POLICY | {"clip_ratio/region_mean": 0.5}))
    assert list(clipped) == ["far"] and "50% of the ratios are clipped" in clipped["far"]


def test_failures_of_ppo_are_told_with_its_own_keys():
    found = symptoms(config(objective="ppo"), series(**PPO | {"policy/clipfrac_avg": 0.5, "val/var_explained": lambda t: -t}))
    assert list(found) == ["far", "blind"] and "num_ppo_epochs, or raise kl_coef" in found["far"] and "vf_coef" in found["blind"]


@pytest.mark.parametrize("name", PLANTED)
def test_each_failure_is_told_by_its_name_alone(name):
    found = symptoms(config(), series(**PLANTED[name]))
    assert list(found) == [name]
    assert symptoms(config(), series(steps=2 * WINDOW - 1, **PLANTED[name])) == {}  # too early to tell


def test_what_is_said_has_the_numbers_and_what_to_write():
    said = symptoms(config(), series(**BOTH_FALL))["both_fall"]
    assert "by 23% and 23%" in said and "loss_type: [sigmoid, sft]" in said  # 14 of 60 nats, the mean of the last window
    assert "40 tokens against 21" in symptoms(config(), series(**PLANTED["length"]))["length"]


def test_without_a_reference_the_start_of_the_run_is_what_is_fallen_from():
    simpo = {"objective": "simpo"}
    logps = {"logps/chosen": lambda t: -2 - t, "logps/rejected": lambda t: -2 - 2 * t, "rewards/chosen": -3.0, "rewards/rejected": -4.0}
    assert list(symptoms(config(**simpo), series(**logps))) == ["both_fall"]
    assert symptoms(config(**simpo), series(**logps | {"logps/chosen": lambda t: -2 + t})) == {}


def test_no_loss_at_which_nothing_is_learnt_is_taken_for_one():
    assert symptoms(config(loss_type="hinge"), series(loss=math.log(2))) == {}
    assert symptoms(config(objective="simpo"), series(loss=math.log(2), **{"rewards/chosen": 0.0})) == {}
    assert list(symptoms(config(objective="kto"), series(loss=0.5))) == ["stuck"]


@pytest.mark.parametrize("keys", [{"objective": "simpo"}, {"loss_type": "sigmoid_norm"}, {"ld_alpha": 0.5}], ids=str)
def test_losses_of_means_do_not_mind_length(keys):
    assert symptoms(config(**keys), series(**PLANTED["length"])) == {}


def test_metrics_that_are_missing_or_null_are_no_failure():
    rows = [{"step": n, "loss": 0.3, "rewards/chosen": None, "logps/chosen": -5.0} for n in range(30)]
    assert symptoms(config(objective="kto"), rows) == {} and symptoms(config(objective="sft"), series(**BOTH_FALL)) == {}
