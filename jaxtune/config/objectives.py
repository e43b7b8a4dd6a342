"""The keys of an objective: defaults that depend on it, and invalid combinations."""

import dataclasses
import difflib
import math
from typing import TYPE_CHECKING, Any

from jaxtune.config import policy
from jaxtune.errors import ConfigError

if TYPE_CHECKING:
    from jaxtune.config.schema import Config

# The losses of each objective, its default first. Those of dpo: objectives/pairwise.py.
LOSS_TYPES = {
    "dpo": (
        "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero",
        "apo_down", "discopop", "sigmoid_norm", "sft",
    ),
    "cpo": ("sigmoid", "hinge", "ipo", "simpo"),
    "simpo": ("simpo",),
    "orpo": ("orpo",),
    "kto": ("kto", "apo_zero_unpaired"),
    "grpo": ("dapo", "grpo", "bnpo", "dr_grpo", "luspo", "cispo", "sapo", "vespo"),
    "rloo": ("rloo",),
}  # fmt: skip
SFT_LOSSES = ("nll", "dft")
BETA = dict.fromkeys(LOSS_TYPES, 0.1) | {"grpo": 0.0, "rloo": 0.05, "distill": 0.5}
ON_TOKENS = ("sft", "distill")  # objectives that learn the rows' tokens one by one
SCORING = ("reward", "stepwise_reward", "classification")  # objectives that train a scoring head in place of the vocabulary head
ON_ANSWERS = ("dpo", "cpo", "simpo", "orpo", "kto", "reward")  # objectives that compare whole answers of the rows
# The log-partition that an f-divergence leaves in a reward cancels only in the difference of a pair's rewards (TRL).
OF_DIFFERENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")


def draws_answers(config: "Config") -> bool:
    """Whether objective distill learns from sampled answers, at some or all steps."""
    return bool(config.lmbda or config.seq_kd)


def resolve(config: "Config") -> dict[str, Any]:
    """Values for defaults of None."""
    out: dict[str, Any] = {}
    if config.beta is None:
        out["beta"] = BETA.get(config.objective)
    if config.temperature is None and config.objective in ("distill", *policy.POLICY):
        out["temperature"] = policy.TEMPERATURE.get(config.objective, 1.0)
    if config.loss_type is None and config.objective in LOSS_TYPES:
        out["loss_type"] = LOSS_TYPES[config.objective][:1]
    if config.loss_type == ("chunked_nll",):  # TRL's name for the way in which every loss is computed here
        out["loss_type"] = ("nll",)
    if config.cpo_alpha is None and config.objective in ("cpo", "simpo"):
        out["cpo_alpha"] = 1.0 if config.objective == "cpo" else 0.0  # TRL's trainer has 1 for both, and its documentation sets 0 for SimPO
    if config.objective in policy.POLICY:
        out |= policy.resolve(config)
    if config.objective == "distill" and draws_answers(config) and config.max_completion_length is None:
        out["max_completion_length"] = 128
    if config.objective == "classification":
        labels = config.num_labels or (len(config.id2label) if config.id2label else None)
        out["num_labels"] = labels
        out["problem_type"] = config.problem_type or ("regression" if labels == 1 else "single_label_classification")
    return out


def check(config: "Config") -> None:
    """Raise ConfigError for the first problem found."""
    for field in dataclasses.fields(config):
        objectives = field.metadata.get("objectives")
        value = getattr(config, field.name)
        if objectives and config.objective not in objectives and value != field.default:
            raise ConfigError(
                f"{field.name} is a key of objective {' or '.join(objectives)}, but objective is {config.objective}; "
                f"write objective: {objectives[0]}, or leave it out."
            )
    losses, weights = config.loss_type or (), config.loss_weights
    if weights is not None and len(weights) != len(losses):
        raise ConfigError(f"loss_weights has {len(weights)} numbers for {len(losses)} losses in loss_type; write one for each.")
    _losses(losses, config.objective)
    if config.objective in LOSS_TYPES:
        _preferences(config, losses)
    if config.objective in policy.POLICY:
        policy.check(config)
    if config.objective == "distill":
        _distilling(config)
    if config.objective in ON_ANSWERS and config.data.train_on not in ("completion", "last"):
        raise ConfigError(
            f"data.train_on is {config.data.train_on}, but objective {config.objective} compares answers to one prompt; leave it out."
        )
    _reference(config)
    if config.objective in SCORING and config.evaluate.metric:
        raise ConfigError(
            f"evaluate.metric is of answers that a model writes, which one of objective {config.objective} does not; leave it out: "
            "what the objective measures is shown for base and tuned."
        )
    if config.objective == "classification":
        _labels(config)
    if config.max_completion_length is not None and config.max_completion_length < 1:
        raise ConfigError(f"max_completion_length is {config.max_completion_length}, but has to be at least 1.")
    if not config.step_separator:
        raise ConfigError("step_separator is empty, but a step is judged at its last token; write one, such as a line break.")


