"""Objectives: `(config, model_config, params, base, batch, key) -> Loss(total, weight, metrics)`. One row each."""

from jaxtune.objectives.distill import distill
from jaxtune.objectives.grpo import grpo
from jaxtune.objectives.kto import kto
from jaxtune.objectives.loss import Loss
from jaxtune.objectives.ppo import ppo
from jaxtune.objectives.preference import cpo, dpo, orpo
from jaxtune.objectives.reward import classification, reward, stepwise_reward
from jaxtune.objectives.sft import sft

OBJECTIVES = {
    "sft": sft, "distill": distill, "dpo": dpo, "orpo": orpo, "cpo": cpo, "simpo": cpo, "kto": kto,
    "reward": reward, "stepwise_reward": stepwise_reward, "classification": classification,
    "grpo": grpo, "rloo": grpo, "ppo": ppo,
}  # fmt: skip

__all__ = ["OBJECTIVES", "Loss"]
