"""python -m jaxtune.plan CONFIG.yaml --target v5e-8 [key=value ...]

Does it fit in memory? Compiles the actual training step for a TPU slice, a GPU or the local machine, from the model's config.json and
shapes alone, before anything is downloaded, and reports what takes the memory.
"""

import os

if __name__ == "__main__":  # before jax is imported: warnings of XLA's compiler and libtpu are of no use here, and errors are raised
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")

import contextlib
import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from jaxtune import cli, costs, data, errors, parallel
from jaxtune.compilation import enable_cache
from jaxtune.config import Config, load_config
from jaxtune.config.load import word
from jaxtune.config.objectives import draws_answers
from jaxtune.config.policy import POLICY, least_batch
from jaxtune.convert import heads
from jaxtune.convert.load import open_config
from jaxtune.convert.retokenised import tokenizer_of
from jaxtune.data import files
from jaxtune.data.rollout_prompts import Layout, Prompts
from jaxtune.errors import ConfigError, DataError, JaxtuneError, ModelError
from jaxtune.generation.batches import fitting_rows
from jaxtune.model.block import RECOMPUTED
from jaxtune.model.families import ModelConfig
from jaxtune.objectives.answers import unshared
from jaxtune.objectives.distill import TEACHER
from jaxtune.peft import METHODS, lora
from jaxtune.plan_report import Plan, show, side_by_side
from jaxtune.plan_search import largest_that_fits
from jaxtune.plan_targets import Target, errors_bytes, find_target
from jaxtune.shapes import abstract_step, check_names
from jaxtune.step import remat_of

log = logging.getLogger("jaxtune")


def plan(
    config: Config | Mapping | str, overrides: Sequence[str] = (), *,
    target: str = "here", alternatives: bool = True, auto: str | None = None,
) -> Plan:
    """Compile the step of `config` for `target` and report what it needs; if it does not fit, find the nearest settings that do.

    If the rows of `data.train` and the tokenizer are on this machine, the step is that of those rows, and the number of steps is known;
    nothing is downloaded for this.

    `auto`: a key of `AUTO`, set to the largest value that fits; or `gradient_checkpointing`, set to what recomputes least and fits.

    Raises ConfigError for a target that is unknown or cannot be compiled for here, ModelError for a model that cannot be read.
    """
    config = load_config(config, overrides)
    where, model_config = find_target(target), _model(config)
    config = unshared(config, model_config)
    if where.name == "here":  # with the rows, it is exactly the program that `train` looks up
        enable_cache(config)
    if auto is not None:
        if where.chip.memory is None:
            raise ConfigError(f"the memory of target {where.name} is not known, so nothing can be fitted; name a chip, as v5e-1 or h100")
        config = (_least_recomputed if auto == REMAT else _largest)(config, model_config, where, auto)
    rows, unknown = rows_at_hand(config, parallel.data_parallel(parallel.make_mesh(config.mesh, where.devices)))
    result = _compile(config, model_config, where, rows)
    if METHODS[config.method].kind is lora.KIND:
        lora.tell_rank(model_config, config.lora)
    result.notes += [unknown] if unknown else []
    if result.fits is False and alternatives:
        result.instead = _alternatives(config, model_config, where)
    if auto is None and where.chip.memory and result.peak_bytes < where.chip.memory / 2 and _recomputes(config, where.devices):
        result.notes.append(costs.ROOM)
    return result


WHOLE = {"trainable_parameters": ()}  # adapters have no such key


def compare(config: Config, target: str) -> dict[str, Plan | str]:
    """The same run as full tuning, LoRA and QLoRA; an error message for a method that cannot be used."""
    where, model_config = find_target(target), _model(config)
    config = unshared(config, model_config)
    rows, unknown = rows_at_hand(config, parallel.data_parallel(parallel.make_mesh(config.mesh, where.devices)))
    found: dict[str, Plan | str] = {}
    for method, quantization in (("full", None), ("lora", None), ("qlora", config.quantization or "nf4-dq")):
        try:
            changed = _changed(config, {"method": method, "quantization": quantization} | ({} if method == "full" else WHOLE))
            found[method] = one = _compile(changed, model_config, where, rows)
            one.notes += [unknown] if unknown else []
        except JaxtuneError as error:
            found[method] = str(error)
    return found


