"""TRL's own code over tests/policy_cases.py: methods of GRPOTrainer and RLOOTrainer, on bare instances."""

import warnings
from collections import defaultdict
from types import SimpleNamespace

import policy_cases as cases
import torch
from accelerate import Accelerator

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl import GRPOTrainer, RLOOTrainer


def trainer(kind, run, **attributes):
    """An instance that was never set up, with what its methods read."""
    self = kind.__new__(kind)
    Accelerator(cpu=True)
    same = lambda x, **_: x  # noqa: E731
    self.accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=same, reduce=same, num_processes=1, process_index=0, pad_across_processes=same,
        sync_gradients=True, unwrap_model=same, is_main_process=True,
    )  # fmt: skip
    self.args = SimpleNamespace(
        **{name: getattr(run, name) for name in vars(run) if name.startswith(("sapo", "vespo"))}, delta=run.delta,
        use_bias_correction_kl=run.use_bias_correction_kl, steps_per_generation=2, gradient_accumulation_steps=2,
        per_device_train_batch_size=4, gradient_checkpointing_kwargs=None,
    )  # fmt: skip
    self.beta, self.epsilon_low, self.epsilon_high = run.beta, run.epsilon, run.epsilon_high
    for name in ("loss_type", "importance_sampling_level", "top_entropy_quantile", "off_policy_mask_threshold", "max_completion_length",
                 "scale_rewards", "multi_objective_aggregation", "normalize_advantages", "reward_clip_range", "num_generations",
                 "num_iterations", "mask_truncated_completions"):  # fmt: skip
        setattr(self, name, getattr(run, name))
    self.loss_type = run.loss_type[0]
    self._metrics, self.model = {"train": defaultdict(list)}, SimpleNamespace(training=True)
    self.current_gradient_accumulation_steps, self.aux_loss_enabled, self._entropy_bonus_enabled, self.use_vllm = 1, False, False, False
    for name, value in attributes.items():
        setattr(self, name, value)
    return self


def theirs(name, arrays=None):
    """(loss, its gradient to `logps`, metrics) by TRL, in float64."""
    run, arrays = cases.config(name), arrays or cases.given(name)
    logps, tensor = torch.tensor(arrays["logps"], requires_grad=True), {key: torch.tensor(value) for key, value in arrays.items()}
    kind = RLOOTrainer if run.objective == "rloo" else GRPOTrainer
    said = lambda *_, **__: (logps, tensor["entropy"], None)  # noqa: E731
    self = trainer(kind, run, _get_per_token_logps_and_entropies=said)
    mask, ids = tensor["mask"].long(), torch.zeros(arrays["mask"].shape, dtype=torch.long)
    batch = {
        "prompt_ids": ids, "prompt_mask": ids + 1, "completion_ids": ids, "completion_mask": mask, "advantages": tensor["advantages"],
        "num_items_in_batch": torch.tensor(float(cases.ROLLOUT)), "ref_per_token_logps": tensor["ref"],
    }  # fmt: skip
    if name != "on_policy":
        batch["old_per_token_logps"] = tensor["old"]
    batch["old_logps"] = (tensor["old"] * mask).sum(1)
    loss = self._compute_loss(None, batch)
    loss.backward()
    return float(loss.detach()), logps.grad.numpy(), {key: values[-1] for key, values in self._metrics["train"].items()}


def advantages(name):
    """(advantages, metrics) that TRL makes of a group's rewards."""
    run, rewards = cases.group_config(name), torch.tensor(cases.group_rewards(name))
    count = len(rewards)
    ids = [[1, 2]] * count
    weights = torch.tensor(run.reward_weights or [1.0, 1.0], dtype=torch.float64)
    self = trainer(
        RLOOTrainer if run.objective == "rloo" else GRPOTrainer, run,
        beta=0.0, environment_factories=None, environments=None, tools=None, _tokenizer=SimpleNamespace(pad_token_id=0), eos_token_ids=[2],
        pad_to_multiple_of=None, reward_weights=weights, reward_funcs=[0, 0], reward_func_names=["a", "b"],
        _logs=defaultdict(lambda: defaultdict(list)),
        _pending_extra_logs=defaultdict(list), _pending_metrics=defaultdict(list), log_multimodal=False, log_unique_prompts=False,
        _calculate_rewards=lambda *_: rewards, _is_vlm=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (torch.zeros(count, 2), None, None),
        _generate=lambda prompts: _generated(run.objective, ids, count),
    )  # fmt: skip
    self._logs |= {key: [] for key in ("prompt", "completion", "advantages")}
    self.model.is_gradient_checkpointing, self.model.gradient_checkpointing_disable = False, lambda: None
    out = self._generate_and_score_completions([{"prompt": "a"}] * count)
    return out["advantages"].numpy(), {key: values[-1] for key, values in self._metrics["train"].items()}


def _generated(objective, ids, count):
    texts = ["b"] * count
    return (ids, ids, None, texts, None, {}, None, None) if objective == "grpo" else (ids, ids, texts)
