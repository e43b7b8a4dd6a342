"""Every preference loss, its gradient and its metrics against TRL's own code."""

from types import SimpleNamespace

import numpy as np
import preference_cases as cases
import pytest

from jaxtune import step

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from oracle import trl_losses  # noqa: E402

SAME = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "kl", "nll_loss",
    "log_odds_ratio", "log_odds_chosen", "logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy",
)  # fmt: skip


@pytest.mark.parametrize("name", cases.CASES)
def test_loss_gradient_and_metrics_are_trls(name):
    (loss, gradient, metrics), (want, want_gradient, want_metrics) = cases.ours(name), trl_losses.theirs(name)
    assert loss == pytest.approx(want, rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(gradient, want_gradient, rtol=1e-5, atol=1e-5)
    objective = cases.config(name).objective
    compared = metrics.keys() & want_metrics.keys() & set(SAME)
    if objective not in ("dpo", "kto"):
        compared -= {"logits/chosen", "logits/rejected"}  # TRL's older trainers take the mean over prompts and padding too
    assert len(compared) >= (10 if objective == "dpo" else 8 if objective == "kto" else 6)
    for key in compared:
        assert metrics[key] == pytest.approx(want_metrics[key], rel=1e-5, abs=1e-6), key


def test_another_loss_is_seen():
    """The comparison above sees a wrong formula: another loss's values differ by far more than its tolerance."""
    arrays = cases.given("sigmoid")
    assert abs(cases.ours("sigmoid", arrays)[0] - trl_losses.theirs("apo_zero", arrays)[0]) > 1e-3


def test_the_reference_follows_as_trls_callback_moves_it():
    """TR-DPO over seven steps, every third; the policy is somewhere else at each."""
    from accelerate import Accelerator
    from trl.trainer.callbacks import SyncRefModelCallback

    Accelerator(cpu=True)  # the callback asks for its state
    policies = np.random.default_rng(0).standard_normal((8, 3, 4)).astype(np.float32)
    settings = SimpleNamespace(ref_model_mixup_alpha=0.6, ref_model_sync_steps=3)
    policy, reference, ours = torch.nn.Linear(4, 3, bias=False), torch.nn.Linear(4, 3, bias=False), {"w": policies[0]}
    reference.weight.data = torch.tensor(policies[0])
    callback = SyncRefModelCallback(reference, None)
    for number in range(1, 8):
        policy.weight.data = torch.tensor(policies[number])
        callback.on_step_end(settings, SimpleNamespace(global_step=number), None, model=policy)
        ours = step._synchronised(settings, ours, {"w": policies[number]}, np.int32(number))
        np.testing.assert_allclose(ours["w"], reference.weight.data.numpy(), rtol=1e-6, atol=1e-7)
    assert np.abs(ours["w"] - policies[0]).max() > 0.1