def _model(config: Config) -> ModelConfig:
    check_names(config)
    if config.model.partition("#")[0].endswith(".gguf") and not Path(config.model).expanduser().exists():
        log.info("%s holds config and weights in one file, and is downloaded whole unless it is cached", config.model)
    head, tokenizer = heads.head_of(config), None
    if head is not None:
        with contextlib.suppress(ModelError):  # not on this machine: the padding token is then unknown, which costs nothing
            tokenizer = tokenizer_of(config, fetch=False)
    return heads.valued(config, heads.headed(heads.cut(config, open_config(config.model)), head, tokenizer))


def rows_at_hand(config: Config, data_parallel: int) -> tuple[data.Source | None, str]:
    """The training rows, or why they are unknown; nothing is downloaded."""
    try:
        sides = (config.data.train, config.data.eval, config.data.test, (config.data.replay,) if config.data.replay else ())
        missing = [source.path for side in sides if isinstance(side, tuple) for source in side if files.find(source.path) is None]
        if not config.data.train or missing:
            return None, f"steps and hours are not known without the rows ({', '.join(missing) or 'data.train is not set'})"
        tokenizer = tokenizer_of(config, fetch=False)
    except (DataError, ModelError) as error:
        return None, f"steps and hours are not known: {error}"
    try:
        return data.load(config, tokenizer, data_parallel).train, ""
    except DataError as error:
        return None, f"steps and hours are not known, and train would stop: {error}"


# ---- compiling ----


def _compile(config: Config, model_config: ModelConfig, where: Target, rows: data.Source | None = None) -> Plan:
    mesh = parallel.make_mesh(config.mesh, where.devices)
    with where.lowering():
        needed, causes, flops = _needs(config, model_config, mesh, rows)
    moved = sum(causes.get(name, 0) for name in ("weights", "scales", "teacher", "trainable", "optimizer")) + 2 * causes["activations"]
    chip = where.chip
    seconds = max(flops / chip.flops, moved / chip.bandwidth) if chip.flops and chip.bandwidth else None
    steps = data.total_steps(config, rows) if rows else config.max_steps if config.max_steps > 0 else None
    return Plan(
        target=where.name, devices=mesh.size, fits=None if chip.memory is None else needed <= chip.memory, peak_bytes=needed,
        device_bytes=chip.memory, bytes=causes, flops=flops, intensity=flops / max(moved, 1), seconds_at_least=seconds, steps=steps,
        hours_at_least=seconds * steps * _share(rows) / 3600 if seconds and steps else None, rows=_row_counts(rows),
        settings=_settings(config), instead=[], notes=[where.figures, *_drawing(config, model_config, parallel.data_parallel(mesh), rows)],
    )  # fmt: skip


