"""The start of a run: its rows, its weights and trainable part, its compiled step."""

import dataclasses
import functools
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtune import costs, data, distributed, eva, loftq, optim, parallel, rollout, runfolder
from jaxtune.config import Config
from jaxtune.config.policy import POLICY
from jaxtune.convert import heads, hf
from jaxtune.convert import peft as peft_files
from jaxtune.convert.load import Model, Opened, read_params
from jaxtune.convert.sources import is_adapter
from jaxtune.data.prepare import check_fits
from jaxtune.data.rollout_prompts import Prompts
from jaxtune.errors import ConfigError
from jaxtune.losses import objective_of
from jaxtune.model import families, nf4_kernel
from jaxtune.model.block import RECOMPUTED
from jaxtune.model.families import ModelConfig
from jaxtune.objectives.answers import check_shared_prompts
from jaxtune.peft import METHODS, kind_of, lora, lora_init, param_dtypes
from jaxtune.peft.adapter import Adapter
from jaxtune.shapes import abstract_arguments, abstract_params, abstract_trainable
from jaxtune.step import TrainState, how_to_compute, init_state, make_eval_step, make_step
from jaxtune.tree import count, nbytes

log = logging.getLogger("jaxtune")


def read_rows(config: Config, opened: Opened, mesh: Mesh) -> tuple[data.Data, int]:
    """The rows, checked against the model, and the number of steps of a run over them."""
    rows = data.load(config, opened.tokenizer, parallel.data_parallel(mesh))
    virtual = getattr(getattr(config, config.method, None), "num_virtual_tokens", 0)
    check_fits((rows.train, rows.eval, rows.test), opened.tokenizer, opened.config, virtual)
    if config.objective in POLICY:
        rollout.check(config, rows, opened.config)
    total_steps = data.total_steps(config, rows.train)
    _say_rows(rows.train, total_steps)
    for source in filter(None, (rows.train, rows.eval)):
        if source.shares_prompts:
            check_shared_prompts(opened.config, source.longest)
    return rows, total_steps


def _say_rows(rows: data.Source, total_steps: int) -> None:
    if isinstance(rows, Prompts):
        log.info(
            "data: %d prompts, the longest of %d tokens; a rollout samples %d answers to each of %d; %d steps per epoch, %d in all",
            len(rows.documents), rows.longest_prompt, rows.layout.answers, rows.layout.prompts, rows.steps_per_epoch, total_steps,
        )  # fmt: skip
        return
    log.info(
        "data: %d documents, %s tokens (%.1f %% trained) in %d rows (%.1f %% filled); %d steps per epoch, %d in all",
        len(rows.documents), f"{rows.tokens:,}", 100 * rows.trained_tokens / rows.tokens, len(rows.plan),
        100 * rows.efficiency, rows.steps_per_epoch, total_steps,
    )  # fmt: skip
    if saved := rows.saved_tokens:
        share = 100 * saved / (saved + rows.tokens)
        log.info("data: answers share their prompts, which saves %s tokens (%.1f %%)", f"{saved:,}", share)


def check_method(config: Config, opened: Opened) -> None:
    """Say what is wrong with the method's own keys before rows are tokenised and memory is taken. Raises ConfigError for targets that the
    model has not."""
    if config.init_adapter:
        return
    model_config = _headed(config, opened)
    abstract_trainable(config, model_config, abstract_params(model_config, param_dtypes(config, model_config), config.quantization))
    if METHODS[config.method].kind is lora.KIND:
        lora.tell_rank(model_config, config.lora)


def _headed(config: Config, opened: Opened) -> ModelConfig:
    return heads.valued(config, heads.headed(opened.config, heads.head_of(config), opened.tokenizer))


def load_for_training(config: Config, opened: Opened, mesh: Mesh) -> tuple[Model, Any]:
    """The model on the mesh, ready to train, and a fresh trainable part."""
    return init_trainable(config, opened, read_weights(config, opened, mesh), None, mesh)


def read_weights(config: Config, opened: Opened, mesh: Mesh) -> tuple[ModelConfig, dict]:
    """The model's config and its parameters on the mesh."""
    started = time.monotonic()
    model_config, params = read_params(opened, param_dtypes(config, opened.config), config.quantization, mesh)
    log.info("model: %s in %.1f s, %.2f GB of weights", model_config.model_type, time.monotonic() - started, nbytes(params) / 1e9)
    if rates := families.dropouts(model_config):
        said = ", ".join(f"{key}={rate:g}" for key, rate in rates.items())
        log.info("model: the dropout of config.json (%s) is not applied; transformers applies it in training", said)
    return model_config, params


