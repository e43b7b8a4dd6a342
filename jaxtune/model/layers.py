"""Activations and norms, by their names in config.json and `ModelConfig.norm`."""

import jax
import jax.numpy as jnp


def _gelu_tanh(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_python": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


def softcap(x: jax.Array, cap: float) -> jax.Array:
    """`cap * tanh(x / cap)`: at most `cap` (Gemma 2, arXiv 2408.00118); x itself if cap is 0."""
    return x if cap == 0.0 else cap * jnp.tanh(x / cap)


def scaled(x: jax.Array, by: float) -> jax.Array:
    """`by` times x, multiplied in float32."""
    return x if by == 1.0 else (x.astype(jnp.float32) * by).astype(x.dtype)


def above(x: jax.Array, cutoff: jax.Array) -> jax.Array:
    """What x is above `mean + cutoff * std` of its last axis, 0 below: of normal numbers the largest (Gemma 3n)."""
    x32 = x.astype(jnp.float32)
    variance = jnp.maximum(x32.var(-1, keepdims=True), 1e-30)  # the root's derivative at 0 is infinite
    return jax.nn.relu(x32 - x32.mean(-1, keepdims=True) - cutoff * jnp.sqrt(variance)).astype(x.dtype)


def xielu(x: jax.Array, alpha_p: jax.Array, alpha_n: jax.Array, beta: jax.Array, eps: jax.Array) -> jax.Array:
    """`p x^2 + beta x` above 0, else `n (exp(min(x, eps)) - 1 - x) + beta x`, in float32, with `p = softplus(alpha_p)` and `n = beta +
    softplus(alpha_n)` (arXiv 2411.13010). Beta and eps are constants."""
    alpha_p, alpha_n, beta, eps = (parameter.astype(jnp.float32) for parameter in (alpha_p, alpha_n, beta, eps))
    beta, eps, x32 = jax.lax.stop_gradient(beta), jax.lax.stop_gradient(eps), x.astype(jnp.float32)
    above = jax.nn.softplus(alpha_p) * jnp.square(x32)
    below = (beta + jax.nn.softplus(alpha_n)) * (jnp.expm1(jnp.minimum(x32, eps)) - x32)
    return (jnp.where(x32 > 0, above, below) + beta * x32).astype(x.dtype)


def _rms(x: jax.Array, eps: float) -> jax.Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)


def rms_norm(x: jax.Array, scale: jax.Array, bias: None, eps: float) -> jax.Array:
    """`x / sqrt(mean(x^2) + eps) * scale`; the mean in float32, the product in x's dtype, as in Llama."""
    return _rms(x, eps).astype(x.dtype) * scale.astype(x.dtype)


def rms_norm_float32(x: jax.Array, scale: jax.Array, bias: None, eps: float) -> jax.Array:
    """The same with the product in float32 too, as in OLMo 2."""
    return (_rms(x, eps) * scale.astype(jnp.float32)).astype(x.dtype)


def rms_norm_offset(x: jax.Array, scale: jax.Array, bias: None, eps: float) -> jax.Array:
    """`x / sqrt(mean(x^2) + eps) * (1 + scale)` in float32, as in Gemma."""
    return (_rms(x, eps) * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None, eps: float) -> jax.Array:
    """`(x - mean(x)) / sqrt(var(x) + eps) * scale + bias` in float32 (arXiv 1607.06450)."""
    x32 = x.astype(jnp.float32)
    x32 = _rms(x32 - x32.mean(-1, keepdims=True), eps) * scale.astype(jnp.float32)
    return (x32 if bias is None else x32 + bias.astype(jnp.float32)).astype(x.dtype)


def layer_norm_offset(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """The same with `1 + scale`, as in Nemotron."""
    return layer_norm(x, 1.0 + scale.astype(jnp.float32), bias, eps)


NORMS = {
    "rms": rms_norm,
    "rms_float32": rms_norm_float32,
    "rms_offset": rms_norm_offset,
    "layer": layer_norm,
    "layer_unbiased": layer_norm,
    "layer_offset": layer_norm_offset,
}
