"""What a plan arranges in rows: a document, or several answers that must share a row.

Answers to one prompt share it: the prompt is a segment, and each answer a segment that continues it (`Batch.parents`), with positions that
restart after the prompt. The prompt's tokens are then computed once. Every kind of unit has

    documents                         the documents it is made of
    lengths, trained, part, answers   int64 [n]: tokens in the row, trained tokens, the documents' source, numbers given to answers
    saved                             int64 [n]: tokens that are not computed again because prompts are shared
    shared                            whether batches have parents
    longest                           tokens of the longest document, prompt and answer
    settings                          what the layout depends on besides the documents, for fingerprints
    members(unit)                     the numbers of its documents
    fill(batch, at, unit)             writes one unit into a row
"""

import logging
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxtune.config import Config
from jaxtune.config.objectives import ON_TOKENS, draws_answers
from jaxtune.data.batch import Batch
from jaxtune.data.documents import Documents
from jaxtune.errors import DataError

log = logging.getLogger("jaxtune")


@dataclass
class Cursor:
    """The next free place of a row: the slot, and the numbers of the last segment and the last answer."""

    row: tuple[int, ...]
    slot: int = 0
    segment: int = 0
    answer: int = 0


def put(batch: Batch, at: Cursor, tokens: np.ndarray, mask: np.ndarray, parent: "Parent | None" = None) -> None:
    """Write a segment."""
    at.segment += 1
    end = at.slot + len(tokens)
    where = (*at.row, slice(at.slot, end))
    batch.tokens[where], batch.weights[where] = tokens, mask > 0
    batch.positions[where] = np.arange(len(tokens)) + (parent.length if parent else 0)
    batch.segments[where] = at.segment
    if batch.before is not None:
        batch.before[where] = np.arange(at.slot - 1, end - 1).clip(0)
        if parent:
            batch.parents[where] = parent.segment
            batch.before[(*at.row, at.slot)] = parent.end
    at.slot = end


@dataclass(frozen=True)
class Parent:
    """A prompt that has been written: its segment, its tokens, its last slot."""

    segment: int
    length: int
    end: int


class Answer(NamedTuple):
    """A whole document, prompt and answer: token ids, mask, the first token of the answer, and its value."""

    tokens: np.ndarray
    mask: np.ndarray
    start: int
    value: float | np.ndarray


def put_answers(batch: Batch, at: Cursor, answers: list[Answer], prompt: int) -> None:
    """Write answers, numbered consecutively, after their common first `prompt` tokens; 0: each is a separate document."""
    assert batch.answers is not None  # the units here number their answers, so batches have room for them
    parent = None
    if prompt:
        put(batch, at, answers[0].tokens[:prompt], answers[0].mask[:prompt])
        parent = Parent(at.segment, prompt, at.slot - 1)
    for answer in answers:
        first = at.slot + answer.start - prompt
        put(batch, at, answer.tokens[prompt:], answer.mask[prompt:], parent)
        at.answer += 1
        batch.answers.numbers[(*at.row, slice(first, at.slot))] = at.answer
        batch.answers.values[(*at.row, at.answer - 1)] = answer.value


class Single:
    """Each document by itself."""

    shared = False
    settings: tuple = ()

    def __init__(self, documents: Documents):
        self.documents = documents
        self.lengths, self.trained, self.part = documents.lengths, documents.trained, documents.part
        self.longest = int(documents.lengths.max(initial=0))
        self.answers = self.saved = np.zeros(len(documents), np.int64)

    def members(self, unit: int) -> list[int]:
        """Its one document."""
        return [unit]

    def fill(self, batch: Batch, at: Cursor, unit: int) -> None:
        """Write one document."""
        put(batch, at, *self.documents[unit])


class Labelled(Single):
    """Each document by itself, with one answer whose value is its label: the mask's mark minus one."""

    def __init__(self, documents: Documents):
        super().__init__(documents)
        self.answers = np.ones(len(documents), np.int64)

    def fill(self, batch: Batch, at: Cursor, unit: int) -> None:
        """Write one document."""
        put_answers(batch, at, [_labelled(self.documents, unit)], 0)


class Classified(Single):
    """Each document by itself as one answer, whose value is the row's."""

    def __init__(self, documents: Documents):
        super().__init__(documents)
        self.answers = np.ones(len(documents), np.int64)

    def fill(self, batch: Batch, at: Cursor, unit: int) -> None:
        """Write one document."""
        put_answers(batch, at, [Answer(*self.documents[unit], 0, self.documents.values[unit])], 0)


