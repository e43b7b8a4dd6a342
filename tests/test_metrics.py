"""Metrics against values computed by hand, and the hook with a user's own function."""

import math
import random
from decimal import Decimal

import pytest

from jaxtune import metrics
from jaxtune.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("name", "prediction", "reference", "wanted"),
    [
        ("exact_match", " 5 4 * * *\n", "5 4 * * *", 1),
        ("exact_match", "Paris.", "Paris", 0),
        ("normalised_match", "The  cat, a dog!", "cat dog", 1),
        ("normalised_match", "cats", "cat", 0),
        ("f1", "the cat sat", "cat sat down", 2 * (2 / 2) * (2 / 3) / (2 / 2 + 2 / 3)),  # "the" is dropped: P = 2/2, R = 2/3
        ("f1", "no no no", "no", 2 * (1 / 3) * 1 / (1 / 3 + 1)),
        ("f1", "", "", 1),
        ("f1", "", "cat", 0),
        ("rouge_l", "police kill the gunman", "police killed the gunman", 3 / 4),  # Lin 2004, section 3.1
        ("rouge_l", "the gunman kill police", "police killed the gunman", 2 / 4),
        ("rouge_l", "a b", "a x b y", 2 * 1 * 0.5 / 1.5),
        ("numeric_match", "So it costs $1,234.50 in all.", "12 x ...\n#### 1234.5", 1),
        ("numeric_match", "16 - 3 = 13", "#### 13", 1),
        ("numeric_match", "#### 13 or 14", "#### 13", 1),
        ("numeric_match", "no idea", "#### 13", 0),
        ("numeric_match", "13", "#### -13", 0),
        ("multiple_choice", "The answer is (b).", "B", 1),
        ("multiple_choice", "C) because of the rain", "c", 1),
        ("multiple_choice", "A man walks in", "A", 0),
    ],
)
def test_one_pair(name, prediction, reference, wanted):
    assert metrics.score(name, [prediction], [reference], [{}]) == pytest.approx([wanted])


def test_every_metric_gives_one_for_the_reference_itself_and_is_at_most_one():
    references = ["B) the 2nd of 3 quick foxes, 14", "#### 5 (A)", "answer: C, 7 apples"]
    for name in metrics.METRICS:
        assert metrics.score(name, references, references, [{}] * 3) == [1, 1, 1], name
        assert all(0 <= value < 1 for value in metrics.score(name, ["nothing"] * 3, references, [{}] * 3)), name


@pytest.mark.parametrize(
    ("text", "number"),
    [("1,234,567", 1234567), ("1,2,3", 3), ("5-10", 10), ("x = -5", -5), (".5", Decimal("0.5")), ("3.", 3), ("none", None)],
)
def test_final_number(text, number):
    assert metrics.final_number(text) == number


def test_a_reference_that_cannot_be_scored_is_an_error_that_shows_it():
    with pytest.raises(DataError, match="'many' holds no number"):
        metrics.score("numeric_match", ["5", "6"], ["5", "many"], [{}, {}])
    with pytest.raises(DataError, match="'42' names no letter"):
        metrics.score("multiple_choice", ["A"], ["42"], [{}])


def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_sample():
    assert metrics.pass_at_k(10, 0, 3) == 0
    assert metrics.pass_at_k(10, 10, 1) == 1
    assert metrics.pass_at_k(5, 2, 1) == pytest.approx(2 / 5)
    rng, right = random.Random(0), [True] * 3 + [False] * 9
    drawn = sum(any(rng.sample(right, 4)) for _ in range(20000)) / 20000
    assert metrics.pass_at_k(12, 3, 4) == pytest.approx(drawn, abs=0.015)
    for n, c, k in ((3, 4, 1), (3, 1, 4), (3, 1, 0)):
        with pytest.raises(ValueError, match="means nothing"):
            metrics.pass_at_k(n, c, k)


def test_perplexity_of_a_uniform_guess_is_the_number_of_choices():
    assert metrics.perplexity(7 * math.log(50), 7) == pytest.approx(50)
    assert metrics.perplexity(1e6, 1) == math.inf


def test_bootstrap_covers_as_often_as_it_says_and_repeats():
    rng, hits = random.Random(1), 0
    for trial in range(200):
        low, high = metrics.bootstrap([float(rng.random() < 0.3) for _ in range(80)], resamples=400, seed=trial)
        hits += low <= 0.3 <= high
    assert 0.89 <= hits / 200 <= 0.99
    assert metrics.bootstrap([1, 0, 1]) == metrics.bootstrap([1, 0, 1])
    assert metrics.bootstrap([2.0, 2.0]) == (2, 2)
    with pytest.raises(ValueError, match="one or more"):
        metrics.bootstrap([])


OWN = """
from dataclasses import dataclass

@dataclass
class Judge:
    field: "str"

def longer(predictions, references, rows):
    return [len(p) > len(row["limit"]) for p, row in zip(predictions, rows)]

def mean(predictions, references, rows):
    return 0.5

short = lambda predictions, references, rows: [1.0]

def fails(predictions, references, rows):
    return [1 / len(p) - row["weight"] for p, row in zip(predictions, rows)]

def two(predictions, references):
    return [1.0] * len(predictions)
"""


def test_a_function_of_a_file_and_of_a_module(tmp_path, monkeypatch):
    (tmp_path / "own_judge_9.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    for spec in (f"{tmp_path}/own_judge_9.py:longer", "own_judge_9.longer"):
        assert metrics.find(spec)[0] == "longer"
        assert metrics.score(spec, ["abc", "a"], ["", ""], [{"limit": "ab"}, {"limit": "ab"}]) == [1, 0]


def test_functions_stand_for_themselves_and_names_are_told_apart(tmp_path):
    def f1(predictions, references, rows):
        return [2.0] * len(rows)

    assert metrics.score(f1, ["a"], ["b"], [{}]) == [2]
    assert list(metrics.find_all(["exact_match", f1])) == ["exact_match", "f1"]
    with pytest.raises(ConfigError, match="two metrics named f1"):
        metrics.find_all(["f1", f1])


def test_a_hook_that_cannot_work_says_why(tmp_path):
    path = tmp_path / "judge.py"
    path.write_text(OWN)
    for spec, words in {
        "exact": "exact is not known; write one of exact_match",
        "no_such_module.f": "No module named 'no_such_module'",
        "json.no_such": "json has no function no_such",
        f"{path}:no_such": "has no function no_such",
        f"{tmp_path}/none.py:f": "there is no file",
        f"{path}:mean": "and returned float",
        f"{path}:short": "each of the 2 answers, and returned 1 values",
        f"{path}:fails": r"metric fails failed: KeyError: 'weight', at line 17 of .*judge.py",
    }.items():
        with pytest.raises(ConfigError, match=words):
            metrics.score(spec, ["a", "b"], ["a", "b"], [{}, {}])
    with pytest.raises(ConfigError, match=r"three lists, and takes \(predictions, references\)"):
        metrics.find_all([f"{path}:two"])
    path.write_text("import (")
    with pytest.raises(ConfigError, match="SyntaxError"):
        metrics.find(f"{path}:mean")
