"""Find the objective of a run: an entry of the table, or the user's own function in its place.

    objective: sft                          # how rows are read, and what a batch holds
    loss_function: losses/mine.py:focal     # or mypackage.losses.focal; from Python jt.train(config, loss_function=focal)

    def focal(config, model_config, params, base, batch, key=None):
        out = token_logprobs(model_config, params, batch)          # of the trained tokens (jaxtune.objectives.logprobs)
        weights = out.weights_BN * (1 - jnp.exp(out.logp_BN)) ** 2
        return Loss(-(weights * out.logp_BN).sum(), out.weights_BN.sum(), {})

Such a function is an objective like those of `jaxtune.objectives`: pure, traced by jax, and returning sums and weights, never means. `key`
is None during evaluation. Naming a file or module is consent to run it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.config import Config
from jaxtune.disk import sha256
from jaxtune.errors import ConfigError
from jaxtune.functions import call, file_of, find
from jaxtune.objectives import OBJECTIVES, Loss

_GIVEN: dict[str, Callable] = {}  # functions handed over from Python, by the names that configs have for them


def with_function(config: Config, function: Callable) -> Config:
    """The config with `function` as its loss, named by its module and itself, as `config.yaml` will have it and a resume asks for.

    Raises ConfigError for what cannot be called, and where the config names another function.
    """
    if not callable(function):
        raise ConfigError(f"loss_function is of type {type(function).__name__}; give a function, or write its name into the config")
    spec = f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"
    if config.loss_function not in (None, spec):
        raise ConfigError(f"the config names loss_function {config.loss_function}, and {spec} is given; leave one of them out")
    _GIVEN[spec] = function
    return config.replace(loss_function=spec)


def objective_of(config: Config) -> Callable:
    """`OBJECTIVES[config.objective]`, or the function that `config.loss_function` names; the same object while its file is unchanged.

    Raises ConfigError if there is no such function and, when it is traced, if it fails or does not return a Loss.
    """
    spec = config.loss_function
    if spec is None:
        return OBJECTIVES[config.objective]
    file = file_of(spec)
    function = _of_file(spec, sha256(file)) if file and file.is_file() else _GIVEN.get(spec) or find({}, spec, "loss_function:")[1]
    return _checked(spec, function)


@functools.lru_cache(maxsize=8)
def _of_file(spec: str, content: str) -> Callable:
    return find({}, spec, "loss_function:")[1]


@functools.lru_cache(maxsize=8)
def _checked(spec: str, function: Callable) -> Callable:
    def objective(config, model_config, params, base, batch, key=None) -> Loss:
        return _loss(spec, call(f"loss_function {spec}", function, config, model_config, params, base, batch, key))

    return objective


def _loss(spec: str, found: Any) -> Loss:
    """The returned Loss, in float32. ConfigError unless it is a Loss of scalars."""
    if not isinstance(found, Loss):
        what = "an array" if isinstance(found, jax.Array) else f"a {type(found).__name__}"
        raise ConfigError(
            f"loss_function {spec} returned {what}; return Loss(total, weight, metrics) of jaxtune.objectives: a sum over the batch, the "
            "sum of its weights, and of each metric such a pair"
        )
    pairs = {"": (found.total, found.weight)} | dict(found.metrics)
    for name, pair in pairs.items():
        what = f"the metric {name!r}" if name else "the loss"
        if not isinstance(pair, tuple) or len(pair) != 2 or any(jnp.shape(part) for part in pair):
            shapes = [list(jnp.shape(part)) for part in pair] if isinstance(pair, tuple) else type(pair).__name__
            raise ConfigError(
                f"loss_function {spec}: {what} has to be two single numbers, a sum and its weight, and is {shapes}; sum over all axes"
            )
    (total, weight), *metrics = (tuple(jnp.asarray(part, jnp.float32) for part in pair) for pair in pairs.values())
    return Loss(total, weight, dict(zip(found.metrics, metrics, strict=True)))
