"""Several adapters on one base: added into one, or chosen and mixed per row of a batch.

Both concatenate the adapters' ranks: `sum_n w_n s_n b_n (a_n x) = [b_1 b_2 ..] (g * [a_1; a_2; ..] x)` with `w_n s_n` in the gate g, which
has one number per rank and, in a batch, one row per row.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxtune.config import LoraConfig
from jaxtune.errors import ConfigError
from jaxtune.model.families import ModelConfig, heads
from jaxtune.model.weight import Matrix, Weight, linear, rows
from jaxtune.peft.adapter import Adapter
from jaxtune.peft.sites import Site, adaptable, is_parameter, names
from jaxtune.tree import flatten, unflatten


def combine(model_config: ModelConfig, adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """The weighted sum of adapters as one adapter; its rank at each matrix is the sum of theirs, so nothing is rounded away.

    PEFT's `add_weighted_adapter(combination_type="cat")`. PEFT's other types are approximations: "svd" reduces the sum to a rank, "linear"
    sums the factors, whose product then contains cross terms of one adapter's a and another's b.

    Raises ConfigError for adapters that are not sums of low-rank products (DoRA, modules_to_save, biases).
    """
    if not adapters or len(adapters) != len(weights):
        raise ConfigError(f"{len(adapters)} adapters and {len(weights)} weights were given; each adapter needs one weight")
    if not np.isfinite(np.asarray(weights, np.float64)).all():
        raise ConfigError(f"the weights are {', '.join(map(str, weights))}; each has to be a finite number")
    _refuse(adapters)
    table, params, sites = adaptable(model_config), {}, []
    ranks: dict[str, int] = {}
    for path in [path for path in table if any(site.path == path for adapter in adapters for site in adapter.sites)]:
        called, layers = names(path, table[path]), []
        for number in range(len(called)):
            pairs = [_layer(adapter, path, number, weight) for adapter, weight in zip(adapters, weights, strict=True)]
            layers.append(_side_by_side([pair for pair in pairs if pair is not None]))
        counts = tuple(pair[1].shape[-1] if pair else 0 for pair in layers)
        params[path] = _stack(layers, table[path].shape, max(counts), bool(table[path].layers))
        sites.append(Site(path, counts, tuple(float(count > 0) for count in counts)))
        ranks |= {name: count for name, count in zip(called, counts, strict=True) if count}
    pattern = tuple(ranks.items())  # alpha = r everywhere: their scale is contained in b
    parameters = tuple(name for site in sites if is_parameter(site.path) for name in names(site.path, table[site.path]) if name in ranks)
    config = LoraConfig(
        r=max(ranks.values()), lora_alpha=max(ranks.values()), rank_pattern=pattern, alpha_pattern=pattern,
        target_modules=tuple(name for name in ranks if name not in parameters), target_parameters=parameters or None,
    )  # fmt: skip
    return Adapter(params=params, sites=tuple(sites), config=config)


def _side_by_side(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray] | None:
    return (np.concatenate([a for a, _ in pairs], axis=-2), np.concatenate([b for _, b in pairs], axis=-1)) if pairs else None


def _layer(adapter: Adapter, path: str, number: int, weight: float) -> tuple[np.ndarray, np.ndarray] | None:
    """`a [..., r, in]` and `weight * scale * b [..., out, r]` of one layer, without padding."""
    site = next((site for site in adapter.sites if site.path == path), None)
    if site is None or not site.ranks[number]:
        return None
    a, b = (np.asarray(adapter.params[path][name]) for name in ("a", "b"))
    a, b = (a[number], b[number]) if a.ndim > 2 else (a, b)
    rank = site.ranks[number]
    return a[..., :rank, :], b[..., :rank] * np.float32(weight * site.scales[number])


def _stack(layers: Sequence[Any], shape: tuple[int, ...], rank: int, stacked: bool) -> dict[str, jax.Array]:
    *lead, out, width = shape
    lead = lead if stacked else [1]
    a, b = np.zeros((*lead, rank, width), np.float32), np.zeros((*lead, out, rank), np.float32)
    for number, pair in enumerate(layers):
        if pair is not None:
            own = pair[1].shape[-1]
            a[number, ..., :own, :], b[number, ..., :own] = pair
    return {"a": jnp.asarray(a if stacked else a[0]), "b": jnp.asarray(b if stacked else b[0])}


def _refuse(adapters: Sequence[Adapter]) -> None:
    for adapter in adapters:
        if not isinstance(adapter.config, LoraConfig):
            raise ConfigError(
                f"an adapter of method {adapter.config.group} is no sum of low-rank products, so it cannot be added to another or mixed; "
                "use it alone"
            )
    if any("magnitude" in pair for adapter in adapters for pair in adapter.params.values()):
        raise ConfigError("a DoRA adapter scales the whole matrix, so it cannot be added to another; merge it into the base instead")
    for adapter in adapters:
        if adapter.wholes or any("bias" in pair for pair in adapter.params.values()):
            what = [key for key in WHOLE_KEYS if getattr(adapter.config, key) not in (None, False, "none")]
            what += ["a scoring head"] if any(whole.path in heads.PATHS for whole in adapter.wholes) else []
            raise ConfigError(f"an adapter with {', '.join(what)} is more than low-rank parts, so it cannot be added to another")


# ---- row by row ----


class RowLoRA(Weight):
    """`W + b diag(gate of the row) a`: a different low-rank part for each row of the batch."""

    base: Matrix
    a: jax.Array  # [R, in], the ranks of all adapters
    b: jax.Array  # [out, R]
    gate: jax.Array  # [B, R]

    def _gated(self, inner: jax.Array) -> jax.Array:
        gate = self.gate.reshape(len(self.gate), *(1,) * (inner.ndim - 2), -1)
        return inner * gate.astype(inner.dtype)

    def apply(self, x: jax.Array) -> jax.Array:
        """`x [B, ..., in]`: the product with the base, plus the row's own part."""
        return linear(self.base, x) + linear(self.b, self._gated(linear(self.a, x)))

    def rows(self, ids: jax.Array, dtype) -> jax.Array:
        """Rows `ids [B, ...]` of an adapted embedding."""
        return rows(self.base, ids, dtype) + linear(self.a.T, self._gated(self.b[ids].astype(dtype)))