def _drawing(config: Config, model_config: ModelConfig, devices: int, rows: data.Source | None) -> list[str]:
    """Notes on sampling answers, which the step's memory and time do not include."""
    if draws_answers(config):
        return [f"sampling of up to {config.max_completion_length} tokens is not included in the step's bytes and hours"]
    if config.objective not in POLICY:
        return []
    layout, prompt = Layout(config, devices), rows.longest_prompt if isinstance(rows, Prompts) else config.data.max_length
    dtype = "bfloat16" if config.dtype == "auto" else config.dtype
    at_once, cache = fitting_rows(dataclasses.replace(model_config, dtype=dtype), prompt, layout.most)
    each = -(-layout.prompts * layout.answers // devices)
    at_once = min(at_once, each)
    size = at_once * cache / 2**30
    return [
        f"sampling is not included in the step's bytes and hours: {layout.prompts * layout.answers:,} of up to {layout.most} tokens for "
        f"every {layout.repeats} step(s); {at_once} at a time per device, with a cache of {size:.2f} GiB besides the weights"
    ]


def _needs(config: Config, model_config: ModelConfig, mesh: Mesh, rows: data.Source | None) -> tuple[int, dict[str, int], float]:
    """The compiled step's peak bytes per device, the same by cause, and its floating-point operations."""
    step, (state, base, batch), model_config = abstract_step(config, model_config, mesh, rows)
    try:
        needed = costs.peak(step.lower(state, base, batch).compile())
    except jax.errors.JaxRuntimeError as error:
        if (needed := errors_bytes(str(error))) is None:
            raise
    length, replicas = batch.tokens.shape[-1], parallel.data_parallel(mesh)
    attended, trained = (rows.attended, rows.trained_share * length) if rows else (None, batch.capacity)
    teacher = base[TEACHER].config if TEACHER in base else None
    rows_each = batch.tokens.shape[0] * batch.tokens.shape[1] // replicas
    flops = costs.flops(config, model_config, length, trained, attended, rows_each, teacher) * replicas / mesh.size
    return needed, costs.by_cause(config, model_config, state, base, batch, needed), flops


def _share(rows: data.Source | None) -> float:
    """The mean length of rows relative to the longest, for which the step is planned."""
    return rows.plan.slots() / (len(rows.plan) * rows.plan.lengths[-1]) if rows else 1.0


def _row_counts(rows: data.Source | None) -> dict[str, Any] | None:
    if rows is None:
        return None
    counts = {"documents": len(rows.documents), "tokens": rows.tokens, "rows": len(rows.plan), "length": rows.plan.lengths[-1]}
    return counts | {"efficiency": round(rows.efficiency, 4), "steps_per_epoch": rows.steps_per_epoch}


def _settings(config: Config) -> dict[str, Any]:
    return {
        "method": config.method, "quantization": config.quantization, "per_device_train_batch_size": config.per_device_train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps, "max_length": config.data.max_length,
        "gradient_checkpointing": config.gradient_checkpointing, "mesh": config.mesh.to_dict(),
    }  # fmt: skip


# ---- what to do instead ----


def _alternatives(config: Config, model_config: ModelConfig, where: Target) -> list[dict[str, Any]]:
    """Settings that fit, each compiled: the mildest change of each kind, sorted by their cost in time."""
    found = []
    for change, candidates in _candidates(config, where.devices):
        for keys in candidates:
            if keys.get("optimizer_in_bwd") and model_config.is_given:
                continue
            tried = _compile(_changed(config, keys), model_config, where)
            if tried.fits:
                found.append({"change": change, "keys": keys, "peak_bytes": tried.peak_bytes, "seconds_at_least": tried.seconds_at_least})
                break
    return sorted(found, key=lambda row: row["seconds_at_least"] or 0.0)


def _changed(config: Config, keys: Mapping[str, Any]) -> Config:
    changes: dict[str, Any] = {}
    for key, value in keys.items():
        group, _, name = key.partition(".")
        changes[group] = dataclasses.replace(changes.get(group, getattr(config, group)), **{name: value}) if name else value
    return config.replace(**changes)


REMAT = "gradient_checkpointing"
LEAST_FIRST = (False, "dots", "full", "offload", "groups")  # by how much the backward pass recomputes
AUTO = {"per_device_train_batch_size": (1, 2**16, 0.0), "data.max_length": (128, 2**24, 0.02)}  # unit, largest, relative precision


def _largest(config: Config, model_config: ModelConfig, where: Target, key: str) -> Config:
    """`config` with the largest value of `key` that fits, trying its own first; unchanged if none fits."""
    unit, most, close = AUTO[key]
    own = config.data.max_length
    if key == "per_device_train_batch_size":
        own, mesh = config.per_device_train_batch_size, parallel.make_mesh(config.mesh, where.devices)
        unit = least_batch(config, parallel.data_parallel(mesh))

    def peak(n: int) -> int:
        found = _compile(_changed(config, {key: n}), model_config, where).peak_bytes
        log.info("%s=%d: %.2f GiB", key, n, found / 2**30)
        return found

    best = largest_that_fits(peak, where.chip.memory, own, unit, most, close)
    return config if best is None else _changed(config, {key: best})


def _least_recomputed(config: Config, model_config: ModelConfig, where: Target, key: str) -> Config:
    """`config` with the value of `key`, `gradient_checkpointing`, that fits and recomputes least; unchanged if none fits."""
    for value in LEAST_FIRST:
        if config.optimizer_in_bwd and value in (False, "dots"):
            continue
        tried = _changed(config, {key: value})
        found = _compile(tried, model_config, where)
        log.info("%s=%s: %.2f GiB", key, word(value), found.peak_bytes / 2**30)
        if found.fits:
            return tried
    return config


def _recomputes(config: Config, devices: Sequence) -> bool:
    """Whether the backward pass recomputes the layers' products."""
    return remat_of(config, devices[0].platform) in RECOMPUTED


def _candidates(config: Config, devices: Sequence):
    """`(description, [settings to try, the mildest first])`."""
    on_host = devices[0].platform == "cpu"
    if not _recomputes(config, devices):
        yield "recompute activations", [{"gradient_checkpointing": True}]
    if config.gradient_checkpointing != "offload" and not on_host:
        yield "each layer's input in host memory", [{"gradient_checkpointing": "offload"}]
    if config.gradient_checkpointing not in ("offload", "groups"):
        yield "the inputs of groups of layers, for another forward pass", [{"gradient_checkpointing": "groups"}]
    micro, steps = config.per_device_train_batch_size, config.gradient_accumulation_steps
    halves = [micro >> n for n in range(1, micro.bit_length()) if micro % (1 << n) == 0]
    batch, accumulation = "per_device_train_batch_size", "gradient_accumulation_steps"
    if not config.optimizer_in_bwd:
        drawn = config.steps_per_generation  # in micro-batches too
        smaller = [{batch: n, accumulation: steps * micro // n, "gradient_checkpointing": True} for n in halves]
        more = [{"steps_per_generation": drawn * micro // n} if drawn else {} for n in halves]
        yield "a smaller micro-batch", [keys | of_drawing for keys, of_drawing in zip(smaller, more, strict=True)]
    if len(devices) > 1 and config.mesh.fsdp == 1:
        yield "weights over the devices", [{"mesh.data": 1, "mesh.fsdp": -1}]
    if config.method == "lora" and config.quantization is None:
        yield "a 4-bit base", [{"method": "qlora", "quantization": "nf4-dq"}]
    if config.method == "full" and config.optim in ("adamw", "lion"):
        yield "moments in 8 bits", [{"optim": f"{config.optim}_8bit"}]
    if config.method == "full" and steps == 1 and not config.optimizer_in_bwd and not config.trainable_parameters:
        remat = "full" if config.gradient_checkpointing in (False, "dots") else config.gradient_checkpointing
        without = {"max_grad_norm": 0.0, "zero_stage": 0, "max_skipped_steps": 0, "gradient_checkpointing": remat}
        yield "each layer updated in the backward pass, without clipping", [{"optimizer_in_bwd": True, **without}]
    if config.method == "full":
        rate = config.learning_rate * 10 if config.learning_rate else None
        yield "LoRA", [{"method": "lora", "learning_rate": rate} | WHOLE]
        yield "LoRA over a 4-bit base", [{"method": "qlora", "quantization": "nf4-dq", "learning_rate": rate} | WHOLE]
    yield "shorter rows", [{"data.max_length": config.data.max_length >> n, "gradient_checkpointing": True} for n in (1, 2, 3)]


# ---- the command ----


def main() -> None:
    """`python -m jaxtune.plan`."""
    parser = cli.config_parser("plan", __doc__)
    parser.add_argument("--target", default="here", help="here, v5e-8, v5p-128, h100, 8xh100, a100-80, ...")
    parser.add_argument("--compare", action="store_true", help="full, LoRA and QLoRA side by side")
    parser.add_argument("--batch", choices=["auto"], help="the largest micro-batch that fits")
    parser.add_argument("--max-length", choices=["auto"], help="the longest rows that fit")
    parser.add_argument("--gradient-checkpointing", choices=["auto"], help="the setting that fits and recomputes least")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else")
    given = cli.parse(parser)
    cli.log_to_terminal()
    if given.target != "here":  # nothing runs: a local device may be busy, and a plugin without a device would only complain
        jax.config.update("jax_platforms", "cpu")
    config = load_config(given.config, given.overrides)
    console = Console()
    if given.compare:
        plans = compare(config, given.target)
        if given.json:
            print(json.dumps({name: {"error": one} if isinstance(one, str) else one.to_dict() for name, one in plans.items()}))
        else:
            side_by_side(plans, console)
        return
    result = plan(config, target=given.target, auto=_auto(given))
    if given.json:
        print(json.dumps(result.to_dict()))
    else:
        show(result, console)
        if (key := _auto(given)) and result.fits:
            what = "the least recomputation" if key == REMAT else "the largest"
            console.print(f"{what} that fits: {key}={word(result.settings[key.rpartition('.')[2]])}", highlight=False, soft_wrap=True)


def _auto(given) -> str | None:
    asked = {"per_device_train_batch_size": given.batch, "data.max_length": given.max_length, REMAT: given.gradient_checkpointing}
    keys = [key for key, value in asked.items() if value]
    if len(keys) > 1:
        raise ConfigError("--batch auto, --max-length auto and --gradient-checkpointing auto depend on each other; set one of them")
    return keys[0] if keys else None


cli.callable_module(__name__, plan)

if __name__ == "__main__":
    errors.run(main)
