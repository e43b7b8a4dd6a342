"""One layer of a stack: its settings, and its weights, cut out of the stack where they are used."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.model import nf4_kernel
from jaxtune.model.attention_mask import Keys
from jaxtune.model.block import block, keys_values
from jaxtune.model.families import ModelConfig
from jaxtune.model.layout import constrain, split
from jaxtune.model.memory import Place
from jaxtune.model.quant import NF4, Int8
from jaxtune.model.spec import spec
from jaxtune.model.streams import corrected, predicted


class Shared(NamedTuple):
    """What all layers share: rotations `[R, B, T, h / 2]` and the tokens' places."""

    cos: jax.Array
    sin: jax.Array
    queries: Keys
    keys: Keys


def one_layer(config: ModelConfig, stack: int, number: jax.Array, w, x_BTD: jax.Array, shared: Shared, kv=None):
    """`x_BTD` after layer `number` of the stack with the weights `w`; the cache's memory and the router's sums."""
    place, streams = _place(config, stack, number, shared), None
    if config.streams is not None:
        streams = predicted(config, w, x_BTD)
        x_BTD = streams[:, :, config.streams.active]
    x_BTD, kv, sums = block(config.at(config.stacks[stack][0]), w, x_BTD, place, kv)
    if streams is not None:
        x_BTD = corrected(config, w, streams, x_BTD)
    return constrain(config.mesh, x_BTD, "rows", "tokens", None), kv, sums


def made_before(config: ModelConfig, stack: int, weights: dict, x_BTD: jax.Array, shared: Shared) -> tuple[jax.Array, jax.Array]:
    """Keys and values of the only layer of a stack, which later layers use too, from its input."""
    number = jnp.zeros((), jnp.int32)
    w = Layer(config, stack, weights, number)
    if config.streams is not None:
        x_BTD = predicted(config, w, x_BTD)[:, :, config.streams.active]
    return keys_values(config.at(config.stacks[stack][0]), w, x_BTD, _place(config, stack, number, shared))


def _place(config: ModelConfig, stack: int, number: jax.Array, shared: Shared) -> Place:
    layers = config.stacks[stack]
    rope = jnp.asarray([config.layer_ropes[i] % (len(config.ropes) + 1) for i in layers])[number]
    window = jnp.asarray([config.layer_windows[i] for i in layers])[number]
    keeping = (*config.memories, *([config.recurrent.layers] if config.recurrent else []))
    sources = [config.kv_source(i) for i in layers]
    group = next((n for n, own in enumerate(keeping) if sources[0] in own), None)  # a feed-forward-only layer keeps nothing
    slot = number if group is None else jnp.asarray([keeping[group].index(i) for i in sources])[number]
    pairs = config.at(layers[0]).head_dim // 2  # if its heads are narrower than the widest
    cos, sin = shared.cos[rope][..., :pairs], shared.sin[rope][..., :pairs]
    turns = jnp.asarray([config.layer_ropes[i] >= 0 for i in layers])[number]
    return Place(cos, sin, window, shared.queries, shared.keys, slot, group or 0, turns)


class Layer(Mapping):
    """One layer's weights by name, each cut out of the stack where it is used: if cut before a checkpoint, they would be kept for it.

    `own`: leaves that come from elsewhere (those with a gradient), by their path in `weights`, such as `q` or `q/a`.
    """

    def __init__(self, config: ModelConfig, stack: int, weights: dict, number: jax.Array, own: dict[str, jax.Array] | None = None):
        self.config, self.stack, self.weights, self.number, self.own = config, stack, weights, number, own or {}

    def __getitem__(self, name: str):
        stacked, whole = opened(self.config, self.stack, {name: self.weights[name]})

        def cut_out(path, leaf):
            own = self.own.get(name_of(path))
            return cut(leaf, self.number) if own is None else own

        return whole(jax.tree_util.tree_map_with_path(cut_out, stacked), self.number)[name]

    def __contains__(self, name: object) -> bool:
        return name in self.weights

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def name_of(path: tuple) -> str:
    """A leaf's path in a stack's weights, such as `q` or `q/a`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def cut(leaf: jax.Array, number: jax.Array) -> jax.Array:
    """One layer's part of a leaf."""
    return jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False, allow_negative_indices=False)


def opened(config: ModelConfig, stack: int, weights: dict):
    """What to cut layers out of, and `whole(layer, number)`, which turns the cut part into a layer's weights: quantised matrices are
    gathered over the mesh, and the kernel reads 4-bit ones from their stack.

    The kernel is used only in a step, which knows the devices of its arguments: a kernel is not partitioned automatically.
    """
    if config.quantization_kernel == "xla" or config.mesh is None or split(config.mesh, "tensor"):
        return weights, lambda layer, number: _brought(config, stack, layer)
    weights, put = nf4_kernel.split_codes(weights, config.mesh)
    return weights, lambda layer, number: put(_brought(config, stack, layer), number)


def _brought(config: ModelConfig, stack: int, layer: dict) -> dict:
    """A layer's quantised matrices, gathered over `fsdp` in quantised form: by itself, the compiler dequantises them first and moves eight
    times the bytes."""
    if config.mesh is None:
        return layer
    axes = {path.removeprefix(f"layers/{stack}/"): row.axes for path, row in spec(config).items()}

    def bring(name: str, leaf):
        if not isinstance(leaf, NF4 | Int8) or (isinstance(leaf, NF4) and leaf.absmax.shape[-1] != leaf.shape[0]):
            return leaf
        names = [axis if axis != "embed" else None for axis in axes[name][1:]]
        if isinstance(leaf, NF4):  # stored transposed
            names[-2:] = names[:-3:-1]
        fields = {"codes": leaf.codes, "absmax": leaf.absmax}
        return leaf.replace(**{name: constrain(config.mesh, x, *names[: x.ndim]) for name, x in fields.items() if x is not None})

    return {
        name: jax.tree.map(lambda leaf, name=name: bring(name, leaf), leaf, is_leaf=lambda leaf: isinstance(leaf, NF4 | Int8))
        for name, leaf in layer.items()
    }
