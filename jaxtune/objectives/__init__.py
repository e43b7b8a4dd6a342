"""Objectives: `(config, model_config, params, base, batch, key) -> Loss(total, weight, metrics)`. One row each."""

from jaxtune.objectives.loss import Loss
from jaxtune.objectives.sft import sft

OBJECTIVES = {"sft": sft}

__all__ = ["OBJECTIVES", "Loss"]
