import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

from jaxtune.model import decoder
from jaxtune.model.families import from_hf
from jaxtune.model.moe import RouterSums, load_balancing_loss, mixture
from jaxtune.model.spec import spec
from jaxtune.tree import unflatten


def layer(normalize: bool, E=5, chosen=2, D=8, F=12):
    golden = references.load("mixtral")
    config = from_hf(golden.config)
    config = dataclasses.replace(
        config, moe=dataclasses.replace(config.moe, num_experts=E, experts_per_token=chosen, normalize=normalize)
    )
    rng = np.random.default_rng(0)
    shapes = {"router": (E, D), "experts_gate": (E, F, D), "experts_up": (E, F, D), "experts_down": (E, D, F)}
    return config, {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}, rng


@pytest.mark.parametrize("normalize", [False, True])
def test_each_token_goes_through_its_likeliest_experts(normalize):
    config, w, rng = layer(normalize)
    x = rng.standard_normal((2, 7, 8)).astype(np.float32)
    live = np.ones((2, 7), bool)
    live[1, 4:] = False
    wanted, counts, probabilities = np.zeros_like(x), np.zeros(5), np.zeros(5)
    for b, t in np.ndindex(2, 7):
        scores = w["router"] @ x[b, t]
        probs = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        best = np.argsort(-probs)[:2]
        for e in best:
            gate, up = w["experts_gate"][e] @ x[b, t], w["experts_up"][e] @ x[b, t]
            share = probs[e] / (probs[best].sum() if normalize else 1)
            wanted[b, t] += share * (w["experts_down"][e] @ (gate / (1 + np.exp(-gate)) * up))
        counts[best] += live[b, t]
        probabilities += live[b, t] * probs
    found, sums = jax.jit(mixture, static_argnums=0)(config, w, x, live)
    assert np.allclose(found, wanted, atol=1e-4)
    assert np.allclose(sums.assignments_E, counts) and np.allclose(sums.probabilities_E, probabilities, atol=1e-5)
    assert sums.tokens == live.sum()


def test_load_balancing_loss_is_least_for_equal_shares():
    even = RouterSums(jnp.full(4, 10.0), jnp.full(4, 5.0), jnp.asarray(20.0))
    assert float(load_balancing_loss(even)) == pytest.approx(2.0)  # two experts per token
    uneven = RouterSums(jnp.asarray([20.0, 20.0, 0.0, 0.0]), jnp.asarray([10.0, 10.0, 0.0, 0.0]), jnp.asarray(20.0))
    assert float(load_balancing_loss(uneven)) == pytest.approx(4.0)


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_sums_are_pooled_over_expert_layers_and_count_no_padding(case):
    golden = references.load(case)
    config = from_hf(golden.config)
    params = references.tree(config, golden.tensors)
    hidden, sums = jax.jit(decoder.hidden, static_argnums=0), {}
    for kind in ("left", "packed"):
        batch = references.layout(golden.documents, kind)
        sums[kind] = hidden(config, params, batch.tokens, batch.positions, batch.segments).aux
        assert float(sums[kind].tokens) == len(config.moe.layers) * sum(map(len, golden.documents))
        assert float(sums[kind].assignments_E.sum()) == config.moe.experts_per_token * float(sums[kind].tokens)
    assert all(np.allclose(a, b, atol=1e-3) for a, b in zip(sums["left"], sums["packed"], strict=True))
    pull = jax.jit(jax.grad(lambda params: load_balancing_loss(decoder.hidden(config, params, golden.documents[0][None]).aux)))(params)
    stack = next(stack for stack in pull["layers"].values() if "router" in stack)
    assert float(jnp.abs(stack["router"]).max()) > 0


@pytest.mark.parametrize("case", ["linear", "glm4_moe"])
def test_dense_models_and_those_without_the_loss_have_no_sums(case):
    golden = references.load(case)
    config = from_hf(golden.config)
    assert decoder.hidden(config, references.tree(config, golden.tensors), golden.documents[0][None]).aux is None


def test_many_stacks_keep_their_order():
    """As dictionary keys "10" comes before "2"."""
    golden = references.load("qwen3_moe")
    config = from_hf(golden.config | {"num_hidden_layers": 12, "mlp_only_layers": []})
    assert config.stacks == (tuple(range(0, 12, 2)), tuple(range(1, 12, 2)))  # a repeating pattern: side by side
    config = dataclasses.replace(from_hf(references.load("llama").config | {"num_hidden_layers": 12}), cuts=tuple(range(1, 12)))
    assert config.stacks == tuple((layer,) for layer in range(12))
    rng = np.random.default_rng(0)
    leaves = {path: rng.standard_normal(row.shape).astype(np.float32) * 0.3 for path, row in spec(config).items()}
    tokens = golden.documents[0][None]
    direct = decoder.forward(config, unflatten(leaves), tokens)  # in the order of the row table; jit sorts a dictionary's keys
    sorted_keys = jax.jit(decoder.forward, static_argnums=0)(config, unflatten(leaves), tokens)
    assert np.allclose(direct, sorted_keys, atol=1e-3)
