"""TRL's PPO over tests/ppo_cases.py, in float64: transcribed, since TRL 1.16 has none any more.

The loss, rewards, whitening and advantages are those of `PPOTrainer.train` in trl 1.0.0 (trl/experimental/ppo/ppo_trainer.py), with its
names. There the score of an answer that is shorter than the longest stands one place behind its last token, and the value of the ended text
is one more; here it stands at the last token, as in trl 0.11 (`PPOTrainer.compute_rewards`) and, for an answer of full length, in 1.0 too.
"""

import ppo_cases as cases
import torch


def masked_mean(values, mask):
    return (values * mask).sum() / mask.sum()


def masked_whiten(values, mask, shift_mean=True):
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask) * mask.sum() / (mask.sum() - 1)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return whitened if shift_mean else whitened + mean


def theirs(name, arrays=None):
    """(loss, its gradient to `logps` and `vpred`, metrics)."""
    args, arrays = cases.config(name), arrays or cases.given(name)
    tensors = {key: torch.tensor(value) for key, value in arrays.items()}
    mb_logprobs, mb_values, mb_advantage, mb_return = (tensors[key] for key in ("old", "values", "advantages", "returns"))
    new_logprobs, vpred = tensors["logps"].requires_grad_(), tensors["vpred"].requires_grad_()
    mask = tensors["mask"]
    vpredclipped = torch.clamp(vpred, mb_values - args.cliprange_value, mb_values + args.cliprange_value)
    vf_losses1 = torch.square(vpred - mb_return)
    vf_losses2 = torch.square(vpredclipped - mb_return)
    vf_loss = 0.5 * masked_mean(torch.max(vf_losses1, vf_losses2), mask)
    vf_clipfrac = masked_mean((vf_losses2 > vf_losses1).double(), mask)
    logprobs_diff = new_logprobs - mb_logprobs
    ratio = torch.exp(logprobs_diff)
    pg_losses = -mb_advantage * ratio
    pg_losses2 = -mb_advantage * torch.clamp(ratio, 1.0 - args.cliprange, 1.0 + args.cliprange)
    pg_loss = masked_mean(torch.max(pg_losses, pg_losses2), mask)
    loss = pg_loss + args.vf_coef * vf_loss
    loss.backward()
    metrics = {
        "loss/policy_avg": pg_loss, "loss/value_avg": vf_loss, "val/clipfrac_avg": vf_clipfrac, "val/ratio": masked_mean(ratio, mask),
        "policy/clipfrac_avg": masked_mean((pg_losses2 > pg_losses).double(), mask),
        "policy/approxkl_avg": 0.5 * masked_mean(logprobs_diff**2, mask), "policy/entropy_avg": masked_mean(tensors["entropy"], mask),
    }  # fmt: skip
    gradient = torch.stack([new_logprobs.grad, vpred.grad]).numpy()
    return float(loss.detach()), gradient, {key: float(value.detach()) for key, value in metrics.items()}


def advantages(name):
    """(advantages, returns, metrics)."""
    args, arrays = cases.config(name), {key: torch.tensor(value) for key, value in cases.given(name).items()}
    scores, padding_mask = arrays["scores"], ~arrays["mask"]
    logprobs, ref_logprobs, values = (torch.masked_fill(arrays[key], padding_mask, 0.0) for key in ("old", "ref", "values"))
    logr = ref_logprobs - logprobs
    kl = -logr if args.kl_estimator == "k1" else (logr.exp() - 1) - logr
    non_score_reward = -args.kl_coef * kl
    rewards = non_score_reward.clone()
    rewards[torch.arange(rewards.size(0)), arrays["mask"].sum(1) - 1] += scores
    if args.whiten_rewards:
        rewards = masked_whiten(rewards, mask=~padding_mask, shift_mean=False)
        rewards = torch.masked_fill(rewards, padding_mask, 0)
    lastgaelam, advantages_reversed, gen_length = 0, [], rewards.shape[1]
    for t in reversed(range(gen_length)):
        nextvalues = values[:, t + 1] if t < gen_length - 1 else 0.0
        delta = rewards[:, t] + args.gamma * nextvalues - values[:, t]
        lastgaelam = delta + args.gamma * args.lam * lastgaelam
        advantages_reversed.append(lastgaelam)
    found = torch.stack(advantages_reversed[::-1], dim=1)
    returns = found + values
    found = torch.masked_fill(masked_whiten(found, ~padding_mask), padding_mask, 0)
    metrics = {
        "objective/kl": kl.sum(1).mean(), "objective/entropy": (-logprobs).sum(1).mean(), "objective/scores": scores.mean(),
        "objective/non_score_reward": non_score_reward.sum(1).mean(),
        "objective/rlhf_reward": non_score_reward.sum(1).mean() + scores.mean(),
    }  # fmt: skip
    return found.numpy(), returns.numpy(), {key: float(value) for key, value in metrics.items()}
