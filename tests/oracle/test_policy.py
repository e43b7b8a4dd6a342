"""GRPO's, RLOO's and PPO's losses, gradients, advantages and metrics against TRL's code."""

import numpy as np
import policy_cases as cases
import ppo_cases
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from oracle import trl_policy, trl_ppo  # noqa: E402

from jaxtune.objectives.advantages import ADVANTAGES  # noqa: E402
from jaxtune.rollout import _flat_groups, _measured  # noqa: E402


@pytest.mark.parametrize("name", [*cases.CASES, *ppo_cases.CASES])
def test_loss_gradient_and_metrics_are_trls(name):
    ours, theirs = (ppo_cases.ours, trl_ppo.theirs) if name in ppo_cases.CASES else (cases.ours, trl_policy.theirs)
    (loss, gradient, metrics), (want, want_gradient, want_metrics) = ours(name), theirs(name)
    assert loss == pytest.approx(want, rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(gradient, want_gradient, rtol=1e-5, atol=1e-6)
    assert metrics.keys() == want_metrics.keys()
    for key, value in metrics.items():
        assert value == pytest.approx(want_metrics[key], rel=1e-5, abs=1e-6), key
    assert np.abs(want_gradient).max() > 1e-3


def test_another_loss_is_seen():
    """The comparison above sees a wrong formula: another loss's values differ by far more than its tolerance."""
    arrays = cases.given("dapo")
    assert abs(cases.ours("dapo", arrays)[0] - trl_policy.theirs("grpo", arrays)[0]) > 1e-3


@pytest.mark.parametrize("name", cases.GROUPS)
def test_advantages_are_trls(name):
    run, rewards = cases.group_config(name), cases.group_rewards(name)
    weights = np.array(run.reward_weights or (1.0, 1.0))
    found = ADVANTAGES[run.objective](run, rewards, weights, cases.SIZE, None)
    want, want_metrics = trl_policy.advantages(name)
    np.testing.assert_allclose(found.advantages, want, rtol=1e-6, atol=1e-7)
    told = _measured([type("Reward", (), {"name": letter}) for letter in "ab"], rewards, found.rewards) | _flat_groups(found.spread)
    for key in told.keys() - ({"frac_reward_zero_std"} if "unjudged" in name else set()):  # one judged answer: TRL's spread is no number
        assert told[key] == pytest.approx(want_metrics[key], rel=1e-6), key
    assert len(told) == 7


@pytest.mark.parametrize("name", ppo_cases.ADVANTAGES)
def test_advantages_of_tokens_are_trls(name):
    found, (want, returns, metrics) = ppo_cases.advantages(name), trl_ppo.advantages(name)
    mask = ppo_cases.given(name)["mask"]
    np.testing.assert_allclose(found.advantages, want, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.returns[mask], returns[mask], rtol=1e-9, atol=1e-9)
    assert found.metrics.keys() - metrics.keys() == {"val/var_explained"}
    for key in metrics.keys() - ({"objective/kl"} if name == "no_kl" else set()):  # without a weight no reference is asked
        assert found.metrics[key] == pytest.approx(metrics[key], rel=1e-9), key
