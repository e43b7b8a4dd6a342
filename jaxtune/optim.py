"""Optimisers by name, equal to torch's step by step.

    update = optimizer(config, total_steps).update(grads, state, trainable)      # an optax chain

Layers are stacked (`layers/0/q` is `[L, out, in]`), so whatever depends on the shape of one parameter (weight decay, factored moments,
orthogonalisation) uses the shape of one layer: a stacked norm `[L, D]` is still a norm.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtune import moments, peft
from jaxtune.config import Config
from jaxtune.schedules import arguments, schedule

STACKED = re.compile(r"(^|/)(layers/\d+|layer_inputs/projection|streams)(/|$)")
WITHOUT_DECAY = re.compile(r"norm|bias|router_correction|act_beta|act_eps|layer_scale")  # and buffers of transformers' modules


def clip_by_global_norm(grads: Any, max_norm: float) -> tuple[Any, jax.Array]:
    """`grads * min(1, max_norm / (norm + 1e-6))` and the norm before clipping (torch's formula); max_norm 0 disables clipping."""
    norm = optax.tree.norm(grads)
    if not max_norm:
        return grads, norm
    scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads), norm


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _per_layer(name: str, leaf: Any) -> int:
    """Dimensions of one layer's parameter."""
    return leaf.ndim - bool(STACKED.search(name))


def decays(params: Any) -> Any:
    """A tree of bool: whether weight decay applies. As in HF's Trainer, norms and biases have none; other vectors (attention sinks, a
    recurrent layer's `a_log`) and an adapter's arrays do."""

    def one(path, leaf):
        name = _name(path)
        own = name.rpartition("/")[2]
        return "bias" not in own if name.startswith("params/") else not WITHOUT_DECAY.search(own)

    return jax.tree_util.tree_map_with_path(one, params)


def _adam(config: Config) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.adam_beta1, config.adam_beta2, config.adam_epsilon, mu_dtype=jnp.float32)


def _adamw(config: Config) -> optax.GradientTransformation:
    """torch.optim.AdamW (arXiv 1711.05101): eps outside the root, decay multiplied by the learning rate."""
    return _adam(config)


def _stacked(path: tuple) -> int:
    return int(bool(STACKED.search(_name(path))))


def _adamw_8bit(config: Config) -> optax.GradientTransformation:
    """bitsandbytes' AdamW8bit: AdamW with both moments in one byte per number (`moments.py`)."""
    return moments.in_8_bits(_adam(config), _stacked, in_turn=config.zero_stage == 0)


def _lion_8bit(config: Config) -> optax.GradientTransformation:
    """bitsandbytes' Lion8bit."""
    return moments.in_8_bits(_lion(config), _stacked, in_turn=config.zero_stage == 0)


def _lion(config: Config) -> optax.GradientTransformation:
    """Lion (arXiv 2302.06675): `sign(b1 m + (1 - b1) g)`, with Adam's keys for the betas, as in transformers."""
    return optax.scale_by_lion(config.adam_beta1, config.adam_beta2, mu_dtype=jnp.float32)


def _sgd(config: Config, momentum=0.0, nesterov=False) -> optax.GradientTransformation:
    """torch.optim.SGD."""
    return optax.trace(momentum, nesterov) if momentum else optax.identity()


class FactoredState(NamedTuple):
    """Adafactor's second moments: means over rows and columns of a matrix; those of a vector in `row`, with an empty `col`."""

    count: jax.Array
    row: Any
    col: Any


def _adafactor(config: Config, decay_rate=0.8, clip_threshold=1.0, eps=1e-30) -> optax.GradientTransformation:
    """Adafactor (arXiv 1804.04235) as transformers runs it: an external learning rate, no first moment, no scaling by the parameter.

    optax's version factors a leaf's two largest axes, wrong for a stack of low-rank pairs, and clips a stack as one.
    """

    def matrix(path, p):
        return _per_layer(_name(path), p) >= 2

    def init(params):
        def zeros(of_matrix, of_vector):
            return jax.tree_util.tree_map_with_path(lambda k, p: jnp.zeros((of_matrix if matrix(k, p) else of_vector)(p.shape)), params)

        row = zeros(lambda shape: shape[:-1], lambda shape: shape)
        col = zeros(lambda shape: shape[:-2] + shape[-1:], lambda shape: (0,))
        return FactoredState(jnp.zeros((), jnp.int32), row, col)

    def update(updates, state, params=None):
        count = state.count + 1
        beta = 1.0 - count.astype(jnp.float32) ** -decay_rate

        def one(path, g, row, col):
            square = g * g + eps
            if not matrix(path, g):
                row = beta * row + (1 - beta) * square
                return _clip_rms(g * jax.lax.rsqrt(row), _per_layer(_name(path), g), clip_threshold), row, col
            row = beta * row + (1 - beta) * square.mean(-1)
            col = beta * col + (1 - beta) * square.mean(-2)
            scale = jax.lax.rsqrt(row / row.mean(-1, keepdims=True))[..., None] * jax.lax.rsqrt(col)[..., None, :]
            return _clip_rms(g * scale, 2, clip_threshold), row, col

        out = jax.tree_util.tree_map_with_path(one, updates, state.row, state.col)
        updates, row, col = (jax.tree.map(lambda _, three, i=i: three[i], updates, out) for i in range(3))
        return updates, FactoredState(count, row, col)

    return optax.GradientTransformation(init, update)


