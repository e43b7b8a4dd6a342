"""Memory (bytes per device, by cause) and floating-point operations of a step, computed from shapes."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.config import Config
from jaxtune.model import delta
from jaxtune.model.block import RECOMPUTED
from jaxtune.model.families import ModelConfig
from jaxtune.model.quant import NF4, Int8
from jaxtune.model.spec import spec
from jaxtune.model.stack import groups
from jaxtune.objectives.distill import TEACHER
from jaxtune.peft import partial
from jaxtune.reference import beforehand, compares

ROOM = "over half of the memory is unused: jaxtune plan CONFIG --gradient-checkpointing auto or --batch auto finds settings that use it"


def peak(program: jax.stages.Compiled) -> int:
    """Bytes that a compiled program needs of a device at one time, its arguments included."""
    memory: Any = program.memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def per_device(tree: Any) -> int:
    """Bytes that one device holds of a tree of sharded shapes."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def by_cause(config: Config, model_config: ModelConfig, state, base, batch, peak: int) -> dict[str, int]:
    """Bytes per device by cause; see `Plan.bytes`."""
    teacher, base = base.get(TEACHER), {name: leaf for name, leaf in base.items() if name != TEACHER}
    scales = [leaf for leaf in jax.tree.leaves(base, is_leaf=_is_packed) if _is_packed(leaf)]
    packed = sum(per_device(leaf.codes) for leaf in scales)
    _, rows, length = batch.tokens.sharding.shard_shape(batch.tokens.shape)
    itemsize = jnp.dtype(model_config.dtype).itemsize
    kept = inputs_kept(config, model_config) * model_config.residual_size + products_kept(model_config)
    causes = {
        "weights": per_device(base) - sum(per_device(leaf) for leaf in scales) + packed,
        "scales": sum(per_device(leaf) for leaf in scales) - packed,
        **({"teacher": per_device(teacher)} if teacher else {}),
        "trainable": per_device(state.trainable),
        "optimizer": per_device(state.opt_state),
        "batch": per_device(batch),
    }
    left = peak - sum(causes.values())
    vocabularies = (0 if model_config.num_labels else model_config.vocab_size) + (teacher.config.vocab_size if teacher else 0)
    estimates = {
        "gradients": gradients(config, state.trainable),
        "activations": rows * length * kept * itemsize,
        "logits": min(rows * length, model_config.logits_chunk) * vocabularies * 4,
    }
    for name, size in estimates.items():
        causes[name] = max(0, min(size, left))
        left -= causes[name]
    return causes | {"other": max(0, left)}


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, NF4 | Int8)


