"""Prompts to which the policy samples answers (grpo, rloo, ppo), and the rows made of prompts and answers."""

import math
from typing import Any

import numpy as np

from jaxtune.config import Config
from jaxtune.config.policy import kl_weight, step_shape, steps_per_rollout
from jaxtune.data import formats
from jaxtune.data.batch import Batch, Rollout
from jaxtune.data.documents import Documents
from jaxtune.data.examples import Prompt
from jaxtune.data.mixing import mixture
from jaxtune.data.packing import Plan
from jaxtune.data.screen import sources_of
from jaxtune.data.source import Source
from jaxtune.data.tokenised import examples, form_of
from jaxtune.data.units import Answer, Cursor, Single, put_answers
from jaxtune.errors import ConfigError, DataError

SHORTEST = 32  # a row has room for at least this many trained tokens


class Prompts(Source):
    """The prompts of one side. A step of Source is a rollout here: the prompts whose answers are sampled together.

    Attributes:
        layout: how their answers become rows.
        fields: `[documents]`, the row of each prompt with all its columns except `prompt`, for reward functions.
        originals: `[documents]`, the prompt as in the row: a text, or a list of messages.
    """

    def __init__(self, documents: Documents, layout: "Layout", seed: int, shuffle: bool, config: Config, name: str):
        count = len(documents)
        plan = Plan(np.arange(count), np.arange(count + 1), np.zeros(count, np.int64), (int(documents.lengths.max()),), (0,))
        mix = mixture(documents.part, config) if name == "train" else None
        super().__init__(Single(documents), plan, layout.prompts, 1, seed, shuffle, mix)
        self.layout, self.repeats = layout, layout.repeats
        self.longest_prompt = int(documents.lengths.max())
        self.originals, self.fields = _rows(documents, config, name)

    @classmethod
    def of(cls, documents: Documents, config: Config, name: str, data_parallel: int) -> "Prompts":
        """The prompts of the side `name`."""
        training = name == "train"
        layout = Layout(config, data_parallel, training)
        return cls(documents, layout, config.data_seed, training and config.data.shuffle, config, name)

    @property
    def shares_prompts(self) -> bool:
        """Whether answers share their prompts' computation."""
        return self.layout.together > 1

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with the longest possible answer."""
        return self.longest_prompt + self.layout.most

    @property
    def attended(self) -> float:
        """Tokens of the longest prompt and answer, for which a step is planned."""
        return float(self.longest)

    @property
    def trained_share(self) -> float:
        """That of the largest step, for which it is planned."""
        batch = self.largest()
        return (batch.capacity or batch.tokens.shape[-1]) / batch.tokens.shape[-1]

    @property
    def rollouts_per_epoch(self) -> int:
        """Rollouts that use each prompt once."""
        return super().steps_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch."""
        return self.rollouts_per_epoch * self.repeats

    def prompts_at(self, rollout: int) -> list[int]:
        """The numbers of the prompts of a rollout (from 0); the last one of an epoch may have fewer."""
        epoch, index = divmod(rollout, self.rollouts_per_epoch)
        places = self._epoch(epoch)[index]
        return places[places >= 0].tolist()

    def rows_at(self, step: int) -> dict[str, list[int]]:
        """The numbers of the rows whose prompts step `step` (from 0) learns from."""
        documents, found = self.documents, {}
        for doc in self.prompts_at(step // self.repeats):
            found.setdefault(documents.info[documents.part[doc]]["path"], []).append(int(documents.rows[doc]))
        return {path: sorted(rows) for path, rows in found.items()}

    def ids(self, prompt: int) -> list[int]:
        """The token ids of a prompt."""
        return self.documents[prompt][0].tolist()

    def largest(self) -> Batch:
        """A batch of the largest shape that a step may have, every token trained."""
        return self.layout.largest(self.longest_prompt)

    def batch_at(self, step: int, process: int = 0, processes: int = 1) -> Batch:
        """Unavailable from a step number alone: the answers depend on the weights."""
        raise NotImplementedError


def turns(prompt: str | list[dict], config: Config) -> str | list[dict]:
    """A prompt as the model reads it: with a system turn (`data.system`), a text becomes the user's turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) and config.data.system else prompt


def _rows(documents: Documents, config: Config, name: str) -> tuple[list[Any], list[dict[str, Any]]]:
    sources = sources_of(config, name)
    if name == "train" and config.data.replay is not None:
        sources = (*sources, config.data.replay)
    if config.data.streaming:
        raise ConfigError(f"data.streaming keeps no rows, but the rewards of objective {config.objective} need them; leave it out")
    found: dict[tuple[int, int], tuple[Any, dict[str, Any]]] = {}
    for part, source in enumerate(sources):
        kept = set(documents.rows[documents.part == part].tolist())
        for row, example in examples(source, config):
            if row.index in kept and isinstance(example, Prompt):
                fields = formats.made(row, form_of(source, config)).fields
                found[part, row.index] = turns(example.prompt, config), {key: value for key, value in fields.items() if key != "prompt"}
    places = [found[int(part), int(row)] for part, row in zip(documents.part, documents.rows, strict=True)]
    columns = {key for _, fields in places for key in fields}
    return [prompt for prompt, _ in places], [{key: fields.get(key) for key in columns} for _, fields in places]


class Layout:
    """How sampled answers become batches `[A, B, T]`.

    The answers to a prompt share it in one row (`Batch.parents`), as many of them as divide both the group and a device's part of a
    micro-batch; with `data.shared_prompts: false` each answer has its own row.

    Attributes:
        prompts: number per rollout. answers: number per prompt. most: tokens per answer.
        slices: steps that a rollout is split into; each is taken `num_iterations` (ppo: `num_ppo_epochs`) times, `repeats` steps in all.
        micro_batches, rows: A and B. together: answers per row (S).
        old: whether steps need log-probabilities under the policy that sampled the answers. reference: whether there is a reference model.
        kept: whether steps get its log-probabilities (for RLOO and PPO they are part of the reward). valued: whether tokens have values.
    """

    def __init__(self, config: Config, data_parallel: int, training: bool = True):
        self.micro_batches, each, self.slices = step_shape(config)
        self.answers, self.most, self.repeats = config.num_generations, int(config.max_completion_length or 0), steps_per_rollout(config)
        self.together = math.gcd(self.answers, each) if config.data.shared_prompts else 1
        self.rows = each * data_parallel // self.together
        self.reference, self.valued = kl_weight(config) != 0, config.objective == "ppo"
        self.old = self.repeats > 1 or self.valued or (config.objective == "rloo" and self.reference)
        self.kept = self.old and self.reference and config.objective == "grpo"
        self.prompts, rest = divmod(each * data_parallel * self.micro_batches * self.slices, self.answers)
        if rest or not self.prompts:
            key = "gradient_accumulation_steps" if self.valued else "steps_per_generation"
            each, times = config.per_device_train_batch_size, getattr(config, key)
            raise ConfigError(
                f"a rollout has per_device_train_batch_size ({each}) * devices ({data_parallel}) * {key} "
                f"({times}) = {each * data_parallel * times} answers, which do not make whole "
                f"groups of num_generations ({self.answers}); change one of them"
            )
        if not training:
            self.answers = config.num_generations_eval
            self.prompts = max(1, config.per_device_eval_batch_size * data_parallel // self.answers)

    def empty(self, size: int, trained: int, slices: int | None = None) -> Batch:
        """Empty rows of `size` tokens, `[A, B, T]` or `[slices, A, B, T]`."""
        shape = (self.micro_batches, self.rows, size) if slices is None else (slices, self.micro_batches, self.rows, size)
        batch = Batch.empty(shape, trained, self.together, self.together > 1)
        assert batch.answers is not None
        return batch.replace(rollout=Rollout(np.zeros_like(batch.answers.values)))

    def largest(self, longest: int) -> Batch:
        """A batch of the largest shape that a step may have, if no prompt has more than `longest` tokens."""
        batch = self.empty(self.size(longest, self.together * self.most), self.together * self.most)
        assert batch.rollout is not None
        known = np.zeros_like(batch.weights)
        of_tokens = (known,) * 3 if self.valued else ()
        rollout = Rollout(batch.rollout.tokens, known if self.old else None, known if self.kept else None, *of_tokens)
        return batch.replace(rollout=rollout)  # type: ignore[attr-defined]

    def size(self, longest: int, trained: int) -> int:
        """Tokens of a row with room for that many trained ones; all prompts get the room of the longest, so that there are few shapes."""
        return -(-(longest + trained) // 16) * 16

    def batches(
        self, prompts: list[list[int]], answers: list[list[int]], advantages: np.ndarray, trained: np.ndarray, longest: int
    ) -> Batch:
        """All rows of a rollout, `[slices, A, B, T]`.

        prompts: token ids of each prompt. answers: token ids of all answers, those to one prompt next to each other. trained: whether to
        train each.
        """
        units = [range(first, first + self.together) for first in range(0, len(answers), self.together)]
        most = max(sum(len(answers[n]) for n in unit) for unit in units)
        room = min(bucket(most), self.together * self.most)
        batch = self.empty(self.size(longest, room), room, self.slices)
        assert batch.answers is not None and batch.rollout is not None
        for place, unit in zip(np.ndindex(batch.tokens.shape[:-1]), units, strict=False):
            prompt = prompts[unit[0] // self.answers]
            put_answers(
                batch, Cursor(place), [_answer(prompt, answers[n], advantages[n], trained[n]) for n in unit],
                len(prompt) if self.together > 1 else 0,
            )  # fmt: skip
        counted = sum(len(answer) for answer, there in zip(answers, trained, strict=True) if there)
        batch.rollout.tokens[:] = counted / len(answers)
        return batch


def _answer(prompt: list[int], answer: list[int], advantage: float, trained: bool) -> Answer:
    tokens = np.array([*prompt, *answer], np.int32)
    mask = np.zeros(len(tokens), np.uint8)
    mask[len(prompt) :] = trained
    return Answer(tokens, mask, len(prompt), float(advantage))


def bucket(n: int) -> int:
    """The next of 32, 48, 64, 96, 128, ...: rows have few lengths, because each is a compilation."""
    size = SHORTEST
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def require_room(prompts: Prompts, model_config: Any) -> None:
    """DataError if the longest prompt and an answer do not fit the model's context."""
    most = model_config.max_position_embeddings
    if prompts.longest > most:
        raise DataError(
            f"the longest prompt has {prompts.longest_prompt} tokens, and answers may have {prompts.layout.most}, but the model's "
            f"max_position_embeddings is {most}; lower max_completion_length, or data.max_length with length_policy: drop"
        )
