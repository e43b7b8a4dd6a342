"""Rotary positions in a GGUF file: the keys under `rope.`, and the tensors of divisors, both ways."""

import math
from typing import Any

import numpy as np

from jaxtune.convert.gguf_file import Metadata
from jaxtune.errors import ModelError
from jaxtune.model.families import ModelConfig
from jaxtune.model.rope import Rope

# Tensors that are not parameters; the config contains their information.
TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def llama3_divisors(theta: float, size: int, rope: dict[str, Any]) -> np.ndarray:
    """llama.cpp's form of a llama3 scheme: a divisor per frequency, float32 `[size]`."""
    wavelength = 2 * np.pi * theta ** (np.arange(size) / size)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    with np.errstate(divide="ignore"):  # Llama 4 has one number for both: no scheme between those that turn slower and the others
        smooth = np.clip((rope["original_max_position_embeddings"] / wavelength - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


# ---- in ----


def rope_parameters(m: Metadata, head_dim: int) -> dict[str, Any]:
    """`rope_parameters` of config.json; the divisors in `rope_freqs.weight` are recognised as llama3's if they match."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": m.get("rope.freq_base", 10000.0)}
    turned = m.get("rope.dimension_count", head_dim)
    if turned != head_dim:
        rope["partial_rotary_factor"] = partial_factor(turned, head_dim)
    if m.has("rope_freqs.weight"):
        divisors = m.file.read("rope_freqs.weight").astype(np.float32)
        return rope | (_llama3(rope["rope_theta"], divisors) or {"rope_type": "divisors", "divisors": divisors.tolist()})
    if m.has("rope_factors_long.weight"):
        return rope | {
            "rope_type": "longrope",
            "long_factor": m.file.read("rope_factors_long.weight").tolist(),
            "short_factor": m.file.read("rope_factors_short.weight").tolist(),
            "original_max_position_embeddings": m("rope.scaling.original_context_length"),
        } | ({"attention_factor": m("rope.scaling.attn_factor")} if m.get("rope.scaling.attn_factor") else {})
    kind = m.get("rope.scaling.type", "linear" if m.get("rope.scale_linear", 1.0) != 1.0 else "none")
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": m.get("rope.scaling.factor") or m("rope.scale_linear")}
    if kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": m("rope.scaling.factor")}
        rope["original_max_position_embeddings"] = m("rope.scaling.original_context_length")
        betas = {key: m.get(f"rope.scaling.yarn_{key}") for key in ("beta_fast", "beta_slow")}
        rope |= {key: value for key, value in betas.items() if value is not None}
        own = m.get("rope.scaling.attn_factor")
        return rope | ({"attention_factor": own * mscale(rope["factor"])} if own else {})
    if kind != "none":
        raise ModelError(f"{m.file.path}: rope.scaling.type {kind!r} is not supported; supported are none, linear, yarn")
    return rope


def partial_factor(turned: int, head_dim: int) -> float:
    """The `partial_rotary_factor` with which `int(head_dim * factor)` is `turned`."""
    factor = turned / head_dim
    return factor if int(head_dim * factor) == turned else math.nextafter(factor, 1)


def mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's factor for attention: `0.1 weight ln(factor) + 1`."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def _llama3(theta: float, divisors: np.ndarray) -> dict[str, Any] | None:
    """The published llama3 scheme with these divisors (3.1: factor 8, 3.2: factor 32), or None."""
    for factor in (8.0, 32.0):
        rope = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        if np.allclose(llama3_divisors(theta, divisors.size, rope), divisors, rtol=1e-5, atol=0):
            return {"rope_type": "llama3"} | rope
    return None


# ---- out ----


def rope_keys(rope: Rope, truncate: bool = True) -> dict[str, Any]:
    """The keys of a scheme. `truncate`: whether llama.cpp rounds YaRN's limits here. ModelError for what it cannot express."""
    keys: dict[str, Any] = {"rope.dimension_count": rope.dim, "rope.freq_base": rope.theta}
    if rope.kind == "linear":
        return keys | {"rope.scaling.type": "linear", "rope.scaling.factor": rope.factor}
    if rope.kind == "longrope":
        return keys | {"rope.scaling.original_context_length": rope.original_max, "rope.scaling.attn_factor": rope.attention_factor}
    if rope.kind == "yarn":
        if rope.truncate != truncate:
            raise ModelError("this model's yarn has a truncate of its own, which GGUF cannot say")
        keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": rope.factor,
            "rope.scaling.original_context_length": rope.original_max,
            "rope.scaling.yarn_beta_fast": rope.beta_fast,
            "rope.scaling.yarn_beta_slow": rope.beta_slow,
        }
        own = rope.attention_factor / mscale(rope.factor)
        return keys if math.isclose(own, 1, rel_tol=1e-6) else keys | {"rope.scaling.attn_factor": own}
    if rope.kind not in ("default", "llama3", "divisors", "proportional"):
        raise ModelError(f"rope_type {rope.kind!r} cannot be written as GGUF; llama.cpp has no word for it")
    return keys


def rope_tensors(c: ModelConfig) -> dict[str, np.ndarray]:
    """Divisors of the rotary frequencies, which llama.cpp stores as tensors."""
    rope = c.ropes[0] if c.ropes else None
    if rope is None:
        return {}
    if rope.kind == "llama3":
        settings = {"factor": rope.factor, "low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
        settings["original_max_position_embeddings"] = rope.original_max
        return {"rope_freqs.weight": llama3_divisors(rope.theta, rope.pairs, settings)}
    if rope.kind == "proportional":  # pairs that do not turn
        still = np.arange(rope.pairs) >= int(rope.dim * rope.partial_rotary_factor / 2)
        return {"rope_freqs.weight": np.where(still, 1e30, 1.0).astype(np.float32)}
    if rope.kind == "divisors":
        return {"rope_freqs.weight": np.asarray(rope.divisors, np.float32)}
    if rope.kind == "longrope":
        factors = {"long": rope.long_factor, "short": rope.short_factor}
        return {f"rope_factors_{name}.weight": np.asarray(values, np.float32) for name, values in factors.items()}
    return {}