def _clip_rms(u: jax.Array, dims: int, threshold: float) -> jax.Array:
    """Scale each layer's update down to a root mean square of at most `threshold`."""
    axes = tuple(range(u.ndim - dims, u.ndim))
    return u / jnp.maximum(1.0, jnp.sqrt(jnp.mean(u * u, axes, keepdims=True)) / threshold)


def _muon(config: Config, momentum=0.95, nesterov=True, ns_steps=5) -> optax.GradientTransformation:
    """Muon (kellerjordan.github.io/posts/muon): orthogonalised momentum, scaled like AdamW (`0.2 sqrt(max(out, in))`, arXiv 2502.16982).

    Applies to matrices inside the layers; embedding, head and vectors use Adam. Equals torch.optim.Muon with `match_rms_adamw`, in float32.
    """

    def update(updates, state, params=None):
        trace = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state, updates)
        ahead = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, trace, updates) if nesterov else trace
        return jax.tree.map(lambda m: orthogonalize(m, ns_steps) * (0.2 * max(m.shape[-2:]) ** 0.5), ahead), trace

    def label(path, p):
        return "muon" if STACKED.search(name := _name(path)) and p.ndim >= 3 and "norm" not in name else "adam"

    muon = optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)
    return optax.partition({"muon": muon, "adam": _adam(config)}, lambda params: jax.tree_util.tree_map_with_path(label, params))


def orthogonalize(m: jax.Array, steps: int = 5) -> jax.Array:
    """Approximately `U V^T` of each matrix `[..., out, in]`, by Newton-Schulz iteration: singular values end between about 0.7 and 1.2."""
    tall = m.shape[-2] > m.shape[-1]
    x = m.mT if tall else m
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=(-2, -1), keepdims=True), 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "adafactor": _adafactor,
    "lion": _lion,
    "lion_8bit": _lion_8bit,
    "sgd": _sgd,
    "muon": _muon,
}


def optimizer(config: Config, total_steps: int) -> optax.GradientTransformation:
    """The chain that `config.optim` names: its direction, weight decay, and the learning rate, which also multiplies the decay.

    Updates and moments (except 8-bit ones) are float32 whatever the parameters are. Clip gradients before (`clip_by_global_norm`).

    Raises:
        ConfigError: an optim_args or lr_scheduler_kwargs key that the optimiser or schedule lacks.
    """
    core = OPTIMIZERS[config.optim]
    core = core(config, **arguments(core, config.optim_args, f"optim_args of {config.optim}"))
    decay = optax.add_decayed_weights(config.weight_decay, decays) if config.weight_decay else optax.identity()
    # torch's SGD adds the decay to the gradient, all others to the update
    parts = [decay, core] if config.optim == "sgd" else [core, decay]
    return peft.METHODS[config.method].around(_in_float32(optax.chain(*parts, _descend(config, total_steps))), config, total_steps)


def _descend(config: Config, total_steps: int) -> optax.GradientTransformation:
    """`- rate(step) * factor` per leaf; LoRA+ (arXiv 2402.12354): `loraplus_lr_ratio` for b and vectors, another for embeddings."""
    rate, ratio = schedule(config, total_steps), config.loraplus_lr_ratio

    def factor(path, leaf) -> float:
        name = _name(path)
        if ratio is None:
            return 1.0
        if "embed" in name.split("/"):
            return config.loraplus_lr_embedding / config.learning_rate
        return ratio if name.endswith("/b") or _per_layer(name, leaf) == 1 else 1.0

    def update(updates, state, params=None):
        now = rate(state)
        return jax.tree_util.tree_map_with_path(lambda path, u: -(now * factor(path, u)) * u, updates), state + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


def _in_float32(chain: optax.GradientTransformation) -> optax.GradientTransformation:
    """Pass float32 parameters and gradients to the chain, so that every moment is float32 too."""

    def cast(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    return optax.GradientTransformation(
        lambda params: chain.init(cast(params)),
        lambda updates, state, params=None: chain.update(cast(updates), state, None if params is None else cast(params)),
    )
