"""LoRA initialised with the directions in which the inputs of the matrices vary most (EVA, arXiv 2410.07170).

`a` of each adapted matrix holds the largest principal components of its inputs over the tokens of the training rows, computed
incrementally, and `b` is zero. Components compete across matrices: as many are kept as the ranks add up to, those that explain the largest
shares of their inputs' variance. So some layers get more rank than others, up to `r * rho`, and some may get none.
"""

import dataclasses
import functools
import logging
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from jaxtune import background, data, parallel
from jaxtune.config import Config, LoraConfig
from jaxtune.convert.load import Model
from jaxtune.errors import ConfigError
from jaxtune.model import decoder
from jaxtune.model.attention_mask import Keys
from jaxtune.model.families import ModelConfig
from jaxtune.model.layer import Shared, one_layer
from jaxtune.model.weight import Matrix, Weight, linear
from jaxtune.peft import METHODS
from jaxtune.peft.adapter import Adapter
from jaxtune.peft.lora_init import randomized_svd
from jaxtune.peft.sites import Site, adaptable, is_parameter, names

log = logging.getLogger("jaxtune")

# matrices of a layer that share their input with another one
SAME_INPUT = {"k": "q", "v": "q", "up": "gate", "in_z": "in_qkv", "in_b": "in_qkv", "in_a": "in_qkv"}
MOST = 256  # the most micro-batches to look at, whether or not all components have converged
SILENCE = 20.0  # seconds between log messages


class Components(struct.PyTreeNode):
    """Principal components of the inputs so far, for one matrix or several with the same input."""

    vectors: jax.Array  # [K, in], unit vectors
    values: jax.Array  # [K], singular values
    mean: jax.Array  # [in]
    count: jax.Array  # [], tokens
    total: jax.Array  # [], the sum of squares around the mean
    still: jax.Array  # bool [K]: whether the last batch turned a component by less than tau allows

    @classmethod
    def none(cls, rank: int, width: int) -> "Components":
        """Of no tokens."""
        zero = jnp.zeros(())
        return cls(jnp.zeros((rank, width)), jnp.zeros(rank), jnp.zeros(width), zero, zero, jnp.zeros(rank, bool))


def init(config: Config, model: Model, fresh: Adapter, rows: data.Source, mesh: Mesh) -> Adapter:
    """The adapter with EVA's initialisation; `fresh` gives the adapted matrices and the ranks to distribute.

    Raises ConfigError for a matrix outside the layers, and if the rows have fewer tokens than components.
    """
    if model.config.is_given:
        kind = model.config.model_type
        raise ConfigError(f"lora.init_lora_weights eva goes through layers one by one, and those of this {kind} model share; leave it out")
    if other := [site.path for site in fresh.sites if not site.path.startswith("layers/") or is_parameter(site.path)]:
        raise ConfigError(f"lora.init_lora_weights eva looks at the inputs of layers' matrices, and {other[0]} is none; leave it out")
    started = time.monotonic()
    found = InputComponents(config, model, fresh.sites, mesh)
    log.info("eva: components of %d inputs of matrices, until they converge", len(found.going))
    batches, live, logged_at = 0, True, started
    while live and batches < MOST:
        step, micro = divmod(batches, rows.accumulation)
        whole = rows.batch_at(step, *parallel.row_part(mesh))
        live = found.look(jax.tree.map(lambda x: x[micro], whole), batches)  # noqa: B023
        batches += 1
        if live and (now := time.monotonic()) - logged_at > SILENCE:
            logged_at = now
            log.info("eva: %d micro-batches, %d of %d inputs not yet converged", batches, sum(found.going.values()), len(found.going))
    ranks = found.ranks
    if ranks is None:
        raise ConfigError(
            f"lora.init_lora_weights eva: none of {batches} micro-batches has {found.most} trained tokens, as many as components; write a "
            "larger per_device_train_batch_size, a smaller lora.r, or eva_config.use_label_mask: false"
        )
    spread = [rank for site in fresh.sites for rank, was in zip(ranks[site.path], site.ranks, strict=True) if was]
    log.info("eva: %d micro-batches, ranks from %d to %d, %.0f s%s", batches, min(spread), max(spread), time.monotonic() - started,
             "; some components had not converged" if live else "")  # fmt: skip
    settled = redistributed(fresh, ranks, adaptable(model.config))
    adapter = METHODS[config.method].init(
        jax.random.key(config.seed), model.config, model.params, config.replace(lora=settled), model.tokenizer
    )
    return adapter.replace(params={site.path: adapter.params[site.path] | {"a": found.rows_of(site)} for site in adapter.sites})


