"""The teacher of objective distill: a separate, frozen model on the same mesh."""

import logging
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxtune import data
from jaxtune.config import Config
from jaxtune.convert.load import Opened, open_model, read_model
from jaxtune.convert.sources import is_adapter
from jaxtune.data.prepare import check_fits
from jaxtune.errors import ConfigError, DataError
from jaxtune.kernels import check_attention
from jaxtune.model import nf4_kernel
from jaxtune.objectives.distill import TEACHER, Teacher
from jaxtune.step import how_to_compute
from jaxtune.tree import nbytes

log = logging.getLogger("jaxtune")


def open_teacher(config: Config, student: Opened, rows: data.Data, mesh: Mesh) -> Opened | None:
    """The files of the run's teacher; None if the objective has none.

    Raises ConfigError for a teacher with another vocabulary, DataError for rows that it cannot process.
    """
    if config.teacher is None:
        return None
    path = Path(config.teacher).expanduser()
    if is_adapter(path):
        raise ConfigError(
            f"teacher {path} is an adapter, and a teacher must be a whole model; export it (python -m jaxtune.export {path} OUT --merge) "
            "and take teacher: OUT"
        )
    opened = open_model(config.teacher)
    check_attention(config, opened.config, mesh)
    check_tokens(config, student.tokenizer, opened.tokenizer)
    try:
        check_fits((rows.train, rows.eval, rows.test), student.tokenizer, opened.config)
    except DataError as error:
        raise DataError(f"teacher {config.teacher}: {error}") from None
    return opened


def check_tokens(config: Config, student: Any, teacher: Any) -> None:
    """ConfigError if student and teacher number a token differently; one of them may have more tokens at the end."""
    if teacher is None:
        raise ConfigError(
            f"teacher {config.teacher} has no tokenizer, so it is unknown whether its tokens are those of {config.model}; put its "
            "tokenizer's files beside it"
        )
    own, theirs = ({number: token for token, number in tokenizer.get_vocab().items()} for tokenizer in (student, teacher))
    other = [number for number in own.keys() & theirs.keys() if own[number] != theirs[number]]
    if other:
        first = min(other)
        raise ConfigError(
            f"teacher {config.teacher} has another tokenizer than {config.model}: {len(other):,} of {len(own):,} tokens differ, such as "
            f"{first}, {theirs[first]!r} and {own[first]!r}. Predictions are compared token by token; take a teacher of the student's "
            "family, or train on answers that the teacher has written (objective: sft)"
        )


def read_teacher(config: Config, opened: Opened | None, mesh: Mesh) -> dict[str, Teacher]:
    """What the teacher adds to the step's base: its weights on the mesh, with the run's computation settings; empty if there is none."""
    if opened is None:
        return {}
    model = read_model(opened, config.dtype, config.teacher_quantization, mesh)
    log.info("teacher: %s, %.2f GB of weights", model.config.model_type, nbytes(model.params) / 1e9)
    model.config = how_to_compute(config, model.config, mesh)
    nf4_kernel.verify_for(model.config, model.params)
    return {TEACHER: Teacher(model.params, model.config)}
