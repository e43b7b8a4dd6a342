"""Gemma 3n (text): Gemma 4's inputs for each layer and shared keys and values, several residual streams (model/streams.py), a low-rank
layer beside attention (LAuReL), and gates of which some layers keep only the largest."""

from statistics import NormalDist
from typing import Any

from jaxtune.errors import ModelError
from jaxtune.model.families.base import Family, ModelConfig
from jaxtune.model.families.factors import Streams
from jaxtune.model.families.gemma import sandwich
from jaxtune.model.families.gemma4 import DEFAULTS, FULL, GEMMA4, SLIDING, check_sharing, input_rows, sharing_attention, sharing_config
from jaxtune.model.families.kinds import ropes_by_kind
from jaxtune.model.families.parts import Rows, linear, mlp, norm
from jaxtune.model.row import Row


def _for_each(hf: dict[str, Any], key: str, otherwise: Any) -> list:
    """A key's value for each layer."""
    value, layers = hf[key], hf["num_hidden_layers"]
    value = otherwise if value is None else value
    found = list(value) if isinstance(value, list | tuple) else [value] * layers
    if len(found) != layers:
        raise ModelError(f"{key} of this gemma3n_text model has {len(found)} values; there are {layers} layers")
    return found


def _gemma3n(hf: dict[str, Any]) -> ModelConfig:
    layers = hf["num_hidden_layers"]
    kinds = list(hf["layer_types"] or [SLIDING if (layer + 1) % 5 else FULL for layer in range(layers)])
    shared = check_sharing(hf, kinds)
    if len(sizes := set(_for_each(hf, "intermediate_size", None))) > 1:
        raise ModelError(f"intermediate_size={hf['intermediate_size']!r} is not implemented for gemma3n_text; only one for all layers is")
    first = 10 if layers > 10 else 0
    sparsity = _for_each(hf, "activation_sparsity_pattern", [0.95] * first + [0.0] * (layers - first))
    if wrong := [share for share in sparsity if not isinstance(share, int | float) or not 0 <= share < 1]:
        raise ModelError(f"activation_sparsity_pattern of this gemma3n_text model holds {wrong[0]!r}; a share is from 0 to below 1")
    count, active = hf["altup_num_inputs"], hf["altup_active_idx"]
    if not 0 <= active < count:
        raise ModelError(f"altup_active_idx={active} is none of the altup_num_inputs={count} streams of this gemma3n_text model")
    head_dim = hf["head_dim"] or hf["hidden_size"] // hf["num_attention_heads"]
    return sharing_config(
        hf | {"intermediate_size": sizes.pop()},
        kinds,
        ropes=ropes_by_kind(hf, head_dim, hf["rope_local_base_freq"]),
        kv_sharing=shared,
        layer_inputs=(hf["vocab_size_per_layer_input"], hf["hidden_size_per_layer_input"]),
        streams=Streams(count, active, bool(hf["altup_correct_scale"])),
        laurel=hf["laurel_rank"],
        cutoffs=tuple(NormalDist().inv_cdf(share) if share else None for share in sparsity),
    )


def _streams(c: ModelConfig) -> Rows:
    assert c.streams is not None
    n, width = c.streams.count, c.hidden_size
    yield from norm(c, "streams_norm", "altup.router_norm", "altup_router_norm")
    yield from linear("streams_router", n, width, (None, "embed"), "altup.modality_router", "altup_router")
    yield from linear("streams_predict", n * n, n, (None, None), "altup.prediction_coefs", "altup_predict_coef")
    yield from linear("streams_correct", n, n, (None, None), "altup.correction_coefs", "altup_correct_coef")
    yield "streams_scale", Row((width,), ("embed",), "zeros", "altup.correct_output_scale", "altup_correct_scale.weight")


def _layer(c: ModelConfig, layer: int) -> Rows:
    yield from sandwich(c, sharing_attention(c, layer), mlp(c))
    yield from linear("laurel_left", c.laurel, c.hidden_size, ("mlp", "embed"), "laurel.linear_left", "laurel_l")
    yield from linear("laurel_right", c.hidden_size, c.laurel, ("embed", "mlp"), "laurel.linear_right", "laurel_r")
    yield from norm(c, "laurel_norm", "laurel.post_laurel_norm", "laurel_post_norm")
    yield from _streams(c)
    yield from input_rows(c)


def _extra_rows(c: ModelConfig) -> Rows:
    assert c.streams is not None
    yield from GEMMA4.extra_rows(c)
    shape, axes = (1, c.hidden_size, c.hidden_size), ("layers", "heads", "embed")  # stacks of one, as that of layer_inputs
    for name, hf, gguf in (("enter", "altup_projections", "altup_proj"), ("leave", "altup_unembed_projections", "altup_unembd_proj")):
        for n in range(c.streams.count - 1):
            yield f"streams/{name}_{n}", Row(shape, axes, "normal", f"model.{hf}.{n}.weight", f"{gguf}.{n}.weight", layers=(0,))


GEMMA3N = Family(
    _gemma3n,
    _layer,
    DEFAULTS
    | dict(
        vocab_size=262400,
        intermediate_size=16384,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        final_logit_softcapping=30.0,
        num_kv_shared_layers=15,
        altup_active_idx=0,
        altup_correct_scale=True,
        altup_num_inputs=4,
        laurel_rank=64,
        activation_sparsity_pattern=None,
    ),
    {"use_bidirectional_attention": (None, False)},
    lists=("intermediate_size", "activation_sparsity_pattern"),
    required=("hidden_size", "num_hidden_layers", "num_attention_heads"),
    extra_rows=_extra_rows,
    ignored=GEMMA4.ignored,
)