def redistributed(fresh: Adapter, ranks: dict[str, list[int]], table: dict[str, Any]) -> LoraConfig:
    """The config of an adapter with these ranks, as PEFT writes it: patterns of full names, and matrices without rank are no targets."""
    config: LoraConfig = fresh.config
    new_ranks, alphas, targets = {}, {}, []
    for site in fresh.sites:
        for name, was, scale, rank in zip(names(site.path, table[site.path]), site.ranks, site.scales, ranks[site.path], strict=True):
            if not rank:
                continue
            alpha = scale * (math.sqrt(was) if config.use_rslora else was)
            alpha *= rank / was if config.eva_config.adjust_scaling_factors else 1.0
            targets.append(name)
            new_ranks |= {name: rank} if rank != config.r else {}
            alphas |= {name: alpha} if alpha != config.lora_alpha else {}
    gone = any(was and not rank for site in fresh.sites for was, rank in zip(site.ranks, ranks[site.path], strict=True))
    patterns = {"rank_pattern": tuple(new_ranks.items()), "alpha_pattern": tuple(alphas.items())}
    return dataclasses.replace(config, **patterns, **({"target_modules": tuple(targets)} if gone else {}))


class InputComponents:
    """Components of the inputs of all sites, and the ranks that follow from them (None: no components yet)."""

    def __init__(self, config: Config, model: Model, sites: tuple[Site, ...], mesh: Mesh):
        self.config, self.mesh, self.sites, self.params = config, mesh, sites, model.params
        self.settings = config.lora.eva_config
        plain: dict[str, Any] = dict(remat="none", mesh=None, quantization_kernel="xla", attention="xla")
        self.model_config = dataclasses.replace(model.config, **plain)
        self.ranks: dict[str, list[int]] | None = None
        paths, widths = {site.path for site in sites}, {path: row.shape[-1] for path, row in adaptable(model.config).items()}
        self.input_of = {path: _same(path) if _same(path) in paths else path for path in paths}
        rank = {path: max(max(site.ranks) for site in sites if self.input_of[site.path] == path) for path in self.input_of.values()}
        most = {path: min(round(own * self.settings.rho), widths[path]) for path, own in rank.items()}
        self.found = {(path, n): Components.none(most[path], widths[path]) for path in most for n in range(len(_site(sites, path).ranks))}
        self.going = dict.fromkeys(self.found, True)  # whether components in use have not converged
        self.most = max(most.values())

    def look(self, batch: data.Batch, number: int) -> bool:
        """Process the tokens of a micro-batch `[B, T]`; returns whether there is more to learn."""
        background.check_cancelled()
        batch = parallel.put(batch, self.mesh, micro_batches=False)
        live_BT = batch.weights != 0 if self.settings.use_label_mask else batch.segments > 0
        if int(parallel.fetch(live_BT.sum())) < self.most:
            return True
        x_BTD, shared = _enter(self.model_config, self.params, batch)
        key = jax.random.fold_in(jax.random.key(self.config.seed), number)
        for stack, layer in self.model_config.places:
            paths = tuple(path for path in sorted(set(self.input_of.values())) if path.startswith(f"layers/{stack}/"))
            before = {path: self.found[path, layer] for path in paths}
            going = {path: self.going[path, layer] for path in paths}
            weights = self.params["layers"][str(stack)]
            static = self.model_config, stack, self.settings.tau
            x_BTD, after = _layer(*static, weights, jnp.int32(layer), x_BTD, shared, live_BT, before, going, key)
            self.found |= {(path, layer): components for path, components in after.items()}
        numbers = parallel.fetch({key: (one.values, one.total, one.still) for key, one in self.found.items()})
        self.ranks = self._share_out(numbers)
        for place in self.found:
            used = max(self.ranks[site.path][place[1]] for site in self.sites if self.input_of[site.path] == place[0])
            self.going[place] = not numbers[place][2][:used].all()
        return any(self.going.values())

    def _share_out(self, numbers: dict) -> dict[str, list[int]]:
        """As many components as the ranks add up to, those with the largest shares of their inputs' variance."""
        places, shares, budget = [], [], 0
        for site in self.sites:
            for layer, rank in enumerate(site.ranks):
                values, total, _ = numbers[self.input_of[site.path], layer]
                own = np.square(values.astype(np.float64)) / total if rank else np.zeros(0)
                places += [(site.path, layer)] * len(own)
                shares.append(own)
                budget += rank
        best = np.argsort(-np.concatenate(shares), kind="stable")[:budget]
        ranks = {site.path: [0] * len(site.ranks) for site in self.sites}
        for place in best:
            path, layer = places[place]
            ranks[path][layer] += 1
        return ranks

    def rows_of(self, site: Site) -> jax.Array:
        """`a [L, R, in]` of a site with these ranks."""
        layers = []
        for layer, rank in enumerate(site.ranks):
            found = parallel.fetch(self.found[self.input_of[site.path], layer])
            own = found.vectors[:rank] / (np.sqrt(found.values[:rank, None]) if self.settings.whiten else 1.0)
            layers.append(np.pad(own, ((0, max(site.ranks) - rank), (0, 0))))
        return jnp.asarray(np.stack(layers))


