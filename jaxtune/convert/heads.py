"""Models with another head: adding a scoring head or a value head to a language model, and loading reward models and classifiers."""

import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtune import parallel
from jaxtune.config import Config
from jaxtune.convert import peft, value
from jaxtune.convert.load import Model, load
from jaxtune.convert.retokenised import beside
from jaxtune.convert.tensors import Safetensors, read_json
from jaxtune.errors import ConfigError, ModelError
from jaxtune.model.families import ModelConfig, heads
from jaxtune.model.spec import spec
from jaxtune.peft import compose, partial
from jaxtune.peft.adapter import Adapter
from jaxtune.peft.sites import Whole

log = logging.getLogger("jaxtune")

TASKS = {"SEQ_CLS": heads.SEQUENCE, "TOKEN_CLS": heads.TOKEN}  # PEFT's task_type


class Head(NamedTuple):
    """A head's description: the names of its labels, what they label, and transformers' name for their type."""

    labels: tuple[str, ...]
    of: str = heads.SEQUENCE
    problem_type: str | None = None


def head_of(config: Config) -> Head | None:
    """The head that a run's objective trains; None if it trains a language model."""
    if config.objective == "reward":
        return Head(_unnamed(1))
    if config.objective == "stepwise_reward":
        return Head(_unnamed(2), heads.TOKEN)
    if config.objective == "classification":
        return Head(tuple(config.id2label or _unnamed(config.num_labels or 0)), heads.SEQUENCE, config.problem_type)
    return None


def keys_of(config: ModelConfig) -> dict[str, Any]:
    """The config keys of the objective that trains such a head."""
    hf = json.loads(config.hf_json)
    names = [name for _, name in sorted((hf.get("id2label") or {}).items(), key=lambda pair: int(pair[0]))]
    if config.labels_of == heads.TOKEN:
        return {"objective": "stepwise_reward"}
    if config.num_labels == 1 and hf.get("problem_type") != "regression":
        return {"objective": "reward"}
    return {"objective": "classification", "id2label": names or _unnamed(config.num_labels), "problem_type": hf.get("problem_type")}


def keys_of_adapter(path: str | os.PathLike) -> dict[str, Any]:
    """The same for an adapter's folder; empty if it has no head."""
    head = head_of_adapter(Path(path).expanduser())
    if head is None:
        return {}
    if head.of == heads.TOKEN:
        return {"objective": "stepwise_reward"}
    return {"objective": "reward"} if len(head.labels) == 1 else {"objective": "classification", "num_labels": len(head.labels)}


