"""What all adapters of matrices are, and the interface that a method implements.

For one matrix `[out, in]`, a method says which arrays it adds (`parts`) and which `Weight` replaces the matrix (`leaf`). Everything else
follows from that table: initialisation, composition, sharding, PEFT's files, merging.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from jaxtune.errors import ConfigError
from jaxtune.model.families import ModelConfig
from jaxtune.model.spec import Row
from jaxtune.model.weight import Matrix, Weight, dense, linear, rows
from jaxtune.peft.sites import Site, Whole, adaptable, check_trained, find_sites, find_wholes
from jaxtune.tree import flatten, unflatten

Init = Callable[[jax.Array, tuple[int, ...]], jax.Array]


class Part(NamedTuple):
    """One array that a method adds to a matrix `[out, in]`.

    shape    of one layer
    axes     for each dimension whether it runs along the matrix's "out" or "in" (and is sharded like it), or along neither
    file     PEFT's name for it, after the module's
    init     `(key, shape of all layers) -> values`
    rank     the dimension (-1, -2) as long as the layer's rank; entries beyond a layer's own rank are zero, and stay so
    turned   whether PEFT stores it transposed
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    file: str
    init: Init
    rank: int | None = None
    turned: bool = False


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Of float32."""
    return jnp.zeros(shape)


def ones(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Of float32."""
    return jnp.ones(shape)


