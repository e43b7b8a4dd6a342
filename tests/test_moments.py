"""Moments in 8 bits: bitsandbytes' levels, rounding to the nearest, one byte per number, sharded like the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.checkpoint import Checkpoints
from jaxtune.config import MeshConfig, load_config
from jaxtune.moments import dequantize, levels, quantize
from jaxtune.optim import optimizer
from jaxtune.parallel import AXES, fetch, like, make_mesh, replicated, state_shardings
from jaxtune.step import init_state


@pytest.mark.parametrize("signed", [True, False])
def test_every_number_takes_the_nearest_level(signed):
    own = levels(signed).astype(np.float64)
    assert len(own) == 256 and np.all(np.diff(own) > 0) and own[-1] == 1 and own[127 if signed else 0] == 0
    rng = np.random.default_rng(0)
    x = 10.0 ** rng.uniform(-8, 0, 256 * 40) * (rng.choice([-1, 1], 256 * 40) if signed else 1)
    x[::256] = 1.0  # absmax of every block
    x = np.float32(x)
    codes, absmax = quantize(jnp.asarray(x), signed)
    assert codes.dtype == jnp.uint8 and np.all(absmax == 1)
    best = np.abs(x[:, None] - own).min(1)
    error = np.abs(x - own[np.asarray(codes)])
    np.testing.assert_allclose(error, best, atol=1e-7)  # except for float32 at a tie
    np.testing.assert_array_equal(quantize(jnp.asarray(levels(signed)), signed)[0], np.arange(256))


@pytest.mark.parametrize("shape", [(3, 2, 512), (3, 7, 100)])
def test_blocks_stay_inside_a_layer(shape):
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    codes, absmax = quantize(x, True, lead=1)
    alone = [quantize(layer, True) for layer in x]
    np.testing.assert_array_equal(codes, jnp.stack([one[0] for one in alone]))
    np.testing.assert_array_equal(absmax, jnp.stack([one[1] for one in alone]))
    assert jnp.abs(dequantize(codes, absmax, True, 1) - x).max() < 0.05 * jnp.abs(x).max()
    zeros = jnp.zeros(shape)
    assert bool(jnp.all(dequantize(*quantize(zeros, True, 1), True, 1) == 0))


@pytest.mark.parametrize(("optim", "copies"), [("adamw_8bit", 2), ("lion_8bit", 1), ("paged_adamw_8bit", 2), ("adamw_bnb_8bit", 2)])
def test_bytes_of_the_moments(optim, copies):
    params = {"layers": {"0": {"q": jnp.zeros((2, 64, 256)), "norm": jnp.zeros((2, 4000))}}}
    state = jax.eval_shape(optimizer(load_config({"model": "m", "method": "full", "optim": optim}), 10).init, params)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    matrix, small = 2 * 64 * 256, 2 * 4000  # a layer's norm is below 4096, although the stack is not
    assert held - copies * (matrix + 4 * matrix // 256 + 4 * small) in (4, 8)  # counts


def test_packed_moments_lie_where_the_parameters_lie():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[:2])
    params = {"layers": {"0": {"q": jnp.zeros((2, 64, 512))}}}
    own = {"layers": {"0": {"q": jax.NamedSharding(mesh, jax.P(None, None, "fsdp"))}}}
    tx = optimizer(load_config({"model": "m", "method": "full", "optim": "adamw_8bit"}), 10)
    state = jax.eval_shape(tx.init, params)
    where = like(params, own, state, replicated(mesh))
    codes = [one for leaf, one in zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True) if leaf.dtype == jnp.uint8]
    assert len(codes) == 2 and all(one.spec == jax.P(None, None, "fsdp") for one in codes)
    grads = {"layers": {"0": {"q": jax.random.normal(jax.random.key(0), (2, 64, 512))}}}
    alone, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    cut = jax.jit(tx.update, out_shardings=(own, where))
    updates, new = cut(jax.device_put(grads, own), jax.device_put(tx.init(params), where), jax.device_put(params, own))
    np.testing.assert_allclose(updates["layers"]["0"]["q"], alone["layers"]["0"]["q"], rtol=1e-6)
    assert "all-gather" not in cut.lower(grads, new, params).compile().as_text()


# a matrix whose rows are two blocks, one whose rows are none, and a norm that stays float32
SHAPES = {"q": ((4, 16, 512), jax.P(None, None, "fsdp")), "odd": ((4, 64, 96), jax.P(None, None, "fsdp"))}
SHAPES |= {"norm": ((4, 512), jax.P(None, "fsdp"))}


def run_on(sizes, steps, checkpoints=None):
    """The state after these steps of 8-bit Adam with ZeRO-1 on a mesh, from the beginning or from the newest checkpoint."""
    mesh = make_mesh(MeshConfig(**dict(zip(AXES, sizes, strict=False))), jax.devices()[: int(np.prod(sizes))])
    own = {"layers": {"0": {name: jax.NamedSharding(mesh, spec) for name, (_, spec) in SHAPES.items()}}}
    rng = np.random.default_rng(0)
    draw = lambda: {"layers": {"0": {name: rng.standard_normal(shape).astype(np.float32) for name, (shape, _) in SHAPES.items()}}}  # noqa: E731
    params, gradients = draw(), [draw() for _ in range(4)]
    tx = optimizer(load_config({"model": "m", "method": "full", "optim": "adamw_8bit", "lr_scheduler_type": "constant"}), 10)
    make = lambda params: init_state(params, tx, 0)  # noqa: E731
    where = state_shardings(mesh, jax.eval_shape(make, params), params, own, zero_stage=1)
    here = jax.jit(make, out_shardings=where)(params)
    if checkpoints is not None and checkpoints.steps():
        here, _ = checkpoints.restore(here)

    def step(state, grads):
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        return state.replace(step=state.step + 1, trainable=jax.tree.map(jnp.add, state.trainable, updates), opt_state=opt_state)

    step = jax.jit(step, out_shardings=where)
    for number in range(int(here.step), steps):
        here = step(here, jax.device_put(gradients[number], own))
    return here


def test_packed_moments_over_fsdp_with_zero_1_and_resumed_on_another_mesh(tmp_path):
    """Each device has its part, and every mesh computes the same bits, also when it continues from another's checkpoint."""
    alone = run_on((1, 1), 4)
    saved = run_on((4, 2), 2)
    for path, leaf in jax.tree_util.tree_leaves_with_path(saved.opt_state):
        if leaf.ndim:
            parts = 4 if "absmax" in str(path) and "odd" in str(path) else 8  # blocks that cross rows are sharded by layers only
            assert leaf.addressable_shards[0].data.size == leaf.size // parts, path
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, saved, {})
    checkpoints.wait()
    for sizes in ((1, 8), (1, 1)):  # a row's blocks are not divisible by eight
        resumed = run_on(sizes, 4, checkpoints=checkpoints)
        for one, other in zip(jax.tree.leaves(fetch(alone.opt_state)), jax.tree.leaves(fetch(resumed.opt_state)), strict=True):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(*(state.trainable["layers"]["0"]["q"] for state in (alone, resumed)))
    checkpoints.close()


