"""Random answers with random log-probabilities, and every loss on them: the shared input of the goldens, TRL's own code and jaxtune.

An answer's tokens have TRL's layout, `[2n, T]`: n chosen answers, then n rejected ones, padded on the right. The first tokens of each row
are its prompt.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.config import load_config
from jaxtune.data.batch import Answers, Batch
from jaxtune.objectives.answers import sum_answers
from jaxtune.objectives.kto import kto_loss
from jaxtune.objectives.logprobs import TokenLogprobs
from jaxtune.objectives.preference import cpo_loss, dpo_loss, orpo_loss

N, T, PROMPT = 6, 11, 3
DPO = {
    name: {"loss_type": name}
    for name in (
        "sigmoid", "hinge", "ipo", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down",
        "discopop", "sigmoid_norm", "sft",
    )
} | {
    "beta": {"beta": 0.7},
    "exo_pair": {"loss_type": "exo_pair", "label_smoothing": 1e-3},
    "robust_smoothed": {"loss_type": "robust", "label_smoothing": 0.2},
    "aot_smoothed": {"loss_type": "aot", "label_smoothing": 0.1},
    "aot_unpaired_smoothed": {"loss_type": "aot_unpaired", "label_smoothing": 0.1},
    "discopop_tau": {"loss_type": "discopop", "discopop_tau": 0.2},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "ld_alpha": {"ld_alpha": 0.4},
    "ld_alpha_ipo": {"ld_alpha": 0.4, "loss_type": "ipo"},
    "weighting": {"use_weighting": True},
    "weighting_apo": {"use_weighting": True, "loss_type": "apo_zero"},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    "alpha_divergence_one": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
    "js_ipo": {"f_divergence_type": "js_divergence", "loss_type": "ipo"},
}  # fmt: skip
CPO = {
    "cpo_sigmoid": {"objective": "cpo"},
    "cpo_smoothed": {"objective": "cpo", "label_smoothing": 0.1, "cpo_alpha": 0.5},
    "cpo_hinge": {"objective": "cpo", "loss_type": "hinge", "beta": 0.3},
    "cpo_ipo": {"objective": "cpo", "loss_type": "ipo", "cpo_alpha": 0.0},
    "simpo": {"objective": "simpo", "beta": 2.0, "simpo_gamma": 0.9},
    "simpo_nll": {"objective": "simpo", "beta": 2.0, "cpo_alpha": 0.7},
}
ORPO = {"orpo": {"objective": "orpo", "beta": 0.25}}
KTO = {
    "kto": {"objective": "kto"},
    "kto_weights": {"objective": "kto", "beta": 0.5, "desirable_weight": 1.3, "undesirable_weight": 0.7},
    "kto_below_zero": {"objective": "kto", "beta": 0.5},
    "apo_zero_unpaired": {"objective": "kto", "loss_type": "apo_zero_unpaired"},
}
CASES = {name: {"objective": "dpo"} | keys for name, keys in DPO.items()} | CPO | ORPO | KTO


def config(name):
    return load_config({"model": "none"} | CASES[name])


def given(name):
    """float64: `logps`, `collision`, `mean_logits` of tokens `[2n, T]`, `ref` of answers `[2n]`; bool: `mask` of tokens, `labels`."""
    rng = np.random.default_rng(sum(map(ord, name)))
    lengths = rng.integers(1, T - PROMPT + 1, 2 * N)
    lengths[0], lengths[N] = 1, T - PROMPT  # the shortest and the longest possible
    place = np.arange(T)[None]
    mask = (place >= PROMPT) & (place < PROMPT + lengths[:, None])
    logps = -rng.gamma(1.0, 1.5, (2 * N, T)) - 0.02
    ref = (np.where(mask, logps, 0) + mask * rng.normal(0, 0.8, logps.shape)).sum(1)
    if name == "kto_below_zero":
        ref = ref + 2.0
    return {
        "logps": logps, "ref": ref, "mask": mask, "labels": rng.permutation(np.arange(2 * N) % 3 > 0),
        "collision": -rng.gamma(1.0, 1.0, logps.shape), "mean_logits": rng.normal(2.0, 1.0, logps.shape),
        "entropy": rng.gamma(1.0, 1.0, logps.shape), "correct": rng.random(logps.shape) < 0.4,
    }  # fmt: skip


def rows(x, kto=False):
    """`[2n, ...]` in TRL's order as two rows of eight answers in jaxtune's numbering, with four places of the second row empty."""
    if kto:
        order = np.arange(2 * N)
    else:
        order = np.stack([np.arange(N), np.arange(N) + N], 1).reshape(-1)
    return [order[:8], order[8:]]


def ours(name, arrays=None):
    """(mean loss, its gradient to `logps`, metrics) by jaxtune, in float32."""
    run, arrays = config(name), arrays or given(name)
    kto = run.objective == "kto"
    # KTO: own answers have even numbers, the odd ones stand for answers to other prompts
    trained = np.arange(T)[None] < PROMPT + arrays["mask"].sum(1)[:, None]
    places = rows(arrays["logps"], kto)
    numbers, weights, source = np.zeros((2, 8 * T), np.int32), np.zeros((2, 8 * T), np.float32), np.zeros((2, 8 * T), np.int32)
    for row, answers in enumerate(places):
        for number, answer in enumerate(answers, 1):
            where = slice((number - 1) * T, number * T)
            numbers[row, where] = np.where(np.arange(T) >= PROMPT, number, 0)
            told = run.objective == "orpo" and answer < N
            weights[row, where] = trained[answer] & (np.arange(T) > 0) if told else arrays["mask"][answer]
            source[row, where] = answer * T + np.arange(T)

    def by_answer(x, empty=0.0):
        return jnp.asarray(np.stack([np.concatenate([x[answers], np.full(8 - len(answers), empty)]) for answers in places]), jnp.float32)

    def loss(logps):
        ids = jnp.zeros((2, 8 * T), jnp.int32)
        batch = Batch(ids, weights, ids, ids, answers=Answers(jnp.asarray(numbers), by_answer(arrays["labels"])))
        live = jnp.asarray(weights != 0, jnp.float32)
        logp = logps.reshape(-1)[source] * live
        told = ("entropy", "correct", "collision", "mean_logits")
        entropy, correct, collision, mean = (jnp.asarray(arrays[name], jnp.float32).reshape(-1)[source] * live for name in told)
        index = jnp.broadcast_to(jnp.arange(8 * T), ids.shape)
        out = sum_answers(batch, TokenLogprobs(logp, jnp.asarray(weights), entropy, correct, index, collision, mean), run.ld_alpha)
        if run.objective == "orpo":
            made = orpo_loss(run, out)
        elif run.objective == "kto":
            made = kto_loss(run, out, by_answer(arrays["ref"]), batch.answers.values)
        elif run.objective == "dpo":
            made = dpo_loss(run, out, by_answer(arrays["ref"]))
        else:
            made = cpo_loss(run, out)
        return made.total / made.weight, made.metrics

    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(arrays["logps"], jnp.float32))
    return float(value), np.asarray(gradient), {key: float(total / weight) for key, (total, weight) in metrics.items() if weight > 0}
