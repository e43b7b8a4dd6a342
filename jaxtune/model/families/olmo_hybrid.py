"""OLMo Hybrid: three of four layers are Gated DeltaNet (model/delta.py) with norms before both parts, every fourth is OLMo 3's attention
with norms after them, usually without positions."""

from typing import Any

from jaxtune.errors import ModelError
from jaxtune.model.families.base import Family, ModelConfig
from jaxtune.model.families.kinds import check_layer_types
from jaxtune.model.families.llama import DEFAULTS, llama_config
from jaxtune.model.families.olmo import post_norm_layer
from jaxtune.model.families.parts import Rows, linear, mlp, norm
from jaxtune.model.families.recurrent import DeltaNet
from jaxtune.model.row import Row

LINEAR, FULL = "linear_attention", "full_attention"


def _delta_net(hf: dict[str, Any], kinds: list[str]) -> DeltaNet:
    heads = hf["num_attention_heads"]
    keys, values = hf["linear_num_key_heads"] or heads, hf["linear_num_value_heads"] or heads
    size = hf["linear_key_head_dim"] or int(0.75 * hf["hidden_size"] / keys)
    if values != keys:
        raise ModelError(f"linear_num_value_heads={values} and linear_num_key_heads={keys} have to be equal for olmo_hybrid")
    if not size:
        raise ModelError(f"linear_num_key_heads={keys} is more than hidden_size={hf['hidden_size']} has room for")
    layers = tuple(i for i, kind in enumerate(kinds) if kind == LINEAR)
    most = 2.0 if hf["linear_allow_neg_eigval"] else 1.0
    return DeltaNet(
        keys, values, size, hf["linear_value_head_dim"] or 2 * size, hf["linear_conv_kernel_dim"], layers, most_written=most, norm_eps=1e-5
    )


def _config(hf: dict[str, Any]) -> ModelConfig:
    layers = hf["num_hidden_layers"]
    kinds = list(hf["layer_types"] or [FULL if i % 4 == 3 else LINEAR for i in range(layers)])
    if hf["layer_types"] is None and FULL not in kinds:
        kinds[-1] = FULL
    check_layer_types(hf, kinds, LINEAR, FULL)
    if missing := {LINEAR, FULL} - set(kinds):
        raise ModelError(f"layer_types of this olmo_hybrid model has no {missing.pop()}; it needs both kinds of layers")
    said = hf["rope_parameters"] or {}
    turned = said.get("rope_theta", hf.get("rope_theta", 1e4)) is not None
    return llama_config(
        hf,
        norm="rms_float32",
        mlp_bias=False,
        delta=_delta_net(hf, kinds),
        layer_ropes=tuple(0 if turned and kind == FULL else -1 for kind in kinds),
    )


def _linear_attention(d: DeltaNet, width: int) -> Rows:
    """Projections and convolutions `[channels, 1, W]` of queries, keys and values, those of gate, writing and decay, the gated norm."""
    keys, values = d.key_heads * d.key_dim, d.value_heads * d.value_dim
    for name, size in (("q", keys), ("k", keys), ("v", values)):
        yield from linear(f"in_{name}", size, width, ("heads", "embed"), f"linear_attn.{name}_proj", f"ssm_{name}")
        channels = (size, 1, d.kernel), ("heads", None, None)
        yield f"conv_{name}", Row(*channels, "normal", f"linear_attn.{name}_conv1d.weight", f"ssm_conv1d_{name}.weight")
    for name, size, hf in (("in_z", values, "g"), ("in_b", d.value_heads, "b"), ("in_a", d.value_heads, "a")):
        yield from linear(name, size, width, ("heads", "embed"), f"linear_attn.{hf}_proj", f"ssm_{hf}")
    yield "dt_bias", Row((d.value_heads,), ("heads",), "ones", "linear_attn.dt_bias", "ssm_dt.bias")
    yield "a_log", Row((d.value_heads,), ("heads",), "zeros", "linear_attn.A_log", "ssm_a")
    yield "state_norm", Row((d.value_dim,), (None,), "ones", "linear_attn.o_norm.weight", "ssm_norm.weight")
    yield from linear("out", width, values, ("embed", "heads"), "linear_attn.o_proj", "ssm_out")


def _layer(c: ModelConfig, layer: int) -> Rows:
    assert c.delta is not None
    if layer not in c.delta.layers:
        yield from post_norm_layer(c, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim)
        return
    yield from norm(c, "attn_norm", "attention_layer_norm", "attn_norm")
    yield from _linear_attention(c.delta, c.hidden_size)
    yield from norm(c, "mlp_norm", "feedforward_layer_norm", "ffn_norm")
    yield from mlp(c)


OLMO_HYBRID = Family(
    _config,
    _layer,
    DEFAULTS
    | dict(
        max_position_embeddings=65536,
        pad_token_id=100277,
        layer_types=None,
        rope_parameters=None,
        linear_num_key_heads=None,
        linear_num_value_heads=None,
        linear_key_head_dim=None,
        linear_value_head_dim=None,
        linear_conv_kernel_dim=4,
        linear_allow_neg_eigval=True,
    ),
)
