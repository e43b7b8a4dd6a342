"""Apertus (Swiss AI): Llama with query and key norms, and a feed-forward part without a gate whose activation is trained."""

import dataclasses
from typing import Any

from jaxtune.errors import ModelError
from jaxtune.model.families.base import Family, ModelConfig, common
from jaxtune.model.families.llama import DEFAULTS
from jaxtune.model.families.parts import Rows, attention, norm, plain_mlp, query_key_norms
from jaxtune.model.row import Row

LLAMA3 = dict(rope_type="llama3", rope_theta=12e6, factor=8.0, original_max_position_embeddings=8192)
LLAMA3 |= dict(low_freq_factor=1.0, high_freq_factor=4.0)


def _apertus(hf: dict[str, Any]) -> ModelConfig:
    bias = bool(hf["attention_bias"])
    said = hf.get("rope_scaling") or hf["rope_parameters"]
    return common(hf | dict(rope_parameters=LLAMA3 if said is None else said), own_act="xielu", qkv_bias=bias, out_bias=bias)


def _layer(c: ModelConfig, layer: int) -> Rows:
    yield from norm(c, "attn_norm", "attention_layernorm", "attn_norm")
    yield from attention(c)
    yield from query_key_norms(c, c.head_dim, c.head_dim)
    yield from norm(c, "mlp_norm", "feedforward_layernorm", "ffn_norm")
    yield from plain_mlp(c)
    if c.hidden_act == "xielu":
        for name, shape, init in (("alpha_p", (1,), "zeros"), ("alpha_n", (1,), "zeros"), ("beta", (), "ones"), ("eps", (), "zeros")):
            yield f"act_{name}", Row(shape, (None,) * len(shape), init, f"mlp.act_fn.{name}", f"ffn_act.{name}")


APERTUS = Family(
    _apertus,
    _layer,
    DEFAULTS
    | dict(hidden_act="xielu", max_position_embeddings=65536, rms_norm_eps=1e-5, rope_theta=12e6, rope_parameters=None, pad_token_id=3),
)


# ---- Apertus 1.5: the head may lack the vocabulary's last rows, of tokens that stand for images and sounds ----


def _apertus1p5(hf: dict[str, Any]) -> ModelConfig:
    size, kept = hf["vocab_size"], hf["output_vocab_size"] or hf["vocab_size"]
    if not 0 < kept <= size or kept < size and hf["tie_word_embeddings"]:
        what = f"this {hf['model_type']} model has output_vocab_size={kept}"
        raise ModelError(f"{what}; at most vocab_size={size} is possible, and only this if tied")
    return dataclasses.replace(_apertus(hf | dict(vocab_size=kept)), unwritten=size - kept)


APERTUS1P5 = APERTUS._replace(config=_apertus1p5, defaults=APERTUS.defaults | dict(output_vocab_size=None))