def init_trainable(
    config: Config, opened: Opened, weights: tuple[ModelConfig, dict], rows: data.Source | None, mesh: Mesh
) -> tuple[Model, Any]:
    """The model with the head it needs and its way of computing, and its trainable part; logs the number of matrices.

    `rows`: the training rows, which may initialise the adapter.
    """
    model = heads.attach(opened.model(*weights), heads.head_of(config), jax.random.key(config.seed), mesh)
    folders = [Path(folder).expanduser() for folder in (config.init_adapter, opened.path) if folder]
    model = heads.attach_value(config, model, folders, mesh)
    model.config = how_to_compute(config, model.config, mesh)
    nf4_kernel.verify_for(model.config, model.params)
    if config.init_adapter:
        trainable = heads.train_value(peft_files.load_adapter(config.init_adapter, model), model.params)
        if kind_of(trainable.config) is not METHODS[config.method].kind:
            own = next(name for name, method in METHODS.items() if method.kind is kind_of(trainable.config))
            raise ConfigError(
                f"{config.init_adapter} holds an adapter of method {own}, and the method is {config.method}; write method: {own}"
            )
    else:
        trainable = METHODS[config.method].init(jax.random.key(config.seed), model.config, model.params, config, model.tokenizer)
        if lora_init.init_from_run(config):
            model, trainable = _initial(config, opened, model, trainable, rows, mesh)
    trainable = parallel.place(trainable, parallel.trainable_shardings(mesh, model.config, trainable))
    if isinstance(trainable, Adapter):
        matched = sum(rank > 0 for site in trainable.sites for rank in site.ranks)
        of = [f"{matched} matrices matched"] if matched else []
        of += [f"{len(trainable.wholes)} parameters trained whole"] if trainable.wholes else []
        log.info("adapter: %s trainable parameters", ", ".join([*of, f"{count(trainable):,}"]))
    else:
        log.info("full: %s of %s parameters are trained", f"{count(trainable):,}", f"{count(model.params):,}")
    return model, trainable


def _initial(config: Config, opened: Opened, model: Model, fresh: Adapter, rows: Any, mesh: Mesh) -> tuple[Model, Adapter]:
    """The initial model and adapter of the run; a resumed run takes those it has saved."""
    kept = runfolder.folder_of(config) / runfolder.INITIAL if config.output_dir else None
    if config.resume and kept and is_adapter(kept):
        return model, peft_files.load_adapter(kept, model)
    if lora_init.init_from_run(config) == "eva":
        return model, eva.init(config, model, fresh, rows, mesh)
    params, adapter = loftq.init(config, opened, model, fresh, mesh)
    return dataclasses.replace(model, params=params), adapter


def save_initial(config: Config, model: Model, adapter: Any, folder: Path) -> None:
    """Save what `init_trainable` made: the adapter, and the base if LoftQ has quantised it differently from what the config asks for."""
    if lora_init.init_from_run(config) is None or is_adapter(folder / runfolder.INITIAL):
        return
    adapter = parallel.fetch(adapter)
    if lora_init.init_from_run(config) == "loftq" and config.lora.loftq_config.loftq_iter > 1:
        model.source = str(folder / runfolder.BASE)
        shutil.rmtree(model.source, ignore_errors=True)  # left by a start that was killed before its adapter was written
        hf.save(model.config, model.params, model.source, tokenizer=model.tokenizer, generation_config=model.generation_config,
                other_tensors=model.other_tensors, keep_packed=True)  # fmt: skip
    if distributed.is_first():
        peft_files.save_adapter(adapter, model, folder / runfolder.INITIAL)


def place_state(mesh, config: Config, trainable, optimizer) -> TrainState:
    """The initial state, with each leaf on its devices."""
    make = lambda trainable: init_state(trainable, optimizer, config.seed, config.sync_ref_model)  # noqa: E731
    shapes = jax.eval_shape(make, trainable)
    own = jax.tree.map(lambda leaf: leaf.sharding, trainable)
    shardings = parallel.state_shardings(mesh, shapes, trainable, own, config.zero_stage)
    return jax.jit(make, out_shardings=shardings, donate_argnums=0)(trainable)


def compile_ahead(config: Config, opened: Opened, mesh: Mesh, rows: data.Source, total_steps: int) -> None:
    """Compile the step for its future shapes, while the weights are still being read; JAX caches the program.

    Skipped for a resumed run: it may be refused or already finished, and its program is on disk.
    """
    if jax.process_count() > 1 or config.resume or config.init_adapter:  # whose shapes depend on its files
        return
    if lora_init.init_from_run(config) == "eva":  # whose ranks depend on the rows
        return
    arguments, model_config = abstract_arguments(config, _headed(config, opened), mesh, rows)
    step, _ = programs(config, model_config, total_steps, arguments[0], mesh)
    _say_memory(costs.peak(step.lower(*arguments).compile()), model_config, mesh)


def _say_memory(needed: int, model_config: ModelConfig, mesh: Mesh) -> None:
    granted = (mesh.devices.flat[0].memory_stats() or {}).get("bytes_limit")
    of = f" of {granted / 1e9:.2f}" if granted else ""
    log.info("step: compiled; it needs %.2f%s GB per device", needed / 1e9, of)
    if granted and needed > granted:
        log.warning("the step does not fit the device; jaxtune plan CONFIG shows what takes the memory and which settings fit")
    elif granted and needed < granted / 2 and model_config.remat in RECOMPUTED:
        log.info("step: %s", costs.ROOM)


def programs(config: Config, model_config: Any, total_steps: int, state: Any, mesh: Mesh) -> tuple[Any, Any]:
    """The jitted step and evaluation step; those of the previous run if they compute the same, as from fold to fold."""
    alike = config.replace(output_dir=None, resume=False, data=dataclasses.replace(config.data, fold=None))
    shardings, structure = jax.tree.flatten(jax.tree.map(lambda leaf: leaf.sharding, state))
    return _jitted(alike, model_config, total_steps, objective_of(config), mesh, tuple(shardings), structure)


@functools.lru_cache(maxsize=1)
def _jitted(
    config: Config, model_config: Any, total_steps: int, objective: Any, mesh: Mesh, shardings: tuple, structure: Any
) -> tuple[Any, Any]:
    step = make_step(config, model_config, objective, optim.optimizer(config, total_steps), mesh=mesh)
    out_shardings = (jax.tree.unflatten(structure, shardings), None)
    return jax.jit(step, donate_argnums=0, out_shardings=out_shardings), jax.jit(make_eval_step(config, model_config, objective, mesh))