def _unnamed(count: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{number}" for number in range(count))


def headed(config: ModelConfig, head: Head | None, tokenizer: Any = None) -> ModelConfig:
    """The model's config with that head; unchanged if there is none to add, or if it already has it.

    Raises ConfigError for a model with another head, or with one if a language model is needed.
    """
    own = (config.num_labels, config.labels_of) if config.num_labels else None
    wanted = (len(head.labels), head.of) if head else None
    if own and own != wanted:
        asked = f"{wanted[0]} for a {wanted[1]} are asked for" if wanted else "a language model is needed"
        raise ConfigError(f"the model has a scoring head of {own[0]} labels for a {own[1]}, but {asked}; start from a model of that kind")
    if head is None or own:
        return config
    return heads.with_head(config, head.labels, head.of, padding(tokenizer), head.problem_type)


def cut(config: Config, model_config: ModelConfig) -> ModelConfig:
    """The model's config with its layers in stacks that the run trains whole or not at all (`trainable_parameters`)."""
    own = partial.cuts(headed(model_config, head_of(config)), config.trainable_parameters)
    return dataclasses.replace(model_config, cuts=tuple(sorted({*model_config.cuts, *own})))


def padding(tokenizer: Any) -> int | None:
    """The token that transformers does not count as the end of a text: the tokenizer's padding, or else its EOS token, as in TRL."""
    if tokenizer is None:
        return None
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def attach(model: Model, head: Head | None, key: jax.Array, mesh: Mesh | None = None) -> Model:
    """The model with a scoring head in place of the vocabulary head: normal with `initializer_range`, biases 0; or the head it already has.

    Placed on `mesh` if given.

    Raises ConfigError for a model that has another one.
    """
    config = headed(model.config, head, model.tokenizer)
    if config is model.config:
        return model
    if not heads.has_class(config, config.labels_of):
        name = heads.class_name(config, config.labels_of)
        log.warning("transformers has no %s; the result has its layout, but only jaxtune can open it", name)
    if model.tokenizer is not None and model.tokenizer.pad_token is None:
        model.tokenizer.pad_token = model.tokenizer.eos_token  # saved with the model: the padding of its batches is not scored
    kept = {name: leaf for name, leaf in model.params.items() if name not in ("head", "head_bias")}
    params = kept | _fresh(config, _dtype(model), key, mesh)
    return dataclasses.replace(model, config=config, params=params, hf_config=json.loads(config.hf_json))


def _fresh(config: ModelConfig, dtype: Any, key: jax.Array, mesh: Mesh | None) -> dict[str, jax.Array]:
    def make(key: jax.Array) -> dict[str, jax.Array]:
        rows = {path: row for path, row in spec(config).items() if path in heads.PATHS}
        noise = {path: jax.random.normal(key, row.shape) * config.initializer_range for path, row in rows.items()}
        return {path: (noise[path] if row.init == "normal" else jnp.zeros(row.shape)).astype(dtype) for path, row in rows.items()}

    shardings = None if mesh is None else parallel.param_shardings(mesh, config, jax.eval_shape(make, key))
    return jax.jit(make, out_shardings=shardings)(key)


# ---- value heads ----


def valued(config: Config, model_config: ModelConfig) -> ModelConfig:
    """The model's config with a value head beside the vocabulary head, if the run's objective trains one."""
    return dataclasses.replace(model_config, value_head=True) if config.objective == "ppo" else model_config


def attach_value(config: Config, model: Model, folders: Sequence[Path], mesh: Mesh) -> Model:
    """The model with a value head, if the run trains one: that of the first folder that has one, or else zeros."""
    model_config = valued(config, model.config)
    if not model_config.value_head:
        return model
    rows = {path: row for path, row in spec(model_config).items() if path in heads.VALUE}
    values = next(filter(None, (value.read(folder, model_config.hidden_size) for folder in folders)), None)
    log.info("value head: %s", "zeros" if values is None else f"gone on with ({value.FILE})")
    values = values or {path: np.zeros(row.shape) for path, row in rows.items()}
    values = {path: jnp.asarray(x, _dtype(model)) for path, x in values.items()}
    values = parallel.place(values, parallel.param_shardings(mesh, model_config, values))
    return dataclasses.replace(model, config=model_config, params=model.params | values)


def train_value(adapter: Adapter, params: dict) -> Adapter:
    """An adapter read from its files, with the value head of `params`, if there is one, added to what it trains."""
    missing = [path for path in heads.VALUE if path in params and path not in adapter.saved]
    saved = adapter.saved | {path: jnp.array(params[path], jnp.float32) for path in missing}
    return adapter.replace(saved=saved, wholes=(*adapter.wholes, *map(Whole, missing)))


# ---- opening ----


def _dtype(model: Model) -> Any:
    return model.params["norm"].dtype


def load_scorer(source: str | os.PathLike, dtype: str = "float32", quantization: str | None = None) -> Model:
    """A reward model or classifier: a run folder, a folder of transformers' `...ForSequenceClassification`, or an adapter for one.

    An adapter's base is found by its name. Raises ModelError for a model without a scoring head.
    """
    path = Path(source).expanduser()
    path = next((path / name for name in ("adapter", "model") if (path / "config.yaml").is_file() and (path / name).is_dir()), path)
    if (path / "adapter_config.json").is_file():
        return _adapted(path, dtype, quantization)
    model = load(path if path.exists() else source, dtype, quantization)
    if not model.config.num_labels:
        raise ModelError(f"{source} is a language model: it has no head to score with; give a reward model")
    return model


def _adapted(path: Path, dtype: str, quantization: str | None) -> Model:
    head = head_of_adapter(path)
    if head is None:
        raise ModelError(f"{path} is an adapter of a language model: it has no head to score with; give that of a reward model")
    base = load(read_json(path / "adapter_config.json")["base_model_name_or_path"], dtype, quantization)
    model = attach(beside([path], base), head, jax.random.key(0))
    return dataclasses.replace(model, params=compose(model.params, peft.load_adapter(path, model)), source=str(path))


def head_of_adapter(path: Path) -> Head | None:
    """The head in an adapter's folder; None if it adapts a language model."""
    of = TASKS.get(read_json(path / "adapter_config.json").get("task_type") or "")
    tensors = Safetensors(path, stem="adapter_model").entries
    shapes = [entry.shape for name, entry in tensors.items() if name.endswith(("score.weight", "classifier.weight"))]
    return Head(_unnamed(shapes[0][0]), of) if of is not None and len(shapes) == 1 else None