def gradients(config: Config, trainable: Any) -> int:
    """Bytes of gradients that exist at the same time on one device."""
    if config.method != "full":
        return sum(x.size * 4 for x in jax.tree.leaves(trainable))
    if not config.optimizer_in_bwd:
        return per_device(trainable)
    outside = per_device(trainable) - per_device(trainable["layers"])
    return outside + max(per_device(stack) // jax.tree.leaves(stack)[0].shape[0] for stack in trainable["layers"].values())


def inputs_kept(config: Config, model_config: ModelConfig) -> int:
    """How many layers' inputs are on the device at the same time in the backward pass."""
    if model_config.remat == "offload":
        return 1  # the others are in host memory
    first = partial.lowest(model_config, config.trainable_parameters)
    kept = _groups(model_config, first)
    largest = max((size for _, size in kept), default=0)
    return sum(number for number, _ in kept) + (largest if largest > 1 else 0)


def products_kept(model_config: ModelConfig) -> int:
    """Values per token of products and attention outputs that the backward pass keeps: with `dots`, and at least these without remat."""
    if model_config.remat in RECOMPUTED:
        return 0
    chosen = model_config.moe.experts_per_token if model_config.moe else 0
    rows = [row for path, row in spec(model_config).items() if (row.is_matrix or row.is_experts) and not path.endswith("down")]
    products = sum(row.shape[-2] * len(row.layers) * (chosen if row.is_experts else 1) for row in rows)
    return products + model_config.num_heads * sum(model_config.at(layer).head_dim for layer in model_config.attending)


def _groups(model_config: ModelConfig, first: int = 0) -> list[tuple[int, int]]:
    """`(inputs kept, layers between two of them)` for the stacks from layer `first` on."""
    found = []
    for pattern in model_config.patterns:
        width = sum(pattern.times)
        if pattern.stacks[-1][-1] >= first:
            found += [(number, size * width) if size > 1 else (number * width, 1) for _, number, size in groups(model_config, pattern)]
    return found


def _shares(config: Config, model_config: ModelConfig) -> tuple[float, float, bool]:
    """The share of layers that gradients pass through, the share of their matrices that is trained, and whether the head is trained."""
    if config.method != "full":
        return 1.0, 0.0, False
    rows, taken = spec(model_config), partial.trained_paths(model_config, config.trainable_parameters)
    sizes = {path: math.prod(row.shape) for path, row in rows.items() if row.is_matrix or row.is_experts}
    ours = sum(size for path, size in sizes.items() if path in taken) / sum(sizes.values())
    through = 1 - partial.lowest(model_config, config.trainable_parameters) / model_config.num_layers
    return through, ours, not taken.isdisjoint({"head", "score"} & rows.keys() or {"embed"})


class _Products(NamedTuple):
    """Multiplications per token in a forward pass: of the layers' matrices, of those that remat repeats, of the head, and of attention
    (including linear attention)."""

    layers: float
    repeated: float
    head: float
    attention: float

    @property
    def all(self) -> float:
        """The total of one pass."""
        return self.layers + self.head + self.attention


def _products(model_config: ModelConfig, length: int, trained: float | None, attended: float | None) -> _Products:
    layers = repeated = 0.0
    for path, row in spec(model_config).items():
        if not (row.is_matrix or row.is_experts):
            continue
        share = model_config.moe.experts_per_token / model_config.moe.num_experts if row.is_experts and model_config.moe else 1.0
        layers += share * math.prod(row.shape)
        repeated += 0.0 if path.endswith("down") else share * math.prod(row.shape)  # nothing reads a layer's output a second time
    outputs = model_config.num_labels or model_config.vocab_size * (trained or length) / length
    seen = length if attended is None else attended  # a token attends to half of the row on average, or at most to its window
    windows = {layer: model_config.layer_windows[layer] for layer in model_config.attending}  # half of its chunk on average
    spans = {layer: min(seen, 2 * window if window > 0 else -window or seen) for layer, window in windows.items()}
    mixed = model_config.num_heads * sum(model_config.at(layer).head_dim * span for layer, span in spans.items())
    mixed += len(model_config.recurrent.layers) * delta.products(model_config.recurrent) if model_config.recurrent else 0
    return _Products(layers, repeated, outputs * model_config.hidden_size, mixed)


def flops(
    config: Config, model_config: ModelConfig, length: int, trained: float | None = None, attended: float | None = None,
    rows: int | None = None, teacher: ModelConfig | None = None,
) -> float:  # fmt: skip
    """FLOPs of the matrix products in a step on one data-parallel device, for rows of `length`: forward, backward and recomputation.

    `rows`: rows per step; None: the config's batch size. `teacher`: the teacher's config, for objective distill.

    A frozen matrix takes two products per token (forward, and the gradient of its input), a trained one three. Remat adds one if it keeps
    no products; groups of layers add another forward pass of all but their last layer; layers below the lowest trained one take the forward
    pass alone. `trained` positions of a row have logits (None: all); a token's document has `attended` tokens (None: the whole row).
    """
    tokens = (rows or config.gradient_accumulation_steps * config.per_device_train_batch_size) * length
    own = _products(model_config, length, trained, attended)
    through, ours, head = _shares(config, model_config)
    again = 1 if model_config.remat in RECOMPUTED else 0
    # the share of layers that groups compute once more
    twice = 1 - sum(number for number, _ in _groups(model_config)) / model_config.num_layers
    forward, backward = own.layers + own.attention, own.layers + 2 * own.attention
    layers = forward + own.layers * ours + through * (backward + forward * twice + (own.repeated + own.attention) * again)
    beside = own.all if compares(config) and not beforehand(config) else 0.0  # the reference's forward pass
    if teacher is not None:
        theirs = _products(teacher, length, trained, attended)
        beside += theirs.all + theirs.head * head  # its logits are computed again for the gradient of the student's head
    return 2.0 * tokens * (layers + own.head * (2 + 2 * head) + beside)
