"""AdaLoRA (arXiv 2303.10512): pairs as a singular value decomposition, whose least important values are removed during training.

Over a run the number of values per matrix falls from `init_r` to `target_r` on average, along a cubic curve. Importance decides which ones
are removed: smoothed |weight * gradient|, times its variability, of the value and of its two vectors.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtune.config import AdaLoraConfig
from jaxtune.errors import ConfigError
from jaxtune.model.families import ModelConfig
from jaxtune.model.spec import Row
from jaxtune.model.weight import Matrix
from jaxtune.peft.adapter import Adapter, Kind, Part, dropped, zeros
from jaxtune.peft.lora import LoRA, adapted
from jaxtune.peft.sites import adaptable, names


class AdaLoRA(LoRA):
    """`W + scale * b diag(e) a`."""

    e: jax.Array | None = None  # [R, 1]

    def apply(self, x: jax.Array) -> jax.Array:
        """`W x + scale * b (e * (a x))`."""
        return adapted(self.base, x, dropped(x, self.key, self.rate), self._scaled(), self.b, self.scale)

    def _scaled(self) -> jax.Array:
        assert self.e is not None  # fields of a parent with defaults require one here
        return self.a * self.e

    def _delta(self) -> jax.Array:
        return self.scale * (self.b @ self._scaled())


class Allocation(NamedTuple):
    """The allocation's state, beside the optimiser's: smoothed sensitivity and uncertainty of each number, and which values are live."""

    chain: optax.OptState
    count: jax.Array
    sensitivity: Adapter
    uncertainty: Adapter
    live: dict[str, jax.Array]  # uint8, 0 or 1


class AdaLoRAKind(Kind):
    """Starts with `e` zero."""

    config = AdaLoraConfig
    peft_type = "ADALORA"
    refused = {"trainable_token_indices": None, "target_parameters": None, "layer_replication": None}
    ignored = frozenset(
        "r use_rslora use_dora use_qalora lora_bias alpha_pattern init_lora_weights megatron_config megatron_core loftq_config eva_config "
        "corda_config lora_ga_config runtime_config qalora_group_size ensure_weight_tying arrow_config alora_invocation_tokens "
        "use_bdlora velora_config kasa_config monteclora_config".split()
    )

    def parts(self, config: AdaLoraConfig, path: str, row: Row, rank: int) -> dict[str, Part]:
        out, width = row.shape[-2:]
        return {"a": Part((rank, width), (None, "in"), "lora_A", _small, -2),
                "e": Part((rank, 1), (None, None), "lora_E", zeros, -2),
                "b": Part((out, rank), ("out", None), "lora_B", _small, -1)}  # fmt: skip

    def leaf(self, adapter: Adapter, base: Matrix, parts: dict[str, jax.Array], scale: jax.Array, key: jax.Array | None) -> Matrix:
        return AdaLoRA(base, parts["a"], parts["b"], scale, key, adapter.config.dropout, parts["e"])

    def penalty(self, adapter: Adapter) -> jax.Array:
        """`orth_reg_weight * mean ||P P^T - I||` over all a and b (transposed)."""
        total, count = jnp.zeros(()), 0
        for site in adapter.sites:
            for name in ("a", "b"):
                value = adapter.params[site.path][name]
                value = value if value.ndim == 3 else value[None]
                adapted_layers = np.flatnonzero(site.ranks)
                value = value[adapted_layers] if name == "a" else value[adapted_layers].mT
                eye = np.arange(value.shape[1]) < np.asarray(site.ranks)[adapted_layers, None]
                difference = value @ value.mT - jnp.eye(value.shape[1]) * eye[:, None]
                total, count = total + jnp.linalg.norm(difference, axis=(1, 2)).sum(), count + len(adapted_layers)
        return adapter.config.orth_reg_weight * total / count

    def around(self, chain: optax.GradientTransformation, config: AdaLoraConfig, total_steps: int) -> optax.GradientTransformation:
        return _allocating(chain, config, total_steps)

    # ---- PEFT's files: only values that are not zero, and which those are ----

    def settled(self, adapter: Adapter) -> Adapter:
        values = {site.path: np.asarray(adapter.params[site.path]["e"]) for site in adapter.sites}
        live = {site.path: _live_of(site, values[site.path]) for site in adapter.sites}
        if not any(mask.any() for mask in live.values()):
            return adapter  # initial: no value has been removed
        sites, params = [], {}
        for site in adapter.sites:
            masks, arrays = live[site.path], {name: np.asarray(x) for name, x in adapter.params[site.path].items()}
            ranks = tuple(int(mask.sum()) for mask in masks)
            stacked = arrays["a"].ndim == 3
            order = [np.argsort(~mask, kind="stable")[: max(ranks)] for mask in masks]

            def first(x: np.ndarray, axis: int, order=order, masks=masks, stacked=stacked) -> np.ndarray:
                layers = [
                    np.take(layer, chosen, axis) * np.expand_dims(mask[chosen], -1 if axis == -2 else 0)
                    for layer, chosen, mask in zip(x if stacked else x[None], order, masks, strict=True)
                ]
                return np.stack(layers) if stacked else layers[0]

            params[site.path] = {name: first(x, -1 if name == "b" else -2) for name, x in arrays.items()}
            sites.append(site._replace(ranks=ranks))
        return adapter.replace(params=params, sites=tuple(sites))

    def fields(self, adapter: Adapter, model_config: ModelConfig) -> dict[str, Any]:
        config, table = adapter.config, adaptable(model_config)
        ranks = {
            name: rank for site in adapter.sites for name, rank in zip(names(site.path, table[site.path]), site.ranks, strict=True)
            if rank or any(name == known for known, _ in config.rank_pattern)
        }  # fmt: skip
        whole = all(rank == config.init_r for rank in ranks.values())
        pattern = {f"{name}.lora_E": [True] * rank + [False] * (config.init_r - rank) for name, rank in ranks.items()}
        steps = config.total_step or config.tinit + config.tfinal + 1  # PEFT opens no file without it
        return config.to_dict() | {"rank_pattern": None if whole else pattern, "total_step": steps}

    def read_fields(self, saved: dict[str, Any]) -> dict[str, Any]:
        pattern = saved.get("rank_pattern") or {}
        ranks = tuple((name.removesuffix(".lora_E"), sum(map(bool, kept))) for name, kept in pattern.items())
        return {name: value for name, value in saved.items() if name != "total_step"} | {"rank_pattern": ranks}


def _small(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return 0.02 * jax.random.normal(key, shape)


def _live_of(site: Any, values: np.ndarray) -> np.ndarray:
    """bool `[L, R]`: the non-zero values, within the layers' ranks."""
    values = values[..., 0] if values.ndim == 3 else values[None, :, 0]
    return (values != 0) & (np.arange(values.shape[1]) < np.asarray(site.ranks)[:, None])


