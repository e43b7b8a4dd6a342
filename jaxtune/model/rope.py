"""Rotary position embeddings (arXiv 2104.09864), half-split as in Hugging Face, with the context-extension schemes of config.json."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import ModelError


@dataclasses.dataclass(frozen=True)
class Rope:
    """One rotary scheme: `dim` of the head's dimensions turn, with frequencies from `theta` changed as `kind` says."""

    dim: int
    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max: int = 0  # llama3: the length the model was first trained at
    divisors: tuple[float, ...] = ()  # kind "divisors": one per frequency (GGUF's rope_freqs)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], head_dim: int) -> "Rope":
        """From config.json: `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (4)."""
        scaling = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
        kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
        theta = scaling.get("rope_theta") or hf.get("rope_theta") or 10000.0
        dim = int(head_dim * (scaling.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0))
        if kind not in KINDS:
            raise ModelError(f"rope_type {kind!r} is not supported; supported are {', '.join(KINDS)}")
        known = {field.name for field in dataclasses.fields(cls)} - {"dim", "theta", "kind"}
        settings = {key: value for key, value in scaling.items() if key in known}
        if "original_max_position_embeddings" in scaling:
            settings["original_max"] = scaling["original_max_position_embeddings"]
        return cls(dim=dim, theta=float(theta), kind=kind, **settings)

    def frequencies(self) -> np.ndarray:
        """Angle per position, float32 `[dim / 2]`."""
        f = 1.0 / self.theta ** (np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim))
        return KINDS[self.kind](self, f.astype(np.float32)).astype(np.float32)


def _linear(rope: Rope, f: np.ndarray) -> np.ndarray:
    return f / rope.factor


def _llama3(rope: Rope, f: np.ndarray) -> np.ndarray:
    """Long wavelengths slowed by `factor`, short ones kept, those between blended."""
    if not rope.original_max:
        raise ModelError("rope_type 'llama3' needs original_max_position_embeddings")
    wavelength = 2 * math.pi / f
    blend = (rope.original_max / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return (1 - blend) * f / rope.factor + blend * f


KINDS = {
    "default": lambda rope, f: f,
    "linear": _linear,
    "llama3": _llama3,
    "divisors": lambda rope, f: f / np.asarray(rope.divisors, np.float32),
}


def cos_sin(ropes: tuple[Rope, ...], positions_BT: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 `[len(ropes) + 1, B, T, head_dim / 2]`; the last one turns nothing (layers without positions).

    float32 always: in bfloat16 position 257 is position 256, and the rotation is noise from there on.
    """
    cos, sin = [], []
    for rope in ropes:
        angle = positions_BT.astype(jnp.float32)[..., None] * rope.frequencies()
        angle = jnp.pad(angle, ((0, 0), (0, 0), (0, head_dim // 2 - angle.shape[-1])))
        cos.append(jnp.cos(angle))
        sin.append(jnp.sin(angle))
    cos.append(jnp.ones_like(cos[0]))
    sin.append(jnp.zeros_like(sin[0]))
    return jnp.stack(cos), jnp.stack(sin)


def rotate(x_BTHh: jax.Array, cos_BTh: jax.Array, sin_BTh: jax.Array) -> jax.Array:
    """Turns each pair `(x[i], x[i + h/2])` by its angle; computed in x's dtype."""
    cos, sin = (a[:, :, None, :].astype(x_BTHh.dtype) for a in (cos_BTh, sin_BTh))
    left, right = jnp.split(x_BTHh, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
