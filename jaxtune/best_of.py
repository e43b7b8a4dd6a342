"""Best-of-n: sample several answers to each prompt and keep the one that a reward model or function scores highest."""

import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune import functions, metrics
from jaxtune.convert.heads import load_scorer
from jaxtune.errors import ConfigError
from jaxtune.generate import Completion, generate_tokens
from jaxtune.generation.prompts import is_one_prompt
from jaxtune.score import score


class Best(NamedTuple):
    """The best answer to one prompt: its text and score, and all answers with their scores, in the order they were sampled."""

    prompt: Any
    text: str
    score: float
    answers: list[Completion]
    scores: list[float]

    @property
    def answer(self) -> Completion:
        """The best answer, with its tokens."""
        return self.answers[self.scores.index(self.score)]


def best_of_n(
    model: Any,
    prompts: Any,
    n: int,
    reward: Any,
    adapter: Any = None,
    *,
    temperature: float = 1.0,
    chat: bool | None = None,
    **settings: Any,
) -> list[Best]:
    """`argmax_y r(x, y)` over n answers y sampled for each prompt x (arXiv 2009.01325), in the order of the prompts.

    prompts   one or a list of texts or conversations, as for `jt.generate`
    reward    a model with a scoring head, anything `jt.load_scorer` accepts, or a function `(prompts, completions) -> numbers` (called with
              these keywords, like TRL's reward functions), also by name: `module.function` or `path/file.py:function`
    settings  passed to `jt.generate_tokens`: max_new_tokens, top_p, seed, ...

    Ties go to the answer sampled first. Raises ConfigError for prompts given as token ids and for a function that does not return one
    finite number per answer, and whatever `jt.generate_tokens` and `jt.score` raise.
    """
    if n < 1:
        raise ConfigError(f"best of {n} chooses from no answers; write 1 or more")
    prompts = [prompts] if is_one_prompt(prompts) else list(prompts)
    if any(not isinstance(prompt, str) and not isinstance(prompt[0], Mapping) for prompt in prompts):
        raise ConfigError("a prompt of token ids has no text that a reward could read; give texts or conversations")
    judge = find_reward(reward)
    if n > 1:
        settings["num_return_sequences"] = n
    drawn = generate_tokens(model, prompts, adapter, temperature=temperature, chat=chat, **settings)
    chatting = chat or (chat is None and bool(model.tokenizer.chat_template))
    conversations = [_conversation(prompt) if chatting else prompt for prompt in prompts]
    scores = judge([conversations[answer.prompt] for answer in drawn], [answer.text for answer in drawn])
    found = []
    for number, prompt in enumerate(prompts):
        own = slice(number * n, (number + 1) * n)
        numbers = [float(number) for number in scores[own]]
        best = max(numbers)
        found.append(Best(prompt, drawn[own][numbers.index(best)].text, best, drawn[own], numbers))
    return found


def for_command(
    model: Any, prompts: list, n: int | None, reward: str | None, adapter: Any, settings: dict[str, Any]
) -> tuple[list[Completion], list[dict[str, Any]]]:
    """The best answers for `jaxtune generate --best-of N --reward WHAT`, and what to print about each."""
    if n is None or reward is None:
        raise ConfigError("--best-of N samples the answers from which --reward WHAT chooses; give both, or neither")
    if settings.pop("num_return_sequences") > 1:
        raise ConfigError("--best-of prints one answer to each prompt; leave --num-return-sequences out")
    found = best_of_n(model, prompts, n, reward, adapter, **settings)
    print(f"best of {n}: mean score {np.mean([best.score for best in found]):.4g}, of all answers "
          f"{np.mean([best.scores for best in found]):.4g}", file=sys.stderr)  # fmt: skip
    return [best.answer for best in found], [{"score": best.score, "scores": best.scores} for best in found]


def _conversation(prompt: str | Sequence[Mapping]) -> list[Mapping]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def find_reward(reward: Any) -> Callable[[list, list[str]], np.ndarray]:
    """`(prompts, completions) -> scores [n]` from a reward model, its folder, a function, or a function's name."""
    named = isinstance(reward, (str, os.PathLike)) and not os.path.exists(os.fspath(reward)) and _is_function(os.fspath(reward))
    if callable(reward) or named:
        name, function = functions.find(metrics.METRICS, os.fspath(reward) if named else reward, "reward")  # type: ignore[arg-type]
        ask = functools.partial(functions.call, f"the reward function {name}", function)
        return lambda prompts, completions: _checked(name, ask(prompts=prompts, completions=completions), len(completions))
    model = load_scorer(reward) if isinstance(reward, (str, os.PathLike)) else reward
    if model.config.num_labels > 1 or model.config.labels_of == "token":
        raise ConfigError(f"a model of {model.config.num_labels} labels does not say which answer is better; give one with a single score")

    def judge(prompts: list, completions: list[str]) -> np.ndarray:
        return np.asarray(score(model, list(zip(prompts, completions, strict=True))))

    return judge


def _is_function(text: str) -> bool:
    return ".py:" in text or ("/" not in text and "." in text and not text.startswith("."))


def _checked(name: str, scores: Any, count: int) -> np.ndarray:
    try:
        values = np.asarray(list(scores), np.float64)
    except (TypeError, ValueError):
        values = np.empty((0, 0))
    if values.shape != (count,) or not np.isfinite(values).all():
        raise ConfigError(f"the reward function {name} must give one finite number for each of the {count} answers")
    return values
