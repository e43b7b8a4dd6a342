"""TRL's own loss code over tests/reward_cases.py, and transformers' where TRL leaves the loss to its models."""

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import reward_cases as cases
import torch
from transformers.loss.loss_utils import ForSequenceClassificationLoss, ForTokenClassification
from trl import RewardTrainer


def trainer(run, **attributes):
    """An instance that was never set up, with what its loss reads."""
    self = RewardTrainer.__new__(RewardTrainer)
    same = lambda x: x  # noqa: E731
    self.accelerator = SimpleNamespace(gather=same, gather_for_metrics=same)
    self.args = SimpleNamespace(center_rewards_coefficient=run.center_rewards_coefficient)
    self._metrics, self._total_train_tokens, self._tp_size = {"train": defaultdict(list)}, 0, 1
    self.model = SimpleNamespace(training=True)
    for name, value in attributes.items():
        setattr(self, name, value)
    return self


def theirs(name, arrays=None):
    """(loss, its gradient to `scores`, metrics) in float64."""
    run, arrays = cases.config(name), arrays or cases.given(name)
    scores, said = torch.tensor(arrays["scores"], requires_grad=True), torch.tensor(arrays["said"])
    metrics = {}
    if run.objective == "reward":
        self = trainer(run)
        batch = {"attention_mask": torch.ones(1)} | ({"margin": said} if said.any() else {})
        loss = self.compute_loss(lambda **_: SimpleNamespace(logits=scores), batch)
        metrics = {key: float(np.mean(values)) for key, values in self._metrics["train"].items()}
    elif run.objective == "stepwise_reward":
        padded = torch.cat([said.long(), torch.full((4,), -100)])  # of steps TRL trains the last token; all others say nothing
        logits = torch.cat([scores.float(), torch.zeros(4, scores.shape[1])])
        loss = ForTokenClassification(logits[None], padded[None], SimpleNamespace(num_labels=scores.shape[1]))
    else:
        kind = SimpleNamespace(num_labels=scores.shape[1], problem_type=run.problem_type)
        loss = ForSequenceClassificationLoss(said.long() if "single" in run.problem_type else said, scores, kind)
    loss.backward()
    return float(loss.detach()), scores.grad.numpy(), metrics