class Mixed(struct.PyTreeNode):
    """Adapters with weights per row of a batch: `weights [B, N]`. `compose` accepts it like an adapter."""

    adapters: tuple[Adapter, ...]
    weights: np.ndarray | jax.Array

    def take(self, numbers: Sequence[int]) -> "Mixed":
        """The same for other rows."""
        return self.replace(weights=np.asarray(self.weights)[np.asarray(numbers)])


WHOLE_KEYS = ("bias", "lora_bias", "modules_to_save", "trainable_token_indices")
Choice = None | str | Mapping[str, float]


def mix(adapters: Mapping[str, Adapter], choices: Sequence[Choice]) -> Mixed:
    """Named adapters and a choice for each row (each prompt of `generate`): a name, weights by name, or None for the base alone.

    Raises ConfigError for any other choice, an unknown name, DoRA, and adapters of experts or whole parameters.
    """
    if not adapters:
        raise ConfigError("there is no adapter to choose from; give at least one, by name")
    _refuse(tuple(adapters.values()))
    if any(is_parameter(site.path) for adapter in adapters.values() for site in adapter.sites):
        raise ConfigError("an adapter of experts cannot be chosen row by row, as tokens of all rows meet in one expert; use it alone")
    names = list(adapters)
    weights = np.zeros((len(choices), len(names)), np.float32)
    for row, choice in enumerate(choices):
        wanted = {choice: 1.0} if isinstance(choice, str) else choice or {}
        weighted = isinstance(wanted, Mapping) and all(isinstance(w, (int, float)) and math.isfinite(w) for w in wanted.values())
        if not weighted:
            raise ConfigError(f"the choice for prompt {row + 1} is {choice!r}; write a name, or weights by name, {{{names[0]}: 0.7}}")
        for name, weight in wanted.items():
            if name not in adapters:
                raise ConfigError(f"prompt {row + 1} asks for adapter {name!r}; there are {', '.join(names)}")
            weights[row, names.index(name)] = weight
    return Mixed(tuple(adapters.values()), weights)


def compose_rows(base: dict, mixed: Mixed) -> dict:
    """The tree with its adapted leaves replaced by `RowLoRA`."""
    leaves = flatten(base)
    paths = dict.fromkeys(site.path for adapter in mixed.adapters for site in adapter.sites)
    if {"embed", "head"} & paths.keys():
        leaves.setdefault("head", leaves["embed"])  # the two uses of a tied matrix are adapted separately, as in lora.compose
    for path in sorted(paths, key=lambda path: path == "head"):
        found = [(number, adapter) for number, adapter in enumerate(mixed.adapters) if path in adapter.params]
        pairs = [adapter.params[path] for _, adapter in found]
        stacked, gates = pairs[0]["a"].ndim == 3, []
        for number, adapter in found:
            scales = np.asarray(next(site.scales for site in adapter.sites if site.path == path), np.float32)
            gate = jnp.asarray(mixed.weights)[None, :, number, None] * scales[:, None, None]  # [L, B, 1]
            gates.append(jnp.repeat(gate, adapter.params[path]["a"].shape[-2], axis=-1))
        gate = jnp.concatenate(gates, axis=-1)
        leaves[path] = RowLoRA(
            base=leaves[path],
            a=jnp.concatenate([pair["a"] for pair in pairs], axis=-2),
            b=jnp.concatenate([pair["b"] for pair in pairs], axis=-1),
            gate=gate if stacked else gate[0],
        )
    return unflatten(leaves)
