"""Distillation on answers sampled during training: the student's own (GKD, arXiv 2306.13649), or the teacher's (`seq_kd`).

As in TRL's GKDTrainer, the student answers a step's prompts with probability `lmbda`; otherwise the step uses the rows' answers, or with
`seq_kd` the teacher's. Who answers, and how, is a pure function of the seed, the step and the weights at that step, so a resumed run learns
from the same answers as an uninterrupted one. Rows leave room for the longest answer (data/units.py), so shapes do not change.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtune import data, parallel
from jaxtune.config import Config
from jaxtune.convert.load import Model
from jaxtune.data.batch import Batch
from jaxtune.data.units import Cursor, prompt_of, put
from jaxtune.errors import ConfigError
from jaxtune.generation.answer import Reader
from jaxtune.generation.prompts import stop_tokens
from jaxtune.generation.sampling import Sampling
from jaxtune.generation.training_samples import sample_answers
from jaxtune.objectives.distill import TEACHER
from jaxtune.peft import compose
from jaxtune.step import TrainState


class OnPolicy:
    """The batches of one run: `batch_at(step, state, base)` replaces a source's `batch_at(step)`."""

    def __init__(self, config: Config, model: Model, mesh: Mesh, train: data.Source):
        if jax.process_count() > 1:
            raise ConfigError("lmbda and seq_kd sample answers in one process; run them on one host, with a mesh over its devices")
        self.config, self.model, self.mesh, self.train = config, model, mesh, train
        self.reader = Reader(model.tokenizer, frozenset(stop_tokens(model)))
        self.sampling = Sampling.create(config.temperature)

    def batch_at(self, step: int, state: TrainState, base: dict) -> tuple[Batch, dict[str, float]]:
        """The batch of step `step` (from 0), and metrics of its answers if they were sampled."""
        own = self.is_own(step)
        metrics = {"on_policy": float(own)}
        if not own and not self.config.seq_kd:
            return self.train.batch_at(step, *parallel.row_part(self.mesh)), metrics
        units = list(dict.fromkeys(self.train.units_at(step)))
        prompts = {unit: prompt_of(*self.train.documents[unit]) for unit in units}
        teacher = base[TEACHER]
        model_config = self.model.config if own else teacher.config
        params = compose({name: leaf for name, leaf in base.items() if name != TEACHER}, state.trainable) if own else teacher.params
        answers, ended = sample_answers(
            model_config, params, [prompts[unit].tolist() for unit in units], 1, int(self.config.max_completion_length or 0),
            sampling=self.sampling, reader=self.reader, seed=(self.config.seed, 2, step), mesh=self.mesh,
        )  # fmt: skip
        tokens = {unit: self._known(answer.tokens) for unit, answer in zip(units, answers, strict=True)}

        def fill(batch: Batch, at: Cursor, unit: int) -> None:
            trained = np.arange(len(prompts[unit]) + len(tokens[unit])) >= len(prompts[unit])
            put(batch, at, np.concatenate([prompts[unit], tokens[unit]]), trained)

        lengths = [len(answer) for answer in tokens.values()]
        metrics |= {"completions/mean_length": float(np.mean(lengths)), "completions/clipped_ratio": float(1 - ended.mean())}
        return self.train.batch_at(step, *parallel.row_part(self.mesh), fill=fill), metrics

    def is_own(self, step: int) -> bool:
        """Whether the student answers at this step."""
        word = int(np.random.SeedSequence((self.config.seed, 3, step)).generate_state(1, np.uint32)[0])
        return word < self.config.lmbda * 2**32

    def _known(self, answer: list[int]) -> Any:
        """The answer up to the first token beyond the student's embedding; a teacher's embedding may be wider."""
        tokens = np.asarray(answer, np.int32)
        unknown = np.flatnonzero(tokens >= self.model.config.vocab_size)
        return tokens[: unknown[0]] if len(unknown) else tokens
