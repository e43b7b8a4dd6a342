"""Laws 1 and 2: a fresh adapter changes nothing; merged equals composed; a frozen base gets no gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxtune import peft
from jaxtune.config import LoraConfig
from jaxtune.convert.load import load
from jaxtune.errors import ConfigError
from jaxtune.model.decoder import forward

TOKENS = np.asarray([[5, 9, 33, 2, 71, 8, 40], [1, 3, 3, 60, 4, 9, 12]], np.int32)
VARIANTS = {
    "all-linear": LoraConfig(r=4),
    "list": LoraConfig(r=4, target_modules=("q_proj", "down_proj")),
    "regex": LoraConfig(r=4, target_modules=r".*layers\.[02]\..*(k|up)_proj"),
    "layers": LoraConfig(r=4, target_modules=("v_proj",), layers_to_transform=(1,)),
    "rsLoRA": LoraConfig(r=9, lora_alpha=4, use_rslora=True),
    "patterns": LoraConfig(r=2, rank_pattern=(("layers.1.self_attn.q_proj", 5), ("q_proj", 3)), alpha_pattern=(("up_proj", 64),)),
    "gaussian": LoraConfig(r=4, init_lora_weights="gaussian"),
    "head and embedding": LoraConfig(r=4, target_modules=("lm_head", "embed_tokens", "o_proj")),
    "DoRA": LoraConfig(r=4, use_dora=True),
    "DoRA of the ends": LoraConfig(r=4, use_dora=True, target_modules=("embed_tokens", "lm_head")),
    "all biases": LoraConfig(r=4, bias="all", target_modules=("q_proj",)),
    "biases of some layers": LoraConfig(r=4, bias="lora_only", target_modules=("k_proj", "o_proj"), layers_to_transform=(0, 2)),
    "biases of its own": LoraConfig(r=4, lora_bias=True, target_modules=("q_proj", "o_proj"), layers_to_transform=(1,)),
    "bias of the head": LoraConfig(r=4, lora_bias=True, target_modules=("lm_head", "o_proj")),
    "modules": LoraConfig(r=4, target_modules=("q_proj",), modules_to_save=("lm_head", "embed_tokens", "norm", "layers.1.mlp")),
    "tokens": LoraConfig(r=4, target_modules=("q_proj",), trainable_token_indices=(3, 9, 60)),
    "tokens of the head": LoraConfig(r=4, target_modules=("q_proj",), trainable_token_indices={"lm_head": (3, 9, 60)}),
}
MOE = {  # with a dense layer among the expert layers
    "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
}  # fmt: skip
EXPERTS = {
    "all-linear of experts": LoraConfig(r=4),
    "parameters": LoraConfig(
        r=4, target_modules=(), rank_pattern={"down_proj": 2},
        target_parameters=("mlp.experts.down_proj", "layers.2.mlp.experts.gate_up_proj"),
    ),
}  # fmt: skip


BASES = {"dense": None, "nf4-dq": "nf4-dq", "int8": "int8"}
# every variant over a dense base; over quantised bases those that use the base differently
EACH = [("dense", name) for name in VARIANTS] + [(base, name) for base in ("nf4-dq", "int8") for name in ("all-linear", "DoRA")]
EACH += [("experts", name) for name in EXPERTS] + [("experts nf4", "all-linear of experts")]
VARIANTS |= EXPERTS


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny.write(folder / "llama")
    tiny.write(folder / "experts", tiny.LLAMA | MOE)
    experts = {"experts": load(folder / "experts"), "experts nf4": load(folder / "experts", quantization="nf4")}
    return {name: load(folder / "llama", quantization=quantization) for name, quantization in BASES.items()} | experts


@pytest.fixture(params=BASES)
def model(models, request):
    return models[request.param]


logits = jax.jit(forward, static_argnums=0)


def trained(adapter, seed=1):
    """The adapter with noise wherever training could have changed it, but not in ranks that a layer lacks."""
    params, rng = {}, np.random.default_rng(seed)
    for site in adapter.sites:
        live = np.arange(max(site.ranks)) < np.asarray(site.ranks)[:, None]
        noise = {name: 0.1 * rng.standard_normal(leaf.shape).astype(np.float32) for name, leaf in adapter.params[site.path].items()}
        middle = (1,) * (noise["a"].ndim - 3)  # of experts
        live = live.reshape(-1, *middle, max(site.ranks)) if noise["a"].ndim > 2 else live[0]
        noise["a"] *= live[..., :, None]
        noise["b"] *= live[..., None, :]
        params[site.path] = {name: leaf + noise[name] for name, leaf in adapter.params[site.path].items()}
    saved = {path: leaf + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32) for path, leaf in adapter.saved.items()}
    return adapter.replace(params=params, saved=saved)


@pytest.mark.parametrize("base_name, name", EACH)
def test_fresh_adapter_changes_nothing(models, base_name, name):
    model = models[base_name]
    adapter = peft.init_adapter(jax.random.key(0), model, VARIANTS[name])
    base = logits(model.config, model.params, TOKENS)
    composed = logits(model.config, peft.compose(model.params, adapter), TOKENS)
    if "DoRA" in name:  # divides by a norm that is computed again: equal to rounding
        np.testing.assert_allclose(composed, base, atol=1e-4)
    elif name == "tokens of the head":  # their logits come from a separate product, summed in another order
        np.testing.assert_allclose(composed, base, atol=2e-6)
    else:
        np.testing.assert_array_equal(composed, base)


@pytest.mark.parametrize("base_name, name", EACH)
def test_merged_equals_composed(models, base_name, name):
    model = models[base_name]
    adapter = trained(peft.init_adapter(jax.random.key(0), model, VARIANTS[name]))
    composed = logits(model.config, peft.compose(model.params, adapter), TOKENS)
    merged_tree = peft.merge(model.params, adapter)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(merged_tree))
    merged = logits(model.config, merged_tree, TOKENS)
    assert np.abs(composed - logits(model.config, model.params, TOKENS)).max() > 1e-2  # the adapter has an effect
    np.testing.assert_allclose(merged, composed, atol=2e-4)


def test_gradients_reach_the_adapter_alone(model):
    adapter = trained(peft.init_adapter(jax.random.key(0), model, VARIANTS["patterns"]))

    def loss(adapter):
        return jnp.square(forward(model.config, peft.compose(model.params, adapter), TOKENS)).mean()

    grads = jax.grad(loss)(adapter)
    for site in adapter.sites:
        a, b = grads.params[site.path]["a"], grads.params[site.path]["b"]
        for layer, rank in enumerate(site.ranks):
            assert np.all(a[layer, rank:] == 0) and np.all(b[layer, :, rank:] == 0)
            if rank:
                assert np.abs(a[layer, :rank]).max() > 0 and np.abs(b[layer, :, :rank]).max() > 0


def test_dora_leaves_other_layers_alone(models):
    """Whatever a stack's magnitudes are in layers without a pair: zeros in an adapter that was read."""
    model = models["dense"]
    config = LoraConfig(r=4, use_dora=True, target_modules=("q_proj", "up_proj"), layers_to_transform=(0, 2))
    adapter = trained(peft.init_adapter(jax.random.key(0), model, config))
    read = {path: pair | {"magnitude": pair["magnitude"].at[1].set(0)} for path, pair in adapter.params.items()}
    first, second = (logits(model.config, peft.compose(model.params, each), TOKENS) for each in (adapter, adapter.replace(params=read)))
    np.testing.assert_array_equal(second, first)


