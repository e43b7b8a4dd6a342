"""Granite 4.0: layers of Mamba-2 (model/mamba.py) between layers of attention, or attention alone; experts beside a shared one, or that
one alone."""

import math
from typing import Any

from jaxtune.errors import ModelError
from jaxtune.model.families.base import ModelConfig, check_layer_types
from jaxtune.model.families.llama import granite_config
from jaxtune.model.families.moe import GRANITEMOE, granite_experts, moe_of
from jaxtune.model.families.parts import Rows, attention, linear, norm
from jaxtune.model.families.recurrent import Mamba
from jaxtune.model.row import Row

LINEAR, FULL = "linear_attention", "full_attention"
OLD = {"mamba": LINEAR, "attention": FULL}  # what files on the hub call them


def _mamba(hf: dict[str, Any], layers: tuple[int, ...]) -> Mamba:
    """What config.json says of the Mamba layers."""
    heads, groups, width = hf["mamba_n_heads"], hf["mamba_n_groups"], int(hf["mamba_expand"] * hf["hidden_size"])
    size = width // heads if hf["mamba_d_head"] in (None, "auto") else hf["mamba_d_head"]
    if not isinstance(size, int) or size < 1 or heads * size != width:
        raise ModelError(f"mamba_n_heads={heads} of mamba_d_head={size!r} are not mamba_expand * hidden_size = {width}")
    if heads % groups:
        raise ModelError(f"mamba_n_heads={heads} is not a multiple of mamba_n_groups={groups}")
    low, high = hf["time_step_limit"] if len(hf["time_step_limit"]) == 2 else (None, None)
    if low != 0 or high not in (math.inf, "Infinity", {"__float__": "Infinity"}):
        raise ModelError(f"time_step_limit={hf['time_step_limit']!r} is not implemented for granitemoehybrid; only [0.0, Infinity] is")
    return Mamba(heads, size, groups, hf["mamba_d_state"], hf["mamba_d_conv"], bool(hf["mamba_conv_bias"]), layers)


def _hybrid(hf: dict[str, Any]) -> ModelConfig:
    layers = range(hf["num_hidden_layers"])
    kinds = hf.get("layers_block_type") or hf["layer_types"] or [LINEAR] * len(layers)  # two names of one key, in transformers too
    kinds = [OLD.get(kind, kind) if isinstance(kind, str) else kind for kind in kinds]
    check_layer_types(hf, kinds, LINEAR, FULL)
    if FULL not in kinds:
        raise ModelError("layer_types: a model without a layer of attention is not implemented for granitemoehybrid")
    linear, shared, moe = tuple(layer for layer in layers if kinds[layer] == LINEAR), hf["shared_intermediate_size"], None
    if shared < 1:
        raise ModelError(f"shared_intermediate_size={shared} is not implemented for granitemoehybrid; it has to be 1 or more")
    if number := hf["num_local_experts"]:
        moe = moe_of(hf, number, hf["intermediate_size"], list(layers), normalize=True, shared_intermediate_size=shared)
    changes: dict[str, Any] = {} if hf["position_embedding_type"] == "rope" else dict(ropes=(), layer_ropes=(-1,) * len(layers))
    mamba = _mamba(hf, linear) if linear else None
    return granite_config(hf, mlp_bias=False, moe=moe, mamba=mamba, intermediate_size=hf["intermediate_size"] if moe else shared, **changes)


def _mamba_rows(c: ModelConfig, m: Mamba) -> Rows:
    """The projection to gate, convolution and time steps, the convolution `[channels, 1, W]`, decay, skip, the gated norm, the way out."""
    into = m.width + m.channels + m.heads
    yield from linear("in_gudt", into, c.hidden_size, ("heads", "embed"), "mamba.in_proj", "ssm_in")
    yield "conv", Row((m.channels, 1, m.kernel), ("heads", None, None), "normal", "mamba.conv1d.weight", "ssm_conv1d.weight")
    if m.conv_bias:
        yield "conv_bias", Row((m.channels,), ("heads",), "zeros", "mamba.conv1d.bias", "ssm_conv1d.bias")
    yield "dt_bias", Row((m.heads,), ("heads",), "ones", "mamba.dt_bias", "ssm_dt.bias")
    yield "a_log", Row((m.heads,), ("heads",), "zeros", "mamba.A_log", "ssm_a")
    yield "skip", Row((m.heads,), ("heads",), "ones", "mamba.D", "ssm_d")
    yield "state_norm", Row((m.width,), ("heads",), "ones", "mamba.norm.weight", "ssm_norm.weight")
    yield from linear("out", c.hidden_size, m.width, ("embed", "heads"), "mamba.out_proj", "ssm_out")


def _layer(c: ModelConfig, layer: int) -> Rows:
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from _mamba_rows(c, c.mamba) if c.mamba and layer in c.mamba.layers else attention(c)
    yield from norm(c, "mlp_norm", "post_attention_layernorm", "ffn_norm")
    if c.moe:
        yield from granite_experts(c)
    else:
        yield from linear("gate_up", 2 * c.intermediate_size, c.hidden_size, ("mlp", "embed"), "shared_mlp.input_linear", "ffn_up")
        yield from linear("down", c.hidden_size, c.intermediate_size, ("embed", "mlp"), "shared_mlp.output_linear", "ffn_down")


GRANITEMOEHYBRID = GRANITEMOE._replace(
    config=_hybrid,
    layer=_layer,
    defaults={**GRANITEMOE.defaults}
    | dict(
        shared_intermediate_size=1024,
        position_embedding_type=None,
        layer_types=None,
        mamba_n_heads=128,
        mamba_n_groups=1,
        mamba_d_state=256,
        mamba_d_head=None,
        mamba_d_conv=4,
        mamba_expand=2,
        mamba_conv_bias=True,
        mamba_proj_bias=False,
        time_step_limit=[0.0, math.inf],
    ),
    refused={"mamba_proj_bias": (False,), "position_embedding_type": (None, "nope", "rope")},
)
