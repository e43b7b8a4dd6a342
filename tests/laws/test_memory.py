"""Law 8: dequantised weights are never live across layers, according to the compiler's count of the step's temporaries."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval

from jaxtune import peft
from jaxtune.config import LoHaConfig, LoraConfig, OFTConfig, load_config
from jaxtune.data.batch import Batch
from jaxtune.model import quant
from jaxtune.model.decoder import forward, hidden
from jaxtune.model.families import from_hf
from jaxtune.model.moe import load_balancing_loss
from jaxtune.model.spec import spec
from jaxtune.model.weight import Weight, linear
from jaxtune.objectives import OBJECTIVES
from jaxtune.peft import lora
from jaxtune.step import how_to_compute, init_state, make_step
from jaxtune.tree import unflatten

SHAPE = tiny.LLAMA | {"hidden_size": 128, "intermediate_size": 512, "attention_bias": False}
EXPERTS = SHAPE | {
    "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "decoder_sparse_step": 1,
    "intermediate_size": 64,
}  # fmt: skip
LORA = LoraConfig(r=2)
METHODS = [LoHaConfig(r=2), OFTConfig(oft_block_size=4)]  # whose leaves create large arrays for a product
TOKENS = 8  # few, so that weights dominate the memory


def temporaries(
    layers: int, remat: str, quantization: str | None, shape: dict, tokens: int = TOKENS, adapter=LORA, **how
) -> int:
    """Bytes of temporaries of one adapter's step on a model with that many layers."""
    config = dataclasses.replace(from_hf(shape | {"num_hidden_layers": layers}), remat=remat, **how)
    loop = dict(max_grad_norm=1.0, max_skipped_steps=0, optimizer_in_bwd=False)
    run = SimpleNamespace(**loop, neftune_noise_alpha=None, router_aux_loss_coef=0.001, loss_type=None)
    flat = {}
    for path, row in spec(config).items():
        if row.can_be_packed and quantization:
            *lead, out, width = row.shape
            leaf = quant.abstract(quantization, (out, width))
            flat[path] = jax.tree.map(lambda x, lead=lead: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype), leaf)
        else:
            flat[path] = jax.ShapeDtypeStruct(row.shape, jnp.float32)
    base = unflatten(flat)
    optimizer = optax.sgd(1.0)
    state = jax.eval_shape(lambda p: init_state(peft.kind_of(adapter).init(jax.random.key(0), config, p, adapter), optimizer, 0), base)
    numbers = jnp.arange(tokens, dtype=jnp.int32)[None, None]
    batch = Batch(numbers, (numbers > 0).astype(jnp.float32), numbers, jnp.ones_like(numbers))
    step = jax.jit(make_step(run, config, OBJECTIVES["sft"], optimizer))
    return step.lower(state, base, batch).compile().memory_analysis().temp_size_in_bytes


def dense_layer(shape: dict) -> int:
    rows = spec(from_hf(shape)).values()
    return sum(4 * int(np.prod(row.shape[1:])) for row in rows if row.can_be_packed)


def growth(remat: str, quantization: str | None = "nf4-dq", shape: dict = SHAPE, adapter=LORA) -> float:
    """Temporaries that one more layer takes, in dense layers."""
    ten, two = (temporaries(layers, remat, quantization, shape, adapter=adapter) for layers in (10, 2))
    return (ten - two) / 8 / dense_layer(shape)


@pytest.mark.parametrize(("kind", "remat"), [("nf4-dq", "none"), ("nf4-dq", "dots"), ("nf4-dq", "full"), ("int8", "none")])
def test_a_layer_leaves_no_dense_copy(kind, remat):
    assert growth(remat, kind) < 0.2


@pytest.mark.parametrize("adapter", METHODS, ids=lambda config: config.group)
def test_no_method_leaves_a_dense_copy(adapter):
    assert growth("none", "int8", adapter=adapter) < 0.2


def test_a_long_row_takes_memory_by_its_length():
    """Twice the tokens take twice the bytes, and only one chunk of the feed-forward part (here 16 times the width)."""
    shape = SHAPE | {"intermediate_size": 2048}
    chunked, longer = (temporaries(1, "full", None, shape, tokens, mlp_chunk=256, logits_chunk=128) for tokens in (2048, 4096))
    assert longer < 2.1 * chunked
    whole = temporaries(1, "full", None, shape, 4096, mlp_chunk=4096, logits_chunk=128)
    assert whole - longer > 1.5 * 4096 * 2048 * 4


