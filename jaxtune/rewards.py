"""Rewards for sampled answers: built-in functions, the user's own functions, and reward models.

A reward function has TRL's signature: `f(prompts, completions, completion_ids, **columns) -> list of float or None`. All lists have one
entry per answer; None means that the function does not score this answer. Prompts are as in the rows; completions are texts or, if prompts
are messages, `[{"role": "assistant", "content": text}]`. The function is called with the arguments it names, or all of them if it takes
`**kwargs`: the columns of the rows, `trainer_state` (`global_step`, `max_steps`), `log_metric(name, value)`, `log_extra(column, values)`.

    reward_funcs: [numeric_match, rewards/mine.py:brief, mypackage.judges.same_sql]

Naming a file or module is consent to run it: it is the user's own code, with the user's own permissions.
"""

import asyncio
import functools
import inspect
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from jaxtune import functions, metrics
from jaxtune.config import Config
from jaxtune.convert.heads import load_scorer
from jaxtune.errors import ConfigError, JaxtuneError
from jaxtune.score import score


class RewardError(JaxtuneError):
    """A reward function that fails, or does not return one number or None per answer."""


class Answers(NamedTuple):
    """What rewards score: lists of the same length, with the answers to a prompt next to each other."""

    prompts: list[Any]
    completions: list[Any]
    texts: list[str]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]]
    step: int
    max_steps: int


class Reward(NamedTuple):
    """A reward: its name in the log, its weight, and its function of answers (float64 `[answers]`, NaN: no score)."""

    name: str
    weight: float
    judge: Callable[[Answers, dict[str, list[float]], dict[str, list]], np.ndarray]


# ---- the table ----


def _by_metric(metric: metrics.Metric, config: Config, answers: Answers) -> list[float]:
    """A metric that compares the answers with the rows' `reward_column`."""
    column = config.reward_column
    if column not in answers.columns:
        raise ConfigError(
            f"the rewards compare answers with the column {column!r}, which the rows lack; they have "
            f"{', '.join(answers.columns) or 'no columns but prompt'}; name one with reward_column"
        )
    references = answers.columns[column]
    if missing := [number for number, reference in enumerate(references) if reference is None]:
        raise ConfigError(f"a row has nothing under {column!r}, which answers are compared with; its prompt is "
                          f"{str(answers.prompts[missing[0]])[:80]!r}")  # fmt: skip
    rows = [{name: values[number] for name, values in answers.columns.items()} for number in range(len(references))]
    return list(metric(answers.texts, [str(reference) for reference in references], rows))


def _format(config: Config, answers: Answers) -> list[float]:
    """1 if the whole answer matches `reward_pattern` (a regular expression; `.` also matches a newline)."""
    pattern = re.compile(config.reward_pattern or "", re.DOTALL)
    return [float(pattern.fullmatch(text.strip()) is not None) for text in answers.texts]


def _think_format(config: Config, answers: Answers) -> list[float]:
    """1 if the answer begins with reasoning between <think> and </think> and has no second <think>: TRL's reward of that name."""
    pattern = re.compile(r"<think>(?!.*<think>).*?</think>", re.DOTALL)
    return [float(pattern.match(text) is not None) for text in answers.texts]


def _soft_overlong(config: Config, answers: Answers) -> list[float]:
    """0 up to 4/5 of `max_completion_length` tokens, then falling to -1 at its end (DAPO's soft punishment, arXiv 2503.14476 eq. 13)."""
    most = config.max_completion_length
    assert most is not None  # set for these objectives
    slack = most / 5
    return [min(0.0, (most - slack - len(ids)) / slack) for ids in answers.completion_ids]


REWARDS: dict[str, Callable[[Config, Answers], list[float]]] = {
    name: functools.partial(_by_metric, metric) for name, metric in metrics.METRICS.items()
} | {"format": _format, "think_format_reward": _think_format, "soft_overlong_punishment": _soft_overlong}


# ---- finding them ----


