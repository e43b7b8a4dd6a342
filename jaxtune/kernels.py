"""Choose how training computes attention: plain XLA, or the platform's kernel if it supports the run and is correct on the actual chip."""

import functools
import logging
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtune.config.checks import PROMPTS
from jaxtune.errors import ConfigError
from jaxtune.model.attention import attend
from jaxtune.model.attention_mask import Keys

log = logging.getLogger("jaxtune")

KERNELS = {"flash": ("gpu", "cuda"), "splash": ("tpu",)}  # with the platforms they run on
HEAD = 256  # the largest supported head
LONGEST, MOST_ROWS = 4096, 2  # limits for the rows of the comparison: the weights may leave little memory
TOLERANCE = 0.02  # relative: bfloat16 probabilities rounded in a different order differ by 0.005


class Shape(NamedTuple):
    """The attention of one layer on one device."""

    rows: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    cap: float
    dtype: str


def attention_form(config, model_config, mesh: Mesh) -> str:
    """`xla | flash | splash` for the key `attention`; `auto` is the platform's kernel, unless it does not support the run or is wrong.

    The kernel is tested on a device that is present, and assumed correct for one that is not (`plan --target`).
    """
    if config.attention != "auto":
        return config.attention
    device = mesh.devices.flat[0]
    form = next((name for name, platforms in KERNELS.items() if device.platform in platforms), "xla")
    if form == "xla" or _cannot(config, model_config, mesh):
        return "xla"
    if device not in jax.devices():
        return form
    return form if works(form, _shape(config, model_config, mesh)) else "xla"


def check_attention(config, model_config, mesh: Mesh) -> None:
    """ConfigError if `attention` names a kernel that does not support this run."""
    platform, form = mesh.devices.flat[0].platform, config.attention
    if form not in KERNELS:
        return
    if platform not in KERNELS[form]:
        kind = "GPUs" if form == "flash" else "TPUs"
        raise ConfigError(f"attention {form} is a kernel for {kind}, and this run is on {platform}; write attention: auto")
    if why := _cannot(config, model_config, mesh):
        raise ConfigError(f"attention {form} {why}; write attention: auto")


def _cannot(config, model_config, mesh: Mesh) -> str | None:
    """Why a kernel does not support this run."""
    if config.method in PROMPTS:
        return f"does not support the virtual tokens of {config.method}"
    if model_config.alibi:
        return "does not support ALiBi, which this model has"
    if model_config.wide:
        return "supports heads of one size, and this model's have two"
    if model_config.head_dim > HEAD:
        return f"supports heads of up to {HEAD}, and this model's have {model_config.head_dim}"
    if model_config.num_kv_heads % mesh.shape["tensor"]:
        heads = f"{model_config.num_kv_heads} key and value heads"
        return f"gives each device whole heads, and mesh.tensor={mesh.shape['tensor']} does not divide this model's {heads}"
    return None


def _shape(config, model_config, mesh: Mesh) -> Shape:
    tensor, tokens = mesh.shape["tensor"], min(config.data.max_length, LONGEST)
    heads, kv_heads = model_config.num_heads // tensor, model_config.num_kv_heads // tensor
    scale, cap = model_config.attention_scale, model_config.attention_softcap
    rows = min(config.per_device_train_batch_size, MOST_ROWS)
    return Shape(rows, tokens, heads, kv_heads, model_config.head_dim, scale, cap, config.dtype)


@functools.lru_cache
def works(form: str, shape: Shape) -> bool:
    """Whether the kernel matches plain XLA's result and gradients on this device, within `TOLERANCE`; logs the outcome."""
    try:
        (found, seconds), (wanted, plain) = trial(form, shape), trial("xla", shape)
    except Exception as error:  # whatever a compiler raises if this chip does not support it
        why = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
        log.warning("attention: xla, since the kernel %s does not work on this device (%s)", form, why)
        return False
    worst = max(_distance(*pair) for pair in zip(found, wanted, strict=True))
    if worst >= TOLERANCE:
        log.warning("attention: xla, since the kernel %s is wrong on this device (relative difference to plain XLA: %.2g)", form, worst)
        return False
    took = f"{1e3 * seconds:.3g} ms per layer, forward and backward; plain XLA takes {1e3 * plain:.3g}"
    advice = "" if seconds < plain else "; attention=xla is faster"
    log.info("attention: %s agrees with plain XLA on this device; %s%s", form, took, advice)
    return True


def trial(form: str, shape: Shape) -> tuple[tuple[jax.Array, ...], float]:
    """Result and gradients for rows with two documents and padding, with a window, in `shape.dtype`, and the seconds of a second call."""
    B, T, h = shape.rows, shape.tokens, shape.head_dim
    first, second = T // 3, T - T // 8
    slots = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    segments = 1 + (slots >= first) - 2 * (slots >= second)
    places = Keys(slots, jnp.where(slots < first, slots, slots - first), segments)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, dout = (
        jax.random.normal(key, (B, T, heads, h)).astype(shape.dtype)
        for key, heads in zip(keys, (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads), strict=True)
    )

    @jax.jit
    def both(q, k, v, dout, window):
        def forward(q, k, v):
            return attend(q, k, v, places, places, scale=shape.scale, window=window, cap=shape.cap, form=form)

        out, back = jax.vjp(forward, q, k, v)
        return out, *back(dout)

    result = jax.block_until_ready(both(q, k, v, dout, T // 2))
    begun = time.perf_counter()
    jax.block_until_ready(both(q, k, v, dout, T // 2))
    return result, time.perf_counter() - begun


def _distance(found: jax.Array, wanted: jax.Array) -> float:
    """Norm of the difference relative to the norm of `wanted`; infinite if `found` contains NaN."""
    found, wanted = found.astype(jnp.float32), wanted.astype(jnp.float32)
    distance = jnp.linalg.norm((found - wanted).ravel()) / jnp.linalg.norm(wanted.ravel())
    return float(jnp.where(jnp.isnan(distance), jnp.inf, distance))
