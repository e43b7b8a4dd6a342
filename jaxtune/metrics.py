"""Task metrics: pure functions of answers and references, and how a metric is found by name.

A metric takes `(predictions, references, rows)`, lists of the same length (answers, the data's own answers, the data's rows as dicts), and
returns one number for each. Means and confidence intervals are computed from these numbers, so your own metric needs nothing else:

    metric: exact_match                    # one of METRICS
    metric: mypackage.judges.same_sql      # a function in an importable module
    metric: judges/cron.py:cron_match      # a function in a file
"""

import inspect
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal

import numpy as np

from jaxtune import functions
from jaxtune.errors import ConfigError, DataError

Metric = Callable[[list[str], list[str], list[dict]], Sequence[float]]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# a sign counts unless it follows a digit ("5-10"); commas count between groups of three digits
_NUMBER = re.compile(r"(?:(?<![\d)])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
# "the answer is B" | "(b)" | "B) ..." | "b" alone
_CHOICE = re.compile(r"(?i:\b(?:answer|choice|option)(?:\s+is)?)\s*:?\s*\(?([A-Z])\b|\(([A-Za-z])\)|^\W*([A-Z])[).:]|^\W*([A-Za-z])\W*$")


# ---- one answer against one reference ----


def normalise(text: str) -> str:
    """Lower case, without punctuation and English articles, with single spaces: SQuAD's rule (arXiv 1606.05250, the official script)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def f1_of_tokens(prediction: str, reference: str) -> float:
    """`2PR / (P + R)` over the common words after `normalise`, counted with repetition (SQuAD's F1)."""
    ours, theirs = normalise(prediction).split(), normalise(reference).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = (Counter(ours) & Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs))


def rouge_l_of(prediction: str, reference: str) -> float:
    """ROUGE-L: `2PR / (P + R)` with P, R = longest common subsequence / words of the prediction, the reference.

    Words are runs of a-z and 0-9 in lower case, unstemmed, as in the rouge_score package (Lin 2004, beta = 1).
    """
    ours, theirs = (re.findall(r"[a-z0-9]+", text.lower()) for text in (prediction, reference))
    if not ours or not theirs:
        return float(ours == theirs)
    best = [0] * (len(theirs) + 1)  # best[j]: longest common subsequence of the words so far and theirs[:j]
    for word in ours:
        diagonal = 0
        for j, other in enumerate(theirs, 1):
            diagonal, best[j] = best[j], diagonal + 1 if word == other else max(best[j], best[j - 1])
    return 2 * best[-1] / (len(ours) + len(theirs))


def final_number(text: str) -> Decimal | None:
    """The number after the last `####` (gsm8k's marker), or else the last number in the text; None if there is none."""
    marked = text.rpartition("####")[2] if "####" in text else None
    found = _NUMBER.findall(text if marked is None else marked)
    if not found:
        return None
    return Decimal((found[-1] if marked is None else found[0]).replace(",", ""))


def chosen_letter(text: str) -> str | None:
    """The letter of a multiple-choice answer: `B`, `(b)`, `B) because ...`, `The answer is B.`; None if there is none."""
    match = _CHOICE.search(text)
    return next(letter for letter in match.groups() if letter).upper() if match else None


# ---- metrics: (predictions, references, rows) -> one number each ----


def exact_match(predictions: list[str], references: list[str], rows: list[dict]) -> list[float]:
    """1.0 if the answer equals the reference, ignoring white space at the ends."""
    return [float(p.strip() == r.strip()) for p, r in zip(predictions, references, strict=True)]


def normalised_match(predictions: list[str], references: list[str], rows: list[dict]) -> list[float]:
    """1.0 if answer and reference are equal after `normalise`."""
    return [float(normalise(p) == normalise(r)) for p, r in zip(predictions, references, strict=True)]


def f1(predictions: list[str], references: list[str], rows: list[dict]) -> list[float]:
    """`f1_of_tokens` of each pair."""
    return [f1_of_tokens(p, r) for p, r in zip(predictions, references, strict=True)]


def rouge_l(predictions: list[str], references: list[str], rows: list[dict]) -> list[float]:
    """`rouge_l_of` of each pair."""
    return [rouge_l_of(p, r) for p, r in zip(predictions, references, strict=True)]


def numeric_match(predictions: list[str], references: list[str], rows: list[dict]) -> list[float]:
    """1.0 if both texts end in the same number (`final_number`): gsm8k's score."""
    pairs = [(final_number(p), final_number(r)) for p, r in zip(predictions, references, strict=True)]
    if any(wanted is None for _, wanted in pairs):
        index = next(i for i, (_, wanted) in enumerate(pairs) if wanted is None)
        raise DataError(f"numeric_match: the reference {references[index]!r} holds no number; use another metric, or put the rows right")
    return [float(given is not None and given == wanted) for given, wanted in pairs]


def multiple_choice(predictions: list[str], references: list[str], rows: list[dict]) -> list[float]:
    """1.0 if both texts choose the same letter (`chosen_letter`)."""
    pairs = [(chosen_letter(p), chosen_letter(r)) for p, r in zip(predictions, references, strict=True)]
    if any(wanted is None for _, wanted in pairs):
        index = next(i for i, (_, wanted) in enumerate(pairs) if wanted is None)
        raise DataError(f"multiple_choice: the reference {references[index]!r} names no letter; use another metric, or put the rows right")
    return [float(given == wanted) for given, wanted in pairs]


METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "normalised_match": normalised_match,
    "f1": f1,
    "rouge_l": rouge_l,
    "numeric_match": numeric_match,
    "multiple_choice": multiple_choice,
}


