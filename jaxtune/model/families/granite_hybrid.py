"""Granite 4.0: layers of Mamba-2 (model/mamba.py) between attention layers, or attention alone; experts with a shared one, or only that
one."""

import math
from typing import Any

from jaxtune.errors import ModelError
from jaxtune.model.families.base import ModelConfig
from jaxtune.model.families.kinds import check_layer_types
from jaxtune.model.families.llama import granite_config
from jaxtune.model.families.mamba import mamba_of, mamba_rows
from jaxtune.model.families.moe import GRANITEMOE, granite_experts, moe_of
from jaxtune.model.families.parts import Rows, attention, linear, norm

LINEAR, FULL = "linear_attention", "full_attention"
OLD = {"mamba": LINEAR, "attention": FULL}  # their names in files on the hub


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
    mamba = mamba_of(hf, linear, int(hf["mamba_expand"] * hf["hidden_size"]), hf["hidden_act"]) if linear else None
    return granite_config(hf, mlp_bias=False, moe=moe, mamba=mamba, intermediate_size=hf["intermediate_size"] if moe else shared, **changes)


def _layer(c: ModelConfig, layer: int) -> Rows:
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from mamba_rows(c, c.mamba) if c.mamba and layer in c.mamba.layers else attention(c)
    yield from norm(c, "mlp_norm", "post_attention_layernorm", "ffn_norm")
    if c.moe:
        yield from granite_experts(c)
    else:
        yield from linear("gate_up", 2 * c.intermediate_size, c.hidden_size, ("mlp", "embed"), "shared_mlp.input_linear", "ffn_up")
        yield from linear("down", c.hidden_size, c.intermediate_size, ("embed", "mlp"), "shared_mlp.output_linear", "ffn_down")


GRANITEMOEHYBRID = GRANITEMOE._replace(
    config=_hybrid,
    layer=_layer,
    defaults=GRANITEMOE.defaults
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
