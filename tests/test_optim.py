import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtune.config import load_config
from jaxtune.errors import ConfigError
from jaxtune.optim import OPTIMIZERS, clip_by_global_norm, decays, optimizer, orthogonalize
from jaxtune.schedules import schedule

TREE = {
    "embed": jnp.ones((8, 4)),
    "layers": {"0": {"attn_norm": jnp.ones((3, 4)), "q": jnp.ones((3, 4, 4)), "q_bias": jnp.ones((3, 4)), "q_norm": jnp.ones((3, 2))}},
    "norm": jnp.ones((4,)),
    "head": jnp.ones((8, 4)),
}


def config(**keys):
    return load_config({"model": "m", "method": "full", "lr_scheduler_type": "constant"} | keys)


# ---- optimisers ----


def test_adamw_is_the_formula():
    """torch.optim.AdamW in float64, by hand."""
    keys = {"learning_rate": 0.01, "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-3}
    tx = optimizer(config(**keys), 10)
    p = np.array([[1.0, -2.0], [0.5, 3.0]])
    params, m, v = {"q": jnp.asarray(p, jnp.float32)}, 0.0, 0.0
    state = tx.init(params)
    for t in range(1, 6):
        g = np.array([[1.0, -1e-3], [1e-6, 100.0]]) * (-1) ** t / t
        p = p * (1 - 0.01 * 0.1)
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
        p = p - 0.01 * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-3)
        updates, state = tx.update({"q": jnp.asarray(g, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["q"], p, rtol=1e-6)


def test_lion_is_the_formula():
    tx = optimizer(config(optim="lion", learning_rate=0.01, weight_decay=0.1, adam_beta2=0.99), 10)
    p, m = np.array([[1.0, -2.0, 0.0]]), 0.0
    params = {"q": jnp.asarray(p, jnp.float32)}
    state = tx.init(params)
    for t in range(1, 5):
        g = np.array([[1.0, -0.3, 0.0]]) * (-1) ** t
        p = p - 0.01 * (np.sign(0.9 * m + 0.1 * g) + 0.1 * p)
        m = 0.99 * m + 0.01 * g
        updates, state = tx.update({"q": jnp.asarray(g, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["q"], p, rtol=1e-6)


def test_decay_skips_norms_and_biases_though_stacked():
    want = {"embed": True, "head": True, "norm": False,
            "layers": {"0": {"attn_norm": False, "q": True, "q_bias": False, "q_norm": False}}}  # fmt: skip
    assert decays(TREE) == want
    kinds = {"sinks": True, "a_log": True, "act_beta": False, "router_correction": False, "layer_scale": False}  # vectors that are neither
    assert decays({"layers": {"0": {name: jnp.ones((3, 4)) for name in kinds}}}) == {"layers": {"0": kinds}}
    # an adapter's paths are one key each; transformers decays a DoRA magnitude, whose name contains no norm
    pair = {"a": jnp.ones((3, 2, 4)), "b": jnp.ones((3, 4, 2)), "magnitude": jnp.ones((3, 4))}
    assert decays({"params": {"layers/0/q": pair}}) == {"params": {"layers/0/q": {"a": True, "b": True, "magnitude": True}}}


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_with_no_gradient_only_decayed_leaves_move(optim):
    tx = optimizer(config(optim=optim, learning_rate=0.1, weight_decay=0.5), 10)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, TREE), tx.init(TREE), TREE)
    want = jax.tree.map(lambda p, decayed: -0.05 * p if decayed else 0 * p, TREE, decays(TREE))
    jax.tree.map(lambda got, wanted: np.testing.assert_allclose(got, wanted, rtol=1e-6), updates, want)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_a_stack_of_layers_is_trained_as_its_layers_one_by_one(optim):
    def run(layers, steps=3):
        tx = optimizer(config(optim=optim, learning_rate=0.1, weight_decay=0.1), 10)
        params = {"layers": {"0": jax.tree.map(lambda x: x[layers], stack)}}
        state = tx.init(params)
        for t in range(steps):
            grads = {"layers": {"0": jax.tree.map(lambda g, t=t: g[t][layers], noise)}}
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params["layers"]["0"]

    rng = np.random.default_rng(0)
    shapes = {"q": (5, 3, 4), "attn_norm": (5, 4)}  # more layers than rows: factored moments must not mistake them for rows
    stack = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    noise = {name: jnp.asarray(rng.standard_normal((3, *shape)), jnp.float32) for name, shape in shapes.items()}
    together = run(slice(None))
    for layer in range(5):
        alone = run(slice(layer, layer + 1))
        for name in shapes:
            np.testing.assert_allclose(together[name][layer], alone[name][0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_moments_are_float32_whatever_the_parameters(optim):
    tx = optimizer(config(optim=optim), 10)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), TREE)
    updates, state = tx.update(params, tx.init(params), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim} <= {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("float32")}
    assert jax.tree.map(jnp.shape, optax.apply_updates(params, updates)) == jax.tree.map(jnp.shape, params)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_every_optimizer_goes_downhill(optim):
    tx = optimizer(config(optim=optim, learning_rate=0.02), 100)
    target = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 4)), jnp.float32)

    def loss(params):
        return jnp.mean((params["layers"]["0"]["q"] - target) ** 2)

    params = {"layers": {"0": {"q": jnp.zeros((2, 6, 4))}}}
    state, step = tx.init(params), jax.jit(lambda p, s: tx.update(jax.grad(loss)(p), s, p))
    start = loss(params)
    for _ in range(50):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    assert loss(params) < 0.97 * start


