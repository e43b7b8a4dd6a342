"""GPT-2, GPT-BigCode (StarCoder 1), GPT-Neo, GPT-J and CodeGen: LayerNorms, a plain feed-forward; GPT-2's files hold matrices as
`[in, out]`."""

from typing import Any

from jaxtune.errors import ModelError
from jaxtune.model.families.base import Family, ModelConfig, common
from jaxtune.model.families.parts import Rows, linear, norm, plain_mlp
from jaxtune.model.rope import Rope

DEFAULTS = dict(n_positions=1024, n_inner=None, layer_norm_epsilon=1e-5, tie_word_embeddings=True)
REQUIRED = ("vocab_size", "n_embd", "n_layer", "n_head")
PREFIX = "transformer.h.{layer}."
ENDS = {"embed": "transformer.wte", "norm": "transformer.ln_f", "head": "lm_head"}
POSITIONS = ENDS | {"positions": "transformer.wpe"}


def _named(hf: dict[str, Any], **changes) -> ModelConfig:
    """Replace GPT-2's names of hidden_size, ... by the usual ones."""
    width = hf["n_embd"]
    named = hf | dict(
        hidden_size=width,
        intermediate_size=hf["n_inner"] or 4 * width,
        num_hidden_layers=hf["n_layer"],
        num_attention_heads=hf["n_head"],
        max_position_embeddings=hf.get("max_position_embeddings") or hf["n_positions"],  # two names of one key, in transformers too
        head_dim=None,
        num_key_value_heads=None,
    )
    return common(named, norm="layer", norm_eps=hf["layer_norm_epsilon"], hidden_act=hf["activation_function"], **changes)


# ---- GPT-2: learned positions, q, k and v in one matrix ----


def _gpt2(hf: dict[str, Any], **changes) -> ModelConfig:
    changes |= {} if hf["scale_attn_weights"] else dict(attention_scale=1.0)
    return _named(hf, ropes=(), layer_ropes=(-1,) * hf["n_layer"], **changes)


def _gpt2_layer(c: ModelConfig, layer: int) -> Rows:
    width, inner, conv1d = c.hidden_size, c.intermediate_size, dict(bias=True, transposed=True)
    yield from norm(c, "attn_norm", "ln_1", "attn_norm")
    yield from linear("qkv", 3 * width, width, ("heads", "embed"), "attn.c_attn", "attn_qkv", **conv1d)
    yield from linear("o", width, width, ("embed", "heads"), "attn.c_proj", "attn_output", **conv1d)
    yield from norm(c, "mlp_norm", "ln_2", "ffn_norm")
    yield from linear("up", inner, width, ("mlp", "embed"), "mlp.c_fc", "ffn_up", **conv1d)
    yield from linear("down", width, inner, ("embed", "mlp"), "mlp.c_proj", "ffn_down", **conv1d)


GPT2 = Family(
    _gpt2,
    _gpt2_layer,
    DEFAULTS | dict(activation_function="gelu_new", scale_attn_weights=True),
    refused={"scale_attn_by_inverse_layer_idx": (None, False), "add_cross_attention": (None, False)},
    required=REQUIRED,
    prefix=PREFIX,
    ends=POSITIONS,
    pads=False,
)


# ---- GPT-BigCode: the same with one head of keys and values ----


def _gpt_bigcode(hf: dict[str, Any]) -> ModelConfig:
    return _gpt2(hf, num_kv_heads=1 if hf["multi_query"] else hf["n_head"], mlp_bias=True)


def _gpt_bigcode_layer(c: ModelConfig, layer: int) -> Rows:
    width, joint = c.hidden_size, c.hidden_size + 2 * c.num_kv_heads * c.head_dim
    yield from norm(c, "attn_norm", "ln_1", "attn_norm")
    yield from linear("qkv_by_head", joint, width, ("heads", "embed"), "attn.c_attn", "attn_qkv", bias=True)
    yield from linear("o", width, width, ("embed", "heads"), "attn.c_proj", "attn_output", bias=True)
    yield from norm(c, "mlp_norm", "ln_2", "ffn_norm")
    yield from plain_mlp(c, "mlp.c_fc", "mlp.c_proj")


GPT_BIGCODE = Family(
    _gpt_bigcode,
    _gpt_bigcode_layer,
    DEFAULTS | dict(activation_function="gelu_pytorch_tanh", scale_attn_weights=True, multi_query=True),
    refused={"add_cross_attention": (None, False)},
    required=REQUIRED,
    prefix=PREFIX,
    ends=POSITIONS,
    pads=False,
)


