"""python -m jaxtune.plan CONFIG.yaml --target v5e-8 [key=value ...]

Will it fit, exactly, before anything is downloaded: compiles the very step that train runs, from the model's config.json and
shapes alone, for a TPU slice, a GPU or the machine at hand, and says what takes the memory.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxtune import cli, costs, errors, optim, parallel
from jaxtune.config import Config, load_config
from jaxtune.convert import heads
from jaxtune.convert.load import open_config
from jaxtune.data import units
from jaxtune.data.batch import Batch
from jaxtune.largest import largest
from jaxtune.model import quant
from jaxtune.model.families import ModelConfig
from jaxtune.model.spec import spec
from jaxtune.objectives import OBJECTIVES
from jaxtune.objectives.answers import REFERENCE
from jaxtune.peft import METHODS
from jaxtune.reference import WITH_REFERENCE, beforehand
from jaxtune.step import how_to_compute, init_state, make_step
from jaxtune.targets import Target, errors_bytes, find_target
from jaxtune.tree import unflatten

log = logging.getLogger("jaxtune")


@dataclasses.dataclass
class Plan:
    """What one device needs for a step.

    Attributes:
        fits: whether `peak_bytes` is within the device's memory; None where that is not known.
        peak_bytes: arguments + temporaries + outputs - what they share, from the compiled program: exact.
        bytes: peak_bytes by cause. Weights, scales, trainable, optimizer and batch are exact; gradients, activations and
            logits are computed from shapes, and `other` is what is left of the temporaries.
        flops: of a step on one device, computed from shapes (products only).
        seconds_at_least: flops or bytes over the chip's published rates, whichever takes longer; None where not known.
    """

    target: str
    devices: int
    fits: bool | None
    peak_bytes: int
    device_bytes: int | None
    bytes: dict[str, int]
    flops: float
    intensity: float
    seconds_at_least: float | None
    hours_at_least: float | None
    settings: dict[str, Any]
    instead: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `--json` prints it."""
        return dataclasses.asdict(self)


def plan(
    config: Config | Mapping | str, overrides: Sequence[str] = (), *,
    target: str = "here", alternatives: bool = True, auto: str | None = None,
) -> Plan:
    """Compile the step of `config` for `target` and say what it needs; where it does not fit, the nearest settings that do.

    `auto`: a key of `AUTO`, which takes the largest value that fits.

    Raises ConfigError for a target that is not known or cannot be compiled for here, ModelError for a model we cannot read.
    """
    config = load_config(config, overrides)
    where = find_target(target)
    model_config = heads.headed(open_config(config.model), heads.head_of(config))
    if auto is not None:
        config = _largest(config, model_config, where, auto)
    result = _compile(config, model_config, where)
    if result.fits is False and alternatives:
        result.instead = _alternatives(config, model_config, where)
    return result


# ---- shapes ----


def abstract_params(config: ModelConfig, dtype: str, quantization: str | None) -> dict:
    """The parameter tree as shapes, packed as `quantization` packs it."""

    def leaf(row):
        if quantization is None or not row.can_be_packed:
            return jax.ShapeDtypeStruct(row.shape, jnp.dtype(dtype))
        *lead, out, width = row.shape
        packed = quant.abstract(quantization, (out, width))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype), packed)

    return unflatten({path: leaf(row) for path, row in spec(config).items()})


def _with_shardings(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _abstract_batch(config: Config, mesh) -> Batch:
    """The batch of a full step; without the data every token counts as trained, and a row has one pair (or other group) of answers."""
    shape = (config.gradient_accumulation_steps, config.per_device_train_batch_size * parallel.data_parallel(mesh), config.data.max_length)
    answers, shared = units.least(config)
    several = config.objective == "classification" and config.problem_type != "single_label_classification" and (config.num_labels or 0) > 1
    empty = Batch.empty((1, 1, 1), None, answers, shared, (config.num_labels or 0,) if several else ())
    if empty.answers is not None and beforehand(config):
        empty = empty.replace(answers=empty.answers.replace(ref_logps=empty.answers.values))

    def leaf(x: np.ndarray) -> jax.ShapeDtypeStruct:
        whole = (*shape[:2], shape[2] if x.dtype == np.int32 or x is empty.weights else x.shape[2], *x.shape[3:])
        return jax.ShapeDtypeStruct(whole, x.dtype, sharding=parallel.batch_sharding(mesh))

    return jax.tree.map(leaf, empty)


def abstract_step(config: Config, model_config: ModelConfig, mesh):
    """`(jitted step, (state, base, batch))`, the step that `train` runs, with shapes in place of arrays."""
    platform = mesh.devices.flat[0].platform
    if config.dtype == "auto":
        config = config.replace(dtype="float32" if platform == "cpu" else "bfloat16")
    model_config = how_to_compute(config, model_config, platform)
    params = abstract_params(model_config, config.param_dtype if config.method == "full" else config.dtype, config.quantization)
    params = _with_shardings(params, parallel.param_shardings(mesh, model_config, params))
    trainable = jax.eval_shape(lambda p: METHODS[config.method].init(jax.random.key(0), model_config, p, config), params)
    own = parallel.trainable_shardings(mesh, model_config, trainable)
    optimizer = optim.optimizer(config, max(config.max_steps, 1000))
    state = jax.eval_shape(lambda t: init_state(t, optimizer, 0, config.sync_ref_model), trainable)
    shardings = parallel.state_shardings(mesh, state, trainable, own, config.zero_stage)
    state = _with_shardings(state, shardings)
    step = make_step(config, model_config, OBJECTIVES[config.objective], optimizer, mesh=mesh)
    base = {} if config.method == "full" else params
    if config.objective in WITH_REFERENCE and config.ref_model is not None and not beforehand(config):
        base = base | {REFERENCE: params}  # a checkpoint of its own
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)), (state, base, _abstract_batch(config, mesh)), model_config