class Stepwise(Single):
    """Each document by itself; every marked token is an answer (the end of a step) whose value is its mark minus one.

    last_only: only the last step of each document is trained.
    """

    def __init__(self, documents: Documents, last_only: bool = False):
        super().__init__(documents)
        self.settings = ("stepwise", last_only)
        self.last_only = last_only
        self.answers = np.minimum(documents.trained, 1) if last_only else documents.trained
        self.trained = self.answers

    def fill(self, batch: Batch, at: Cursor, unit: int) -> None:
        """Write one document."""
        tokens, mask = self.documents[unit]
        assert batch.answers is not None
        places, start = np.flatnonzero(mask)[-1 if self.last_only else 0 :], at.slot
        put(batch, at, tokens, np.isin(np.arange(len(mask)), places))
        for place in places:
            at.answer += 1
            batch.answers.numbers[(*at.row, start + place)] = at.answer
            batch.answers.values[(*at.row, at.answer - 1)] = int(mask[place]) - 1


class Pairs:
    """Documents 2u and 2u + 1: the chosen and the rejected answer to one prompt, numbered odd and even. Their value is the pair's margin.

    train_prompt: the prompt is trained too, once, with the chosen answer (ORPO).
    """

    def __init__(self, documents: Documents, share: bool = True, train_prompt: bool = False):
        self.documents, self.shared, self.train_prompt = documents, share, train_prompt
        self.settings = ("pairs", share, train_prompt)
        count = len(documents) // 2
        self.part, self.answers, self.longest = documents.part[::2], np.full(count, 2, np.int64), int(documents.lengths.max(initial=0))
        self.saved = np.array([_common(*self._pair(unit)) for unit in range(count)], np.int64) * share  # the prompt, if it is shared
        self.lengths = documents.lengths.reshape(-1, 2).sum(1) - self.saved
        self.trained = documents.trained.reshape(-1, 2).sum(1)
        if train_prompt:
            self.trained = self.trained + [self._pair(unit)[0].start - 1 for unit in range(count)]

    def members(self, unit: int) -> list[int]:
        """Chosen and rejected."""
        return [2 * unit, 2 * unit + 1]

    def _pair(self, unit: int) -> list[Answer]:
        documents = self.documents
        return [Answer(*documents[n], int(documents[n][1].argmax()), documents.values[n]) for n in self.members(unit)]

    def fill(self, batch: Batch, at: Cursor, unit: int) -> None:
        """Write one pair."""
        chosen, rejected = self._pair(unit)
        if self.train_prompt:
            place = np.arange(len(chosen.mask))
            chosen = chosen._replace(mask=np.where((place > 0) & (place < chosen.start), 1, chosen.mask))
        put_answers(batch, at, [chosen, rejected], int(self.saved[unit]))


class Mismatched:
    """Labelled answers in twos (threes if one is left over), each beside an answer that belongs to another prompt.

    Answers are numbered (own, other), (own, other), ... The others, from which KTO estimates how far the policy is from the reference, are
    the unit's own answers shifted by one prompt, so that every batch has the same answers in both roles. An other answer that would make
    its document longer than `max_length` is cut there, as in TRL.
    """

    def __init__(self, documents: Documents, max_length: int, share: bool = True):
        self.documents, self.shared, self.max_length = documents, share, max_length
        self.settings = ("mismatched", share, max_length)
        order = np.argsort(_occurrence(documents.rows), kind="stable")  # for the two answers of a row separately: their prompt is the same
        self._units = [unit for part in np.unique(documents.part) for unit in _by_twos(order[documents.part[order] == part])]
        self.part = np.array([documents.part[unit[0]] for unit in self._units])
        self.answers = np.array([2 * len(unit) for unit in self._units])
        groups = [self._groups(unit) for unit in range(len(self._units))]
        self.longest = max(len(answer.tokens) for group in groups for pair in group for answer in pair)
        self.saved = np.array([sum(own.start * share for own, _ in group) for group in groups])
        self.lengths = np.array([sum(len(answer.tokens) for pair in group for answer in pair) for group in groups]) - self.saved
        self.trained = np.array([sum(np.count_nonzero(x.mask) for pair in group for x in pair) for group in groups])

    def members(self, unit: int) -> list[int]:
        """Two or three answers."""
        return self._units[unit].tolist()

    def _groups(self, unit: int) -> list[tuple[Answer, Answer]]:
        own = [_labelled(self.documents, n) for n in self._units[unit]]
        return [(answer, _elsewhere(answer, other, self.max_length)) for answer, other in zip(own, own[-1:] + own[:-1], strict=True)]

    def fill(self, batch: Batch, at: Cursor, unit: int) -> None:
        """Write two or three prompts, each with its answer and another one's."""
        for own, other in self._groups(unit):
            put_answers(batch, at, [own, other], own.start * self.shared)