# ---- numbers from numbers ----


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The probability that k of n samples, chosen without replacement, include a correct one: `1 - C(n - c, k) / C(n, k)` (arXiv 2107.03374
    eq. 1).

    Raises ValueError unless 0 <= correct <= n and 1 <= k <= n.
    """
    if not (0 <= correct <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {n} samples, {correct} of them right, means nothing: 0 <= correct <= n and 1 <= k <= n")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def perplexity(nll: float, weight: float) -> float:
    """`exp(nll / weight)` for a sum of negative log-likelihoods (nats) and its weight; inf on overflow."""
    try:
        return math.exp(nll / weight)
    except OverflowError:
        return math.inf


def bootstrap(scores: Sequence[float], confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `scores` (Efron 1979): resampled with replacement, seeded and hence reproducible.

    For paired differences it is the interval of the change.
    """
    values = np.asarray(scores, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"bootstrap takes a list of one or more numbers, not shape {values.shape}")
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


# ---- the hook ----


def find_all(specs: Iterable[str | Metric]) -> dict[str, Metric]:
    """`{name: function}` of several metrics. Raises ConfigError if two share a name, or if one does not take three lists."""
    found: dict[str, Metric] = {}
    for spec in specs:
        name, function = find(spec)
        if not _takes_three(function):
            takes = inspect.signature(function)
            raise ConfigError(f"metric {spec} has to take (predictions, references, rows), three lists, and takes {takes}")
        if name in found:
            raise ConfigError(f"metric {spec}: there are two metrics named {name}; rename the function, or leave one out")
        found[name] = function
    return found


def _takes_three(function: Metric) -> bool:
    try:
        inspect.signature(function).bind([], [], [])
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        return True
    return True


def find(spec: str | Metric) -> tuple[str, Metric]:
    """The metric that `spec` names, and its short name: one of METRICS, `module.function`, or `path/file.py:function`.

    The named module or file is the user's own code and is executed. A function is returned as it is. Raises ConfigError if there is none.
    """
    return functions.find(METRICS, spec, "metric")


def score(spec: str | Metric, predictions: list[str], references: list[str], rows: list[dict]) -> list[float]:
    """A metric's number for each answer. Raises ConfigError if it does not return one number per answer."""
    name, metric = find(spec)
    given = (list(predictions), list(references), list(rows))
    scores = metric(*given) if name in METRICS else functions.call(f"metric {name}", metric, *given)
    try:
        values = np.asarray(list(scores), np.float64)
    except (TypeError, ValueError):
        values = np.empty((0, 0))
    if values.shape != (len(predictions),):
        given = f"{len(scores)} values" if hasattr(scores, "__len__") else type(scores).__name__
        raise ConfigError(f"metric {name} must return one number for each of the {len(predictions)} answers, and returned {given}")
    return [float(value) for value in values]