# ---- GPT-J: side by side under one norm, neighbours in a part of a head turn, a bias of the head ----


def _gptj(hf: dict[str, Any]) -> ModelConfig:
    rope = Rope(hf["rotary_dim"] or hf["n_embd"] // hf["n_head"], interleaved=True)
    return _named(hf, ropes=(rope,), parallel_residual=True, shared_norm=True, mlp_bias=True, head_bias=True)


def _gptj_layer(c: ModelConfig, layer: int) -> Rows:
    width = c.hidden_size
    yield from norm(c, "attn_norm", "ln_1", "attn_norm")
    for name in "qkv":
        yield from linear(name, width, width, ("heads", "embed"), f"attn.{name}_proj", f"attn_{name}")
    yield from linear("o", width, width, ("embed", "heads"), "attn.out_proj", "attn_output")
    yield from plain_mlp(c, "mlp.fc_in", "mlp.fc_out")


GPTJ = Family(
    _gptj,
    _gptj_layer,
    DEFAULTS | dict(n_positions=2048, activation_function="gelu_new", rotary_dim=64, tie_word_embeddings=False),
    required=REQUIRED,
    prefix=PREFIX,
    ends=ENDS,
    pads=False,
)


# ---- CodeGen: the same with q, v and k in one matrix, shard by shard of the machine that trained it ----


def _codegen(hf: dict[str, Any]) -> ModelConfig:
    if hf["n_embd"] % SHARDS:
        raise ModelError(f"n_embd={hf['n_embd']} of this codegen model is not a multiple of {SHARDS}, in which its qkv_proj is cut")
    return _gptj(hf)


def _codegen_layer(c: ModelConfig, layer: int) -> Rows:
    width = c.hidden_size
    yield from norm(c, "attn_norm", "ln_1", "attn_norm")
    yield from linear("qvk_by_shard", 3 * width, width, ("heads", "embed"), "attn.qkv_proj", "attn_qkv")
    yield from linear("o", width, width, ("embed", "heads"), "attn.out_proj", "attn_output")
    yield from plain_mlp(c, "mlp.fc_in", "mlp.fc_out")


SHARDS = 4
CODEGEN = GPTJ._replace(config=_codegen, layer=_codegen_layer)


# ---- GPT-Neo: learned positions, scores not scaled, every other layer with a window ----


def _gpt_neo(hf: dict[str, Any]) -> ModelConfig:
    layers, kinds = hf["num_layers"], hf["attention_layers"] or _expanded(hf["attention_types"])
    if len(kinds) != layers or not all(kind in ("global", "local") for kind in kinds):
        raise ModelError(f"attention_types of this gpt_neo model have to be global or local for each of num_layers={layers}, not {kinds}")
    named = hf | dict(n_embd=hf["hidden_size"], n_layer=layers, n_head=hf["num_heads"], n_inner=hf["intermediate_size"])
    window = hf["window_size"]
    return _named(
        named,
        ropes=(),
        layer_ropes=(-1,) * layers,
        layer_windows=tuple(window if kind == "local" else 0 for kind in kinds),
        attention_scale=1.0,
        out_bias=True,
        mlp_bias=True,
    )


def _expanded(types: Any) -> list[Any]:
    """`[[["global", "local"], 12]]` is twelve times both."""
    try:
        return [kind for kinds, times in types for _ in range(times) for kind in kinds]
    except (TypeError, ValueError):
        raise ModelError(f"attention_types={types!r} of this gpt_neo model have to be like [[[global, local], 12]]") from None


def _gpt_neo_layer(c: ModelConfig, layer: int) -> Rows:
    width = c.hidden_size
    yield from norm(c, "attn_norm", "ln_1", "attn_norm")
    for name in "qkv":
        yield from linear(name, width, width, ("heads", "embed"), f"attn.attention.{name}_proj", f"attn_{name}")
    yield from linear("o", width, width, ("embed", "heads"), "attn.attention.out_proj", "attn_output", bias=True)
    yield from norm(c, "mlp_norm", "ln_2", "ffn_norm")
    yield from plain_mlp(c, "mlp.c_fc", "mlp.c_proj")


GPT_NEO = Family(
    _gpt_neo,
    _gpt_neo_layer,
    dict(max_position_embeddings=2048, intermediate_size=None, layer_norm_epsilon=1e-5, tie_word_embeddings=True)
    | dict(activation_function="gelu_new", window_size=256, attention_layers=None, attention_types=[[["global", "local"], 12]]),
    required=("vocab_size", "hidden_size", "num_layers", "num_heads"),
    prefix=PREFIX,
    ends=POSITIONS,
    pads=False,
)
