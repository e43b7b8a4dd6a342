"""python -m jaxtune.train CONFIG.yaml [key=value ...]

Fine-tune a model as the config says; writes a run folder: config.yaml, run.json, metrics.jsonl, loss.png, tensorboard/,
checkpoints/, and the result: adapter/ (PEFT's format) or model/ (Hugging Face's). With data.kfold, one such folder for each fold and
folds.json, the mean and spread of what they measured.
"""

import dataclasses
import functools
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtune import cli, compilation, data, distributed, errors, metrics, optim, parallel, reference, rollout, runfolder
from jaxtune.background import Background
from jaxtune.checkpoint import Checkpoints
from jaxtune.config import Config, describe, load_config
from jaxtune.config.policy import POLICY
from jaxtune.convert import heads, hf
from jaxtune.convert import peft as peft_files
from jaxtune.convert.load import Model, Opened, open_model, read_params
from jaxtune.data.asked import Prompts
from jaxtune.data.prepare import check_fits
from jaxtune.disk import write_text
from jaxtune.errors import ConfigError
from jaxtune.evaluate import of_run
from jaxtune.folds import CrossValidation, cross_validate
from jaxtune.loop import Loop
from jaxtune.model import nf4_kernel
from jaxtune.model.families import ModelConfig
from jaxtune.objectives import OBJECTIVES
from jaxtune.objectives.answers import check_shared_prompts
from jaxtune.peft import METHODS, beginnings, compose, kind_of, param_dtypes
from jaxtune.peft.adapter import Adapter
from jaxtune.rewards import find_rewards, hashes
from jaxtune.rollout import Rollouts
from jaxtune.shapes import abstract_arguments
from jaxtune.step import TrainState, check_attention, how_to_compute, init_state, make_eval_step, make_step, say_attention
from jaxtune.teacher import open_teacher, read_teacher
from jaxtune.tree import count, nbytes

log = logging.getLogger("jaxtune")


@dataclasses.dataclass
class Result:
    """What a run ended with: its folder, the last metrics by name, what was trained, and the model it was trained on."""

    folder: Path
    step: int
    metrics: dict[str, float]
    trainable: Any
    model: Model
    interrupted: bool = False


@compilation.in_32_bits
def train(
    config: Config | Mapping | str | os.PathLike, overrides: tuple[str, ...] | list[str] = (), *, reward_funcs: Sequence[Callable] = ()
) -> Result | CrossValidation:
    """One training run, from a config to its result; with `data.kfold` and no `data.fold`, one for each fold.

    `reward_funcs`: functions of objectives grpo and rloo (jaxtune/rewards.py), beside those that the config names.

    Raises JaxtuneError for everything the user can put right: keys, files, rows, targets, a folder in use.
    """
    config = load_config(config, overrides)
    _check_tables(config)
    distributed.start(config.distributed)
    compilation.enable_cache(config)
    distributed.check_joined(config.distributed, answers=bool(config.evaluate.metric))
    mesh = parallel.make_mesh(config.mesh)
    config = _settle(config)
    if config.data.kfold is None or config.data.fold is not None:
        return _train(config, mesh, reward_funcs)
    tokenizer = open_model(config.model).tokenizer
    try:
        found = cross_validate(config, tokenizer, parallel.data_parallel(mesh), lambda fold: _train(fold, mesh, reward_funcs))
    finally:
        runfolder.let_go(config)
    if distributed.is_first():
        found.show()
    return found


def _train(config: Config, mesh: jax.sharding.Mesh, reward_funcs: Sequence[Callable]) -> Result:
    try:
        return _run(config, mesh, reward_funcs)
    finally:
        runfolder.let_go(config)