def _site(sites: tuple[Site, ...], path: str) -> Site:
    return next(site for site in sites if site.path == path)


def _same(path: str) -> str:
    """The matrix whose input this one shares."""
    stack, _, name = path.rpartition("/")
    return f"{stack}/{SAME_INPUT.get(name, name)}"


class _Recorded(Weight):
    """A matrix that records its input in `seen`, while one layer is traced."""

    base: Matrix
    seen: dict = struct.field(pytree_node=False)
    path: str = struct.field(pytree_node=False)

    def apply(self, x: jax.Array) -> jax.Array:
        """`W x`."""
        self.seen[self.path] = x
        return linear(self.base, x)


@functools.partial(jax.jit, static_argnums=0)
def _enter(config: ModelConfig, params: dict, batch: data.Batch) -> tuple[jax.Array, Shared]:
    """The input of the first layer."""
    slots = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)
    queries = Keys(slots, batch.positions, batch.segments, batch.parents)
    return decoder.entered(config, params, decoder.embed(config, params, batch.tokens), queries, queries._replace(parents=None))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _layer(config: ModelConfig, stack: int, tau: float, weights, number, x_BTD, shared, live_BT, before, going, key):
    """The layer's output, and the components updated with its inputs at live tokens, for those not yet converged."""
    seen: dict[str, jax.Array] = {}
    cut = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False), weights)
    for path in before:
        name = path.rpartition("/")[2]
        cut[name] = _Recorded(cut[name], seen, path)
    x_BTD, _, _ = one_layer(config, stack, number, cut, x_BTD, shared)
    after = {}
    for path, components in before.items():
        x_ND = seen[path].astype(jnp.float32).reshape(-1, seen[path].shape[-1])

        def take_in(components, x_ND=x_ND):
            return with_inputs(components, x_ND, live_BT.reshape(-1), tau, key)

        after[path] = jax.lax.cond(going[path], take_in, lambda components: components, components)
    return x_BTD, after


def with_inputs(found: Components, x_ND: jax.Array, live_N: jax.Array, tau: float, key: jax.Array) -> Components:
    """Incremental PCA (Ross et al. 2008): the components of the old components scaled by their values, the new rows around their mean, and
    the shift of the mean; by power iteration on twice as many directions, as in PEFT."""
    rank, width = found.vectors.shape
    count = live_N.sum().astype(jnp.float32)
    mean = jnp.where(live_N[:, None], x_ND, 0.0).sum(0) / count
    x_ND = jnp.where(live_N[:, None], x_ND - mean, 0.0)
    moved = jnp.sqrt(found.count / (found.count + count) * count) * (found.mean - mean)
    stacked = jnp.concatenate([found.values[:, None] * found.vectors, x_ND, moved[None]])
    with jax.default_matmul_precision("highest"):
        _, values, vectors = randomized_svd(stacked, min(2 * rank, width, len(stacked)), 4, key)
    values, vectors = values[:rank], vectors[:rank]
    strongest = jnp.take_along_axis(vectors, jnp.abs(vectors).argmax(1)[:, None], 1)
    vectors = vectors * jnp.where(strongest < 0, -1.0, 1.0)
    return Components(
        vectors=vectors,
        values=values,
        mean=(found.count * found.mean + count * mean) / (found.count + count),
        count=found.count + count,
        total=found.total + jnp.square(x_ND).sum() + jnp.square(moved).sum(),
        still=((vectors * found.vectors).sum(1) >= tau) & (found.count > 0),
    )