# ---- compiling ----


def _compile(config: Config, model_config: ModelConfig, where: Target) -> Plan:
    mesh = parallel.make_mesh(config.mesh, where.devices)
    step, (state, base, batch), model_config = abstract_step(config, model_config, mesh)
    flops = costs.flops(config, model_config) / (mesh.size / parallel.data_parallel(mesh))
    needed = None
    try:
        memory = step.lower(state, base, batch).compile().memory_analysis()
        needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    except jax.errors.JaxRuntimeError as error:
        needed = errors_bytes(str(error))
        if needed is None:
            raise
    causes = costs.by_cause(config, model_config, state, base, batch, needed)
    moved = sum(causes[name] for name in ("weights", "scales", "trainable", "optimizer")) + 2 * causes["activations"]
    chip = where.chip
    seconds = max(flops / chip.flops, moved / chip.bandwidth) if chip else None
    return Plan(
        target=where.name, devices=mesh.size, fits=None if chip is None else needed <= chip.memory, peak_bytes=needed,
        device_bytes=chip.memory if chip else None, bytes=causes, flops=flops, intensity=flops / max(moved, 1), seconds_at_least=seconds,
        hours_at_least=seconds * config.max_steps / 3600 if seconds and config.max_steps > 0 else None,
        settings=_settings(config), instead=[],
    )  # fmt: skip


def _settings(config: Config) -> dict[str, Any]:
    return {
        "method": config.method, "quantization": config.quantization, "per_device_train_batch_size": config.per_device_train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps, "max_length": config.data.max_length,
        "gradient_checkpointing": config.gradient_checkpointing, "mesh": config.mesh.to_dict(),
    }  # fmt: skip


# ---- what to do instead ----


def _alternatives(config: Config, model_config: ModelConfig, where: Target) -> list[dict[str, Any]]:
    """Settings that fit, each compiled: the cheapest change of each kind, in the order of what they cost."""
    found = []
    for change, candidates in _candidates(config, len(where.devices)):
        for keys in candidates:
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


AUTO = {"per_device_train_batch_size": (1, 2**16, 0.0), "data.max_length": (128, 2**24, 0.02)}  # unit, most, how near is enough


def _largest(config: Config, model_config: ModelConfig, where: Target, key: str) -> Config:
    """`config` with the largest value of `key` that fits, its own being the first tried; as it is where nothing does."""
    if where.chip is None:
        raise errors.ConfigError(f"the memory of target {where.name} is not known, and so no largest {key}; name a chip, as v5e-1 or h100")
    unit, most, close = AUTO[key]
    own = config.data.max_length if key == "data.max_length" else config.per_device_train_batch_size

    def peak(n: int) -> int:
        found = _compile(_changed(config, {key: n}), model_config, where).peak_bytes
        log.info("%s=%d: %.2f GiB", key, n, found / 2**30)
        return found

    best = largest(peak, where.chip.memory, own, unit, most, close)
    return config if best is None else _changed(config, {key: best})