def test_zero_rows_stay_zero():
    """Ranks that differ by layer are padded with zero rows and columns; no optimiser may change them."""
    for optim in OPTIMIZERS:
        tx = optimizer(config(optim=optim, weight_decay=0.1, learning_rate=0.1), 10)
        a = jnp.zeros((2, 3, 4)).at[:, :2].set(1.0).at[1].set(0.0)
        params = {"layers": {"0": {"a": a}}}
        updates, _ = tx.update(params, tx.init(params), params)
        moved = updates["layers"]["0"]["a"]
        assert bool(jnp.all(moved[1] == 0)) and bool(jnp.all(moved[0, 2] == 0)) and bool(jnp.all(moved[0, :2] != 0)), optim


def test_orthogonalize_brings_singular_values_near_one():
    m = jnp.asarray(np.random.default_rng(0).standard_normal((3, 20, 8)), jnp.float32)
    values = jnp.linalg.svd(orthogonalize(m), compute_uv=False)
    assert values.shape == (3, 8) and 0.6 < values.min() and values.max() < 1.3
    np.testing.assert_allclose(orthogonalize(m.mT), orthogonalize(m).mT, atol=1e-5)


def test_muon_leaves_norms_with_a_scale_for_each_head_to_adam():
    tx, grad = optimizer(config(optim="muon", learning_rate=0.1), 10), jnp.arange(1.0, 25).reshape(2, 3, 4)
    params = {"layers": {"0": {"q": jnp.zeros((2, 3, 4)), "q_norm": jnp.ones((2, 3, 4))}}}
    moved = tx.update(jax.tree.map(lambda _: grad, params), tx.init(params), params)[0]["layers"]["0"]
    np.testing.assert_allclose(moved["q_norm"], -0.1, rtol=1e-4)  # Adam's first step
    assert np.ptp(np.asarray(moved["q"])) > 0.01


def test_loraplus_and_embedding_rates():
    tx = optimizer(config(method="lora", optim="sgd", learning_rate=0.1, loraplus_lr_ratio=16), 5)
    pair = {"a": jnp.ones((3, 2, 4)), "b": jnp.ones((3, 4, 2)), "magnitude": jnp.ones((3, 4))}
    params = {"params": {"layers/0/q": pair, "embed": {"a": jnp.ones((2, 8)), "b": jnp.ones((4, 2))}}}
    updates, _ = tx.update(params, tx.init(params), params)
    rates = jax.tree.map(lambda u: -float(u.ravel()[0]), updates)["params"]
    assert rates["layers/0/q"] == {"a": pytest.approx(0.1), "b": pytest.approx(1.6), "magnitude": pytest.approx(1.6)}
    assert rates["embed"] == {"a": pytest.approx(1e-6), "b": pytest.approx(1e-6)}


def test_the_rate_of_an_update_is_the_schedules():
    keys = {"optim": "sgd", "lr_scheduler_type": "linear", "warmup_steps": 2, "learning_rate": 1.0}
    tx, rate = optimizer(config(**keys), 6), schedule(config(**keys), 6)
    params = {"q": jnp.ones((2, 2))}
    state = tx.init(params)
    for step in range(6):
        updates, state = tx.update(params, state, params)
        assert -float(updates["q"][0, 0]) == np.float32(rate(step))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"optim": "adamw", "optim_args": {"momentum": 0.9}}, "optim_args of adamw cannot hold momentum; it takes no keys"),
        ({"optim": "sgd", "optim_args": {"momentum": "high"}}, "momentum in optim_args of sgd is 'high'"),
        ({"optim": "sgd", "optim_args": {"nesterov": 1}}, "nesterov in optim_args of sgd is 1"),
    ],
)
def test_optimizer_keys_are_checked(keys, says):
    with pytest.raises(ConfigError) as caught:
        optimizer(config(**keys), 10)
    assert says in str(caught.value)


# ---- clipping ----


def test_clipping_gives_the_norm_before_and_torchs_scale():
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    clipped, norm = clip_by_global_norm(grads, 1.0)
    assert float(norm) == 5.0
    np.testing.assert_allclose(clipped["a"], [3 / (5 + 1e-6), 0], rtol=1e-7)
    same, norm = clip_by_global_norm(grads, 5.1)
    assert float(norm) == 5.0 and bool(jnp.all(same["a"] == grads["a"]))
    assert clip_by_global_norm(grads, 0.0)[0] is grads
    assert math.isnan(float(clip_by_global_norm({"a": jnp.array([jnp.nan])}, 1.0)[1]))
