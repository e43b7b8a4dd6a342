"""Writes tests/goldens/objectives/preference.npz: TRL's value and gradient of every preference loss over random answers.

    python tools/make_preference_goldens.py          needs torch and trl

`CASE/logps`, `CASE/collision`, `CASE/mean_logits`, `CASE/ref`, `CASE/mask`, `CASE/labels` are what the loss was given
(tests/preference_cases.py); `CASE/loss` and `CASE/gradient` (to the tokens' log-probabilities) are what TRL's own trainer made of it, in
float64.
"""

import os
import sys
from pathlib import Path

import numpy as np

TESTS = Path(__file__).parent.parent / "tests"
OUT = TESTS / "goldens" / "objectives" / "preference.npz"

sys.path.insert(0, str(TESTS))
import preference_cases as cases  # noqa: E402
from oracle import trl_losses  # noqa: E402


def main():
    arrays = {}
    for name in cases.CASES:
        given = {key: value.astype(np.float32) if value.dtype == float else value for key, value in cases.given(name).items()}
        exact = {key: value.astype(float) if value.dtype == np.float32 else value for key, value in given.items()}
        loss, gradient, _ = trl_losses.theirs(name, exact)
        arrays |= {f"{name}/{key}": value for key, value in given.items()}
        arrays |= {f"{name}/loss": np.float64(loss), f"{name}/gradient": gradient.astype(np.float32)}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    scratch = OUT.with_name(f".{OUT.name}.{os.getpid()}.npz")
    np.savez_compressed(scratch, **arrays)
    os.replace(scratch, OUT)
    print(f"{OUT}: {len(cases.CASES)} losses, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
