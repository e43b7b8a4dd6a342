"""EXAONE 3, 3.5 and Deep: Llama under GPT-2's names. (EXAONE 4 is in olmo.py, whose layers it has.)"""

from typing import Any

from jaxtune.errors import ModelError
from jaxtune.model.families.base import Family, ModelConfig
from jaxtune.model.families.llama import DEFAULTS, llama_config
from jaxtune.model.families.parts import Rows, attention, linear, norm

OLDER = {"num_layers": "num_hidden_layers", "layer_norm_epsilon": "rms_norm_eps", "activation_function": "hidden_act"}


def _exaone(hf: dict[str, Any]) -> ModelConfig:
    hf = hf | {OLDER[key]: hf[key] for key in OLDER if hf.get(key) is not None}
    if not isinstance(layers := hf.get("num_hidden_layers"), int) or layers < 1:
        raise ModelError(f"this exaone model has num_layers={layers!r}; it needs a positive whole number there")
    return llama_config(hf)


def _layer(c: ModelConfig, layer: int) -> Rows:
    width, inner, bias = c.hidden_size, c.intermediate_size, c.mlp_bias
    yield from norm(c, "attn_norm", "ln_1", "attn_norm")
    yield from attention(c, "out_proj", hf="attn.attention")
    yield from norm(c, "mlp_norm", "ln_2", "ffn_norm")
    yield from linear("gate", inner, width, ("mlp", "embed"), "mlp.c_fc_0", "ffn_gate", bias)
    yield from linear("up", inner, width, ("mlp", "embed"), "mlp.c_fc_1", "ffn_up", bias)
    yield from linear("down", width, inner, ("embed", "mlp"), "mlp.c_proj", "ffn_down", bias)


EXAONE = Family(
    _exaone,
    _layer,
    DEFAULTS | dict(num_key_value_heads=8, max_position_embeddings=4096, rms_norm_eps=1e-5, rope_theta=5e5, pad_token_id=0),
    required=("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"),
    prefix="transformer.h.{layer}.",
    ends={"embed": "transformer.wte", "norm": "transformer.ln_f", "head": "lm_head"},
)
