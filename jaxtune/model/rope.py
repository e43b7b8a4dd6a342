"""Rotary position embeddings (arXiv 2104.09864), as in Hugging Face, with the context-extension schemes of config.json.

"dynamic" and "longrope" choose their frequencies by the length of the text. transformers uses the longest row of the batch; here it is the
document itself, so that a text's result does not depend on what it is batched or packed with. For a single text, both are the same.
"""

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
    """One rotary scheme: the first `dim` dimensions of a head are rotated, with frequencies from `theta` changed according to `kind`."""

    dim: int
    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_max: int = 0  # the length of the model's first training (dynamic, llama3, longrope, yarn)
    attention_factor: float = 1.0  # multiplies cos and sin (longrope, yarn)
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    short_factor: tuple[float, ...] = ()  # longrope: a divisor per frequency
    long_factor: tuple[float, ...] = ()  # longrope
    divisors: tuple[float, ...] = ()  # kind "divisors": one per frequency (GGUF's rope_freqs)
    partial_rotary_factor: float = 1.0  # proportional: the share of the pairs that are rotated at all
    interleaved: bool = False  # pairs are neighbours, not halves of a head; the same in all of a model's schemes
    backwards: bool = False  # rotated the other way (NanoChat)

    @property
    def pairs(self) -> int:
        """The number of frequencies: one per two dimensions. An odd `dim` is rounded up, as in transformers."""
        return (self.dim + 1) // 2

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], head_dim: int, interleaved: bool = False) -> "Rope":
        """From config.json: `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (4).

        ModelError for an unknown kind or missing settings.
        """
        said = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
        if not isinstance(said, Mapping):
            raise ModelError(f"rope_scaling (or rope_parameters) of config.json is {said!r}; it has to be an object or null")
        given = {key: value for key, value in said.items() if value is not None}
        if nested := [key for key, value in given.items() if isinstance(value, Mapping)]:
            raise ModelError(f"rope_parameters.{nested[0]}: one rotary scheme per kind of layer is not implemented for {hf['model_type']}")
        kind = given.get("rope_type") or given.get("type") or "default"
        _check_settings(given)
        if kind not in KINDS:
            raise ModelError(f"rope_type {kind!r} is not supported; supported are {', '.join(KINDS)}")
        if missing := [key for key in _NEEDED.get(kind, ()) if key not in given]:
            raise ModelError(f"rope_type {kind!r} needs {', '.join(missing)} in rope_parameters (or rope_scaling) of config.json")
        dim = int(head_dim * (given.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0))
        own = {"dim", "theta", "kind", "original_max", "attention_factor", "interleaved", "backwards"}
        if kind == "proportional":
            dim = head_dim
        else:
            own.add("partial_rotary_factor")
        names = {field.name for field in dataclasses.fields(cls)} - own
        settings: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items() if key in names}
        original = hf.get("max_position_embeddings", 0)
        if kind != "dynamic":
            original = hf.get("original_max_position_embeddings") or given.get("original_max_position_embeddings") or original
        theta = float(given.get("rope_theta") or hf.get("rope_theta") or 10000.0)
        rope = cls(dim, theta, kind, original_max=original, interleaved=interleaved, **settings)
        if kind == "yarn" and theta <= 1:
            raise ModelError(f"rope_theta={theta:g} of config.json turns all dimensions alike, which rope_type yarn cannot; fetch it again")
        if kind == "longrope" and original <= 1:
            raise ModelError(f"original_max_position_embeddings={original} of config.json is no length of a text; fetch it again")
        if 2 * rope.pairs > head_dim:
            raise ModelError(f"head_dim={head_dim} is odd, and rotary positions turn two dimensions at a time; look at config.json")
        for key in ("short_factor", "long_factor"):
            if kind == "longrope" and len(settings[key]) != rope.pairs:
                raise ModelError(f"rope_parameters.{key} has {len(settings[key])} numbers; this model's heads need {rope.pairs}")
        if kind in ("longrope", "yarn"):
            rope = dataclasses.replace(rope, attention_factor=_attention_factor(rope, given, hf))
        return rope

    def frequencies(self, length_BT: jax.Array | None = None) -> np.ndarray | jax.Array:
        """Angle per position, float32 `[dim / 2]`; `[B, T, dim / 2]` if it depends on `length_BT`, the length of each token's text.

        Without lengths, those for a text no longer than `original_max`.
        """
        return KINDS[self.kind](self, length_BT)


