"""Reward functions: TRL's signature, the table, and one clear error for each failure."""

import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from jaxtune.config import load_config
from jaxtune.errors import ConfigError
from jaxtune.rewards import Answers, RewardError, find_rewards, hashes

TEXTS = ["it is 7", "<think>so</think>8", "nine 9"]
ANSWERS = Answers(
    prompts=["a", "a", "b"], completions=TEXTS, texts=TEXTS, completion_ids=[[1] * 5, [1] * 9, [1] * 10],
    columns={"answer": ["7", "7", "9"], "level": [1, 1, 2]}, step=4, max_steps=9,
)  # fmt: skip


def config(**keys):
    return load_config({"model": "none", "objective": "grpo", "max_completion_length": 10} | keys)


def judged(spec, **keys):
    """What one reward returns: given by name, or as a function."""
    names = {"reward_funcs": [spec]} if isinstance(spec, str) else {}
    (reward,) = find_rewards(config(**names, **keys), () if isinstance(spec, str) else [spec])
    told: dict = {}
    return reward.judge(ANSWERS, told, {}).tolist(), told


@pytest.mark.parametrize(
    ("name", "keys", "want"),
    [
        ("numeric_match", {}, [1, 0, 1]),
        ("exact_match", {"reward_column": "level"}, [0, 0, 0]),
        ("format", {"reward_pattern": r"\w+ .*"}, [1, 0, 1]),
        ("think_format_reward", {}, [0, 1, 0]),
        ("soft_overlong_punishment", {}, [0, -0.5, -1]),
    ],
)
def test_the_table(name, keys, want):
    assert judged(name, **keys)[0] == want


def test_a_function_gets_what_it_asks_for_and_may_tell_more():
    def by_level(level, trainer_state, log_metric):
        log_metric("levels", sum(level))
        return [x + trainer_state.global_step / trainer_state.max_steps for x in level]

    def everything(prompts, completions, completion_ids, **kwargs):
        assert kwargs.keys() >= {"answer", "level", "trainer_state", "log_extra"}
        return [len(ids) if prompt == "a" else None for prompt, ids in zip(prompts, completion_ids, strict=True)]

    async def later(completions, **kwargs):
        return [float(len(text)) for text in completions]

    assert judged(by_level) == ([1 + 4 / 9, 1 + 4 / 9, 2 + 4 / 9], {"levels": [4.0]})
    values, _ = judged(everything)
    assert values[:2] == [5, 9] and math.isnan(values[2])
    assert judged(later)[0] == [len(text) for text in TEXTS]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return [1.0, 2.0]", "bad must return a list with one number, or None, for each of the 3 answers; it returned 2"),
        ("return 1.0", "it returned float"),
        ("return [1.0, float('nan'), 2.0]", r"entry 1 is nan \(return None for an answer that it cannot score\)"),
        ("return ['x', 1, 2]", "entry 0 is 'x'"),
        ("return [1 / 0]", r"the reward function bad failed at step 4: ZeroDivisionError: division by zero, at line 2 of .*mine.py"),
    ],
)
def test_what_goes_wrong_is_said_with_the_functions_name(tmp_path, body, said):
    (tmp_path / "mine.py").write_text(f"def bad(completions, **kwargs):\n    {body}\n")
    with pytest.raises(RewardError, match=said):
        judged(f"{tmp_path / 'mine.py'}:bad")
    assert list(hashes(config(reward_funcs=[f"{tmp_path / 'mine.py'}:bad"]))) == [str(tmp_path / "mine.py")]


def test_a_column_that_the_rows_have_not():
    def f(completions, solution):
        return []

    with pytest.raises(RewardError, match="f asks for 'solution', which the rows lack; there are answer, level, prompts"):
        judged(f)
    with pytest.raises(ConfigError, match="the column 'solution', which the rows lack; they have answer, level"):
        judged("exact_match", reward_column="solution")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "needs a reward, and none is named; write reward_funcs: one of exact_match"),
        ({"reward_funcs": ["exact"]}, "reward_funcs: exact is not known; write one of exact_match"),
        ({"reward_funcs": ["f1", "f1"]}, "two rewards named f1"),
        ({"reward_funcs": ["no/file.py:f"]}, "there is no file no/file.py"),
        ({"reward_funcs": ["format"]}, "format needs reward_pattern"),
        ({"reward_funcs": ["f1"], "reward_weights": [1, 2]}, "reward_weights has 2 numbers for 1 rewards"),
    ],
)
def test_what_may_not_be_named(keys, said):
    with pytest.raises(ConfigError, match=said):
        find_rewards(config(**keys))


def test_weights_and_names():
    found = find_rewards(config(reward_funcs=["f1", "exact_match"], reward_weights=[0.5, 2]))
    assert [(reward.name, reward.weight) for reward in found] == [("f1", 0.5), ("exact_match", 2.0)]
    assert np.isfinite(found[0].judge(ANSWERS, {}, {})).all()


def test_the_config_of_the_guide():
    """The config shown for gsm8k is valid, and what the shipped one names exists."""
    root = Path(__file__).parent.parent
    shown = (root / "docs" / "rlhf.md").read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    (found,) = find_rewards(load_config(yaml.safe_load(shown)))
    gsm8k = ANSWERS._replace(columns={"answer": ["3 + 4 is 7\n#### 7", "#### 8", "#### 10"]})
    assert found.name == "numeric_match" and found.judge(gsm8k, {}, {}).tolist() == [1, 1, 0]
    own = load_config(root / "configs" / "grpo.yaml")
    assert find_rewards(own) and all((root / source.path).is_file() for source in (*own.data.train, *own.data.eval))
