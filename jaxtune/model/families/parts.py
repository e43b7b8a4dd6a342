"""The parts of a layer, as rows: each yields `(name, Row)` with names inside the layer and no stack axis."""

from collections.abc import Iterator

from jaxtune.model.families.base import ModelConfig
from jaxtune.model.row import Row

Rows = Iterator[tuple[str, Row]]


def norm(c: ModelConfig, name: str, hf: str, gguf: str, *shape: int) -> Rows:
    """A norm over the residual stream, or over the last `shape` dimensions inside the attention."""
    if name in c.bare_norms:
        return
    axes: tuple[str | None, ...] = (None,) * len(shape) if shape else ("embed",)
    shape = shape or (c.hidden_size,)
    yield name, Row(shape, axes, "zeros" if c.norm.endswith("_offset") else "ones", f"{hf}.weight", f"{gguf}.weight")
    if c.norm in ("layer", "layer_offset"):
        yield f"{name}_bias", Row(shape, axes, "zeros", f"{hf}.bias", f"{gguf}.bias")


def linear(
    name: str, out: int, width: int, axes: tuple[str, str], hf: str, gguf: str, bias: bool = False, transposed: bool = False
) -> Rows:
    """A matrix `[out, width]` with its bias."""
    yield name, Row((out, width), axes, "normal", f"{hf}.weight", f"{gguf}.weight", transposed=transposed)
    if bias:
        yield f"{name}_bias", Row((out,), axes[:1], "zeros", f"{hf}.bias", f"{gguf}.bias")


def attention(c: ModelConfig, out: str = "o_proj", gated: bool = False, hf: str = "self_attn") -> Rows:
    """Projections q, k, v and o of the module `hf`, where o is named `out`; `gated`: q also contains the result's gate."""
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    name, width = ("q_and_gate", 2 * q) if gated else ("q", q)
    yield from linear(name, width, c.hidden_size, ("heads", "embed"), f"{hf}.q_proj", "attn_q", c.qkv_bias)
    yield from linear("k", kv, c.hidden_size, ("kv_heads", "embed"), f"{hf}.k_proj", "attn_k", c.qkv_bias)
    yield from linear("v", kv, c.hidden_size, ("kv_heads", "embed"), f"{hf}.v_proj", "attn_v", c.qkv_bias)
    yield from linear("o", c.hidden_size, q, ("embed", "heads"), f"{hf}.{out}", "attn_output", c.out_bias)


def query_key_norms(c: ModelConfig, q_width: int, k_width: int, q: str = "q_norm", k: str = "k_norm") -> Rows:
    """Norms of queries and keys: over a head, or over the whole projection, by their widths; `q` and `k` are Hugging Face's names."""
    yield from norm(c, "q_norm", f"self_attn.{q}", "attn_q_norm", q_width)
    yield from norm(c, "k_norm", f"self_attn.{k}", "attn_k_norm", k_width)


def mlp(c: ModelConfig, times: int = 1, hf: str = "mlp") -> Rows:
    """A gated feed-forward network with a multiple of the usual width, under Hugging Face's name `hf`."""
    width, inner = c.hidden_size, times * c.intermediate_size
    yield from linear("gate", inner, width, ("mlp", "embed"), f"{hf}.gate_proj", "ffn_gate", c.mlp_bias)
    yield from linear("up", inner, width, ("mlp", "embed"), f"{hf}.up_proj", "ffn_up", c.mlp_bias)
    yield from linear("down", width, inner, ("embed", "mlp"), f"{hf}.down_proj", "ffn_down", c.mlp_bias)


def shared_expert(c: ModelConfig, hf: str) -> Rows:
    """The expert that every token uses."""
    assert c.moe is not None
    width, inner = c.hidden_size, c.moe.shared_intermediate_size
    yield from linear("shared_gate", inner, width, ("mlp", "embed"), f"{hf}.gate_proj", "ffn_gate_shexp")
    yield from linear("shared_up", inner, width, ("mlp", "embed"), f"{hf}.up_proj", "ffn_up_shexp")
    yield from linear("shared_down", width, inner, ("embed", "mlp"), f"{hf}.down_proj", "ffn_down_shexp")


def plain_mlp(c: ModelConfig, up: str = "mlp.up_proj", down: str = "mlp.down_proj") -> Rows:
    """A feed-forward network without a gate."""
    yield from linear("up", c.intermediate_size, c.hidden_size, ("mlp", "embed"), up, "ffn_up", c.mlp_bias)
    yield from linear("down", c.hidden_size, c.intermediate_size, ("embed", "mlp"), down, "ffn_down", c.mlp_bias)


def fused_mlp(c: ModelConfig) -> Rows:
    """A gated feed-forward network with gate and up in one matrix."""
    width, inner = c.hidden_size, c.intermediate_size
    yield from linear("gate_up", 2 * inner, width, ("mlp", "embed"), "mlp.gate_up_proj", "ffn_up")
    yield from linear("down", width, inner, ("embed", "mlp"), "mlp.down_proj", "ffn_down")


def pre_norm_layer(c: ModelConfig, layer: int) -> Rows:
    """Llama's layer: norm, attention, norm, feed-forward."""
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from attention(c)
    yield from norm(c, "mlp_norm", "post_attention_layernorm", "ffn_norm")
    yield from mlp(c)
