"""The row table: one row per parameter, read by initialisation, sharding, import, export, the planner and adapter targets."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.model.families import ModelConfig
from jaxtune.tree import unflatten


class Row(NamedTuple):
    """One parameter: what it is (shape, axes, init), what others call it (hf, gguf), and which layers it stacks."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str  # normal | zeros | ones
    hf: str
    gguf: str
    layers: tuple[int, ...] = ()

    @property
    def is_matrix(self) -> bool:
        """Whether `linear` multiplies by it (so that it can be quantised or adapted): not norms, biases, embeddings."""
        return len(self.shape) - bool(self.layers) == 2 and "vocab" not in self.axes

    def hf_names(self) -> list[str]:
        """The Hugging Face tensors this row is stacked from, in order."""
        return [self.hf.format(layer=layer) for layer in self.layers] or [self.hf]

    def gguf_names(self) -> list[str]:
        """The GGUF tensors this row is stacked from, in order."""
        return [self.gguf.format(layer=layer) for layer in self.layers] or [self.gguf]


# row -> (Hugging Face name, GGUF name) inside a layer; a family adds or replaces entries
LLAMA_NAMES = {
    "attn_norm": ("input_layernorm", "attn_norm"),
    "q": ("self_attn.q_proj", "attn_q"),
    "k": ("self_attn.k_proj", "attn_k"),
    "v": ("self_attn.v_proj", "attn_v"),
    "o": ("self_attn.o_proj", "attn_output"),
    "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
    "gate": ("mlp.gate_proj", "ffn_gate"),
    "up": ("mlp.up_proj", "ffn_up"),
    "down": ("mlp.down_proj", "ffn_down"),
}
NAMES = {"llama": LLAMA_NAMES, "mistral": LLAMA_NAMES}


def spec(config: ModelConfig) -> dict[str, Row]:
    """The row table of a model, keyed by `/`-joined path, in tree order."""
    c, names = config, NAMES[config.model_type]
    rows = {"embed": Row((c.vocab_size, c.hidden_size), ("vocab", "embed"), "normal", "model.embed_tokens.weight", "token_embd.weight")}
    for number, layers in enumerate(c.stacks):
        for name, shape, axes, init in _block_rows(c):
            matrix, _, bias = name.partition("_bias")
            hf, gguf = names[matrix] if name.endswith("_bias") else names[name]
            suffix = "bias" if name.endswith("_bias") else "weight"
            rows[f"layers/{number}/{name}"] = Row(
                (len(layers), *shape), ("layers", *axes), init, f"model.layers.{{layer}}.{hf}.{suffix}", f"blk.{{layer}}.{gguf}.{suffix}", layers
            )
    rows["norm"] = Row((c.hidden_size,), ("embed",), "ones", "model.norm.weight", "output_norm.weight")
    if not c.tie_word_embeddings:
        rows["head"] = Row((c.vocab_size, c.hidden_size), ("vocab", "embed"), "normal", "lm_head.weight", "output.weight")
    return rows


def _block_rows(c: ModelConfig):
    """`(name, shape, axes, init)` of one layer's parameters."""
    width, mlp = c.hidden_size, c.intermediate_size
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    yield "attn_norm", (width,), ("embed",), "ones"
    yield from _linear("q", q, width, "heads", "embed", c.qkv_bias)
    yield from _linear("k", kv, width, "kv_heads", "embed", c.qkv_bias)
    yield from _linear("v", kv, width, "kv_heads", "embed", c.qkv_bias)
    yield from _linear("o", width, q, "embed", "heads", c.out_bias)
    yield "mlp_norm", (width,), ("embed",), "ones"
    yield from _linear("gate", mlp, width, "mlp", "embed", c.mlp_bias)
    yield from _linear("up", mlp, width, "mlp", "embed", c.mlp_bias)
    yield from _linear("down", width, mlp, "embed", "mlp", c.mlp_bias)


def _linear(name: str, out: int, width: int, out_axis: str, in_axis: str, bias: bool):
    yield name, (out, width), (out_axis, in_axis), "normal"
    if bias:
        yield f"{name}_bias", (out,), (out_axis,), "zeros"


def abstract(config: ModelConfig, dtype="float32") -> dict:
    """The parameter tree as `jax.ShapeDtypeStruct`: no memory."""
    return unflatten({path: jax.ShapeDtypeStruct(row.shape, jnp.dtype(dtype)) for path, row in spec(config).items()})


def init_params(key: jax.Array, config: ModelConfig, dtype="float32") -> dict:
    """Random parameters: normal with `initializer_range`, ones and zeros as the rows say."""

    def leaf(number: int, row: Row) -> jax.Array:
        if row.init != "normal":
            return jnp.full(row.shape, 1.0 if row.init == "ones" else 0.0, dtype)
        noise = jax.random.normal(jax.random.fold_in(key, number), row.shape, jnp.float32)
        return (noise * config.initializer_range).astype(dtype)

    return unflatten({path: leaf(number, row) for number, (path, row) in enumerate(spec(config).items())})


def parameter_count(config: ModelConfig) -> int:
    """How many parameters the model has."""
    return sum(math.prod(row.shape) for row in spec(config).values())
