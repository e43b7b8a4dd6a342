"""LoRA (arXiv 2106.09685), rank-stabilised LoRA (2312.03732) and DoRA (2402.09353) as parameter pytrees merged at apply time.

One adapter spans stacks of layers: `a [L, R, in]`, `b [L, out, R]` with R the largest rank of the stack, `[L, E, ...]` for experts. A layer
with a smaller rank, or none, has zero rows in `a` and zero columns in `b`: both gradients are zero there, so they stay zero under any
optimiser.
"""

import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxtune.config import LoraConfig
from jaxtune.model.families import ModelConfig
from jaxtune.model.spec import Row
from jaxtune.model.weight import Matrix, Weight, dense, grouped, linear, rows
from jaxtune.peft.adapter import Adapter, Kind, Part, dropout_keys, dropped, kaiming, own_values, put_saved, zeros
from jaxtune.peft.lora_init import has_residual_base, init_pair
from jaxtune.peft.sites import adaptable, check_trained, find_sites, find_wholes, settle
from jaxtune.tree import flatten, unflatten

log = logging.getLogger("jaxtune")


class LoRA(Weight):
    """`W + scale * b a`; the product stays factored. `key` (with `rate`) drops elements of the adapter's input in training."""

    base: Matrix
    a: jax.Array  # [R, in]
    b: jax.Array  # [out, R]
    scale: jax.Array  # []
    key: jax.Array | None = None
    rate: float = struct.field(pytree_node=False, default=0.0)

    def apply(self, x: jax.Array) -> jax.Array:
        """`W x + scale * b (a x)`, with dropout on the x of the second term."""
        return adapted(self.base, x, dropped(x, self.key, self.rate), self.a, self.b, self.scale)

    def grouped(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """Experts: `a [E, R, in]`, `b [E, out, R]`, `scale [E]`, applied to each row of x by its own expert."""
        return grouped(self.base, x, sizes) + grouped(self.b * self.scale[:, None, None], grouped(self.a, x, sizes), sizes)

    def _delta(self) -> jax.Array:
        return self.scale * (self.b.astype(jnp.float32) @ self.a.astype(jnp.float32))

    def dense(self, dtype) -> jax.Array:
        """`W + scale * b a`, added in float32."""
        return (dense(self.base, jnp.float32) + self._delta()).astype(dtype)

    def rows(self, ids: jax.Array, dtype) -> jax.Array:
        """Rows of an adapted embedding."""
        return rows(self.base, ids, dtype) + (linear(self.a.T, self.b[ids].astype(dtype)) * self.scale.astype(dtype))


@jax.custom_vjp
def adapted(base, x, dropped, a, b, scale):
    """`W x + scale * b (a x)`; the second x is `dropped` if given.

    The barriers, here and in the backward pass, save memory: each sum is computed as soon as its parts exist, with the small product after
    the large one, and the gradients of a and b come first, so that x need not be kept for them. Without barriers, XLA orders all three the
    other way.
    """
    y, x = jax.lax.optimization_barrier((linear(base, x), x if dropped is None else dropped))
    return jax.lax.optimization_barrier(y + linear(b, linear(a, x) * scale.astype(x.dtype)))


def _adapted_fwd(base, x, dropped, a, b, scale):
    return adapted(base, x, dropped, a, b, scale), (base, x, dropped, a, b, scale)


def _adapted_bwd(residuals, dy):
    """What autodiff gives (base and scale are not trained), with the small matrix on the left of every product over tokens: for the other
    order XLA would write a transposed copy of x or dy, which on a CPU takes ten times as long as the product."""
    base, x, dropped, a, b, scale = residuals
    _, pull = jax.vjp(lambda x: linear(base, x), x)
    x = x if dropped is None else dropped
    rank_N, wide_N = (x.ndim - 1,), tuple(range(x.ndim - 1))
    scale = scale.astype(x.dtype)
    inner = linear(a, x) * scale
    dinner = jax.lax.dot_general(dy, b.astype(x.dtype), ((rank_N, (0,)), ((), ()))) * scale
    over_tokens = ((wide_N, wide_N), ((), ()))
    da = jax.lax.dot_general(dinner, x, over_tokens, preferred_element_type=jnp.float32)
    # the barrier keeps XLA from reversing the product to save this small transpose
    db = jax.lax.optimization_barrier(jax.lax.dot_general(inner, dy, over_tokens, preferred_element_type=jnp.float32)).T
    dy, dinner, da, db = jax.lax.optimization_barrier((dy, dinner, da.astype(a.dtype), db.astype(b.dtype)))
    dx, dinner = jax.lax.optimization_barrier((*pull(dy), dinner))
    second = jax.lax.dot_general(dinner, a.astype(x.dtype), ((rank_N, (0,)), ((), ())))
    dx, ddropped = (dx + second, None) if dropped is None else (dx, second)
    return None, *jax.lax.optimization_barrier((dx, ddropped)), da, db, None


adapted.defvjp(_adapted_fwd, _adapted_bwd)


class DoRA(LoRA):
    """`m * V / |V|` with `V = W + scale * b a`, |V| the norm of each output row, a constant for the backward pass."""

    magnitude: jax.Array | None = None  # [out]
    live: jax.Array | None = None  # []: whether this layer of the stack is adapted; None: all are

    def _ratio(self, axis: int = 1) -> jax.Array:
        """`m / |V|`, 1 where the layer is not adapted; V is computed again in the backward pass, not kept."""

        def ratio(leaf):
            norm = jnp.linalg.norm(dense(leaf.base, jnp.float32) + leaf._delta(), axis=axis)
            m, norm = (x if leaf.live is None else jnp.where(leaf.live, x, 1.0) for x in (leaf.magnitude, norm))
            return m / jax.lax.stop_gradient(norm)

        return jax.checkpoint(ratio)(self)

    def apply(self, x: jax.Array) -> jax.Array:
        """`m / |V| * V x`."""
        return super().apply(x) * self._ratio().astype(x.dtype)

    def dense(self, dtype) -> jax.Array:
        """`m * V / |V|`."""
        return (super().dense(jnp.float32) * self._ratio()[:, None]).astype(dtype)


class DoRAEmbedding(DoRA):
    """DoRA of an embedding `[V, D]`: |V| is the norm of each of its D columns, as in PEFT."""

    magnitude: jax.Array | None = None  # [D]

    def rows(self, ids: jax.Array, dtype) -> jax.Array:
        """Rows of the embedding."""
        return (super().rows(ids, jnp.float32) * self._ratio(0)).astype(dtype)

    def dense(self, dtype) -> jax.Array:
        """`V * m / |V|`."""
        return (LoRA.dense(self, jnp.float32) * self._ratio(0)).astype(dtype)


def tell_rank(model_config: ModelConfig, config: LoraConfig) -> None:
    """Warn about a rank that no adapted matrix can have: the rank of `b a` is at most min(out, in)."""
    config = settle(model_config, config)
    table, sites = adaptable(model_config), find_sites(model_config, config)
    full = max((min(table[site.path].shape[-2:]) for site in sites), default=0)
    if sites and min(rank for site in sites for rank in site.ranks if rank) > full:
        log.warning(
            "lora.r=%d is more than the rank that any of the adapted matrices can have, %d: it takes memory and changes nothing; "
            "write lora.r=%d or less", config.r, full, full,
        )  # fmt: skip


def init(key: jax.Array, model_config: ModelConfig, params: dict, config: LoraConfig) -> Adapter:
    """A fresh adapter: `a` uniform in ±1/sqrt(in) (PEFT's kaiming with a = sqrt 5) or normal with deviation 1/r ("gaussian"), for an
    embedding normal with deviation 1; `b` zeros; whole parameters start as the base's."""
    config = settle(model_config, config)
    table = adaptable(model_config)
    sites = find_sites(model_config, config)
    leaves = flatten(params)
    tree = {}
    for number, site in enumerate(sites):
        row, rank = table[site.path], max(site.ranks)
        *lead, out, width = row.shape
        ranks = np.asarray(site.ranks, np.float32).reshape(-1, *(1,) * len(row.shape[1:])) if lead else np.float32(rank)
        noise_key = jax.random.fold_in(key, number)
        if site.path == "embed":
            a = jax.random.normal(noise_key, (rank, width))  # as in PEFT, where an embedding's B is initialised like an embedding
        elif config.init_lora_weights == "gaussian":
            a = jax.random.normal(noise_key, (*lead, rank, width)) / np.maximum(ranks, 1)
        else:
            a = jax.random.uniform(noise_key, (*lead, rank, width), minval=-1.0, maxval=1.0) / math.sqrt(width)
        a = jnp.where(np.arange(rank)[:, None] < ranks, a, 0.0)
        pair = {"a": a, "b": jnp.zeros((*lead, out, rank))}
        if has_residual_base(config):
            pair = init_pair(config, noise_key, leaves.get(site.path, leaves["embed"]), site)
        if config.lora_bias:
            pair["bias"] = jnp.zeros((*lead, out))
        if config.use_dora:
            pair["magnitude"] = _norms(leaves.get(site.path, leaves["embed"]), axis=-2 if site.path == "embed" else -1)
        tree[site.path] = pair
    wholes = find_wholes(model_config, config, sites)
    check_trained(config, sites, wholes)
    saved = {whole.path: own_values(whole, leaves.get(whole.path, leaves["embed"]), config) for whole in wholes}
    return Adapter(params=tree, sites=sites, config=config, saved=saved, wholes=wholes)


def _norms(w: Matrix, axis: int) -> jax.Array:
    return jnp.linalg.norm(dense(w, jnp.float32), axis=axis)


def compose(base: dict, adapter: Adapter, key: jax.Array | None = None) -> dict:
    """The tree with its adapted leaves replaced by `LoRA(base, a, b)`; computes next to nothing. `key` enables dropout."""
    leaves = flatten(base)
    put_saved(leaves, adapter)
    for number, site in enumerate(adapter.sites):
        pair = adapter.params[site.path]
        stacked = pair["a"].ndim > 2
        scale = jnp.asarray(site.scales if stacked else site.scales[0], jnp.float32)
        rate = adapter.config.lora_dropout
        keys = dropout_keys(key, rate, number, len(site.scales) if stacked else None)
        if site.path == "embed" and "head" not in leaves and "score" not in leaves:
            leaves["head"] = leaves["embed"]  # as in PEFT, an adapter on the embedding of a tied model leaves the head unchanged
        for path, part in _parts(site.path, pair, scale).items():
            target = leaves["embed"] if path == "head" and "head" not in leaves else leaves[path]
            kind = LoRA if "magnitude" not in part else DoRAEmbedding if path == "embed" else DoRA
            if kind is DoRA and stacked and not all(site.ranks):
                part["live"] = jnp.asarray(site.ranks) > 0
            leaves[path] = kind(base=target, key=keys, rate=rate, **part)
        if "bias" in pair:
            added, own = scale[..., None] * pair["bias"], leaves.get(f"{site.path}_bias")
            leaves[f"{site.path}_bias"] = added if own is None else own.astype(jnp.float32) + added
    return unflatten(leaves)


def _parts(path: str, pair: dict[str, jax.Array], scale: jax.Array) -> dict[str, dict[str, jax.Array]]:
    """The leaves that a pair adapts, with its part for each: two for the experts' gate and up, which it adapts as one matrix."""
    part = {name: pair[name] for name in ("a", "b", "magnitude") if name in pair} | {"scale": scale}
    if part["a"].ndim == 4:
        part["scale"] = jnp.broadcast_to(scale[:, None], part["a"].shape[:2])
    if not path.endswith("experts_gate_up"):
        return {path: part}
    gate, up = jnp.split(part["b"], 2, axis=-2)
    stack = path.removesuffix("experts_gate_up")
    return {f"{stack}experts_gate": part | {"b": gate}, f"{stack}experts_up": part | {"b": up}}


class LoRAKind(Kind):
    """LoRA also adapts embeddings, routers and experts, so it has its own initialisation and composition."""

    config = LoraConfig
    peft_type = "LORA"
    refused = {
        "layer_replication": None, "alora_invocation_tokens": None, "use_qalora": False, "arrow_config": None, "use_bdlora": None,
        "velora_config": None, "kasa_config": None, "monteclora_config": None,
    }  # fmt: skip
    ignored = frozenset("megatron_config megatron_core corda_config lora_ga_config runtime_config qalora_group_size".split())

    def settle(self, model_config: ModelConfig, config: LoraConfig) -> LoraConfig:
        return settle(model_config, config)

    def parts(self, config: LoraConfig, path: str, row: Row, rank: int) -> dict[str, Part]:
        """PEFT's pair for an embedding `[V, D]` is that of its transpose; experts are concatenated in one pair."""
        out, width = row.shape[-2:]
        rank *= row.shape[1] if row.is_experts else 1
        if path == "embed":
            found = {"b": Part((out, rank), ("out", None), "lora_embedding_A", zeros, -1, turned=True),
                     "a": Part((rank, width), (None, "in"), "lora_embedding_B", zeros, -2, turned=True)}  # fmt: skip
            size, axis = width, "in"
        else:
            found = {"a": Part((rank, width), (None, "in"), "lora_A.weight", kaiming, -2),
                     "b": Part((out, rank), ("out", None), "lora_B.weight", zeros, -1)}  # fmt: skip
            size, axis = out, "out"
        if config.lora_bias:
            found["bias"] = Part((out,), ("out",), "lora_B.bias", zeros)
        if config.use_dora:
            found["magnitude"] = Part((size,), (axis,), "lora_magnitude_vector", zeros)
        return found

    def fields(self, adapter: Adapter, model_config: ModelConfig) -> dict[str, Any]:
        """A trained pair is an ordinary one, however it was initialised. `loftq_config` says which quantised base it needs."""
        own, start = adapter.config.to_dict(), adapter.config.init_lora_weights
        loftq = own["loftq_config"] if start == "loftq" else {}
        return own | {"init_lora_weights": start if start == "gaussian" else True, "loftq_config": loftq, "eva_config": None}

    def read_fields(self, saved: dict[str, Any]) -> dict[str, Any]:
        """With PEFT's defaults for missing fields."""
        began = {"init_lora_weights": "loftq"} if saved.get("loftq_config") else {}
        kept = {name: value for name, value in saved.items() if name not in ("init_lora_weights", "eva_config")}
        return {"r": 8, "lora_alpha": 8, "target_modules": ()} | kept | began

    def init(self, key: jax.Array, model_config: ModelConfig, params: dict, config: LoraConfig, tokenizer: Any = None) -> Adapter:
        return init(key, model_config, params, config)

    def compose(self, base: dict, adapter: Adapter, key: jax.Array | None = None) -> dict:
        return compose(base, adapter, key)


KIND = LoRAKind()