def _distilling(config: "Config") -> None:
    if config.teacher is None:
        raise ConfigError("teacher is missing; write teacher: a hub id, a folder, or a .gguf file of a model with the same tokenizer.")
    if config.beta is not None and not 0 <= config.beta <= 1:
        raise ConfigError(f"beta is {config.beta:g}, but goes from 0 (forward KL) to 1 (reverse KL).")
    if not 0 < config.kd_ratio <= 1:
        raise ConfigError(f"kd_ratio is {config.kd_ratio:g}, but has to be above 0 and at most 1; without a teacher it is objective: sft.")
    if not 0 < config.temperature < math.inf:
        raise ConfigError(f"temperature is {config.temperature:g}, but has to be above 0.")
    if not 0 <= config.lmbda <= 1:
        raise ConfigError(f"lmbda is {config.lmbda:g}, but goes from 0 (the rows' answers) to 1 (the student's own at every step).")
    if not draws_answers(config) and config.max_completion_length is not None:
        raise ConfigError("max_completion_length is of answers that are drawn; write lmbda above 0 or seq_kd: true, or leave it out.")
    if draws_answers(config) and config.mesh.sequence > 1:
        raise ConfigError("answers are drawn with whole rows on a device; write mesh.sequence: 1, or lmbda: 0 and seq_kd: false.")


def _labels(config: "Config") -> None:
    names = config.id2label or ()
    if config.num_labels is None or config.num_labels < 1:
        raise ConfigError("num_labels is missing; write the number of classes, or their names: id2label: [negative, positive].")
    if names and len(names) != config.num_labels:
        raise ConfigError(f"id2label names {len(names)} classes, but num_labels is {config.num_labels}; leave num_labels out.")
    if len(set(names)) < len(names):
        raise ConfigError(f"id2label has a name twice: {', '.join(names)}; each class needs one of its own.")
    if config.num_labels == 1 and config.problem_type != "regression":
        raise ConfigError(f"problem_type {config.problem_type} with one label has nothing to choose from; write problem_type: regression.")


def _losses(losses: tuple[str, ...], objective: str) -> None:
    """ConfigError for a loss that the objective lacks."""
    known = SFT_LOSSES if objective == "sft" else LOSS_TYPES.get(objective, ())
    for name in losses:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}." if known else "leave it out."
            raise ConfigError(f"loss_type {name} is not one of objective {objective}; {hint}")
    if len(losses) > 1 and objective != "dpo":
        raise ConfigError(f"loss_type has {len(losses)} losses, but only objective dpo adds several up; write one.")


def _preferences(config: "Config", losses: tuple[str, ...]) -> None:
    if config.beta is not None and config.beta <= 0 and config.objective not in policy.POLICY:
        raise ConfigError(f"beta is {config.beta}, but has to be above 0; 0.1 is usual.")
    if not 0 <= config.label_smoothing < 0.5:
        raise ConfigError(f"label_smoothing is {config.label_smoothing}, but is the chance that a label is wrong: from 0 to below 0.5.")
    if "exo_pair" in losses and config.label_smoothing == 0:
        raise ConfigError("loss_type exo_pair needs label_smoothing above 0; its authors write 0.001.")
    if config.f_divergence_type != "reverse_kl" and (wrong := [name for name in losses if name not in OF_DIFFERENCE]):
        raise ConfigError(
            f"f_divergence_type {config.f_divergence_type} is defined for losses of a difference of rewards, which {wrong[0]} is not; "
            f"write f_divergence_type: reverse_kl, or one of {', '.join(OF_DIFFERENCE)}."
        )
    if config.use_weighting and (sorting := [name for name in losses if name.startswith("aot")]):
        raise ConfigError(f"use_weighting weighs each pair, but loss_type {sorting[0]} sorts them apart; leave one of the two out.")


def _reference(config: "Config") -> None:
    if not config.sync_ref_model:
        return
    if config.precompute_ref_log_probs:
        raise ConfigError("sync_ref_model moves the reference model, but precompute_ref_log_probs needs it to stay fixed; leave one out.")
    if not 0 < config.ref_model_mixup_alpha <= 1 or config.ref_model_sync_steps < 1:
        raise ConfigError("ref_model_mixup_alpha has to be above 0 and at most 1, and ref_model_sync_steps at least 1.")
    if config.method != "full" and config.ref_model_mixup_alpha != 1:
        raise ConfigError(
            "sync_ref_model copies an adapter whole (two of them mixed are no adapter of that rank); write ref_model_mixup_alpha: 1."
        )