def test_ranks_and_scales_follow_the_first_pattern(model):
    adapter = peft.init_adapter(jax.random.key(0), model, VARIANTS["patterns"])
    sites = {site.path: site for site in adapter.sites}
    assert sites["layers/0/q"].ranks == (3, 5, 3)
    assert sites["layers/0/q"].scales == (32 / 3, 32 / 5, 32 / 3)
    assert sites["layers/0/up"].scales == (32.0,) * 3
    rs = peft.init_adapter(jax.random.key(0), model, VARIANTS["rsLoRA"])
    assert rs.sites[0].scales == (4 / 3,) * 3


def test_initial_a_is_uniform_within_pefts_bound(model):
    adapter = peft.init_adapter(jax.random.key(0), model, LoraConfig(r=64))
    a = np.asarray(adapter.params["layers/0/down"]["a"])
    bound = 1 / np.sqrt(a.shape[-1])
    assert np.abs(a).max() <= bound and np.isclose(a.std(), bound / np.sqrt(3), rtol=0.05)
    assert a.dtype == np.float32


def test_dropout_draws_from_the_key(model):
    config = dataclasses.replace(VARIANTS["all-linear"], lora_dropout=0.5)
    adapter = trained(peft.init_adapter(jax.random.key(0), model, config))

    def run(key):
        return np.asarray(logits(model.config, peft.compose(model.params, adapter, key), TOKENS))

    assert np.array_equal(run(jax.random.key(1)), run(jax.random.key(1)))
    assert not np.array_equal(run(jax.random.key(1)), run(jax.random.key(2)))
    assert np.array_equal(run(None), np.asarray(logits(model.config, peft.compose(model.params, adapter), TOKENS)))


@pytest.mark.parametrize("targets", [("q_proj", "wrong_proj"), "nothing.*"])
def test_a_target_that_matches_nothing_is_an_error(models, targets):
    with pytest.raises(ConfigError, match="matches no linear layer.*down_proj.*q_proj"):
        peft.init_adapter(jax.random.key(0), models["dense"], LoraConfig(target_modules=targets))
