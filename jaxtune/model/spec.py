"""The row table: one row per parameter, read by initialisation, sharding, import, export, the planner and adapter targets."""

import math

import jax
import jax.numpy as jnp

from jaxtune.model.families import FAMILIES, ModelConfig, heads, nested
from jaxtune.model.families.parts import norm
from jaxtune.model.row import Row
from jaxtune.tree import unflatten

__all__ = ["Row", "abstract", "init_params", "parameter_count", "spec"]


def spec(config: ModelConfig) -> dict[str, Row]:
    """The row table of a model, keyed by `/`-joined path, in tree order."""
    c, family = config, FAMILIES[config.model_type]
    table = (c.vocab_size, c.hidden_size), ("vocab", "embed"), "normal"
    width = c.vocab_size + c.unwritten
    rows = {"embed": Row((width, c.hidden_size), *table[1:], f"{family.ends['embed']}.weight", "token_embd.weight")}
    if "positions" in family.ends:
        shape, name = (c.position_offset + c.max_position_embeddings, c.hidden_size), f"{family.ends['positions']}.weight"
        rows["positions"] = Row(shape, (None, "embed"), "normal", name, "position_embd.weight")
    rows |= dict(family.extra_rows(c))
    for number, layers in enumerate(c.stacks):
        for name, row in ((name, nested.in_file(c, name, row)) for name, row in family.layer(c, layers[0])):
            rows[f"layers/{number}/{name}"] = row._replace(
                shape=(len(layers), *row.shape),
                axes=("layers", *row.axes),
                hf=family.prefix + row.hf,
                gguf="blk.{layer}." + row.gguf,
                layers=tuple(c.layer_names[layer] for layer in layers),
            )
    rows |= dict(norm(c, "norm", family.ends["norm"], "output_norm"))
    if c.num_labels:
        rows |= dict(heads.rows(c))
    elif not c.tie_word_embeddings:
        rows["head"] = Row(*table, f"{family.ends['head']}.weight", "output.weight")
    if c.head_bias and not c.num_labels:
        rows["head_bias"] = Row((c.vocab_size,), ("vocab",), "zeros", f"{family.ends['head']}.bias", "output.bias")
    if c.value_head:
        rows |= dict(heads.value_rows(c))
    return rows


def abstract(config: ModelConfig, dtype="float32") -> dict:
    """The parameter tree as `jax.ShapeDtypeStruct`: no memory."""
    return unflatten(
        {path: jax.ShapeDtypeStruct(row.shape, jnp.dtype("float32" if row.float32 else dtype)) for path, row in spec(config).items()}
    )


def init_params(key: jax.Array, config: ModelConfig, dtype="float32") -> dict:
    """Random parameters: normal with `initializer_range`, ones and zeros as the rows say."""

    def leaf(number: int, row: Row) -> jax.Array:
        if row.init != "normal":
            return jnp.full(row.shape, 1.0 if row.init == "ones" else 0.0, "float32" if row.float32 else dtype)
        noise = jax.random.normal(jax.random.fold_in(key, number), row.shape, jnp.float32)
        return (noise * config.initializer_range).astype(dtype)

    return unflatten({path: leaf(number, row) for number, (path, row) in enumerate(spec(config).items())})


def parameter_count(config: ModelConfig) -> int:
    """The number of the model's parameters."""
    return sum(math.prod(row.shape) for row in spec(config).values())
