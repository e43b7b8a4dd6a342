"""NanoChat: norms without parameters, also of the embedding; rotation backwards, and before the norms of queries and keys."""

import dataclasses
from typing import Any

from jaxtune.model.families.base import Family, ModelConfig
from jaxtune.model.families.llama import DEFAULTS, llama_config
from jaxtune.model.families.parts import Rows, attention, plain_mlp


def _nanochat(hf: dict[str, Any]) -> ModelConfig:
    config = llama_config(
        hf,
        mlp_bias=False,
        bare_norms=("embed_norm", "attn_norm", "q_norm", "k_norm", "mlp_norm", "norm"),
        logits_softcap=float(hf["final_logit_softcapping"] or 0.0),
    )
    return dataclasses.replace(config, ropes=tuple(dataclasses.replace(rope, backwards=True) for rope in config.ropes))


def _layer(c: ModelConfig, layer: int) -> Rows:
    yield from attention(c)
    yield from plain_mlp(c, "mlp.fc1", "mlp.fc2")


NANOCHAT = Family(_nanochat, _layer, DEFAULTS | dict(hidden_act="relu2", final_logit_softcapping=15.0, pad_token_id=1))