def _run(config: Config, mesh: jax.sharding.Mesh, reward_funcs: Sequence[Callable]) -> Result:
    # ---- 1. What there is: the model's files, the rows ----
    distributed.on_first(lambda: _check_folder(config))  # refuse a folder in use before anything long is done
    log.info("%s", describe(config))
    rewards = find_rewards(config, reward_funcs) if config.objective in POLICY else []
    opened = open_model(config.model)
    opened.config = heads.cut(config, opened.config)
    check_attention(config, opened.config, mesh)
    say_attention(config, mesh.devices.flat[0].platform)
    with Background(lambda: _read(config, opened, mesh)) as weights:
        rows, total_steps = _read_rows(config, opened, mesh)
        teacher = open_teacher(config, opened, rows, mesh)

        # ---- 2. The step; the weights, and what is trained of them ----
        _compile_ahead(config, opened, mesh, rows.train, total_steps)
        model, trainable = _begin(config, opened, weights.result(), mesh)
    base = reference.prepare(config, opened, model, trainable, rows, mesh) | read_teacher(config, teacher, mesh)
    initial = None
    if beginnings.moves(getattr(trainable, "config", None)):
        initial = jax.tree.map(lambda x: x.copy(), trainable)  # the step donates what is trained
        base = base | beginnings.moved(model.params, initial, lambda scale: jax.device_put(scale, parallel.replicated(mesh)))

    # ---- 3. The state ----
    state = _place_state(mesh, config, trainable, optim.optimizer(config, total_steps))
    step, eval_step = _programs(config, model.config, total_steps, state, mesh)

    # ---- 4. The folder; resume ----
    distributed.on_first(lambda: _open_folder(config))
    folder = runfolder.folder_of(config)
    checkpoints = Checkpoints(folder / "checkpoints", config.save_total_limit)
    notes = first_notes(rows) | {"rewards": hashes(config)}
    if config.resume:
        state, notes = _resume(config, folder, checkpoints, state, notes)
    if distributed.is_first():
        if config.resume:  # whose keys of what is kept and said may be others
            runfolder.write_config(folder, config)
        _write_run_json(folder, config, mesh, opened, teacher, rows, state.trainable, total_steps)

    # ---- 5. The loop ----
    rollouts = Rollouts(config, model, mesh, rows, rewards, folder, total_steps) if rewards else None
    run = Loop(config, mesh, rows, total_steps, checkpoints, folder, notes, rollouts)
    state, metrics = run(state, base, step, eval_step)

    # ---- 6. The result ----
    trainable = state.trainable
    if initial is not None:
        trainable = beginnings.over_the_base(model.config, *parallel.fetch((trainable, initial)))
    if not run.interrupted:
        save_result(config, model, trainable, folder)
    scoring = heads.head_of(config) is not None and (config.data.eval is not None or config.data.test is not None)
    if not run.interrupted and (config.evaluate.metric or scoring):
        of_run(config, model, trainable, folder).show()
        log.info("%s; the loss: %s", folder / ("predictions.jsonl" if config.evaluate.metric else "evaluation.json"), folder / "loss.png")
    return Result(folder, int(state.step), metrics, trainable, model, run.interrupted)


def _read_rows(config: Config, opened: Opened, mesh: Mesh) -> tuple[data.Data, int]:
    """The rows, which the model can take, and how many steps a run over them has."""
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
            "data: %d prompts, the longest of %d tokens; a rollout draws %d answers to each of %d; %d steps an epoch, %d in all",
            len(rows.documents), rows.longest_prompt, rows.layout.answers, rows.layout.prompts, rows.steps_per_epoch, total_steps,
        )  # fmt: skip
        return
    log.info(
        "data: %d documents, %s tokens (%.1f %% trained) in %d rows (%.1f %% filled); %d steps an epoch, %d in all",
        len(rows.documents), f"{rows.tokens:,}", 100 * rows.trained_tokens / rows.tokens, len(rows.plan),
        100 * rows.efficiency, rows.steps_per_epoch, total_steps,
    )  # fmt: skip
    if saved := rows.saved_tokens:
        share = 100 * saved / (saved + rows.tokens)
        log.info("data: answers share their prompts, which saves computing %s tokens (%.1f %%)", f"{saved:,}", share)


def _check_tables(config: Config) -> None:
    for key, table in (("method", METHODS), ("objective", OBJECTIVES)):
        if (name := getattr(config, key)) not in table:
            raise ConfigError(f"{key} {name!r} is not known; there are {', '.join(table)}")
    metrics.find_all(config.evaluate.metric)  # they are called at the end, and a mistake is to be heard of at the start


def _settle(config: Config) -> Config:
    """Values that depend on the machine."""
    changes: dict[str, Any] = {}
    if config.dtype == "auto":
        changes["dtype"] = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if config.output_dir is None:
        changes["output_dir"] = f"runs/{Path(config.model.partition('#')[0]).stem}-{config.method}-{config.objective}"
    return config.replace(**changes)


def load_for_training(config: Config, opened: Opened, mesh: Mesh) -> tuple[Model, Any]:
    """The model on the mesh, ready to train, and a fresh trainable part."""
    return _begin(config, opened, _read(config, opened, mesh), mesh)