_LONGEST = 2**31  # positions are int32
_TOO_LARGE = 1e30  # beyond it, powers of a setting are infinite


def _check_settings(given: Mapping[str, Any]) -> None:
    """ModelError for a setting that must be a number above 0 (or a list of them) and is not."""

    def positive(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _TOO_LARGE

    for key, value in given.items():
        if key in ("short_factor", "long_factor", "divisors"):
            fits = isinstance(value, list | tuple) and all(map(positive, value))
        elif key in ("type", "rope_type"):
            fits = isinstance(value, str)
        elif key in ("mscale", "mscale_all_dim", "llama_4_scaling_beta"):
            fits = positive(value) or (value == 0 and not isinstance(value, bool))
        elif key.endswith("embeddings"):
            fits = positive(value) and value < _LONGEST
        else:
            fits = not key.endswith(("factor", "theta", "beta_fast", "beta_slow", "alpha")) or positive(value)
        if not fits:
            wants = f"a number above 0 and below {_LONGEST if key.endswith('embeddings') else _TOO_LARGE:.0e}"
            raise ModelError(f"rope_parameters (or rope_scaling) of config.json has {key}={value!r}; it needs {wants} there")


_NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
    "yarn": ("factor",),
    "divisors": ("divisors",),
}


def _attention_factor(rope: Rope, given: Mapping[str, Any], hf: Mapping[str, Any]) -> float:
    """The factor of cos and sin, given explicitly or derived from the scheme's factor."""
    if "attention_factor" in given:
        return float(given["attention_factor"])
    if rope.kind == "longrope":
        factor = given.get("factor") or hf["max_position_embeddings"] / rope.original_max
        return math.sqrt(1 + math.log(factor) / math.log(rope.original_max)) if factor > 1 else 1.0

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if given.get("mscale") and given.get("mscale_all_dim"):
        return mscale(given["mscale"]) / mscale(given["mscale_all_dim"])
    return mscale(1.0)


# ---- frequencies, one function a kind ----


def _powers(rope: Rope) -> np.ndarray:
    return np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)


def _default(rope: Rope, length_BT=None) -> np.ndarray:
    return np.float32(1.0) / np.float32(rope.theta) ** _powers(rope)


def _linear(rope: Rope, length_BT=None) -> np.ndarray:
    return _default(rope) / np.float32(rope.factor)


def _dynamic(rope: Rope, length_BT=None):
    """theta grows with the part of the text beyond `original_max` (NTK-aware scaling)."""
    if length_BT is None:
        return _default(rope)
    stretch = rope.factor * jnp.maximum(length_BT, rope.original_max) / rope.original_max - (rope.factor - 1)
    theta_BT = rope.theta * stretch ** (rope.dim / (rope.dim - 2))
    return 1.0 / theta_BT[..., None] ** _powers(rope)[None, None]


def _llama3(rope: Rope, length_BT=None) -> np.ndarray:
    """Long wavelengths are slowed by `factor`, short ones kept, those in between blended."""
    f = _default(rope)
    wavelength = 2 * math.pi / f
    between = rope.high_freq_factor - rope.low_freq_factor or 1e-30  # Llama 4 blends none
    blend = np.clip((rope.original_max / wavelength - rope.low_freq_factor) / between, 0.0, 1.0)
    return ((1 - blend) * f / rope.factor + blend * f).astype(np.float32)