# ---- allocation, after each update ----


def _allocating(chain: optax.GradientTransformation, config: AdaLoraConfig, total_steps: int) -> optax.GradientTransformation:
    """The optimiser, followed by PEFT's `update_and_allocate` for that step."""
    end = (config.total_step or total_steps) - config.tfinal
    if config.tinit >= end:
        raise ConfigError(
            f"adalora.tinit is {config.tinit} and tfinal {config.tfinal}, which leaves none of the {end + config.tfinal} steps to lower "
            "the ranks in; write smaller ones"
        )

    def init(adapter: Adapter) -> Allocation:
        nothing = jax.tree.map(jnp.zeros_like, adapter.replace(saved={}, wholes=()))
        live = {path: jnp.ones(arrays["e"].shape, jnp.uint8) for path, arrays in adapter.params.items()}
        return Allocation(chain.init(adapter), jnp.zeros((), jnp.int32), nothing, nothing, live)

    def update(grads: Adapter, state: Allocation, adapter: Adapter | None = None):
        assert adapter is not None
        updates, inner = chain.update(grads, state.chain, adapter)
        new, step = optax.apply_updates(adapter, updates), state.count
        early = step < end
        sensitivity, uncertainty = _smoothed(config, new, grads, state, early)
        budget, due = _budget(config, adapter, end, step)
        masks = _masks(adapter, sensitivity, uncertainty, budget)
        due = jnp.where(early, due, step == end) & (budget < _total(adapter))
        live = {path: jnp.where(due, masks[path], state.live[path]) for path in masks}
        cut = due | (step > end)
        e = {path: jnp.where(cut & (live[path] == 0), -adapter.params[path]["e"], updates.params[path]["e"]) for path in live}
        params = {path: arrays | {"e": e[path]} for path, arrays in updates.params.items()}
        return updates.replace(params=params), Allocation(inner, step + 1, sensitivity, uncertainty, live)

    return optax.GradientTransformation(init, update)