def _read(config: Config, opened: Opened, mesh: Mesh) -> tuple[ModelConfig, dict]:
    started = time.monotonic()
    model_config, params = read_params(opened, param_dtypes(config, opened.config), config.quantization, mesh)
    log.info("model: %s in %.1f s, %.2f GB of weights", model_config.model_type, time.monotonic() - started, nbytes(params) / 1e9)
    return model_config, params


def _begin(config: Config, opened: Opened, weights: tuple[ModelConfig, dict], mesh: Mesh) -> tuple[Model, Any]:
    """The model with the head it needs and how it computes, and what is trained of it; says how many matrices that has."""
    model = heads.attach(opened.model(*weights), heads.head_of(config), jax.random.key(config.seed), mesh)
    model.config = how_to_compute(config, model.config, jax.default_backend())
    nf4_kernel.prove_for(model.config, model.params)
    if config.init_adapter:
        trainable = peft_files.load_adapter(config.init_adapter, model)
        if kind_of(trainable.config) is not METHODS[config.method].kind:
            own = next(name for name, method in METHODS.items() if method.kind is kind_of(trainable.config))
            raise ConfigError(
                f"{config.init_adapter} holds an adapter of method {own}, and the method is {config.method}; write method: {own}"
            )
    else:
        trainable = METHODS[config.method].init(jax.random.key(config.seed), model.config, model.params, config, model.tokenizer)
    trainable = parallel.place(trainable, parallel.trainable_shardings(mesh, model.config, trainable))
    if isinstance(trainable, Adapter):
        matched = sum(rank > 0 for site in trainable.sites for rank in site.ranks)
        of = [f"{matched} matrices matched"] if matched else []
        of += [f"{len(trainable.wholes)} parameters trained whole"] if trainable.wholes else []
        log.info("adapter: %s trainable parameters", ", ".join([*of, f"{count(trainable):,}"]))
    else:
        log.info("full: %s of %s parameters are trained", f"{count(trainable):,}", f"{count(model.params):,}")
    return model, trainable


def _place_state(mesh, config: Config, trainable, optimizer) -> TrainState:
    """The first state, each leaf where it belongs."""
    make = lambda trainable: init_state(trainable, optimizer, config.seed, config.sync_ref_model)  # noqa: E731
    shapes = jax.eval_shape(make, trainable)
    own = jax.tree.map(lambda leaf: leaf.sharding, trainable)
    shardings = parallel.state_shardings(mesh, shapes, trainable, own, config.zero_stage)
    return jax.jit(make, out_shardings=shardings, donate_argnums=0)(trainable)


def _compile_ahead(config: Config, opened: Opened, mesh: Mesh, rows: data.Source, total_steps: int) -> None:
    """Compile the step for the shapes that it will have, which JAX keeps, while the weights are still being read."""
    if jax.process_count() > 1 or config.init_adapter:  # whose shapes are those of its files
        return
    model_config = heads.headed(opened.config, heads.head_of(config), opened.tokenizer)
    arguments, model_config = abstract_arguments(config, model_config, mesh, rows)
    step, _ = _programs(config, model_config, total_steps, arguments[0], mesh)
    step.lower(*arguments).compile()


def _programs(config: Config, model_config: Any, total_steps: int, state: Any, mesh: Mesh) -> tuple[Any, Any]:
    """The jitted step and evaluation step; those of the run before where nothing that they compute is different, as from fold to fold."""
    alike = config.replace(output_dir=None, resume=False, data=dataclasses.replace(config.data, fold=None))
    shardings, structure = jax.tree.flatten(jax.tree.map(lambda leaf: leaf.sharding, state))
    return _jitted(alike, model_config, total_steps, OBJECTIVES[config.objective], mesh, tuple(shardings), structure)


@functools.lru_cache(maxsize=1)
def _jitted(
    config: Config, model_config: Any, total_steps: int, objective: Any, mesh: Mesh, shardings: tuple, structure: Any
) -> tuple[Any, Any]:
    step = make_step(config, model_config, objective, optim.optimizer(config, total_steps), mesh=mesh)
    out_shardings = (jax.tree.unflatten(structure, shardings), None)
    return jax.jit(step, donate_argnums=0, out_shardings=out_shardings), jax.jit(make_eval_step(config, model_config, objective, mesh))


def _check_folder(config: Config) -> None:
    """Refuse a folder that is in use, and one to resume that holds another run."""
    runfolder.check_free(config)
    if config.resume and (found := runfolder.differences(config, runfolder.folder_of(config))):
        _refuse(config, f"{config.output_dir} holds another run: {'; '.join(found)}")


