"""The training step as shapes alone: parameters, state and batch without their arrays."""

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import data, optim, parallel
from jaxtune.config import Config
from jaxtune.config.policy import POLICY
from jaxtune.convert.bitsandbytes import is_skipped, packed_as
from jaxtune.convert.load import open_config
from jaxtune.data import units
from jaxtune.data.batch import Batch
from jaxtune.data.rollout_prompts import Layout
from jaxtune.errors import ConfigError
from jaxtune.kernels import check_attention
from jaxtune.losses import objective_of
from jaxtune.model import quant
from jaxtune.model.families import ModelConfig
from jaxtune.model.spec import spec
from jaxtune.objectives import OBJECTIVES
from jaxtune.objectives.answers import REFERENCE
from jaxtune.objectives.distill import TEACHER, Teacher
from jaxtune.peft import METHODS, lora_init, param_dtypes, partial
from jaxtune.reference import beforehand, compares
from jaxtune.step import how_to_compute, init_state, make_step
from jaxtune.tree import unflatten


def check_names(config: Config) -> None:
    """ConfigError for an unknown method, objective or loss function."""
    for key, table in (("method", METHODS), ("objective", OBJECTIVES)):
        if (name := getattr(config, key)) not in table:
            raise ConfigError(f"{key} {name!r} is not known; there are {', '.join(table)}")
    objective_of(config)


def abstract_params(config: ModelConfig, dtype: str | Callable[[str], str], quantization: str | None) -> dict:
    """The parameter tree as shapes, quantised as in the checkpoint or else by `quantization` (`dtype`: for all, or a function of the path).
    """
    hf = json.loads(config.hf_json or "{}")
    in_file = packed_as(hf)
    kind = in_file or quantization

    def leaf(path, row):
        if kind is None or not row.can_be_packed or in_file and is_skipped(hf, row.hf_names()[0].removesuffix(".weight")):
            own = "float32" if row.float32 else dtype if isinstance(dtype, str) else dtype(path)
            return jax.ShapeDtypeStruct(row.shape, jnp.dtype(own))
        *lead, out, width = row.shape
        packed = quant.abstract(kind, (out, width))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype), packed)

    return unflatten({path: leaf(path, row) for path, row in spec(config).items()})


def abstract_batch(config: Config, mesh, rows: data.Source | None = None) -> Batch:
    """The batch of a full step: the largest of `rows`. Without rows every token counts as trained, and a row has one pair (or other group)
    of answers; for sampled answers, prompts have `data.max_length` tokens."""
    sharding = parallel.batch_sharding(mesh)
    known = rows is not None or config.objective in POLICY
    if rows is not None:
        batch = rows.largest()
    elif config.objective in POLICY:
        batch = Layout(config, parallel.data_parallel(mesh)).largest(config.data.max_length)
    else:
        answers, shared = units.least(config)
        labels = config.num_labels or 0
        several = config.objective == "classification" and config.problem_type != "single_label_classification" and labels > 1
        batch = Batch.empty((1, 1, 1), None, answers, shared, (labels,) if several else ())
    if batch.answers is not None and beforehand(config):
        batch = batch.replace(answers=batch.answers.replace(ref_logps=batch.answers.values))
    if known:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch)
    shape = (config.gradient_accumulation_steps, config.per_device_train_batch_size * parallel.data_parallel(mesh), config.data.max_length)

    def leaf(x: np.ndarray) -> jax.ShapeDtypeStruct:
        whole = (*shape[:2], shape[2] if x.dtype == np.int32 or x is batch.weights else x.shape[2], *x.shape[3:])
        return jax.ShapeDtypeStruct(whole, x.dtype, sharding=sharding)

    return jax.tree.map(leaf, batch)


def abstract_step(config: Config, model_config: ModelConfig, mesh, rows: data.Source | None = None):
    """`(jitted step, (state, base, batch), model_config)`: the step that `train` runs, with shapes in place of arrays, for these rows if
    known."""
    if config.dtype == "auto":
        config = config.replace(dtype="float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16")
    arguments, model_config = abstract_arguments(config, model_config, mesh, rows)
    step = make_step(config, model_config, objective_of(config), optim.optimizer(config, _steps(config, rows)), mesh=mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, arguments[0])
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)), arguments, model_config


def abstract_arguments(config: Config, model_config: ModelConfig, mesh, rows: data.Source | None = None):
    """`((state, base, batch), model_config)`: the shapes of the arguments of `train`'s step, and how it computes."""
    check_attention(config, model_config, mesh)
    model_config = how_to_compute(config, model_config, mesh)
    params = abstract_params(model_config, param_dtypes(config, model_config), config.quantization)
    params = _with_shardings(params, parallel.param_shardings(mesh, model_config, params))
    trainable = abstract_trainable(config, model_config, params)
    own = parallel.trainable_shardings(mesh, model_config, trainable)
    optimizer = optim.optimizer(config, _steps(config, rows))
    state = jax.eval_shape(lambda t: init_state(t, optimizer, 0, config.sync_ref_model), trainable)
    state = _with_shardings(state, parallel.state_shardings(mesh, state, trainable, own, config.zero_stage))
    base = partial.rest(params, trainable) if config.method == "full" else params
    if lora_init.has_residual_base(getattr(trainable, "config", None)):
        base = lora_init.residual_base(params, _with_shardings(trainable, own), lambda scale: _everywhere(scale, mesh))
    apart = config.ref_model is not None or (config.objective in POLICY and config.method == "full")
    if apart and compares(config) and not beforehand(config):
        base = base | {REFERENCE: params}  # a separate checkpoint, or a copy of the initial weights
    if config.teacher is not None:
        base = base | {TEACHER: _abstract_teacher(config, mesh)}
    return (state, base, abstract_batch(config, mesh, rows)), model_config


def abstract_trainable(config: Config, model_config: ModelConfig, params: dict) -> Any:
    """What is trained of `params`, as shapes. ConfigError where the method finds nothing to train."""
    widest = lora_init.with_widest_ranks(config)
    return jax.eval_shape(lambda p: METHODS[config.method].init(jax.random.key(0), model_config, p, widest), params)


def _steps(config: Config, rows: data.Source | None) -> int:
    return data.total_steps(config, rows) if rows else max(config.max_steps, 1000)


def _abstract_teacher(config: Config, mesh) -> Teacher:
    """The teacher as shapes, as jaxtune/teacher.py reads it."""
    teacher = open_config(config.teacher)
    check_attention(config, teacher, mesh)
    teacher = how_to_compute(config, teacher, mesh)
    params = abstract_params(teacher, config.dtype, config.teacher_quantization)
    return Teacher(_with_shardings(params, parallel.param_shardings(mesh, teacher, params)), teacher)


def _everywhere(x: jax.Array, mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=parallel.replicated(mesh))


def _with_shardings(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
