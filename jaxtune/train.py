"""python -m jaxtune.train CONFIG.yaml [key=value ...]

Fine-tune a model as the config says. Writes a run folder: config.yaml, run.json, metrics.jsonl, loss.png, tensorboard/, checkpoints/, and
the result: adapter/ (PEFT's format) or model/ (Hugging Face's). With data.kfold, one such folder per fold, and folds.json with the mean and
spread of their metrics.
"""

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxtune import cli, compilation, data, distributed, errors, losses, metrics, optim, parallel, reference, runfolder, startup
from jaxtune.background import Background
from jaxtune.checkpoint import Checkpoints
from jaxtune.config import Config, describe, load_config
from jaxtune.config.objectives import ON_TOKENS, draws_answers
from jaxtune.config.policy import POLICY
from jaxtune.convert import heads, hf
from jaxtune.convert import peft as peft_files
from jaxtune.convert.load import Model, Opened, open_config, open_model
from jaxtune.convert.peft_config import config_file
from jaxtune.convert.retokenised import for_run, tokenizer_of, with_tokenizer
from jaxtune.convert.tokenizer import save_tokenizer
from jaxtune.disk import write_text
from jaxtune.evaluate import of_run
from jaxtune.folds import CrossValidation, cross_validate
from jaxtune.gpu import grant_memory
from jaxtune.kernels import check_attention
from jaxtune.loop import Loop
from jaxtune.objectives.answers import unshared
from jaxtune.on_policy import OnPolicy
from jaxtune.peft import compose, lora_init
from jaxtune.peft.adapter import Adapter
from jaxtune.rewards import find_rewards, hashes
from jaxtune.rollout import Rollouts
from jaxtune.shapes import check_names
from jaxtune.step import TrainState
from jaxtune.teacher import open_teacher, read_teacher
from jaxtune.tree import count, nbytes

log = logging.getLogger("jaxtune")


@dataclasses.dataclass
class Result:
    """The result of a run: its folder, the last metrics by name, the trained part, and the model it was trained on."""

    folder: Path
    step: int
    metrics: dict[str, float]
    trainable: Any
    model: Model
    interrupted: bool = False