def _smoothed(config: AdaLoraConfig, new: Adapter, grads: Adapter, state: Allocation, early) -> tuple[Adapter, Adapter]:
    def smooth(value, grad, mean, spread):
        now = jnp.abs(value * grad)
        average = config.beta1 * mean + (1 - config.beta1) * now
        return average, config.beta2 * spread + (1 - config.beta2) * jnp.abs(now - average)

    pairs = jax.tree.map(smooth, new.params, grads.params, state.sensitivity.params, state.uncertainty.params)
    is_pair = lambda x: isinstance(x, tuple)  # noqa: E731
    kept = []
    for number, old in enumerate((state.sensitivity, state.uncertainty)):
        chosen = jax.tree.map(lambda pair, number=number: pair[number], pairs, is_leaf=is_pair)
        kept.append(old.replace(params=jax.tree.map(lambda x, y: jnp.where(early, x, y), chosen, old.params)))
    return kept[0], kept[1]


def _total(adapter: Adapter) -> int:
    return sum(sum(site.ranks) for site in adapter.sites)


def _budget(config: AdaLoraConfig, adapter: Adapter, end: int, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many values may remain after this step, and whether it removes any."""
    first, last = _total(adapter), config.target_r * sum(rank > 0 for site in adapter.sites for rank in site.ranks)
    steps = np.arange(end + 1)
    budgets = ((first - last) * (1 - (steps - config.tinit) / (end - config.tinit)) ** 3 + last).astype(np.int64)
    budgets = np.where(steps <= config.tinit, first, budgets).astype(np.int32)
    due = (steps > config.tinit) & (steps % config.deltaT == 0)
    at = jnp.minimum(step, end)
    return jnp.asarray(budgets)[at], jnp.asarray(due)[at]


def _masks(adapter: Adapter, sensitivity: Adapter, uncertainty: Adapter, budget: jax.Array) -> dict[str, jax.Array]:
    """By path, which values (1 or 0) are among the `budget` most important ones."""
    scores, all_live = {}, []
    for site in adapter.sites:
        mean, spread = sensitivity.params[site.path], uncertainty.params[site.path]
        score = {name: mean[name] * spread[name] for name in ("a", "b", "e")}
        scores[site.path] = score["e"] + score["a"].mean(-1)[..., None] + score["b"].mean(-2)[..., None]
        live = np.arange(score["e"].shape[-2]) < np.asarray(site.ranks)[:, None]
        all_live.append(scores[site.path].reshape(live.shape)[live])
    ordered = jnp.sort(jnp.concatenate(all_live))
    threshold = ordered[jnp.maximum(len(ordered) - budget - 1, 0)]  # at most as many values as are to be removed lie at or below it
    return {path: (score > threshold).astype(jnp.uint8) for path, score in scores.items()}


KIND: Any = AdaLoRAKind()
