"""LoRA (arXiv 2106.09685), rank-stabilised LoRA (2312.03732) and DoRA (2402.09353) as parameter pytrees merged at apply time.

One adapter spans stacks of layers: `a [L, R, in]`, `b [L, out, R]` with R the largest rank of the stack. A layer with a smaller rank,
or none, has zero rows in `a` and zero columns in `b`: both gradients are zero there, so they stay zero under any optimiser.
"""

import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxtune.config import LoraConfig
from jaxtune.errors import ConfigError
from jaxtune.model.families import FAMILIES, ModelConfig, heads
from jaxtune.model.spec import Row, spec
from jaxtune.model.weight import Matrix, Weight, dense, linear, rows
from jaxtune.tree import flatten, unflatten


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
        return linear(self.base, x) + self._low_rank(x)

    def _low_rank(self, x: jax.Array) -> jax.Array:
        if self.key is not None and self.rate > 0:
            keep = jax.random.bernoulli(self.key, 1 - self.rate, x.shape)
            x = jnp.where(keep, x / (1 - self.rate), 0).astype(x.dtype)
        return _low_rank(x, self.a, self.b, self.scale)

    def _delta(self) -> jax.Array:
        return self.scale * (self.b.astype(jnp.float32) @ self.a.astype(jnp.float32))

    def dense(self, dtype) -> jax.Array:
        """`W + scale * b a`, added in float32."""
        return (dense(self.base, jnp.float32) + self._delta()).astype(dtype)

    def rows(self, ids: jax.Array, dtype) -> jax.Array:
        """Rows of an adapted embedding."""
        return rows(self.base, ids, dtype) + (linear(self.a.T, self.b[ids].astype(dtype)) * self.scale.astype(dtype))


@jax.custom_vjp
def _low_rank(x, a, b, scale):
    """`scale * b (a x)`."""
    return linear(b, linear(a, x) * scale.astype(x.dtype))


def _low_rank_fwd(x, a, b, scale):
    return _low_rank(x, a, b, scale), (x, a, b, scale)


def _low_rank_bwd(residuals, dy):
    """What autodiff gives (the scale is not trained), with the small matrix on the left of every product over tokens: XLA would write
    a transposed copy of x or dy for the other order, which on a CPU takes ten times as long as the product."""
    x, a, b, scale = residuals
    rank_N, wide_N = (x.ndim - 1,), tuple(range(x.ndim - 1))
    scale = scale.astype(x.dtype)
    inner = linear(a, x) * scale
    dinner = jax.lax.dot_general(dy, b.astype(x.dtype), ((rank_N, (0,)), ((), ()))) * scale
    over_tokens = ((wide_N, wide_N), ((), ()))
    da = jax.lax.dot_general(dinner, x, over_tokens, preferred_element_type=jnp.float32)
    # the barrier keeps XLA from turning the product round to save this small transpose
    db = jax.lax.optimization_barrier(jax.lax.dot_general(inner, dy, over_tokens, preferred_element_type=jnp.float32)).T
    dx = jax.lax.dot_general(dinner, a.astype(x.dtype), ((rank_N, (0,)), ((), ())))
    return dx, da.astype(a.dtype), db.astype(b.dtype), None


_low_rank.defvjp(_low_rank_fwd, _low_rank_bwd)


class DoRA(LoRA):
    """`m * V / |V|` with `V = W + scale * b a`, |V| the norm of each output row, taken as a constant in the backward pass."""

    magnitude: jax.Array | None = None  # [out]

    def _ratio(self) -> jax.Array:
        norm = jnp.linalg.norm(dense(self.base, jnp.float32) + self._delta(), axis=1)
        return self.magnitude / jax.lax.stop_gradient(norm)

    def apply(self, x: jax.Array) -> jax.Array:
        """`m / |V| * V x`; V is made again in the backward pass, not kept."""
        ratio = jax.checkpoint(lambda leaf: leaf._ratio())(self)
        return (linear(self.base, x) + self._low_rank(x)) * ratio.astype(x.dtype)

    def dense(self, dtype) -> jax.Array:
        """`m * V / |V|`."""
        return (super().dense(jnp.float32) * self._ratio()[:, None]).astype(dtype)