def test_experts_leave_no_dense_copy():
    assert growth("none", shape=EXPERTS) < 0.2  # 0.99 if autodiff keeps the matrices


def test_the_measure_sees_a_dense_copy(monkeypatch):
    """Autodiff through the plain product keeps the matrices: this law's failure, made on purpose."""
    monkeypatch.setattr(quant.NF4, "apply", Weight.apply)
    monkeypatch.setattr(lora, "adapted", lambda base, x, dropped, a, b, scale: linear(base, x) + linear(b, linear(a, x)) * scale)
    assert growth("none") > 0.9


def test_the_default_keeps_products_on_a_cpu_and_nothing_elsewhere():
    run = load_config({"model": "x", "data": {"train": "x.jsonl"}, "output_dir": "x"})
    chosen = {platform: how_to_compute(run, from_hf(SHAPE), tiny.mesh_on(platform)).remat for platform in ("cpu", "gpu", "tpu")}
    assert chosen == {"cpu": "dots", "gpu": "full", "tpu": "full"}


def test_what_is_kept_changes_no_number():
    """Gradients are bit-identical or nearly, whatever the backward pass recomputes, keeps or offloads."""
    config = from_hf(SHAPE | {"num_hidden_layers": 5})  # groups of 2, 2 and 1
    keys = iter(jax.random.split(jax.random.key(0), 100))
    params = unflatten({path: 0.05 * jax.random.normal(next(keys), row.shape) for path, row in spec(config).items()})
    tokens = jax.random.randint(next(keys), (2, 16), 0, SHAPE["vocab_size"])

    def gradient(remat, **chunks):
        how = dataclasses.replace(config, remat=remat, **chunks)
        return jax.jit(jax.grad(lambda params: jnp.square(forward(how, params, tokens)).mean()))(params)

    plain = gradient("none")
    ways = [(name, {}) for name in ("dots", "full", "offload", "groups")]
    for remat, chunks in (*ways, ("full", {"mlp_chunk": 10})):  # three chunks, the last not full
        for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(gradient(remat, **chunks)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6 * float(jnp.abs(one).max()), err_msg=f"{remat} {chunks}")


@pytest.mark.parametrize("remat", ["full", "groups"])
def test_what_routers_are_asked_for_comes_through(remat):
    """The load-balancing loss has the same gradient if layers are recomputed."""
    config = from_hf(EXPERTS | {"num_hidden_layers": 3})  # groups of 2 and 1
    keys = iter(jax.random.split(jax.random.key(0), 100))
    params = unflatten({path: 0.05 * jax.random.normal(next(keys), row.shape) for path, row in spec(config).items()})

    def gradient(remat):
        how = dataclasses.replace(config, remat=remat)
        return jax.jit(jax.grad(lambda params: load_balancing_loss(hidden(how, params, jnp.arange(16)[None]).aux)))(params)

    routers = [tree["layers"]["0"]["router"] for tree in (gradient("none"), gradient(remat))]
    assert jnp.abs(routers[0]).max() > 0
    np.testing.assert_allclose(*routers, rtol=1e-5, atol=1e-7)


def test_chunks_take_no_product_twice_more():
    """Gate and up are computed again in the backward pass, as without chunks, and nothing else is."""
    width = 112  # of no other matrix
    config = from_hf(SHAPE | {"intermediate_size": width})
    params = unflatten({path: jax.ShapeDtypeStruct(row.shape, jnp.float32) for path, row in spec(config).items()})

    def products(jaxpr) -> int:
        found = 0
        for eqn in jaxpr.eqns:
            found += eqn.primitive.name == "dot_general" and any(width in v.aval.shape for v in (*eqn.invars, *eqn.outvars))
            found += sum(products(inner) for inner in jaxprs_in_params(eqn.params))
        return found

    def of(**how):
        chosen = dataclasses.replace(config, **how)
        tokens = jnp.zeros((1, 32), jnp.int32)
        whole = jax.make_jaxpr(jax.grad(lambda params: forward(chosen, params, tokens).sum()))(params).jaxpr
        return products(partial_eval.dce_jaxpr(whole, [True] * len(whole.outvars))[0])  # XLA omits unused results too

    assert of(remat="full", mlp_chunk=8) == of(remat="full") == of(remat="none") + 2