def _yarn(rope: Rope, length_BT=None) -> np.ndarray:
    """Like llama3, blended over the dimensions that make between `beta_fast` and `beta_slow` rotations in `original_max` (arXiv
    2309.00071)."""

    def dimension(turns: float) -> float:
        return rope.dim * math.log(rope.original_max / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001
    slowed = np.clip((np.arange(rope.pairs, dtype=np.float32) - low) / (high - low), 0.0, 1.0)
    f = _default(rope)
    return (f / rope.factor * slowed + f * (1 - slowed)).astype(np.float32)


def _longrope(rope: Rope, length_BT=None):
    """A learned divisor per frequency, with one set for texts up to `original_max` and one for longer ones (arXiv 2402.13753)."""
    f = _default(rope)
    short, long = f / np.asarray(rope.short_factor, np.float32), f / np.asarray(rope.long_factor, np.float32)
    return short if length_BT is None else jnp.where(length_BT[..., None] > rope.original_max, long, short)


def _divisors(rope: Rope, length_BT=None) -> np.ndarray:
    return _default(rope) / np.asarray(rope.divisors, np.float32)


def _proportional(rope: Rope, length_BT=None) -> np.ndarray:
    """Only the first pairs of a whole head are rotated, at the frequencies that they have among all pairs."""
    turning = np.arange(rope.pairs) < int(rope.partial_rotary_factor * rope.dim // 2)
    return np.where(turning, _linear(rope), np.float32(0.0))


KINDS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "divisors": _divisors,
    "proportional": _proportional,
}
BY_LENGTH = ("dynamic", "longrope")


# ---- use ----


def cos_sin(ropes: tuple[Rope, ...], positions_BT: jax.Array, segments_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 `[len(ropes) + 1, B, T, dim / 2]`; the last one rotates nothing (layers without positions). All have the widest
    dim; narrower ones are padded.

    Always float32: in bfloat16 position 257 equals position 256, and the rotation is noise from there on.
    """
    length_BT = _lengths(positions_BT, segments_BT) if any(rope.kind in BY_LENGTH for rope in ropes) else None
    widest = max((rope.pairs for rope in ropes), default=0)
    still = jnp.zeros((*positions_BT.shape, widest), jnp.float32)
    cos, sin = [], []
    for rope in ropes:
        frequencies = jnp.broadcast_to(rope.frequencies(length_BT), (*positions_BT.shape, rope.pairs))
        frequencies = jnp.pad(frequencies, ((0, 0), (0, 0), (0, widest - rope.pairs)))
        angle = positions_BT.astype(jnp.float32)[..., None] * (-frequencies if rope.backwards else frequencies)
        cos.append(jnp.cos(angle) * rope.attention_factor)
        sin.append(jnp.sin(angle) * rope.attention_factor)
    return jnp.stack([*cos, still + 1.0]), jnp.stack([*sin, still])


def _lengths(positions_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """The length of a token's text, as far as it is present: the last position of its segment, plus one."""
    same = segments_BT[:, :, None] == segments_BT[:, None, :]
    return jnp.where(same, positions_BT[:, None, :], 0).max(-1) + 1


def rotate(x_BTHh: jax.Array, cos_BTh: jax.Array, sin_BTh: jax.Array, interleaved: bool = False) -> jax.Array:
    """Rotate each pair of a head's first `dim` dimensions by its angle: `(x[i], x[i + dim/2])`, or `(x[2i], x[2i + 1])`; in x's dtype."""
    cos, sin = (a[:, :, None, :].astype(x_BTHh.dtype) for a in (cos_BTh, sin_BTh))
    half = cos.shape[-1]
    if interleaved:
        left, right, rest = x_BTHh[..., 0 : 2 * half : 2], x_BTHh[..., 1 : 2 * half : 2], x_BTHh[..., 2 * half :]
    else:
        left, right, rest = jnp.split(x_BTHh, [half, 2 * half], axis=-1)
    turned = [left * cos - right * sin, right * cos + left * sin]
    if interleaved:
        turned = [jnp.stack(turned, axis=-1).reshape(*left.shape[:-1], 2 * half)]
    return jnp.concatenate([*turned, rest], axis=-1)
