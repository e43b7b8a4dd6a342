"""Batches as a pure function of the step number."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, lru_cache

import numpy as np

from jaxtune.data.batch import Batch
from jaxtune.data.documents import Documents
from jaxtune.data.mixing import Mixture
from jaxtune.data.packing import Plan, permutation
from jaxtune.data.units import Cursor, Units
from jaxtune.errors import DataError

Fill = Callable[[Batch, Cursor, int], None]


class Source:
    """The training or evaluation rows of a run.

    `batch_at(step)` depends only on the plan, so resuming needs a step number and nothing else. Epoch e visits the rows in a permutation
    drawn from `(seed, e)`; `shuffle=False` keeps the plan's order, which for `packing: false` is the order of the file. A step takes
    `accumulation * rows` rows, so (rows 8, accumulation 1) and (1, 8) see the same ones; the last step of an epoch is filled with empty
    rows of weight zero.

    Attributes:
        rows: rows per micro-batch, over all devices and processes (B).
        accumulation: micro-batches per step (A).
        units: what a row is made of (data/units.py): documents, or pairs and other groups of answers.
        plan: which units share a row.
        mixture: which rows an epoch has, if not simply all of them.
        ref_logps: float32, the reference's log-probability of each answer, unit after unit, if computed beforehand.
    """

    def __init__(
        self, units: Units, plan: Plan, rows: int, accumulation: int = 1, seed: int = 0, shuffle: bool = True,
        mixture: Mixture | None = None,
    ):  # fmt: skip
        self.units, self.plan, self.rows, self.accumulation = units, plan, rows, accumulation
        self.seed, self.shuffle, self.mixture = seed, shuffle, mixture
        self.ref_logps: np.ndarray | None = None
        self._epoch = lru_cache(maxsize=2)(self._steps_of_epoch)

    @property
    def documents(self) -> Documents:
        """The documents that the units are made of."""
        return self.units.documents

    @property
    def shares_prompts(self) -> bool:
        """Whether answers share their prompts' computation."""
        return self.units.shared

    @property
    def longest(self) -> int:
        """Tokens of the longest text, prompt and answer."""
        return self.units.longest

    @property
    def attended(self) -> float:
        """Tokens of a token's unit, averaged over the slots of the rows."""
        return float((self.units.lengths.astype(float) ** 2).sum() / self.plan.slots())

    @property
    def trained_share(self) -> float:
        """Trained tokens divided by token slots, over all rows of the plan."""
        return int(self.units.trained.sum()) / self.plan.slots()

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps per epoch: those that visit each row once, or as often as the mixture says."""
        count = len(self.plan) if self.mixture is None else sum(self.mixture.quota)
        return -(-count // (self.rows * self.accumulation))

    @property
    def tokens(self) -> int:
        """Tokens of an epoch, without padding; with a mixture, of the first epoch."""
        return self._total(self.units.lengths)

    @property
    def trained_tokens(self) -> int:
        """Trained tokens of an epoch; with a mixture, of the first epoch."""
        return self._total(self.units.trained)

    @property
    def saved_tokens(self) -> int:
        """Tokens of an epoch that are not computed again because answers share their prompt."""
        return self._total(self.units.saved)

    @property
    def efficiency(self) -> float:
        """Tokens divided by token slots, over all rows of the plan: 1 means no padding."""
        return int(self.units.lengths.sum()) / self.plan.slots()

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of everything that determines what step n trains on."""
        digest = hashlib.sha256(self.documents.fingerprint.encode())
        for array in (self.plan.docs, self.plan.starts, self.plan.group):
            digest.update(np.ascontiguousarray(array, np.int64).data)
        quota = self.mixture and self.mixture.quota
        settings = self.plan.lengths, self.rows * self.accumulation, self.seed, self.shuffle, self.units.settings, quota
        digest.update(repr(settings).encode())
        return digest.hexdigest()

    def batch_at(self, step: int, process: int = 0, processes: int = 1, fill: Fill | None = None) -> Batch:
        """The batch of step `step` (from 0), int32 / float32 `[A, B / processes, T]`.

        `fill` writes a unit instead of `units.fill`. Process p gets the p-th of `processes` equal parts of every micro-batch, so the
        concatenated parts are the same bytes for any number of hosts.
        """
        epoch, index = divmod(step, self.steps_per_epoch)
        return self._batch(self._epoch(epoch)[index].reshape(self.accumulation, self.rows), process, processes, fill)

    def units_at(self, step: int) -> list[int]:
        """The numbers of the units that step `step` (from 0) trains on."""
        epoch, index = divmod(step, self.steps_per_epoch)
        places = self._epoch(epoch)[index]
        return [int(unit) for row in places[places >= 0] for unit in self._units_of(row)]

    def largest(self) -> Batch:
        """A batch of the largest shape that a step may have."""
        row = int(np.argmax(self.plan.group))
        return self._batch(np.full((self.accumulation, self.rows), row), 0, 1)

    def rows_at(self, step: int) -> dict[str, list[int]]:
        """The numbers of the rows that step `step` (from 0) trains on, from 1, by source."""
        documents = [doc for unit in self.units_at(step) for doc in self.units.members(unit)]
        found: dict[str, set[int]] = {}
        for doc in documents:
            found.setdefault(self.documents.info[self.documents.part[doc]]["path"], set()).add(int(self.documents.rows[doc]))
        return {path: sorted(rows) for path, rows in found.items()}

    def check_vocabulary(self, size: int) -> None:
        """DataError, naming the row, for a token beyond a model's vocabulary of `size`."""
        documents = self.documents
        for part, tokens in enumerate(documents.tokens):
            own = np.flatnonzero(documents.part == part)
            own = own[np.argsort(documents.starts[own])]
            for place in np.flatnonzero(tokens >= size):
                doc = own[np.searchsorted(documents.starts[own], place, "right") - 1]
                if 0 <= place - documents.starts[doc] < documents.lengths[doc]:
                    row = f"{documents.info[part]['path']}, row {documents.rows[doc]}"
                    raise DataError(
                        f"{row}: the tokenizer makes token {tokens[place]} of it, but the model's embedding has {size} rows, 0 to "
                        f"{size - 1}; the tokenizer is another model's, or has grown: give the model as many rows with transformers "
                        "(model.resize_token_embeddings(len(tokenizer)), then save_pretrained), or take the tokenizer it came with"
                    )

    def batches(self, process: int = 0, processes: int = 1) -> Iterator[Batch]:
        """Each row once, in order, as batches `[1, B / processes, T]`; the last ones are filled with empty rows."""
        for rows in self._steps(np.arange(len(self.plan)), self.rows):
            yield self._batch(rows[None], process, processes)

    def _steps_of_epoch(self, epoch: int) -> np.ndarray:
        order = self._order(epoch)
        steps = self._steps(order, self.rows * self.accumulation)
        several = self.shuffle and len(self.plan.lengths) > 1
        return steps[permutation(len(steps), self.seed, epoch, 1)] if several else steps

    def _order(self, epoch: int) -> np.ndarray:
        """The rows of an epoch."""
        if self.mixture is not None:
            return self.mixture.epoch(epoch, self.seed, self.shuffle)
        return permutation(len(self.plan), self.seed, epoch) if self.shuffle else np.arange(len(self.plan))

    def _total(self, counts: np.ndarray) -> int:
        """The sum of a per-unit number over the units of the first epoch."""
        return int(self._by_row(counts)[self._order(0)].sum())

    def _by_row(self, counts: np.ndarray) -> np.ndarray:
        return np.add.reduceat(counts[self.plan.docs], self.plan.starts[:-1])

    def by_source(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and tokens of each source in the first epoch."""
        order = self._order(0)
        source = self.units.part[self.plan.docs[self.plan.starts[:-1]]][order]
        return np.bincount(source), np.bincount(source, self._by_row(self.units.lengths)[order]).astype(np.int64)

    @cached_property
    def answers(self) -> list[int]:
        """The most answers in a row of each group, or of a smaller one; 0 for objectives that do not number answers."""
        counts = self._by_row(self.units.answers)
        return [int(counts[self.plan.group <= group].max()) for group in range(len(self.plan.lengths))]

    def _steps(self, order: np.ndarray, per_step: int) -> np.ndarray:
        """Row numbers [steps, per_step], -1 where there is none.

        Rows are sorted by group and then cut into steps, so that an epoch has the same number of steps whatever a mixture has drawn. A step
        that spans two groups takes the longer shape.
        """
        order = order[np.argsort(self.plan.group[order], kind="stable")]
        return np.pad(order, (0, -len(order) % per_step), constant_values=-1).reshape(-1, per_step)

    def _batch(self, rows_AB: np.ndarray, process: int, processes: int, fill: Fill | None = None) -> Batch:
        if self.rows % processes:
            raise DataError(
                f"{self.rows} rows of a micro-batch do not divide by {processes} processes; make "
                "per_device_train_batch_size times the devices a multiple of the processes"
            )
        group = self.plan.group[rows_AB[rows_AB >= 0]].max()
        mine = np.split(rows_AB, processes, axis=1)[process]
        shape = (*mine.shape, self.plan.lengths[group])
        value = self.documents.values.shape[1:]
        batch = Batch.empty(shape, self.plan.capacities[group], self.answers[group], self.units.shared, value)
        for place, row in np.ndenumerate(mine):
            if row >= 0:
                at = Cursor(place)
                for unit in self._units_of(row):
                    (fill or self.units.fill)(batch, at, int(unit))
        if self.ref_logps is None:
            return batch
        known = np.zeros((*mine.shape, self.answers[group]), np.float32)
        for place, row in np.ndenumerate(mine):
            if row >= 0:
                values = self.ref_logps[self._answers_of(row)]
                known[(*place, slice(len(values)))] = values
        assert batch.answers is not None  # a reference has log-probabilities of answers only
        return replace(batch, answers=replace(batch.answers, ref_logps=known))

    def _units_of(self, row: int) -> np.ndarray:
        return self.plan.docs[self.plan.starts[row] : self.plan.starts[row + 1]]

    def _answers_of(self, row: int) -> np.ndarray:
        """The numbers of a row's answers among all answers of all units."""
        ends = [(int(self._ends[unit]), int(self.units.answers[unit])) for unit in self._units_of(row)]
        return np.concatenate([np.arange(end - count, end) for end, count in ends])

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.units.answers)

    def each_answer(self, function: Callable[[Batch], np.ndarray], process: int = 0, processes: int = 1) -> np.ndarray:
        """`function(batch [1, B, T]) -> [B, S]`, for all processes' rows, applied to each row once; float32 [answers], unit after unit."""
        out = np.zeros(int(self.units.answers.sum()), np.float32)
        for rows in self._steps(np.arange(len(self.plan)), self.rows):
            for row, answers in zip(rows, function(self._batch(rows[None], process, processes)), strict=True):
                if row >= 0:
                    where = self._answers_of(row)
                    out[where] = answers[: len(where)]
        return out