def _open_folder(config: Config) -> None:
    folder = runfolder.open_run(config)
    if not config.resume:  # before anything else is in it, so that a run killed from here on can be resumed
        runfolder.write_config(folder, config)


def first_notes(rows: data.Data) -> dict[str, Any]:
    """What a run remembers beside its state, before the first step; checkpoints carry it."""
    best = {"best": None, "best_step": None, "bad_evals": 0}
    return {"fingerprint": rows.train.fingerprint, "num_tokens": 0, "skipped_steps": 0, "losses": []} | best


def _resume(config: Config, folder: Path, checkpoints: Checkpoints, state: TrainState, notes: dict) -> tuple[TrainState, dict]:
    if not checkpoints.steps():
        log.info("resume: %s has no checkpoint yet, so from the start", folder)
        return state, notes
    state, saved = checkpoints.restore(state)
    if saved["fingerprint"] != notes["fingerprint"]:
        _refuse(config, f"the training rows are not those {folder} was trained on")
    if saved.get("rewards", {}) != notes["rewards"]:
        _refuse(config, [f"the reward functions are not those {folder} was trained with ({', '.join(notes['rewards'])} has changed)"])
    log.info("resume: at step %d", int(state.step))
    return state, notes | saved | {name: notes[name] for name in ("fingerprint", "rewards")}


def _refuse(config: Config, what: str) -> None:
    """CheckpointError for a run that is not the one to go on with, or where that is allowed a line that says so."""
    if not config.resume_allow_drift:
        raise errors.CheckpointError(f"{what}. Put it back, use another folder, or write resume_allow_drift=true to go on all the same")
    log.warning("resume_allow_drift: %s; going on all the same", what)


def _write_run_json(folder: Path, config: Config, mesh, opened: Opened, teacher: Opened | None, rows, trainable, total_steps: int) -> None:
    models = {"model": opened} | ({"teacher": teacher} if teacher else {})
    run = runfolder.provenance(mesh) | {
        "seed": config.seed,
        **{name: {"source": one.source, "sha256": runfolder.file_hashes(one.path)} for name, one in models.items()},
        "data": {"fingerprint": rows.train.fingerprint, "ledger": rows.ledger},
        "reward_files": hashes(config),
        "counts": {
            "trainable_parameters": count(trainable), "documents": len(rows.train.documents), "rows": len(rows.train.plan),
            "tokens": rows.train.tokens, "trained_tokens": rows.train.trained_tokens, "packing_efficiency": rows.train.efficiency,
            "shared_prompt_tokens": rows.train.saved_tokens,
            "steps_per_epoch": rows.train.steps_per_epoch, "steps": total_steps,
        },
    }  # fmt: skip
    write_text(folder / "run.json", json.dumps(run, indent=2, default=str))


def save_result(config: Config, model: Model, trainable: Any, folder: Path) -> Path:
    """`adapter/` in PEFT's format, or `model/` in Hugging Face's; the result of an earlier end of this run is replaced."""
    out = folder / ("adapter" if isinstance(trainable, Adapter) else "model")
    scratch, old = folder / f".{out.name}.new", folder / f".{out.name}.old"
    if distributed.is_first():
        for left in (scratch, old):  # by a killed run
            shutil.rmtree(left, ignore_errors=True)
    if isinstance(trainable, Adapter):
        trainable = parallel.fetch(trainable)
    elif not distributed.is_first():
        hf.take_part(model.config, compose(model.params, trainable))
    if distributed.is_first():
        if isinstance(trainable, Adapter):
            peft_files.save_adapter(trainable, model, scratch)
        else:
            whole = compose(model.params, trainable)
            hf.save(model.config, whole, scratch, tokenizer=model.tokenizer, generation_config=model.generation_config)
        if out.exists():  # aside first: what is there is at no moment half of one
            os.replace(out, old)
        os.replace(scratch, out)
        shutil.rmtree(old, ignore_errors=True)
        log.info("result: %s", out)
    return out


def main() -> None:
    """`python -m jaxtune.train`."""
    arguments = cli.parse(cli.config_parser("train", __doc__))
    cli.log_to_terminal()
    compilation.keep_memory()
    result = train(arguments.config, arguments.overrides)
    if not result.interrupted:
        log.info("done: %s", result.folder)


cli.callable_module(__name__, train)

if __name__ == "__main__":
    errors.run(main)