def find_rewards(config: Config, own: Sequence[Callable] = ()) -> list[Reward]:
    """The rewards that a config names, then the given functions, then the reward models. ConfigError if there are none."""
    found: list[tuple[str, Callable]] = []
    for spec in (*config.reward_funcs, *own):
        name, function = functions.find(REWARDS, spec, "reward_funcs:")
        if isinstance(spec, str) and spec in REWARDS:
            found.append((name, _of_table(name, functools.partial(function, config))))
        else:
            found.append((name, functools.partial(_of_user, name, function)))
    found += [(Path(place).name or place, _of_model(place)) for place in config.reward_model]
    if not found:
        raise ConfigError(
            f"objective {config.objective} needs a reward, and none is named; write reward_funcs: one of {', '.join(REWARDS)}, or "
            "your own path/file.py:function; or reward_model: FOLDER"
        )
    names = [name for name, _ in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"there are two rewards named {twice[0]}; rename a function, or leave one out")
    weights = config.reward_weights or (1.0,) * len(found)
    if len(weights) != len(found):
        raise ConfigError(f"reward_weights has {len(weights)} numbers for {len(found)} rewards ({', '.join(names)}); write one for each.")
    return [Reward(name, weight, judge) for (name, judge), weight in zip(found, weights, strict=True)]


def hashes(config: Config) -> dict[str, str]:
    """sha256 of the files that define rewards and `loss_function`, for run.json."""
    return functions.hashes((*config.reward_funcs, config.loss_function or ""))


def _of_table(name: str, function: Callable[[Answers], list[float]]) -> Callable:
    return lambda answers, logged, extra: _numbers(name, function(answers), len(answers.texts))


def _of_model(place: str) -> Callable:
    model = load_scorer(place)
    if model.config.num_labels > 1 or model.config.labels_of == "token":
        raise ConfigError(f"reward_model {place} has {model.config.num_labels} labels, which do not rate an answer; it needs 1")

    def judge(answers: Answers, logged: dict, extra: dict) -> np.ndarray:
        return np.asarray(score(model, list(zip(answers.prompts, answers.texts, strict=True))), np.float64)

    return judge


def _of_user(name: str, function: Callable, answers: Answers, logged: dict[str, list[float]], extra: dict[str, list]) -> np.ndarray:
    given = answers.columns | {
        "prompts": answers.prompts,
        "completions": answers.completions,
        "completion_ids": answers.completion_ids,
        "trainer_state": SimpleNamespace(global_step=answers.step, max_steps=answers.max_steps),
        "log_metric": lambda key, value: logged.setdefault(key, []).append(float(value)),
        "log_extra": lambda key, values: extra.setdefault(key, []).extend(values),
    }
    try:
        out = function(**_wanted(name, function, given))
        out = asyncio.run(_awaited(out)) if inspect.isawaitable(out) else out
    except JaxtuneError:
        raise
    except Exception as error:  # a user's function may raise anything
        said = functions.failure(function, error)
        raise RewardError(f"the reward function {name} failed at step {answers.step}: {said}") from error
    return _numbers(name, out, len(answers.texts))


async def _awaited(value: Any) -> Any:
    return await value


def _wanted(name: str, function: Callable, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a function takes."""
    parameters = inspect.signature(function).parameters.values()
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return given
    named = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    if missing := [one.name for one in named if one.default is one.empty and one.name not in given]:
        columns = [key for key in given if key not in ("trainer_state", "log_metric", "log_extra")]
        raise RewardError(f"the reward function {name} asks for {missing[0]!r}, which the rows lack; there are {', '.join(columns)}")
    return {one.name: given[one.name] for one in named if one.name in given}


def _numbers(name: str, out: Any, count: int) -> np.ndarray:
    """Rewards as float64, with None as NaN; a non-number, or a wrong count, is an error of the function."""
    must = f"the reward function {name} must return a list with one number, or None, for each of the {count} answers"
    if isinstance(out, (str, bytes, dict)) or not hasattr(out, "__iter__"):
        raise RewardError(f"{must}; it returned {type(out).__name__}")
    values = list(out)
    if len(values) != count:
        raise RewardError(f"{must}; it returned {len(values)}")
    for number, value in enumerate(values):
        try:
            sound = value is None or math.isfinite(value)
        except TypeError:
            sound = False
        if not sound:
            raise RewardError(f"{must}; entry {number} is {value!r} (return None for an answer that it cannot score)")
    return np.array([math.nan if value is None else float(value) for value in values], np.float64)