Units = Single | Pairs | Mismatched


def make(documents: Documents, config: Config, training: bool = True) -> Units:
    """The units that rows are made of under the config's objective."""
    objective, share = config.objective, config.data.shared_prompts
    if objective in ON_TOKENS:
        return Single(documents)
    if objective == "stepwise_reward":
        return Stepwise(documents, config.train_on_last_step_only and training)
    if objective == "classification":
        return Classified(documents)
    if objective == "kto" and config.loss_type == ("apo_zero_unpaired",):
        return Labelled(documents)
    if objective == "kto":
        return Mismatched(documents, config.data.max_length, share)
    return Pairs(documents, share, train_prompt=objective == "orpo")


def room(units: Units, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and trained tokens that each unit needs room for: its own, or those with a sampled answer.

    DataError if a prompt and an answer do not fit `data.max_length`, and for text without a prompt.
    """
    if not draws_answers(config):
        return units.lengths, units.trained
    documents, most = units.documents, int(config.max_completion_length or 0)
    prompts = np.array([len(prompt_of(*documents[number])) for number in range(len(documents))], np.int64)
    size = config.data.max_length
    alone = "is text without a prompt to answer; write lmbda: 0 and seq_kd: false, or rows with prompts"
    long = f"has a prompt that leaves no room for {most} tokens in data.max_length {size}; lower max_completion_length, or raise it"
    for wrong, said in ((prompts < 2, alone), (prompts + most > size, long)):
        if wrong.any():
            first = int(wrong.argmax())
            raise DataError(f"{documents.info[documents.part[first]]['path']}, row {documents.rows[first]} {said}")
    units.longest = max(units.longest, int(prompts.max()) + most)
    return np.maximum(units.lengths, prompts + most), np.maximum(units.trained, most)


def prompt_of(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Everything before the last run of trained tokens."""
    trained = np.flatnonzero(mask)
    ends = np.flatnonzero(np.diff(trained) > 1)
    return tokens[: trained[ends[-1] + 1 if len(ends) else 0] if len(trained) else 0]


def warn_of_one_label(units: Units) -> None:
    """Warn about labelled answers that are all good or all bad: training runs without an error but learns nothing about the other kind."""
    labels = {bool(_labelled(units.documents, number).value) for number in range(len(units.documents))}
    if len(labels) == 1:
        kind, other = ("good", "bad") if labels.pop() else ("bad", "good")
        log.warning("all %d answers are labelled %s: without %s ones the loss cannot tell them apart", len(units.documents), kind, other)


def least(config: Config) -> tuple[int, bool]:
    """For a row, without the data: the least number of answers in a unit (0: answers are not numbered), and whether units share prompts.

    For the planner; another answer or two in a row are a few bytes.
    """
    objective, share = config.objective, config.data.shared_prompts
    if objective in (*ON_TOKENS, "classification", "stepwise_reward") or config.loss_type == ("apo_zero_unpaired",):
        return int(objective not in ON_TOKENS), False
    return (4 if objective == "kto" else 2), share


def _occurrence(rows: np.ndarray) -> np.ndarray:
    """The number of documents of the same row directly before each."""
    starts = np.flatnonzero(np.diff(rows, prepend=rows[:1] - 1))
    return np.arange(len(rows)) - np.repeat(starts, np.diff(np.append(starts, len(rows))))


def _labelled(documents: Documents, number: int) -> Answer:
    tokens, mask = documents[number]
    return Answer(tokens, mask, int((mask > 0).argmax()), int(mask.max()) - 1)


def _elsewhere(answer: Answer, other: Answer, size: int) -> Answer:
    """The prompt of `answer` with the answer of `other`."""
    tokens, mask = (np.concatenate([x[: answer.start], y[other.start :]])[:size] for x, y in zip(answer[:2], other[:2], strict=True))
    return Answer(tokens, mask, answer.start, 0.0)


def _by_twos(numbers: np.ndarray) -> list[np.ndarray]:
    if len(numbers) < 2:
        raise DataError(
            "KTO needs answers to other prompts, but a source has only one answer; add rows, or write loss_type: apo_zero_unpaired"
        )
    return np.split(numbers, np.arange(2, len(numbers) - 1, 2))


def _common(a: Answer, b: Answer) -> int:
    """Tokens that two documents have in common at the beginning and that belong to neither's answer."""
    size = min(a.start, b.start)
    different = np.flatnonzero(a.tokens[:size] != b.tokens[:size])
    return int(different[0]) if len(different) else size