class Site(NamedTuple):
    """One adapted row of the table: per layer of its stack the rank (0: not adapted) and the scale `alpha / r`."""

    path: str
    ranks: tuple[int, ...]
    scales: tuple[float, ...]


class Adapter(struct.PyTreeNode):
    """A LoRA adapter: `params[path] = {"a", "b"[, "magnitude"]}` in float32, trained; the sites and the config beside them, static.

    `saved[path]` are whole parameters that are trained beside it, float32 (PEFT's `modules_to_save`): the scoring head.
    """

    params: dict[str, dict[str, jax.Array]]
    sites: tuple[Site, ...] = struct.field(pytree_node=False)
    config: LoraConfig = struct.field(pytree_node=False)
    saved: dict[str, jax.Array] = struct.field(default_factory=dict)


def init(key: jax.Array, model_config: ModelConfig, params: dict, config: LoraConfig) -> Adapter:
    """A fresh adapter: `a` uniform in ±1/sqrt(in) (PEFT's kaiming with a = sqrt 5) or normal with deviation 1/r ("gaussian"), `b` zeros."""
    table = adaptable(model_config)
    sites = find_sites(model_config, config)
    leaves = flatten(params)
    tree = {}
    for number, site in enumerate(sites):
        row, rank = table[site.path], max(site.ranks)
        stacked = bool(row.layers)
        out, width = row.shape[-2:]
        shape = (len(site.ranks), rank, width)
        noise_key = jax.random.fold_in(key, number)
        if config.init_lora_weights == "gaussian":
            a = jax.random.normal(noise_key, shape) / np.asarray(site.ranks, np.float32).clip(1)[:, None, None]
        elif config.init_lora_weights is True:
            a = jax.random.uniform(noise_key, shape, minval=-1.0, maxval=1.0) / math.sqrt(width)
        else:
            raise ConfigError(f"lora.init_lora_weights={config.init_lora_weights!r} is not supported; write true or gaussian")
        a = jnp.where(np.arange(rank)[None, :, None] < np.asarray(site.ranks)[:, None, None], a, 0.0)
        pair = {"a": a, "b": jnp.zeros((len(site.ranks), out, rank))}
        if not stacked:
            pair = {name: leaf[0] for name, leaf in pair.items()}
        if config.use_dora:
            pair["magnitude"] = _row_norms(leaves[site.path])
        tree[site.path] = pair
    saved = {path: leaves[path].astype(jnp.float32) for path in heads.PATHS if path in leaves}
    return Adapter(params=tree, sites=sites, config=config, saved=saved)


def _row_norms(w: Matrix) -> jax.Array:
    return jnp.linalg.norm(dense(w, jnp.float32), axis=-1)


def compose(base: dict, adapter: Adapter, key: jax.Array | None = None) -> dict:
    """The tree with its adapted leaves replaced by `LoRA(base, a, b)`; computes nothing. `key` switches dropout on."""
    leaves = flatten(base)
    for number, site in enumerate(adapter.sites):
        pair, stacked = adapter.params[site.path], adapter.params[site.path]["a"].ndim == 3
        scale = jnp.asarray(site.scales if stacked else site.scales[0], jnp.float32)
        rate, keys = adapter.config.lora_dropout, None
        if key is not None and rate > 0:
            keys = jax.random.fold_in(key, number)
            keys = jax.random.split(keys, len(site.scales)) if stacked else keys
        if site.path == "embed" and "head" not in leaves and "score" not in leaves:
            leaves["head"] = leaves["embed"]  # as in PEFT, an adapter on the embedding of a tied model leaves the head alone
        target = leaves["embed"] if site.path == "head" and "head" not in leaves else leaves[site.path]
        kind = DoRA if "magnitude" in pair else LoRA
        extra = {"magnitude": pair["magnitude"]} if "magnitude" in pair else {}
        leaves[site.path] = kind(base=target, a=pair["a"], b=pair["b"], scale=scale, key=keys, rate=rate, **extra)
    return unflatten(leaves | adapter.saved)