def _candidates(config: Config, devices: int):
    """`(what it is, [settings to try, the mildest first])`."""
    if config.gradient_checkpointing in (False, "dots"):
        yield "recompute activations", [{"gradient_checkpointing": True}]
    if config.gradient_checkpointing != "offload":
        yield "each layer's input in the host's memory", [{"gradient_checkpointing": "offload"}]
    micro, steps = config.per_device_train_batch_size, config.gradient_accumulation_steps
    halves = [micro >> n for n in range(1, micro.bit_length()) if micro % (1 << n) == 0]
    batch, accumulation = "per_device_train_batch_size", "gradient_accumulation_steps"
    yield "a smaller micro-batch", [{batch: n, accumulation: steps * micro // n, "gradient_checkpointing": True} for n in halves]
    if devices > 1 and config.mesh.fsdp == 1:
        yield "weights over the devices", [{"mesh.data": 1, "mesh.fsdp": -1}]
    if config.method == "lora" and config.quantization is None:
        yield "a 4-bit base", [{"method": "qlora", "quantization": "nf4-dq"}]
    if config.method == "full":
        rate = config.learning_rate * 10 if config.learning_rate else None
        yield "LoRA", [{"method": "lora", "learning_rate": rate}]
        yield "LoRA over a 4-bit base", [{"method": "qlora", "quantization": "nf4-dq", "learning_rate": rate}]
    yield "shorter rows", [{"data.max_length": config.data.max_length >> n, "gradient_checkpointing": True} for n in (1, 2, 3)]


def compare(config: Config, target: str) -> dict[str, Plan]:
    """The same run by full tuning, LoRA and QLoRA."""
    where, model_config = find_target(target), heads.headed(open_config(config.model), heads.head_of(config))
    keys = {"full": {"method": "full", "quantization": None}, "lora": {"method": "lora", "quantization": None}}
    keys["qlora"] = {"method": "qlora", "quantization": "nf4-dq"}
    return {name: _compile(_changed(config, change), model_config, where) for name, change in keys.items()}


# ---- the command ----


def show(result: Plan, console: Console) -> None:
    """Print a plan."""
    verdict = {True: "fits", False: "does not fit", None: "memory of the machine not known"}[result.fits]
    of = f" of {result.device_bytes / 2**30:.2f} GiB" if result.device_bytes else ""
    console.print(f"[bold]{verdict}[/]: {result.peak_bytes / 2**30:.2f} GiB{of} on each of {result.devices} device(s) of {result.target}")
    table = Table("what", "GiB", "share", box=None)
    for name, size in result.bytes.items():
        table.add_row(name, f"{size / 2**30:.3f}", f"{100 * size / result.peak_bytes:.1f} %")
    console.print(table)
    console.print("gradients, activations and logits are estimated from shapes, the total is the compiler's", style="dim")
    bound = f"; a step takes at least {result.seconds_at_least:.3f} s" if result.seconds_at_least else ""
    hours = f", the run {result.hours_at_least:.2f} h" if result.hours_at_least else ""
    console.print(f"{result.flops / 1e12:.2f} TFLOP a step and device, {result.intensity:.0f} FLOP a byte{bound}{hours}")
    for row in result.instead:
        keys = " ".join(f"{key}={value}" for key, value in row["keys"].items())
        console.print(f"instead, {row['change']}: {keys}  ({row['peak_bytes'] / 2**30:.2f} GiB)", highlight=False)
    if result.fits is False and not result.instead:
        console.print("no single change makes it fit; take a larger target or a smaller model")


def main() -> None:
    """`python -m jaxtune.plan`."""
    parser = cli.config_parser("plan", __doc__)
    parser.add_argument("--target", default="here", help="here, v5e-8, v5p-128, h100, 8xh100, a100-80, ...")
    parser.add_argument("--compare", action="store_true", help="full, LoRA and QLoRA side by side")
    parser.add_argument("--batch", choices=["auto"], help="the largest micro-batch that fits")
    parser.add_argument("--max-length", choices=["auto"], help="the longest rows that fit")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    given = cli.parse(parser)
    cli.log_to_terminal()
    if given.target != "here":  # nothing runs: a device that is here may be busy, and a plugin without one would only complain
        jax.config.update("jax_platforms", "cpu")
    config = load_config(given.config, given.overrides)
    console = Console()
    if given.compare:
        plans = compare(config, given.target)
        if given.json:
            print(json.dumps({name: one.to_dict() for name, one in plans.items()}))
            return
        for name, one in plans.items():
            console.print(f"\n[bold]{name}[/]")
            show(one, console)
        return
    result = plan(config, target=given.target, auto=_auto(given))
    if given.json:
        print(json.dumps(result.to_dict()))
    else:
        show(result, console)


def _auto(given) -> str | None:
    if given.batch and given.max_length:
        raise errors.ConfigError("--batch auto and --max-length auto trade against each other; set one of the two")
    return "per_device_train_batch_size" if given.batch else "data.max_length" if given.max_length else None


cli.callable_module(__name__, plan)

if __name__ == "__main__":
    errors.run(main)
