"""optimizer_in_bwd: the numbers of the ordinary step, without its gradients."""

import jax
import numpy as np
import pytest
import references
import tiny

from jaxtune import optim, parallel
from jaxtune.config import MeshConfig, load_config
from jaxtune.data.batch import Batch
from jaxtune.errors import ConfigError
from jaxtune.model.families import from_hf
from jaxtune.model.spec import init_params
from jaxtune.objectives import OBJECTIVES
from jaxtune.step import how_to_compute, init_state, make_step

LLAMA = tiny.LLAMA | {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 130, "attention_bias": False}
IN_BACKWARD = {"optimizer_in_bwd": True, "max_grad_norm": 0.0}


def steps(shape: dict, overrides: dict, mesh=None, number: int = 2):
    """(trainable, optimiser state, metrics) after some steps."""
    given = {"model": "m", "method": "full", "data": {"train": "x"}, "max_steps": 10, "learning_rate": 1e-2, "weight_decay": 0.1}
    given["adam_epsilon"] = 1e-3  # otherwise Adam would make whole steps of gradients that are rounding errors
    config = load_config(given | {"max_grad_norm": 0.0, "gradient_checkpointing": "full", "dtype": "float32"} | overrides)
    model_config = how_to_compute(config, from_hf(shape), tiny.mesh_on("cpu"))
    trainable, optimizer = init_params(jax.random.key(0), model_config), optim.optimizer(config, 10)
    rng, (rows, length) = np.random.default_rng(0), (8, 12)
    tokens = rng.integers(0, model_config.vocab_size, (1, rows, length)).astype(np.int32)
    ones, places = np.ones_like(tokens), np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    batch = Batch(tokens, (places > 4).astype(np.float32), places, ones, capacity=length - 5)
    if mesh is not None:
        trainable = jax.device_put(trainable, parallel.trainable_shardings(mesh, model_config, trainable))
        batch = jax.device_put(batch, parallel.batch_sharding(mesh))
    state, metrics = init_state(trainable, optimizer, 0), {}
    step = jax.jit(make_step(config, model_config, OBJECTIVES["sft"], optimizer, mesh=mesh))
    for _ in range(number):
        state, metrics = step(state, {}, batch)
    return jax.tree.map(np.asarray, (state.trainable, state.opt_state, metrics))


def assert_same(plain, fused, others=0.0):
    """`others`: the fraction of a leaf's numbers that may differ. A sum in another order may fall on the next level of an 8-bit moment."""
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(plain), jax.tree.leaves(fused), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        if one.size:
            one, other = one.astype(np.float32), other.astype(np.float32)
            differ = np.abs(one - other) > 1e-4 * (np.abs(one) + np.abs(one).max())
            assert differ.mean() <= others, (path, one[differ][:5], other[differ][:5])


@pytest.mark.parametrize("name", ["adamw_8bit", "muon"])
def test_the_ordinary_steps_numbers(name):
    own = {"optim": name}
    assert_same(steps(LLAMA, own), steps(LLAMA, own | IN_BACKWARD), others=1e-3 if "8bit" in name else 0)


def test_groups():
    shape, own = LLAMA | {"num_hidden_layers": 5}, {"gradient_checkpointing": "groups"}
    assert_same(steps(shape, own), steps(shape, own | IN_BACKWARD))


def test_experts_and_stacks():
    """Two dense layers and one of experts, twice: stacks processed side by side, in a group of two units."""
    shape = references.load("qwen3_moe").config | {"decoder_sparse_step": 3, "mlp_only_layers": [], "num_hidden_layers": 6}
    assert from_hf(shape).stacks == ((0, 1, 3, 4), (2, 5))
    assert_same(steps(shape, {"gradient_checkpointing": False}), steps(shape, IN_BACKWARD | {"gradient_checkpointing": "groups"}))


def test_mesh():
    mesh = parallel.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shape = LLAMA | {"intermediate_size": 128}
    assert_same(steps(shape, {}), steps(shape, IN_BACKWARD, mesh))


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm: 0"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps: 1"),
        ({"max_skipped_steps": 1}, "max_skipped_steps"),
        ({"zero_stage": 1}, "mesh.fsdp"),
        ({"gradient_checkpointing": False}, "gradient_checkpointing: full"),
        ({"method": "lora"}, "method lora"),
    ],
)
def test_what_it_cannot_go_with(settings, named):
    given = {"model": "m", "method": "full", "data": {"train": "x"}, **IN_BACKWARD, **settings}
    with pytest.raises(ConfigError, match=named):
        load_config(given)