def test_one_layer_at_a_time_is_in_float32():
    """The same update and state as for all layers at once, with a fraction of the memory (on a v5e that was more than 8 bits save)."""
    shapes = {"layers": {"0": {name: (32, 16, 512) for name in "qk"} | {"norm": (32, 512)}}, "embed": (40, 512)}
    params = jax.tree.map(lambda shape: jax.random.normal(jax.random.key(0), shape), shapes, is_leaf=lambda x: isinstance(x, tuple))
    found = {}
    for stage in (0, 1):
        tx = optimizer(load_config({"model": "m", "method": "full", "optim": "adamw_8bit", "zero_stage": stage}), 10)
        update = jax.jit(tx.update, donate_argnums=(0, 1)).lower(params, jax.eval_shape(tx.init, params), params).compile()
        state = tx.init(params)
        for scale in (1.0, 0.1):
            updates, state = update(jax.tree.map(lambda x, scale=scale: jnp.sin(x) * scale, params), state, params)
        found[stage] = updates, state, update.memory_analysis().temp_size_in_bytes
    for one, other in zip(jax.tree.leaves(found[0][:2]), jax.tree.leaves(found[1][:2]), strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=1e-6)
    stack = 4 * 32 * 16 * 512
    assert found[0][2] < 2 * stack < 6 * stack < found[1][2]
