"""Writes tests/goldens/objectives/: TRL's value and gradient of every preference, reward and policy loss over random answers.

    python tools/make_preference_goldens.py          needs torch and trl

preference.npz: `CASE/logps`, `CASE/collision`, `CASE/mean_logits`, `CASE/entropy`, `CASE/correct`, `CASE/ref`, `CASE/mask`, `CASE/labels`
are what the loss was given (tests/preference_cases.py); `CASE/loss` and `CASE/gradient` (to the tokens' log-probabilities) are what TRL's
own trainer made of it, in float64. reward.npz: `CASE/scores` and `CASE/said` (tests/reward_cases.py), and loss and gradient to the
scores. policy.npz: `CASE/logps`, `CASE/old`, `CASE/ref`, `CASE/entropy`, `CASE/advantages`, `CASE/mask` (tests/policy_cases.py), and loss
and gradient to `logps`. ppo.npz: what tests/ppo_cases.py gives, and loss and gradient to `logps` and `vpred`.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np

TESTS = Path(__file__).parent.parent / "tests"
OUT = TESTS / "goldens" / "objectives"

sys.path.insert(0, str(TESTS))
import policy_cases  # noqa: E402
import ppo_cases  # noqa: E402
import preference_cases  # noqa: E402
import reward_cases  # noqa: E402
from oracle import trl_losses, trl_policy, trl_ppo, trl_rewards  # noqa: E402


def write(name, cases, theirs):
    """One file: each case's arrays, and what the reference makes of them."""
    arrays = {}
    for case in cases.CASES:
        given = {key: value.astype(np.float32) if value.dtype == float else value for key, value in cases.given(case).items()}
        exact = {key: value.astype(float) if value.dtype == np.float32 else value for key, value in given.items()}
        loss, gradient, _ = theirs(case, exact)
        arrays |= {f"{case}/{key}": value for key, value in given.items()}
        arrays |= {f"{case}/loss": np.float64(loss), f"{case}/gradient": gradient.astype(np.float32)}
    OUT.mkdir(parents=True, exist_ok=True)
    scratch = OUT / f".{name}.{os.getpid()}.npz"
    np.savez_compressed(scratch, **arrays)
    os.replace(scratch, OUT / f"{name}.npz")
    print(f"{OUT / name}.npz: {len(cases.CASES)} losses, {(OUT / f'{name}.npz').stat().st_size} bytes")


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    write("preference", preference_cases, trl_losses.theirs)
    write("reward", reward_cases, trl_rewards.theirs)
    write("policy", policy_cases, trl_policy.theirs)
    write("ppo", ppo_cases, trl_ppo.theirs)


if __name__ == "__main__":
    main()
