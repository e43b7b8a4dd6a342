"""LoRA initialised with a part of the matrix: PiSSA (arXiv 2404.02948), its largest singular vectors, and OLoRA (2406.01775), its QR.

The initial pair is subtracted from the base, `W - scale * b0 a0`, so that a fresh adapter changes nothing. The result is saved as `scale *
(b a - b0 a0)`, LoRA of twice the rank over the original base (PEFT's `path_initial_model_for_weight_conversion`).
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.config import LoraConfig
from jaxtune.errors import ConfigError
from jaxtune.model.families import ModelConfig
from jaxtune.model.weight import Matrix, Weight, dense, linear
from jaxtune.peft.adapter import Adapter
from jaxtune.peft.combine import combine
from jaxtune.peft.sites import Site, is_parameter
from jaxtune.tree import flatten, unflatten


class ResidualBase(Weight):
    """`W - scale * b a`, all of it frozen."""

    base: Matrix
    a: jax.Array  # [R, in]
    b: jax.Array  # [out, R]
    scale: jax.Array  # []

    def apply(self, x: jax.Array) -> jax.Array:
        """`W x - scale * b (a x)`."""
        return linear(self.base, x) - linear(self.b, linear(self.a, x) * self.scale.astype(x.dtype))

    def dense(self, dtype) -> jax.Array:
        """The matrix itself, in float32."""
        return (dense(self.base, jnp.float32) - self.scale * (self.b @ self.a)).astype(dtype)


def has_residual_base(config: Any) -> bool:
    """Whether adapters of this config start with a part of the base, which is subtracted from it."""
    return isinstance(config, LoraConfig) and config.init_lora_weights not in (True, "gaussian", "loftq", "eva")


def init_from_run(config: Any) -> str | None:
    """`loftq` or `eva` if a run's adapter is initialised from the model's files (jaxtune/loftq.py) or from the rows (jaxtune/eva.py)."""
    start = config.lora.init_lora_weights
    return start if config.method in ("lora", "qlora") and not config.init_adapter and start in ("loftq", "eva") else None


def with_widest_ranks(config: Any) -> Any:
    """The run with the largest ranks that EVA may give each layer, for which its step is planned."""
    if init_from_run(config) != "eva":
        return config
    lora, rho = config.lora, config.lora.eva_config.rho
    ranks = tuple((name, round(rank * rho)) for name, rank in lora.rank_pattern)
    return config.replace(lora=dataclasses.replace(lora, r=round(lora.r * rho), rank_pattern=ranks))


def init_pair(config: LoraConfig, key: jax.Array, w: Matrix, site: Site) -> dict[str, jax.Array]:
    """`a` and `b` of all layers of a site, with the largest rank; entries beyond a layer's own rank are zero. ConfigError for experts and
    embeddings."""
    if is_parameter(site.path) or site.path == "embed":
        raise ConfigError(f"lora.init_lora_weights={config.init_lora_weights} is for linear layers, and {site.path} is none; leave it out")
    rank, stacked = max(site.ranks), site.stacked
    of = _olora if config.init_lora_weights == "olora" else _pissa

    def one(layer):
        leaf, own, scale, key = layer
        a, b = of(dense(leaf, jnp.float32), rank, scale, key, str(config.init_lora_weights))
        live = jnp.arange(rank) < own
        return {"a": a * live[:, None], "b": b * live}

    keys = jax.random.split(key, len(site.ranks))
    scales = jnp.asarray([scale or 1.0 for scale in site.scales], jnp.float32)
    if not stacked:
        return one((w, jnp.asarray(site.ranks[0]), scales[0], keys[0]))
    return jax.lax.map(one, (w, jnp.asarray(site.ranks), scales, keys))


def _pissa(w: jax.Array, rank: int, scale: jax.Array, key: jax.Array, how: str) -> tuple[jax.Array, jax.Array]:
    steps = re.fullmatch(r"pissa_niter_(\d+)", how)
    u, s, v = randomized_svd(w, rank, int(steps[1]), key) if steps else jnp.linalg.svd(w, full_matrices=False)
    root = jnp.sqrt(s[:rank] / scale)
    return root[:, None] * v[:rank], u[:, :rank] * root


def randomized_svd(w: jax.Array, rank: int, steps: int, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The `rank` largest singular values and their vectors, approximately, by `steps` power iterations (arXiv 0909.4061)."""
    q, _ = jnp.linalg.qr(w @ jax.random.normal(key, (w.shape[1], rank)))
    for _ in range(steps):
        q, _ = jnp.linalg.qr(w.T @ q)
        q, _ = jnp.linalg.qr(w @ q)
    u, s, v = jnp.linalg.svd(q.T @ w, full_matrices=False)
    return q @ u, s, v


def _olora(w: jax.Array, rank: int, scale: jax.Array, key: jax.Array, how: str) -> tuple[jax.Array, jax.Array]:
    q, r = jnp.linalg.qr(w)
    return r[:rank], q[:, :rank]


def residual_base(base: dict, initial: Adapter | None, place: Callable[[jax.Array], Any] = lambda scale: scale) -> dict:
    """The base minus what `initial` adds; unchanged without it. `place` puts a scale on the devices of the rest."""
    if initial is None:
        return base
    leaves = flatten(base)
    for site in initial.sites:
        pair, stacked = initial.params[site.path], site.stacked
        scale = jnp.asarray(site.scales if stacked else site.scales[0], jnp.float32)
        target = leaves["embed"] if site.path == "head" and "head" not in leaves else leaves[site.path]
        leaves[site.path] = ResidualBase(target, pair["a"], pair["b"], place(scale))
    return unflatten(leaves)


def original_base(base: dict) -> dict | None:
    """The base as it was before `residual_base`; None if `residual_base` changed nothing."""
    is_residual = lambda leaf: isinstance(leaf, ResidualBase)  # noqa: E731
    if not any(map(is_residual, jax.tree.leaves(base, is_leaf=is_residual))):
        return None
    return jax.tree.map(lambda leaf: leaf.base if is_residual(leaf) else leaf, base, is_leaf=is_residual)


def on_original_base(model_config: ModelConfig, adapter: Any, initial: Adapter | None) -> Any:
    """The adapter over the original base, of twice the rank; `adapter` itself if the base was not changed."""
    if initial is None:
        return adapter
    pairs = [one.replace(saved={}, wholes=()) for one in (adapter, initial)]  # whole parameters (a head) leave the base unchanged
    return combine(model_config, pairs, [1.0, -1.0]).replace(saved=adapter.saved, wholes=adapter.wholes)