@compilation.in_32_bits
def train(
    config: Config | Mapping | str | os.PathLike, overrides: tuple[str, ...] | list[str] = (), *,
    reward_funcs: Sequence[Callable] = (), loss_function: Callable | None = None,
) -> Result | CrossValidation:  # fmt: skip
    """Run a training config to its result; with `data.kfold` and no `data.fold`, one run per fold.

    `reward_funcs`: functions for objectives grpo, rloo and ppo (jaxtune/rewards.py), in addition to those that the config names.
    `loss_function`: a function that replaces the objective's own (jaxtune/losses.py).

    Raises JaxtuneError for everything the user can correct: keys, files, rows, targets, a folder in use.
    """
    grant_memory()
    config = load_config(config, overrides)
    if loss_function is not None:
        config = losses.with_function(config, loss_function)
    _check_tables(config)
    distributed.start(config.distributed)
    compilation.enable_cache(config)
    distributed.check_joined(config.distributed, answers=bool(config.evaluate.metric))
    mesh = parallel.make_mesh(config.mesh)
    config = settled(config)
    if config.data.kfold is None or config.data.fold is not None:
        return _train(config, mesh, reward_funcs)
    tokenizer = tokenizer_of(config)
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
    distributed.on_first(lambda: _check_folder(config))  # refuse a folder in use before any long work
    log.info("%s", describe(config))
    rewards = find_rewards(config, reward_funcs) if config.objective in POLICY else []
    opened = for_run(config, open_model(_base(config)))
    opened.config = heads.cut(config, opened.config)
    check_attention(config, opened.config, mesh)
    startup.check_method(config, opened)
    with Background(lambda: startup.read_weights(config, opened, mesh)) as weights:
        rows, total_steps = startup.read_rows(config, opened, mesh)
        teacher = open_teacher(config, opened, rows, mesh)

        # ---- 2. The step; the weights, and what is trained of them ----
        startup.compile_ahead(config, opened, mesh, rows.train, total_steps)
        model, trainable = startup.init_trainable(config, opened, weights.result(), rows.train, mesh)
    base = reference.prepare(config, opened, model, trainable, rows, mesh) | read_teacher(config, teacher, mesh)
    initial = None
    if lora_init.has_residual_base(getattr(trainable, "config", None)):
        initial = jax.tree.map(lambda x: x.copy(), trainable)  # the step donates what is trained
        base = base | lora_init.residual_base(model.params, initial, lambda scale: jax.device_put(scale, parallel.replicated(mesh)))

    # ---- 3. The state ----
    state = startup.place_state(mesh, config, trainable, optim.optimizer(config, total_steps))
    step, eval_step = startup.programs(config, model.config, total_steps, state, mesh)

    # ---- 4. The folder; resume ----
    distributed.on_first(lambda: _open_folder(config))
    folder = runfolder.folder_of(config)
    checkpoints = Checkpoints(folder / "checkpoints", config.save_total_limit)
    notes = first_notes(rows) | {"rewards": hashes(config)}
    startup.save_initial(config, model, state.trainable, folder)
    if config.resume:
        state, notes = _resume(config, folder, checkpoints, state, notes)
    if distributed.is_first():
        checkpoint = nbytes((state.trainable, state.opt_state)) if config.save_strategy != "no" else 0
        runfolder.check_room(folder, nbytes(state.trainable) + checkpoint)
        if config.resume:  # keys that only affect saving and logging may have changed
            runfolder.write_config(folder, config)
        _write_run_json(folder, config, mesh, opened, teacher, rows, state.trainable, total_steps)

    # ---- 5. The loop ----
    rollouts = Rollouts(config, model, mesh, rows, rewards, folder, total_steps) if rewards else None
    on_policy = OnPolicy(config, model, mesh, rows.train) if draws_answers(config) else None
    run = Loop(config, mesh, rows, total_steps, checkpoints, folder, notes, rollouts, on_policy)
    state, metrics = run(state, base, step, eval_step)

    # ---- 6. The result ----
    trainable = state.trainable
    if initial is not None:
        trainable = lora_init.on_original_base(model.config, *parallel.fetch((trainable, initial)))
    if not run.interrupted:
        save_result(config, model, trainable, folder)
    scoring = heads.head_of(config) is not None and (config.data.eval is not None or config.data.test is not None)
    if not run.interrupted and (config.evaluate.metric or scoring):
        of_run(config, model, trainable, folder).show()
        log.info("%s; the loss: %s", folder / ("predictions.jsonl" if config.evaluate.metric else "evaluation.json"), folder / "loss.png")
    return Result(folder, int(state.step), metrics, trainable, model, run.interrupted)


def _check_tables(config: Config) -> None:
    check_names(config)
    metrics.find_all(config.evaluate.metric)  # metrics are called at the end, but their mistakes should be reported at the start
    if config.init_adapter:
        config_file(Path(config.init_adapter).expanduser())


def settled(config: Config) -> Config:
    """The config with values that depend on the machine and on the model."""
    changes: dict[str, Any] = {}
    if config.dtype == "auto":
        changes["dtype"] = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if config.output_dir is None:
        changes["output_dir"] = runfolder.default_folder(config, f"{config.method}-{config.objective}")
    config = config.replace(**changes)
    if config.objective in ON_TOKENS:  # `unshared` would not change it, so the model's config need not be read
        return config
    return unshared(config, open_config(_base(config)))


def _base(config: Config) -> str:
    """The model that the run trains over."""
    return runfolder.base_of(runfolder.folder_of(config), config) if config.resume else config.model


def _check_folder(config: Config) -> None:
    """Refuse a folder in use, and one to resume that holds another run."""
    runfolder.check_free(config)
    if config.resume and (found := runfolder.differences(config, runfolder.folder_of(config))):
        _refuse(config, f"{config.output_dir} holds another run: {'; '.join(found)}")


def _open_folder(config: Config) -> None:
    folder = runfolder.open_run(config)
    if not config.resume:  # first of all files, so that a run killed from here on can be resumed
        runfolder.write_config(folder, config)


def first_notes(rows: data.Data) -> dict[str, Any]:
    """What a run remembers besides its state, before the first step; part of every checkpoint."""
    best = {"best": None, "best_step": None, "bad_evals": 0}
    return {"fingerprint": rows.train.fingerprint, "num_tokens": 0, "skipped_steps": 0, "losses": []} | best