def kaiming(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform in +-1 / sqrt(last dimension): torch's `kaiming_uniform_(a=sqrt(5))`, PEFT's initialisation."""
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) / math.sqrt(shape[-1])


class Constant:
    """A numpy array that defines an adapter and is not trained; two are equal if their numbers are."""

    def __init__(self, value: np.ndarray):
        self.value, self._key = value, (value.shape, str(value.dtype), value.tobytes())
        self._hash = hash(self._key)

    def __eq__(self, other: object) -> bool:
        return self is other or isinstance(other, Constant) and self._hash == other._hash and self._key == other._key

    def __hash__(self) -> int:
        return self._hash


class Adapter(struct.PyTreeNode):
    """An adapter: everything that is trained, in float32, and its static description.

    params  by row path the method's arrays by name (`{"a", "b"[, "magnitude"][, "bias"]}` for LoRA), as described by `sites`
    saved   by row path the parameters that are trained themselves, as described by `wholes`
    shared  arrays that all matrices share and that are not trained
    """

    params: dict[str, dict[str, jax.Array]]
    sites: tuple[Site, ...] = struct.field(pytree_node=False)
    config: Any = struct.field(pytree_node=False)
    saved: dict[str, jax.Array] = struct.field(default_factory=dict)
    wholes: tuple[Whole, ...] = struct.field(pytree_node=False, default=())
    shared: tuple[Constant, ...] = struct.field(pytree_node=False, default=())


class Kind:
    """A method that adapts matrices. A subclass defines its config class, PEFT's name for it, `parts` and `leaf`."""

    config: ClassVar[type]
    peft_type: ClassVar[str]
    neutral: ClassVar[dict[str, float]] = {}  # the neutral values by name, where they are not zero
    changes_bias: ClassVar[bool] = False  # whether `bias` differs from the base's
    stands: ClassVar[bool] = True  # whether it adapts matrices, which `target_modules` names
    merges: ClassVar[bool] = True  # whether it can be merged into the base
    conv1d: ClassVar[bool] = True  # whether PEFT supports it on a Conv1D (GPT-2)
    refused: ClassVar[dict[str, Any]] = {}  # fields of adapter_config.json that change the result, with their neutral values
    ignored: ClassVar[frozenset[str]] = frozenset()  # fields that have no effect once an adapter is trained

    def settle(self, model_config: ModelConfig, config: Any) -> Any:
        """The config with everything that depends on the model filled in."""
        return config

    def parts(self, config: Any, path: str, row: Row, rank: int) -> dict[str, Part]:
        """The arrays for one matrix; `rank` is the largest rank of its layers."""
        raise NotImplementedError

    def leaf(self, adapter: Adapter, base: Matrix, parts: dict[str, jax.Array], scale: jax.Array, key: jax.Array | None) -> Matrix:
        """The replacement for the matrix. All arguments are for all layers of the stack, including `scale [L]` and `key [L]`."""
        raise NotImplementedError

    def bias(self, adapter: Adapter, own: jax.Array | None, parts: dict[str, jax.Array], scale: jax.Array) -> jax.Array | None:
        """The bias of the matrix; `own` is the base's."""
        return own

    def constants(self, model_config: ModelConfig, config: Any, sites: tuple[Site, ...]) -> tuple[Constant, ...]:
        """`Adapter.shared` of a fresh adapter."""
        return ()

    # ---- training ----

    def penalty(self, adapter: Adapter) -> jax.Array | None:
        """The method's addition to a step's loss, independent of the batch."""
        return None

    def around(self, chain: optax.GradientTransformation, config: Any, total_steps: int) -> optax.GradientTransformation:
        """The optimiser, including what the method does to its parameters after an update."""
        return chain

    # ---- PEFT's files ----

    shared_files: ClassVar[tuple[str, ...]] = ()  # names of the constants in the file

    def fields(self, adapter: Adapter, model_config: ModelConfig) -> dict[str, Any]:
        """The method's fields of adapter_config.json."""
        return adapter.config.to_dict()

    def read_fields(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The config's fields from those of adapter_config.json."""
        return saved

    def settled(self, adapter: Adapter) -> Adapter:
        """The adapter as it is saved."""
        return adapter

    def whole_name(self, path: str, module: str, kind: str) -> str:
        """The name of a parameter that is trained whole, `weight` or `bias` of a module."""
        return f"{module}.{kind}"

    def more_tensors(self, adapter: Adapter) -> dict[str, np.ndarray]:
        """What the file contains besides the matrices' arrays and whole parameters."""
        return {}

    # ---- beginning and composing ----

    def wholes(self, model_config: ModelConfig, config: Any, sites: tuple[Site, ...]) -> tuple[Whole, ...]:
        """What is trained whole."""
        return find_wholes(model_config, config, sites)

    def check(self, config: Any, path: str, row: Row) -> None:
        """ConfigError for a matrix that the method cannot adapt."""
        if row.transposed and not self.conv1d:
            name = row.hf.format(layer=0).removesuffix(".weight")
            raise ConfigError(f"{config.group}: {name} is a Conv1D, which PEFT's {self.peft_type} cannot adapt; name other target_modules")

    def init(self, key: jax.Array, model_config: ModelConfig, params: dict, config: Any, tokenizer: Any = None) -> Adapter:
        """A fresh adapter, in float32."""
        config, table, leaves, tree = self.settle(model_config, config), adaptable(model_config), flatten(params), {}
        sites = find_sites(model_config, config)
        for number, site in enumerate(sites):
            row, own = table[site.path], jax.random.fold_in(key, number)
            self.check(config, site.path, row)
            parts = self.parts(config, site.path, row, max(site.ranks))
            tree[site.path] = {
                name: within_ranks(part, part.init(jax.random.fold_in(own, place), (*row.shape[:-2], *part.shape)), site)
                for place, (name, part) in enumerate(parts.items())
            }
        wholes = self.wholes(model_config, config, sites)
        check_trained(config, sites, wholes)
        saved = {whole.path: own_values(whole, leaves.get(whole.path, leaves["embed"]), config) for whole in wholes}
        return Adapter(tree, sites, config, saved, wholes, self.constants(model_config, config, sites))

    def compose(self, base: dict, adapter: Adapter, key: jax.Array | None = None) -> dict:
        """The tree with its adapted leaves replaced; computes next to nothing. `key` enables dropout."""
        leaves = flatten(base)
        put_saved(leaves, adapter)
        for number, site in enumerate(adapter.sites):
            stacked = site.stacked
            scale = jnp.asarray(site.scales if stacked else site.scales[0], jnp.float32)
            parts = self._live(adapter, site, stacked)
            keys = dropout_keys(key, adapter.config.dropout, number, len(site.scales) if stacked else None)
            target = leaves["embed"] if site.path == "head" and "head" not in leaves else leaves[site.path]
            leaves[site.path] = self.leaf(adapter, target, parts, scale, keys)
            bias = self.bias(adapter, leaves.get(f"{site.path}_bias"), parts, scale)
            if bias is not None:
                leaves[f"{site.path}_bias"] = bias
        return unflatten(leaves)

    def _live(self, adapter: Adapter, site: Site, stacked: bool) -> dict[str, jax.Array]:
        """A site's arrays, with neutral values for layers that are not adapted, whatever was trained."""
        parts = adapter.params[site.path]
        if not stacked or all(site.ranks):
            return parts

        def only(name: str, value: jax.Array) -> jax.Array:
            live = np.asarray(site.ranks).reshape(-1, *(1,) * (value.ndim - 1)) > 0
            return jnp.where(live, value, self.neutral.get(name, 0.0))

        return {name: only(name, value) for name, value in parts.items()}


def within_ranks(part: Part, value: jax.Array, site: Site) -> jax.Array:
    """Zeros beyond each layer's own rank."""
    if part.rank is None or value.ndim == len(part.shape):
        return value
    live = np.arange(part.shape[part.rank]) < np.asarray(site.ranks)[:, None]  # [L, R]
    shape = [1] * value.ndim
    shape[0], shape[part.rank] = live.shape
    return jnp.where(live.reshape(shape), value, 0.0)


def dropout_keys(key: jax.Array | None, rate: float, number: int, layers: int | None) -> jax.Array | None:
    """Random keys of a site, one per layer; None without dropout."""
    if key is None or rate == 0:
        return None
    own = jax.random.fold_in(key, number)
    return own if layers is None else jax.random.split(own, layers)


def dropped(x: jax.Array, key: jax.Array | None, rate: float) -> jax.Array | None:
    """x with some elements dropped, or None if it equals x."""
    if key is None or rate == 0:
        return None
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


# ---- parameters that are trained themselves ----


class TokenRows(Weight):
    """A matrix `[V, D]` with the rows `ids` replaced by `values [k, D]`: single tokens that are trained."""

    base: Matrix
    values: jax.Array
    ids: tuple[int, ...] = struct.field(pytree_node=False, default=())

    def apply(self, x: jax.Array) -> jax.Array:
        """Logits of a tied head; those of `ids` come from the values."""
        return linear(self.base, x).at[..., np.asarray(self.ids)].set(linear(self.values, x))

    def dense(self, dtype) -> jax.Array:
        """The whole matrix."""
        return dense(self.base, dtype).at[np.asarray(self.ids)].set(self.values.astype(dtype))

    def rows(self, ids: jax.Array, dtype) -> jax.Array:
        """Rows of the embedding."""
        same = ids[..., None] == np.asarray(self.ids)
        own = self.values.astype(dtype)[same.argmax(-1)]
        return jnp.where(same.any(-1)[..., None], own, rows(self.base, ids, dtype))


def own_values(whole: Whole, leaf: Matrix, config: Any) -> jax.Array:
    """A copy of the trained part of a base leaf."""
    if isinstance(leaf, Weight):
        raise ConfigError(
            f"{config.group}.modules_to_save names {whole.path}, which is packed in 4 or 8 bits and cannot be trained; take it out"
        )
    return jnp.array(leaf if whole.numbers is None else leaf[np.asarray(whole.numbers)], jnp.float32)


def put_saved(leaves: dict, adapter: Adapter) -> None:
    """Insert the parameters that are trained themselves. For a tied matrix only one of its uses is replaced, except for single tokens."""
    for whole in adapter.wholes:
        value, path = adapter.saved[whole.path], whole.path
        if path in ("embed", "head") and whole.numbers is not None:
            leaves[path] = TokenRows(leaves[path], value, whole.numbers)
        elif whole.numbers is not None:
            leaves[path] = leaves[path].astype(jnp.float32).at[np.asarray(whole.numbers)].set(value)
        else:
            if path == "embed" and not adapter.config.ensure_weight_tying and "score" not in leaves:
                leaves.setdefault("head", leaves["embed"])
            leaves[path] = value
