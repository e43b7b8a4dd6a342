"""Learning-rate schedules by name: the factor on learning_rate at every step, in float64, by the formulas of transformers.optimization.

    rate = schedule(config, total_steps)(step)      # step 0 is the first update
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtune.config import Config, interval
from jaxtune.errors import ConfigError


def _linear(t, warmup, total, rate):
    return np.maximum(0.0, (total - t) / max(1, total - warmup))


def _constant(t, warmup, total, rate):
    return np.ones_like(t)


def _progress(t, warmup, total):
    return (t - warmup) / max(1, total - warmup)


def _cosine(t, warmup, total, rate, num_cycles=0.5):
    return np.maximum(0.0, 0.5 * (1.0 + np.cos(np.pi * num_cycles * 2.0 * _progress(t, warmup, total))))


def _cosine_with_restarts(t, warmup, total, rate, num_cycles=1):
    progress = _progress(t, warmup, total)
    return np.where(progress >= 1, 0.0, np.maximum(0.0, 0.5 * (1.0 + np.cos(np.pi * ((num_cycles * progress) % 1.0)))))


def _cosine_with_min_lr(t, warmup, total, rate, num_cycles=0.5, min_lr=None, min_lr_rate=None):
    if (min_lr is None) == (min_lr_rate is None):
        raise ConfigError("a lr_scheduler_type with min_lr needs lr_scheduler_kwargs: {min_lr: RATE} or {min_lr_rate: SHARE}.")
    low = min_lr / rate if min_lr_rate is None else min_lr_rate
    factor = 0.5 * (1.0 + np.cos(np.pi * num_cycles * 2.0 * _progress(t, warmup, total)))
    return np.maximum(0.0, factor * (1 - low) + low)


def _cosine_warmup_with_min_lr(t, warmup, total, rate, num_cycles=0.5, min_lr=None, min_lr_rate=None, warmup_lr_rate=None):
    """The cosine one step ahead, and a warm-up that begins at `warmup_lr_rate`, by default at `1 / warmup`, instead of 0."""
    up = (t + 1) / max(1, warmup)
    if warmup_lr_rate is not None:
        up = warmup_lr_rate + (1.0 - warmup_lr_rate) * t / max(1, warmup - 1)
    return np.where(t < warmup, up, _cosine_with_min_lr(t + 1, warmup, total, rate, num_cycles, min_lr, min_lr_rate))


def _polynomial(t, warmup, total, rate, lr_end=1e-7, power=1.0):
    if rate <= lr_end:
        raise ConfigError(f"lr_scheduler_kwargs.lr_end is {lr_end}, but has to be below the learning rate, {rate}.")
    remaining = np.maximum(0.0, 1 - _progress(t, warmup, total))
    return ((rate - lr_end) * remaining**power + lr_end) / rate


def _inverse_sqrt(t, warmup, total, rate, timescale=None):
    scale = timescale or warmup or 10_000
    return 1.0 / np.sqrt((np.maximum(t, warmup) + scale - warmup) / scale)


def _ramp(kind: str, progress):
    """From 0 to 1 over progress 0..1."""
    shapes = {
        "linear": lambda: progress,
        "cosine": lambda: 0.5 * (1.0 - np.cos(np.pi * progress)),
        "1-sqrt": lambda: 1.0 - np.sqrt(np.maximum(0.0, 1.0 - progress)),
    }
    if kind not in shapes:
        raise ConfigError(f"a warm-up or decay of type {kind!r} is not known; write linear, cosine or 1-sqrt.")
    return shapes[kind]()


def _warmup_stable_decay(t, warmup, total, rate, num_decay_steps=0.1, warmup_type="linear", decay_type="cosine", min_lr_ratio=0.0):
    decay = interval(num_decay_steps, total)
    if warmup + decay > total:
        raise ConfigError(f"warmup_steps and num_decay_steps are {warmup} + {decay} steps, but the run has only {total}.")
    progress = (t - (total - decay)) / max(1, decay)
    down = 1.0 - np.sqrt(np.clip(progress, 0.0, 1.0)) if decay_type == "1-sqrt" else 1.0 - _ramp(decay_type, progress)
    factor = np.where(t < warmup, _ramp(warmup_type, t / max(1, warmup)), np.clip(down, 0.0, 1.0))
    factor = np.where(t < total, factor, 0.0)
    return np.where((t >= warmup) & (progress < 0), 1.0, factor * (1.0 - min_lr_ratio) + min_lr_ratio)


SCHEDULES: dict[str, Callable] = {
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_min_lr": _cosine_with_min_lr,
    "cosine_warmup_with_min_lr": _cosine_warmup_with_min_lr,
    "cosine_with_restarts": _cosine_with_restarts,
    "constant": _constant,
    "constant_with_warmup": _constant,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
    "warmup_stable_decay": _warmup_stable_decay,
}


def _factors(config: Config, total_steps: int) -> np.ndarray:
    """The learning-rate factor at steps 0 .. total_steps, float64."""
    name, t = config.lr_scheduler_type, np.arange(total_steps + 1, dtype=np.float64)
    warmup = interval(config.warmup_steps, total_steps)
    given = arguments(SCHEDULES[name], config.lr_scheduler_kwargs, f"lr_scheduler_kwargs of {name}")
    factor = SCHEDULES[name](t, warmup, total_steps, config.learning_rate, **given)
    if name in ("warmup_stable_decay", "cosine_warmup_with_min_lr"):  # whose warm-ups have their own shapes
        return factor
    return np.where(t < warmup, t / max(1, warmup), factor)


def schedule(config: Config, total_steps: int) -> Callable[[Any], Any]:
    """`step -> learning rate` of the update at that step; step 0 is the first update, as in transformers' Trainer.

    An int gives a Python float (for the log), an int32 array or tracer a float32 array: both from one float64 table that equals
    transformers' schedule exactly. After the last step, the last value is kept.

    Raises:
        ConfigError: an lr_scheduler_kwargs key that the schedule lacks, or values that do not fit together.
    """
    rates = _factors(config, total_steps) * config.learning_rate

    def rate(step: Any) -> Any:
        if isinstance(step, (int, np.integer)):
            return float(rates[min(step, total_steps)])
        return jnp.asarray(rates, jnp.float32)[jnp.minimum(step, total_steps)]

    return rate


def arguments(function: Callable, given: tuple, what: str) -> dict[str, Any]:
    """Keyword arguments for a schedule or an optimiser, each converted to the type of its default."""
    known = {name: p.default for name, p in inspect.signature(function).parameters.items() if p.default is not p.empty}
    for name, value in given:
        if name not in known:
            raise ConfigError(f"{what} cannot hold {name}; it takes {', '.join(known) or 'no keys'}.")
        kind = type(known[name]) if isinstance(known[name], (str, bool)) else (int, float)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"{name} in {what} is {value!r}, but its default is {known[name]!r}; write a value of that kind.")
    return dict(given)