def _resume(config: Config, folder: Path, checkpoints: Checkpoints, state: TrainState, notes: dict) -> tuple[TrainState, dict]:
    if not checkpoints.steps():
        log.info("resume: %s has no checkpoint yet; starting from the beginning", folder)
        return state, notes
    state, saved = checkpoints.restore(state)
    if saved["fingerprint"] != notes["fingerprint"]:
        _refuse(config, f"the training rows are not those {folder} was trained on")
    if changed := {file for file, _ in saved.get("rewards", {}).items() ^ notes["rewards"].items()}:
        _refuse(config, f"the functions of {', '.join(sorted(changed))} are not those {folder} was trained with")
    log.info("resume: at step %d", int(state.step))
    return state, notes | saved | {name: notes[name] for name in ("fingerprint", "rewards")}


def _refuse(config: Config, what: str) -> None:
    """CheckpointError for a run that cannot be resumed as this one, or only a warning if drift is allowed."""
    if not config.resume_allow_drift:
        raise errors.CheckpointError(f"{what}. Put it back, use another folder, or write resume_allow_drift=true to continue anyway")
    log.warning("resume_allow_drift: %s; continuing anyway", what)


def _write_run_json(folder: Path, config: Config, mesh, opened: Opened, teacher: Opened | None, rows, trainable, total_steps: int) -> None:
    models = {"model": opened} | ({"teacher": teacher} if teacher else {})
    run = runfolder.provenance(mesh) | {
        "seed": config.seed,
        **{name: {"source": one.source, "sha256": runfolder.file_hashes(one.path)} for name, one in models.items()},
        "data": {"fingerprint": rows.train.fingerprint, "ledger": rows.ledger},
        "function_files": hashes(config),
        "counts": {
            "trainable_parameters": count(trainable), "documents": len(rows.train.documents), "rows": len(rows.train.plan),
            "tokens": rows.train.tokens, "trained_tokens": rows.train.trained_tokens, "packing_efficiency": rows.train.efficiency,
            "shared_prompt_tokens": rows.train.saved_tokens,
            "steps_per_epoch": rows.train.steps_per_epoch, "steps": total_steps,
        },
    }  # fmt: skip
    write_text(folder / "run.json", json.dumps(run, indent=2, default=str))


def save_result(config: Config, model: Model, trainable: Any, folder: Path) -> Path:
    """`adapter/` in PEFT's format, or `model/` in Hugging Face's; replaces an earlier result of this run."""
    out = folder / ("adapter" if isinstance(trainable, Adapter) else "model")
    scratch, old = folder / f".{out.name}.new", folder / f".{out.name}.old"
    if distributed.is_first():
        for left in (scratch, old):  # left by a killed run
            shutil.rmtree(left, ignore_errors=True)
    if isinstance(trainable, Adapter):
        trainable = parallel.fetch(trainable)
    elif not distributed.is_first():
        hf.take_part(model.config, compose(model.params, trainable), model.other_tensors)
    if distributed.is_first():
        if isinstance(trainable, Adapter):
            peft_files.save_adapter(trainable, model, scratch)
            save_tokenizer(model.tokenizer, scratch)
        else:
            if not model.config.num_labels:  # other programs find the ends of answers in the generation config
                model = with_tokenizer(model, model.tokenizer)
            whole = compose(model.params, trainable)
            settings = {"tokenizer": model.tokenizer, "generation_config": model.generation_config, "other_tensors": model.other_tensors}
            hf.save(model.config, whole, scratch, **settings)
        if out.exists():  # moved aside first, so that there is never half a result
            os.replace(out, old)
        os.replace(scratch, out)
        shutil.rmtree(old, ignore_errors=True)
        log.info("result: %s", out)
    return out


def main() -> None:
    """`python -m jaxtune.train`."""
    arguments = cli.parse(cli.config_parser("train", __doc__))
    cli.log_to_terminal()
    result = train(arguments.config, arguments.overrides)
    if not result.interrupted:
        log.info("done: %s", result.folder)


cli.callable_module(__name__, train)

if __name__ == "__main__":
    errors.run(main)
