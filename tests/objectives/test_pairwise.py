"""The table of losses: TRL's numbers (goldens), the formulas in float64, and edge cases."""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import preference_cases as cases
import pytest

from jaxtune.config import load_config
from jaxtune.config.objectives import LOSS_TYPES
from jaxtune.objectives.pairwise import BY_MEAN, LOSSES, REFERENCE_FREE, SCORES, Pairs, log_odds_ratio

GOLDEN = np.load(Path(__file__).parent.parent / "goldens" / "objectives" / "preference.npz")
KEYS = ("logps", "collision", "mean_logits", "entropy", "correct", "ref", "mask", "labels")


@pytest.mark.parametrize("name", cases.CASES)
def test_value_and_gradient_are_trls(name):
    loss, gradient, _ = cases.ours(name, {key: GOLDEN[f"{name}/{key}"] for key in KEYS})
    assert loss == pytest.approx(float(GOLDEN[f"{name}/loss"]), rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(gradient, GOLDEN[f"{name}/gradient"], rtol=1e-5, atol=1e-5)


def test_the_config_knows_every_loss_of_the_table():
    assert set(LOSS_TYPES["dpo"]) == set(LOSSES) and set(LOSS_TYPES["cpo"]) == set(REFERENCE_FREE) and set(BY_MEAN) < set(REFERENCE_FREE)
    assert set(LOSSES) <= {name for names in (cases.config(case).loss_type for case in cases.DPO) for name in names}


# ---- the formulas, in float64 and by themselves ----


def ls(x):
    return -np.logaddexp(0, -x)


def sig(x):
    return 1 / (1 + np.exp(-x))


FORMULAS = {
    "sigmoid": lambda a, b, n, m, c, e: -(1 - e) * ls(c * (a - b)) - e * ls(c * (b - a)),
    "hinge": lambda a, b, n, m, c, e: np.maximum(0, 1 - c * (a - b)),
    "ipo": lambda a, b, n, m, c, e: (a / n - b / m - 1 / (2 * c)) ** 2,
    "exo_pair": lambda a, b, n, m, c, e: sum(q * np.log(q / p) for q, p in ((sig(c * (a - b)), 1 - e), (sig(c * (b - a)), e))),
    "nca_pair": lambda a, b, n, m, c, e: -ls(c * a) - 0.5 * ls(-c * a) - 0.5 * ls(-c * b),
    "robust": lambda a, b, n, m, c, e: (-(1 - e) * ls(c * (a - b)) + e * ls(c * (b - a))) / (1 - 2 * e),
    "bco_pair": lambda a, b, n, m, c, e: -ls(c * a) - ls(-c * b),
    "sppo_hard": lambda a, b, n, m, c, e: (a - 0.5 / c) ** 2 + (b + 0.5 / c) ** 2,
    "aot_unpaired": lambda a, b, n, m, c, e: -(1 - e) * ls(c * (np.sort(a) - np.sort(b))) - e * ls(c * (np.sort(b) - np.sort(a))),
    "apo_zero": lambda a, b, n, m, c, e: 1 - sig(c * a) + sig(c * b),
    "apo_down": lambda a, b, n, m, c, e: sig(c * a) + 1 - sig(c * (a - b)),
    "discopop": lambda a, b, n, m, c, e: -ls(c * (a - b)) * (1 - sig(c * (a - b) / 0.05)) + np.exp(c * (b - a)) * sig(c * (a - b) / 0.05),
    "sigmoid_norm": lambda a, b, n, m, c, e: -ls(c * (a / n - b / m)),
}  # fmt: skip


def pairs(seed=0, n=9, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    arrays = [-rng.gamma(4.0, 6.0, n) for _ in range(4)] + [rng.integers(1, 40, n).astype(float) for _ in range(2)]
    return arrays, Pairs(*(jnp.asarray(x, dtype) for x in arrays), jnp.ones(n))


@pytest.mark.parametrize(("beta", "eps"), [(0.1, 0.0), (0.1, 0.3), (1.0, 0.1)])
@pytest.mark.parametrize("name", FORMULAS)
def test_losses_are_their_formulas(name, beta, eps):
    eps = eps or (1e-3 if name == "exo_pair" else 0.0)
    c = load_config({"model": "m", "objective": "dpo", "loss_type": name, "beta": beta, "label_smoothing": eps})
    (chosen, rejected, ref_chosen, ref_rejected, n, m), p = pairs()
    want = FORMULAS[name](chosen - ref_chosen, rejected - ref_rejected, n, m, beta, eps)
    np.testing.assert_allclose(np.sort(jax.jit(lambda p: LOSSES[name](p, c))(p)), np.sort(want), rtol=2e-5, atol=1e-6)


def test_scores_are_the_derivatives_of_their_divergences():
    x = np.linspace(-6, 6, 25)
    t, c = np.exp(x), SimpleNamespace(f_alpha_divergence_coef=0.4)
    want = {
        "reverse_kl": np.log(t),
        "forward_kl": 1 - 1 / t,
        "js_divergence": np.log(2 * t / (t + 1)),
        "alpha_divergence": (t ** (0.4 - 1) - 1) / (0.4 - 1),
    }
    assert want.keys() == SCORES.keys()
    for name, values in want.items():
        np.testing.assert_allclose(SCORES[name](jnp.asarray(x, jnp.float32), c), values, rtol=3e-6, atol=1e-6, err_msg=name)


def test_odds_ratio_is_its_formula_and_finite_for_answers_known_by_heart():
    x, y = np.array([-3.0, -0.2, -0.9, -30.0]), np.array([-0.01, -0.6932, -4.0, -0.5])
    odds = lambda z: np.exp(z) / -np.expm1(z)  # noqa: E731
    np.testing.assert_allclose(log_odds_ratio(*map(jnp.float32, (x, y))), np.log(odds(x) / odds(y)), rtol=1e-5)
    gradient = jax.grad(lambda x: log_odds_ratio(x, jnp.float32(-1.0)))
    assert np.isfinite(log_odds_ratio(jnp.float32(0.0), jnp.float32(-1.0))) and np.isfinite(gradient(jnp.float32(0.0)))
    assert all(np.isfinite(gradient(jnp.float32(z))) for z in (-1e-8, -0.6931, -0.6932, -200.0))


@pytest.mark.parametrize("name", ["sigmoid", "aot", "aot_unpaired", "sft"])
def test_padding_counts_for_nothing(name):
    c = load_config({"model": "m", "objective": "dpo", "loss_type": name, "label_smoothing": 0.1})
    _, p = pairs()
    spread = Pairs(*(jnp.zeros(14).at[jnp.array([0, 1, 3, 4, 5, 8, 9, 12, 13])].set(x) for x in p))
    value, gradient = jax.value_and_grad(lambda p, live: (LOSSES[name](p._replace(live=live), c) * live).sum())(p, p.live)
    padded, spread_gradient = jax.value_and_grad(lambda p, live: (LOSSES[name](p._replace(live=live), c) * live).sum())(spread, spread.live)
    assert padded == pytest.approx(float(value), rel=1e-6)
    for field in ("chosen", "rejected"):
        left, right = np.asarray(getattr(gradient, field)), np.asarray(getattr(spread_gradient, field))
        np.testing.assert_allclose(right[np.asarray(spread.live) > 0], left, rtol=1e-6)
        assert not right[np.asarray(spread.live) == 0].any()


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "sft"])
def test_extreme_ratios_have_finite_gradients(name):
    c = load_config({"model": "m", "objective": "dpo", "loss_type": name, "label_smoothing": 0.1})
    far = jnp.array([-800.0, 800.0, 0.0])
    gradient = jax.grad(lambda x: LOSSES[name](Pairs(x, -x, 0 * x, 0 * x, 0 * x + 3, 0 * x + 5, 0 * x + 1), c).sum())(far)
    assert np.isfinite(gradient).all()