# ---- targets ----


def module_names(row: Row) -> list[str]:
    """PEFT's names of the modules a row stacks: `model.layers.0.self_attn.q_proj`, ..."""
    return [name.removesuffix(".weight") for name in row.hf_names()]


def adaptable(model_config: ModelConfig) -> dict[str, Row]:
    """The rows an adapter can stand at: matrices inside the layers, the embedding, the output head (a tied one too, alone)."""
    rows = spec(model_config)
    if "head" not in rows and not model_config.num_labels:
        rows["head"] = rows["embed"]._replace(hf=f"{FAMILIES[model_config.model_type].ends['head']}.weight")
    return {path: row for path, row in rows.items() if row.is_matrix or path in ("embed", "head")}


def find_sites(model_config: ModelConfig, config: LoraConfig) -> tuple[Site, ...]:
    """Which rows and layers the config's `target_modules` names, with ranks and scales, by PEFT's rules.

    A list matches a module's full name or its end (`q_proj`), a string is a regular expression for the full name, "all-linear" is
    every linear layer but the output head. `ConfigError` for a target that matches nothing, naming what is there.
    """
    sites, matched = [], set()
    rows = adaptable(model_config)
    for path, row in rows.items():
        hits = [_matches(name, row, config) for name in module_names(row)]
        matched.update(hit for hit in hits if hit)
        if any(hits):
            pairs = [rank_and_scale(name, config) if hit else (0, 0.0) for name, hit in zip(module_names(row), hits, strict=True)]
            sites.append(Site(path, tuple(r for r, _ in pairs), tuple(s for _, s in pairs)))
    targets = config.target_modules
    wanted = {targets} if isinstance(targets, str) else set(targets or ())
    if missing := sorted(wanted - matched):
        names = sorted({name.rsplit(".", 1)[-1] for row in rows.values() if row.is_matrix for name in module_names(row)})
        raise ConfigError(f"lora.target_modules: {', '.join(missing)} matches no linear layer of this model; there are {', '.join(names)}")
    return tuple(sites)


def _matches(name: str, row: Row, config: LoraConfig) -> str | None:
    """The target that names this module, or None."""
    if config.exclude_modules and _named(name, config.exclude_modules):
        return None
    if config.target_modules == "all-linear":
        return "all-linear" if row.is_matrix else None
    hit = _named(name, config.target_modules)
    if hit and hit != name and config.layers_to_transform is not None and not isinstance(config.target_modules, str):
        layer = re.search(r"\.(\d+)\.", name)
        chosen = config.layers_to_transform
        if layer is None or int(layer.group(1)) not in ((chosen,) if isinstance(chosen, int) else chosen):
            return None
    return hit


def _named(name: str, targets) -> str | None:
    if isinstance(targets, str):
        return targets if re.fullmatch(targets, name) else None
    return next((t for t in targets if name == t or name.endswith("." + t)), None)


def rank_and_scale(name: str, config: LoraConfig) -> tuple[int, float]:
    """Rank and `alpha / r` (rsLoRA: `alpha / sqrt r`); of a pattern's keys the first that matches counts, as in PEFT."""

    def pattern(patterns, default):
        return next((value for key, value in dict(patterns).items() if re.fullmatch(rf"(.*\.)?({key})", name)), default)

    rank, alpha = pattern(config.rank_pattern, config.r), pattern(config.alpha_pattern, config.lora_alpha)
    return rank, alpha / (math.sqrt(rank) if config.use_rslora else rank)
