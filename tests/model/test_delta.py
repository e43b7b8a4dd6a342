"""The chunked gated delta rule against the recurrence token by token, and carrying the state from call to call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

from jaxtune.config import PrefixTuningConfig, PromptTuningConfig, load_config
from jaxtune.errors import ConfigError, ModelError
from jaxtune.model import decoder, delta
from jaxtune.model.convolution import convolution
from jaxtune.model.families import from_hf
from jaxtune.objectives.answers import unshared
from jaxtune.peft import kind_of

B, K, H, WIDTH, VALUE = 2, 2, 4, 8, 6


def inputs(T, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((B, T, heads, width)) for heads, width in ((K, WIDTH), (K, WIDTH), (H, VALUE)))
    k[:, : T // 2] = k[:, :1]  # the same key repeatedly: the hardest triangular system
    g, beta = -rng.exponential(0.2, (B, T, H)), rng.uniform(0, 1, (B, T, H))
    begins = rng.uniform(size=(B, T)) < 0.02
    state = rng.standard_normal((B, H, WIDTH, VALUE))
    return [jnp.asarray(x, jnp.float32) for x in (q, k, v, g, beta)], jnp.asarray(begins), jnp.asarray(state, jnp.float32)


def by_token(q, k, v, g, beta, begins, state, erases=True):
    """The formula, in its order."""
    if erases:
        q, k = (x / jnp.sqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
        q = q * WIDTH**-0.5
    q, k = (jnp.repeat(x, H // K, axis=2) for x in (q, k))

    def token(state, now):
        q, k, v, g, beta, begins = now
        state = jnp.where(begins[:, None, None, None], 0, state) * jnp.exp(g)[..., None, None]
        new = (v - erases * jnp.einsum("bhkv,bhk->bhv", state, k)) * beta[..., None]
        state = state + k[..., None] * new[..., None, :]
        return state, jnp.einsum("bhkv,bhk->bhv", state, q)

    state, out = jax.lax.scan(token, state, jax.tree.map(lambda x: x.swapaxes(0, 1), (q, k, v, g, beta, begins)))
    return out.swapaxes(0, 1), state


def close(found, wanted, tolerance=2e-5):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance * float(jnp.abs(other).max()))


@pytest.mark.parametrize("erases", [True, False])
def test_chunks_are_the_recurrence(monkeypatch, erases):
    monkeypatch.setattr(delta, "BLOCK", 128)
    T = 200  # two blocks, and a chunk that is not full
    parts, begins, state = inputs(T)
    weights = np.random.default_rng(1).standard_normal((B, T, H, VALUE))

    def total(rule):
        def of(parts, state):
            out, last = rule(*parts, begins, state, erases=erases)
            return (out * weights).sum() + jnp.square(last).sum(), (out, last)

        return jax.jit(jax.value_and_grad(of, argnums=(0, 1), has_aux=True))(parts, state)

    close(total(delta.gated_delta_rule), total(by_token))


def test_a_state_and_a_tail_go_on():
    """A row in pieces equals the row, for the rule and for the convolution."""
    parts, begins, state = inputs(100)
    w, x = jnp.asarray(np.random.default_rng(2).standard_normal((5, 4))), parts[0][..., 0, :5]

    @jax.jit
    def through(parts, x, begins, state, tail):
        out, state = delta.gated_delta_rule(*parts, begins, state)
        mixed, tail = convolution(w, x, begins, tail)
        return out, mixed, state, tail

    tail = jnp.zeros((B, 3, 5))
    whole, found = through(parts, x, begins, state, tail), []
    for piece in (slice(0, 98), slice(98, 99), slice(99, 100)):
        *own, state, tail = through([part[:, piece] for part in parts], x[:, piece], begins[:, piece], state, tail)
        found.append(own)
    out, mixed = (jnp.concatenate(own, axis=1) for own in zip(*found, strict=True))
    close((out, mixed, state, tail), whole)


def test_no_state_is_kept_for_a_token():
    T, width = 4096, 64

    def total(*parts):
        return delta.gated_delta_rule(*parts, jnp.zeros((1, T), bool))[0].sum()

    shapes = [jax.ShapeDtypeStruct((1, T, *own), jnp.float32) for own in ((1, width), (1, width), (1, width), (1,), (1,))]
    memory = jax.jit(jax.grad(total, argnums=range(5))).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < T * width * width * 4 / 4


def test_layers_that_are_given_something_have_no_virtual_tokens():
    config = from_hf(references.load("gemma4").config)
    for method in (PromptTuningConfig(num_virtual_tokens=2), PrefixTuningConfig(num_virtual_tokens=2)):
        with pytest.raises(ConfigError, match="heads of several sizes, or are given .* write method: lora"):
            kind_of(method).init(jax.random.key(0), config, {}, method)


def test_what_a_state_rules_out():
    """A text that continues from another segment: never computed, and never laid out."""
    config, other = (from_hf(references.load(name).config) for name in ("qwen3_5", "qwen3"))
    run = load_config({"model": "m", "objective": "dpo", "data": {"train": "x"}})
    assert run.data.shared_prompts and unshared(run, other) is run and not unshared(run, config).data.shared_prompts
    of_tokens = load_config({"model": "m", "data": {"train": "x"}})  # no answers, which could share a prompt
    assert unshared(of_tokens, config) is of_tokens
    tokens = jnp.ones((1, 4), jnp.int32)
    with pytest.raises(ModelError, match="data.shared_prompts: false"):
        decoder.hidden(config, {}, tokens, parents_BT=tokens)
    for method in (PromptTuningConfig(num_virtual_tokens=2), PrefixTuningConfig(num_virtual_tokens=2)):
        with pytest.raises(ConfigError, match="carry a state .* write method: lora"):
            kind_of(method).init(jax.random.key(0), config, {}, method)
