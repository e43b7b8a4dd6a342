"""The divergence and its gradient against TRL's GKD."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
gkd = pytest.importorskip("trl.experimental.gkd")

from jaxtune.objectives.distill import divergence  # noqa: E402


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_divergence_is_trls(beta, temperature):
    rng = np.random.default_rng(0)
    student, teacher = (rng.normal(0, 3, (2, 5, 40)).astype(np.float32) for _ in range(2))
    live = rng.random((2, 5)) < 0.7
    logits = torch.tensor(student, requires_grad=True)
    labels = torch.where(torch.tensor(live), 0, -100)
    want = gkd.GKDTrainer.generalized_jsd_loss(logits, torch.tensor(teacher), labels, beta, temperature)  # over `live.sum()` tokens
    want.backward()
    value, derivative = jax.jit(divergence, static_argnums=(0, 1))(beta, temperature, student, teacher)
    assert float((value * live).sum() / live.sum()) == pytest.approx(want.item(), rel=1e-5)
    np.testing.assert_allclose(derivative * live[..., None] / live.sum(), logits.grad, atol=2e-7)
    assert logits.grad.abs().max() > 5e-4
