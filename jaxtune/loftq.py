"""LoRA initialised to compensate for the quantisation of the base (LoftQ, arXiv 2310.08659).

For a matrix W, alternate `Q = pack(W - scale * b a)` and `scale * b a` = the largest singular vectors of `W - Q`. With `loftq_iter: 1` the
base is what `quantization` makes of the model anyway; with more it differs, and the run saves it beside its adapter.
"""

import functools
import logging
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtune import background, parallel
from jaxtune.config import Config
from jaxtune.convert import hf
from jaxtune.convert.bitsandbytes import Bitsandbytes
from jaxtune.convert.load import Model, Opened
from jaxtune.convert.names import cells, match_names
from jaxtune.convert.shards import Shards
from jaxtune.errors import ConfigError
from jaxtune.model import quant
from jaxtune.model.spec import spec
from jaxtune.model.weight import Matrix, dense, is_weight
from jaxtune.peft.adapter import Adapter
from jaxtune.tree import flatten, unflatten

log = logging.getLogger("jaxtune")


def init(config: Config, opened: Opened, model: Model, adapter: Adapter, mesh: Mesh) -> tuple[dict, Adapter]:
    """LoftQ's base and the adapter that compensates for it; `adapter` gives the adapted matrices.

    The files are read once more, one tensor at a time. Raises ConfigError for a base that is quantised in its files, and for a matrix that
    is not quantised.
    """
    started, rounds = time.monotonic(), config.lora.loftq_config.loftq_iter
    leaves, rows = flatten(model.params), spec(model.config)
    if isinstance(opened.checkpoint, Bitsandbytes):
        raise ConfigError(f"lora.init_lora_weights loftq: {opened.source} holds a packed model; give the one that it was packed from")
    if rounds > 1 and jax.process_count() > 1:
        raise ConfigError("lora.loftq_config.loftq_iter above 1 writes another base, which one process does; write 1.")
    if plain := [site.path for site in adapter.sites if not is_weight(leaves.get(site.path))]:
        raise ConfigError(f"lora.init_lora_weights loftq: {plain[0]} is not packed; leave it out of target_modules")
    table = list(cells(spec(opened.config)))
    stored, shards = match_names(opened.checkpoint, table), Shards(opened.checkpoint, mesh, config.quantization)
    sites = {site.path: site for site in adapter.sites}
    params = {path: jax.tree.map(lambda x: np.zeros(x.shape, np.float32), parts) for path, parts in adapter.params.items()}
    before = after = 0.0
    for cell in table:
        site = sites.get(cell.path)
        number = cell.index[0] if cell.index else 0
        if site is None or not site.ranks[number]:
            continue
        background.check_cancelled()
        w = opened.checkpoint.read(stored[cell.name])
        w = jnp.asarray(w.T if cell.transposed else w, jnp.float32)
        first = parallel.fetch(jax.tree.map(lambda x, index=cell.index: x[index], leaves[cell.path]))
        leaf, a, b = alternate(w, first, config.quantization or "", site.ranks[number], site.scales[number], rounds, config.dtype)
        params[cell.path]["a"][number, : len(a)], params[cell.path]["b"][number, :, : len(a)] = a, b
        if rounds > 1:
            placed = parallel.place(leaf, shards.of_layer(leaf, cell.path, rows[cell.path]))
            leaves[cell.path] = hf.put(leaves[cell.path], placed, cell.index, shards)
        before, after = before + float(_square(w, first)), after + float(_square(w, leaf, site.scales[number] * b @ a))
    log.info("loftq: the squared error falls to %.1f %% of %.4g in %.0f s", 100 * after / before, before, time.monotonic() - started)
    return unflatten(leaves), adapter.replace(params=jax.tree.map(jnp.asarray, params))


def alternate(
    w: jax.Array, first: Matrix, kind: str, rank: int, scale: float, rounds: int, dtype: str
) -> tuple[Matrix, np.ndarray, np.ndarray]:
    """`(Q, a [R, in], b [out, R])` after the given rounds: Q quantised as `kind`, `scale * b a` the nearest matrix of rank R to `w - Q`.

    w      float32 `[out, in]`; cast to `dtype` before quantising, as when a model is loaded
    first  `pack(w)`, which the first round starts from
    """
    leaf, (a, b) = first, _nearest(w, first, rank, scale)
    for _ in range(rounds - 1):
        leaf = quant.quantize((w - scale * b @ a).astype(dtype), kind)
        a, b = _nearest(w, leaf, rank, scale)
    return leaf, np.asarray(a), np.asarray(b)


@functools.partial(jax.jit, static_argnums=2)
def _nearest(w: jax.Array, leaf: Matrix, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    """`(a, b)`: the largest singular vectors of `w - leaf`, from the eigenvectors of the smaller of its two Gram matrices."""
    with jax.default_matmul_precision("highest"):
        rest = w - dense(leaf, jnp.float32)
        wide = rest if rest.shape[0] <= rest.shape[1] else rest.T
        values, vectors = jnp.linalg.eigh(wide @ wide.T)
        u = vectors[:, ::-1][:, :rank]  # [small, R]
        root = jnp.sqrt(jnp.sqrt(jnp.maximum(values[::-1][:rank], 0.0)) / scale)
        own, other = u * root, (u.T @ wide) / jnp.where(root > 0, scale * root, jnp.inf)[:, None]
        return (other, own) if wide is rest else (own.T, other.T)


@jax.jit
def _square(w: jax.Array, leaf: Matrix, low: jax.Array | float = 0.0) -> jax.Array:
    return jnp.square(w - dense(leaf, jnp.float32) - low).sum()
