"""What config.json says of each layer: its window, its rotary scheme."""

from collections.abc import Mapping
from typing import Any

from jaxtune.errors import ModelError
from jaxtune.model.rope import Rope


def whole_rope(hf: Mapping[str, Any], head_dim: int, interleaved: bool = False) -> Rope:
    """The rotary scheme of a family with fully rotated heads; ModelError if config.json says otherwise."""
    rope = Rope.from_hf(hf, head_dim, interleaved)
    if rope.dim != head_dim:
        raise ModelError(f"partial_rotary_factor is not implemented for {hf['model_type']}; transformers turns whole heads there")
    return rope


def ropes_by_kind(hf: Mapping[str, Any], head_dim: int, sliding_theta: float) -> tuple[Rope, Rope]:
    """The rotary schemes of full and sliding layers: `rope_parameters` by kind (transformers 5), or `rope_scaling` for full ones (4)."""
    nested, scaling = hf.get("rope_parameters") or {}, hf.get("rope_scaling") or {}
    full, sliding = (nested.get(f"{kind}_attention") or {} for kind in ("full", "sliding"))
    if wrong := next((rope for rope in (full, sliding) if not isinstance(rope, Mapping)), None):
        raise ModelError(f"rope_parameters of this {hf['model_type']} model holds {wrong!r}; it needs an object for each kind of layer")
    if not nested and "rope_type" not in scaling and scaling.get("type", "default") != "default":
        raise ModelError(f"rope_scaling of this {hf['model_type']} model has type={scaling['type']!r}; transformers reads rope_type there")
    hf = {**hf, "rope_parameters": None, "original_max_position_embeddings": None}  # which counts inside of a scheme alone
    of_sliding = whole_rope({**hf, "rope_scaling": sliding, "rope_theta": sliding_theta}, head_dim)
    return whole_rope({**hf, "rope_scaling": {**full, **scaling}}, head_dim), of_sliding


def windows(hf: Mapping[str, Any], layer_types: list[str]) -> tuple[int, ...]:
    """The window of each layer from its type; ModelError for a type that is neither sliding nor full, or a missing window."""
    check_layer_types(hf, layer_types, "sliding_attention", "full_attention")
    if "sliding_attention" in layer_types and not hf.get("sliding_window"):
        raise ModelError(f"layer_types has sliding_attention but sliding_window is {hf.get('sliding_window')!r}, not a number of tokens")
    return tuple(hf["sliding_window"] if kind == "sliding_attention" else 0 for kind in layer_types)


def windows_by_period(hf: Mapping[str, Any], period: int) -> tuple[int, ...]:
    """The window of each layer by `layer_types`; by default all layers except every `period`-th have one (0: none)."""
    kinds = ["sliding_attention" if period and (layer + 1) % period else "full_attention" for layer in range(hf["num_hidden_layers"])]
    return windows(hf, hf.get("layer_types") or kinds)


def check_layer_types(hf: Mapping[str, Any], layer_types: list[str], *known: str) -> None:
    """ModelError for a list of the wrong length, or with a type that is not `known`."""
    if len(layer_types) != hf["num_hidden_layers"]:
        raise ModelError(f"layer_types has {len(layer_types)} entries for num_hidden_layers={hf['num_hidden_layers']}")
    if unknown := set(layer_types) - set(known):
        raise ModelError(f"layer_types: {sorted(unknown)[0]!r} is not supported; supported are {', '.join(known)}")


def one_window(hf: Mapping[str, Any]) -> tuple[int, ...]:
    """The same window on every layer, or none."""
    return (hf.get("sliding_window") or 0,) * hf["num_hidden_layers"]
