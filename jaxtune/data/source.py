"""Batches as a pure function of the step number."""

import hashlib
from collections.abc import Iterator
from functools import cached_property, lru_cache

import numpy as np

from jaxtune.data.batch import Batch
from jaxtune.data.documents import Documents
from jaxtune.data.mixing import Mixture
from jaxtune.data.packing import Plan, permutation
from jaxtune.errors import DataError


class Source:
    """The training or evaluation rows of a run.

    `batch_at(step)` reads no state but the plan: resume is a step number. Epoch e visits the rows in a permutation drawn from
    `(seed, e)`; `shuffle=False` keeps the plan's order, which for `packing: false` is the order of the file. A step
    takes `accumulation * rows` rows, so that (rows 8, accumulation 1) and (1, 8) see the same ones; the last step
    of an epoch is filled up with empty rows, which weigh nothing.

    Attributes:
        rows: rows of a micro-batch, all devices and processes together (B).
        accumulation: micro-batches of a step (A).
        plan: which documents share a row.
        copies: documents of a row of the data. 2: the plan is over pairs, and each row of it becomes two rows of the batch, 2i with the
            chosen and 2i + 1 with the rejected answers, document for document in the same segments.
        mixture: which rows an epoch has, where not simply all of them.
    """

    def __init__(
        self, documents: Documents, plan: Plan, rows: int, accumulation: int = 1, seed: int = 0, shuffle: bool = True,
        copies: int = 1, mixture: Mixture | None = None,
    ):  # fmt: skip
        self.documents, self.plan, self.rows, self.accumulation = documents, plan, rows, accumulation
        self.seed, self.shuffle, self.copies, self.mixture = seed, shuffle, copies, mixture
        self._epoch = lru_cache(maxsize=2)(self._steps_of_epoch)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch: those that visit each row once, or as often as the mixture says."""
        per_step = self.rows * self.accumulation
        counts = np.bincount(self.plan.group) if self.mixture is None else [sum(self.mixture.quota)]
        return int(sum(-(-count // per_step) for count in counts))

    @property
    def tokens(self) -> int:
        """Tokens of an epoch, padding not counted; with a mixture, of the first one."""
        return self._total(self.documents.lengths)

    @property
    def trained_tokens(self) -> int:
        """Tokens of an epoch that the loss is taken on; with a mixture, of the first one."""
        return self._total(self.documents.trained)

    @property
    def efficiency(self) -> float:
        """Tokens by places for tokens, over all rows of the plan: 1 means no padding."""
        return int(self.documents.lengths.sum()) / (self.plan.slots() * self.copies)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of everything that decides what step n trains on."""
        digest = hashlib.sha256(self.documents.fingerprint.encode())
        for array in (self.plan.docs, self.plan.starts, self.plan.group):
            digest.update(np.ascontiguousarray(array, np.int64).data)
        quota = self.mixture and self.mixture.quota
        digest.update(repr((self.plan.lengths, self.rows * self.accumulation, self.seed, self.shuffle, self.copies, quota)).encode())
        return digest.hexdigest()

    def batch_at(self, step: int, process: int = 0, processes: int = 1) -> Batch:
        """The batch of step `step` (from 0), int32 / float32 `[A, B / processes, T]`.

        Process p holds the p-th of `processes` equal parts of every micro-batch, so that the parts side by side are the same
        bytes on any number of hosts.
        """
        epoch, index = divmod(step, self.steps_per_epoch)
        return self._batch(self._epoch(epoch)[index].reshape(self.accumulation, self.rows), process, processes)

    def batches(self, process: int = 0, processes: int = 1) -> Iterator[Batch]:
        """Each row once, in order, as batches `[1, B / processes, T]`; the last ones are filled up with empty rows."""
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
        """The sum of a number that each document has over the documents of the first epoch."""
        units = counts.reshape(-1, self.copies).sum(1)[self.plan.docs]
        return int(np.add.reduceat(units, self.plan.starts[:-1])[self._order(0)].sum())

    def _steps(self, order: np.ndarray, per_step: int) -> np.ndarray:
        """Row numbers [steps, per_step], -1 where there is none; the rows of a step are of one shape."""
        steps = []
        for group in range(len(self.plan.lengths)):
            rows = order[self.plan.group[order] == group]
            steps.append(np.pad(rows, (0, -len(rows) % per_step), constant_values=-1).reshape(-1, per_step))
        return np.concatenate(steps)

    def _batch(self, rows_AB: np.ndarray, process: int, processes: int) -> Batch:
        if self.rows % processes:
            raise DataError(
                f"{self.rows} rows of a micro-batch do not divide by {processes} processes; make "
                "per_device_train_batch_size times the devices a multiple of the processes"
            )
        group = self.plan.group[rows_AB.max()]
        mine = np.split(rows_AB, processes, axis=1)[process]
        shape = (len(mine), mine.shape[1] * self.copies, self.plan.lengths[group])
        batch = Batch.empty(shape, self.plan.capacities[group])
        for (micro, place), row in np.ndenumerate(mine):
            for copy in range(self.copies):
                if row >= 0:
                    self._fill(batch, (micro, place * self.copies + copy), row, copy)
        return batch

    def _fill(self, batch: Batch, place: tuple[int, int], row: int, copy: int) -> None:
        start = 0
        docs = self.plan.docs[self.plan.starts[row] : self.plan.starts[row + 1]]
        for segment, doc in enumerate(docs, 1):
            tokens, mask = self.documents[doc * self.copies + copy]
            where = (*place, slice(start, start + len(tokens)))
            batch.tokens[where], batch.weights[where] = tokens, mask > 0
            batch.positions[where] = np.arange(len(tokens))
            batch.segments[where] = segment
            start += len(tokens)
