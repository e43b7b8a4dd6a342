"""LayerNorms and separate projections: Phi 1 and 2, StarCoder 2, StableLM, Nemotron, Jais 2; and Arcee, Nemotron with Llama's norms."""

from typing import Any

from jaxtune.model.families.base import Family, ModelConfig, common
from jaxtune.model.families.kinds import one_window
from jaxtune.model.families.llama import DEFAULTS as LLAMA_DEFAULTS
from jaxtune.model.families.llama import llama_config
from jaxtune.model.families.parts import Rows, attention, mlp, norm, plain_mlp, query_key_norms
from jaxtune.model.row import Row

DEFAULTS = dict(num_key_value_heads=None, tie_word_embeddings=False)


# ---- Phi 1, 1.5 and 2: side by side under one norm; biases, of the head too ----


def _phi(hf: dict[str, Any]) -> ModelConfig:
    on = dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias", "head_bias", "parallel_residual", "shared_norm"), True)
    return common(hf, partial=True, norm="layer", norm_eps=hf["layer_norm_eps"], qk_norm=bool(hf["qk_layernorm"]), **on)


def _phi_layer(c: ModelConfig, layer: int) -> Rows:
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from attention(c, "dense")
    if c.qk_norm:
        yield from query_key_norms(c, c.head_dim, c.head_dim, "q_layernorm", "k_layernorm")
    yield from plain_mlp(c, "mlp.fc1", "mlp.fc2")


PHI = Family(
    _phi,
    _phi_layer,
    DEFAULTS
    | dict(
        hidden_act="gelu_new", max_position_embeddings=2048, layer_norm_eps=1e-5, partial_rotary_factor=0.5, qk_layernorm=False
    ),
    ends={"embed": "model.embed_tokens", "norm": "model.final_layernorm", "head": "lm_head"},
)


# ---- StarCoder 2 ----


def _starcoder2(hf: dict[str, Any]) -> ModelConfig:
    biases = dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), bool(hf["use_bias"]))
    return common(hf, norm="layer", norm_eps=hf["norm_epsilon"], layer_windows=one_window(hf), **biases)


def _starcoder2_layer(c: ModelConfig, layer: int) -> Rows:
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from attention(c)
    yield from norm(c, "mlp_norm", "post_attention_layernorm", "ffn_norm")
    yield from plain_mlp(c, "mlp.c_fc", "mlp.c_proj")


STARCODER2 = Family(
    _starcoder2,
    _starcoder2_layer,
    dict(
        num_key_value_heads=2,
        hidden_act="gelu_pytorch_tanh",
        max_position_embeddings=4096,
        norm_epsilon=1e-5,
        sliding_window=None,
        use_bias=True,
        tie_word_embeddings=True,
        initializer_range=0.018042,
    ),
)


# ---- StableLM ----


def _stablelm(hf: dict[str, Any]) -> ModelConfig:
    side_by_side = bool(hf["use_parallel_residual"])
    return common(
        hf,
        partial=True,
        norm="layer",
        norm_eps=hf["layer_norm_eps"],
        qkv_bias=bool(hf["use_qkv_bias"]),
        parallel_residual=side_by_side,
        shared_norm=side_by_side,
        qk_norm=bool(hf["qk_layernorm"]),
    )


def _stablelm_layer(c: ModelConfig, layer: int) -> Rows:
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from attention(c)
    if c.qk_norm:  # of the 12B: LayerNorms without biases, each head's a module of its own
        for name, heads in (("q", c.num_heads), ("k", c.num_kv_heads)):
            hf = f"self_attn.{name}_layernorm.norms.{{head}}.weight"
            yield f"{name}_norm", Row((heads, c.head_dim), (None, None), "ones", hf, f"attn_{name}_norm.weight")
    if not c.shared_norm:
        yield from norm(c, "mlp_norm", "post_attention_layernorm", "ffn_norm")
    yield from mlp(c)


STABLELM = Family(
    _stablelm,
    _stablelm_layer,
    DEFAULTS
    | dict(
        num_key_value_heads=32,
        hidden_act="silu",
        max_position_embeddings=4096,
        layer_norm_eps=1e-5,
        partial_rotary_factor=0.25,
        use_qkv_bias=False,
        use_parallel_residual=False,
        qk_layernorm=False,
    ),
)


# ---- Nemotron 3 and 4, Minitron: LayerNorms of 1 + w, squared ReLU. Arcee (AFM) and Jais 2: the same with other norms ----


def _nemotron(hf: dict[str, Any]) -> ModelConfig:
    return llama_config(hf, partial=True, norm="layer_offset", norm_eps=hf["norm_eps"])


def _jais2(hf: dict[str, Any]) -> ModelConfig:
    return llama_config(hf, norm="layer", norm_eps=hf["layer_norm_eps"])


def _ungated_layer(c: ModelConfig, layer: int) -> Rows:
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from attention(c)
    yield from norm(c, "mlp_norm", "post_attention_layernorm", "ffn_norm")
    yield from plain_mlp(c)


_UNGATED = LLAMA_DEFAULTS | dict(hidden_act="relu2", max_position_embeddings=4096)
NEMOTRON = Family(
    _nemotron, _ungated_layer, _UNGATED | dict(norm_eps=1e-5, partial_rotary_factor=0.5, initializer_range=0.0134)
)
ARCEE = Family(llama_config, _ungated_layer, _UNGATED | dict(rms_norm_eps=1e-5))
JAIS2 = Family(
    _jais2, _ungated_layer, _UNGATED | dict(max_position_embeddings=8192, layer_norm_eps=1e-5, attention_bias=True, mlp_bias=True)
)
