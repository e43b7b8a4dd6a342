"""TRL's own loss code over tests/preference_cases.py: its trainers' methods, on bare instances, with a model that says what it is told."""

import warnings
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import preference_cases as cases
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the experimental trainers announce themselves
    from trl import DPOTrainer, KTOTrainer
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer


def trainer(kind, run, **attributes):
    """An instance that was never set up, with what its loss reads."""
    self = kind.__new__(kind)
    same = lambda x: x  # noqa: E731
    self.accelerator = SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same)
    self.beta, self.label_smoothing, self._metrics = run.beta, run.label_smoothing, {"train": defaultdict(list)}
    self.aux_loss_enabled, self._total_train_tokens, self._tp_size, self.model = False, 0, 1, SimpleNamespace(training=True)
    for name, value in attributes.items():
        setattr(self, name, value)
    return self


class Model:
    """The log-probabilities of the rows whose numbers stand in `input_ids[:, 0]`."""

    training = True

    def __init__(self, logps, arrays):
        self.logps, self.mask = logps, torch.tensor(arrays["mask"])
        self.given = {name: torch.tensor(arrays[name]) for name in ("collision", "mean_logits", "entropy", "correct")}

    def __call__(self, input_ids, attention_mask, labels=None, **_):
        rows = input_ids[:, 0]
        if labels is None:  # logits of two tokens, of which the first is the target
            logps = self.logps[rows]
            logits = torch.stack([logps, torch.log(-torch.expm1(logps))], -1)
            return SimpleNamespace(logits=torch.cat([logits[:, 1:], logits[:, :1]], 1))
        shown = torch.where(self.mask[rows], self.logps[rows], 0)[:, 1:]
        collision, mean_logits, entropy, correct = (x[rows][:, 1:] for x in self.given.values())
        return SimpleNamespace(
            log_probs=shown, log_sum_sq_probs=collision, entropy=entropy, mean_logits=mean_logits, is_top1=correct
        )


def inputs(arrays, rows, prefix=""):
    ids = torch.zeros((len(rows), cases.T), dtype=torch.long)
    ids[:, 0] = torch.as_tensor(rows)
    mask = torch.tensor(arrays["mask"][rows]).long()
    return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": torch.ones_like(ids), f"{prefix}completion_mask": mask}


def dpo(run, arrays, logps):
    n = cases.N
    self = trainer(
        DPOTrainer, run, ld_alpha=run.ld_alpha, precompute_ref_logps=True, use_weighting=run.use_weighting, loss_types=list(run.loss_type),
        loss_weights=list(run.loss_weights or [1.0] * len(run.loss_type)), f_divergence_type=run.f_divergence_type,
        f_alpha_divergence_coef=run.f_alpha_divergence_coef, args=SimpleNamespace(discopop_tau=run.discopop_tau),
    )  # fmt: skip
    ref = torch.tensor(arrays["ref"])
    batch = inputs(arrays, np.arange(2 * n)) | {"ref_chosen_logps": ref[:n], "ref_rejected_logps": ref[n:]}
    return self._compute_loss(Model(logps, arrays), batch, False), {name: values[-1] for name, values in self._metrics["train"].items()}


def kto(run, arrays, logps):
    paired = run.loss_type == ("kto",)
    own = np.arange(0, 2 * cases.N, 2) if paired else np.arange(2 * cases.N)
    self = trainer(
        KTOTrainer, run, calculate_KL=paired, precompute_ref_logps=True, loss_type=run.loss_type[0],
        desirable_weight=run.desirable_weight, undesirable_weight=run.undesirable_weight,
    )  # fmt: skip
    ref = torch.tensor(arrays["ref"])
    batch = inputs(arrays, own) | {"label": torch.tensor(arrays["labels"][own]), "ref_logps": ref[own]}
    if paired:
        batch |= inputs(arrays, own + 1, "KL_") | {"ref_KL_logps": ref[own + 1]}
    return self._compute_loss(Model(logps, arrays), batch, False), {name: values[-1] for name, values in self._metrics["train"].items()}


def reference_free(kind, run, arrays, logps, **attributes):
    """ORPO's and CPO's trainers, which take means over labels as the older trainers did."""
    self = trainer(kind, run, is_encoder_decoder=False, pad_token_id=0, padding_value=0, **attributes)
    n, batch = cases.N, {}
    for side, rows in (("chosen", np.arange(n)), ("rejected", np.arange(n) + n)):
        mask = torch.tensor(arrays["mask"][rows])
        ids = torch.zeros(mask.shape, dtype=torch.long)
        ids[:, 0] = torch.as_tensor(rows)
        seen = torch.arange(cases.T) < cases.PROMPT + mask.sum(1, keepdim=True)
        labels = torch.where(mask, torch.zeros_like(ids), -100)
        batch |= {f"{side}_input_ids": ids, f"{side}_attention_mask": seen.long(), f"{side}_labels": labels}
    return self.get_batch_loss_metrics(Model(logps, arrays), batch)


def theirs(name, arrays=None):
    """(loss, its gradient to `logps`, metrics) by TRL, in float64 where its code takes that."""
    run, arrays = cases.config(name), arrays or cases.given(name)
    dtype = torch.float32 if run.f_divergence_type == "alpha_divergence" else torch.float64
    arrays = {key: torch.tensor(value).to(dtype).numpy() if value.dtype == float else value for key, value in arrays.items()}
    logps = torch.tensor(arrays["logps"], requires_grad=True)
    if run.objective == "dpo":
        loss, metrics = dpo(run, arrays, logps)
    elif run.objective == "kto":
        loss, metrics = kto(run, arrays, logps)
    elif run.objective == "orpo":
        loss, metrics = reference_free(ORPOTrainer, run, arrays, logps)
    else:
        settings = {"alpha": 0.0, "simpo_gamma": run.simpo_gamma, "cpo_alpha": run.cpo_alpha, "loss_type": run.loss_type[0]}
        loss, metrics = reference_free(CPOTrainer, run, arrays, logps, **settings)
    loss.backward()
    return float(loss.detach()), logps.grad.numpy(), metrics
