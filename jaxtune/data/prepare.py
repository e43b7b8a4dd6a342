"""From the config to the rows of a run."""

import dataclasses
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtune.config import Config
from jaxtune.config import Source as SourceConfig
from jaxtune.config.objectives import ON_TOKENS
from jaxtune.config.policy import POLICY
from jaxtune.data import splits
from jaxtune.data import units as unit_kinds
from jaxtune.data.documents import Documents
from jaxtune.data.encode import SFT
from jaxtune.data.examples import Classified, Example, Labelled, Pair, Prompt, Steps
from jaxtune.data.files import Row
from jaxtune.data.mixing import mixture
from jaxtune.data.packing import make_plan, widened
from jaxtune.data.rollout_prompts import Prompts
from jaxtune.data.screen import screened, sources_of
from jaxtune.data.source import Source
from jaxtune.data.tokenised import examples, tokenise
from jaxtune.errors import ConfigError, DataError

log = logging.getLogger("jaxtune")
MOST_STEPS = 10_000_000  # a table holds the learning rate of each step
# objective: the kind of its rows. All others take preference pairs.
KINDS: dict[str, tuple[type, ...]] = {"kto": (Labelled, Pair), "stepwise_reward": (Steps,), "classification": (Classified,)}
KINDS |= dict.fromkeys(ON_TOKENS, SFT)
KINDS |= dict.fromkeys(POLICY, (Prompt,))


@dataclass(frozen=True)
class Data:
    """The training and evaluation data of a run, and the ledger of how it was made.

    Attributes:
        train: batches by step number.
        eval: None without evaluation rows.
        test: rows excluded from both; None without test rows.
        ledger: for `run.json` and the report: rows and tokens read, kept, cut and dropped, by source and reason.
    """

    train: Source
    eval: Source | None
    test: Source | None
    ledger: dict


def load(config: Config, tokenizer: Any, data_parallel: int = 1, survey: bool = False) -> Data:
    """Read, tokenise (or load from the cache), split, mix and plan the data of `config`.

    Args: config: `config.data` says which rows and how; batch sizes and seed come from the config itself. tokenizer: a fast Hugging Face
    tokenizer, with the chat template that chat rows need. data_parallel: devices that hold different rows. A micro-batch has
    `per_device_train_batch_size * data_parallel` rows, or as many pairs of rows for an objective that compares two answers. survey: leave
    out, and record, rows that would stop a run. For the report.

    Raises:
        DataError: an unusable source or row, with its file, number, the reason and what to change.
    """
    if not config.data.train:
        raise DataError("no training data is named; set data.train to a file, folder, glob or hub id")
    sources = _sources(config, tokenizer, data_parallel, survey)
    folds = [dataclasses.replace(config.data, fold=fold) for fold in range(config.data.kfold or 0) if fold != (config.data.fold or 0)]
    others = [_sources(config.replace(data=fold), tokenizer, data_parallel, survey) for fold in folds]
    for name, source in sources.items():  # folds share shapes, so that one compilation serves all
        source.plan = widened(source.plan, [other[name].plan for other in others])
    ledger = {name: source.documents.info for name, source in sources.items()}
    return Data(sources["train"], sources.get("eval"), sources.get("test"), ledger)


def total_steps(config: Config, train: Source) -> int:
    """Optimiser steps of a run on these rows: `max_steps`, or those of `num_train_epochs`. ConfigError if they are absurdly many."""
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * train.steps_per_epoch)
    if steps > MOST_STEPS:
        raise ConfigError(f"the run would have {steps} steps, but at most {MOST_STEPS} are possible; lower max_steps or num_train_epochs")
    return steps


def _sources(config: Config, tokenizer: Any, data_parallel: int, survey: bool) -> dict[str, Source]:
    parts = divide(config, tokenizer, survey)
    if config.data.replay is not None:
        parts["train"] = Documents.join([parts["train"], _read((config.data.replay,), config, tokenizer, survey)])
    if config.objective in POLICY:
        return {name: Prompts.of(part, config, name, data_parallel) for name, part in parts.items()}
    return {name: _source(part, config, name == "train", data_parallel) for name, part in parts.items()}


def check_fits(sources: Iterable[Source | None], tokenizer: Any, model_config: Any, virtual: int = 0) -> None:
    """DataError for a row with a token that the model lacks, or longer than its position table, if it has one (GPT-2), of which `virtual`
    tokens take the first.

    With rotary positions, a row longer than the model's context is only a warning. Tokens are checked if the tokenizer has more of them
    than the model.
    """
    unknown = max(tokenizer.get_vocab().values(), default=0) >= model_config.vocab_size
    most = model_config.max_position_embeddings - virtual
    sources = list(sources)
    for source in sources:
        if source is None:
            continue
        if unknown:
            source.check_vocabulary(model_config.vocab_size)
        if not model_config.ropes and source.units.longest > most:
            ends = f"has room for {most} beside {virtual} virtual tokens" if virtual else f"ends at {most}"
            raise DataError(
                f"the longest row has {source.units.longest} tokens, and this model's table of positions {ends}; "
                f"write data.max_length: {most} (or less), with data.length_policy: drop or truncate"
            )
    longest = max((source.units.longest for source in sources if source is not None), default=0)
    if model_config.ropes and longest > most:
        log.warning(
            "the longest row has %d tokens, and this model's max_position_embeddings is %d: positions beyond it are new to the model; "
            "write data.max_length: %d, or extend them by rope_scaling in its config.json", longest, most, most,
        )  # fmt: skip


def evaluation(config: Config, tokenizer: Any, name: str = "eval", data_parallel: int = 1) -> Source:
    """The batches of the `eval` or `test` side alone; `data.train` is only needed if that side is a share of it.

    Raises:
        DataError: the config names no such rows.
    """
    require(config, name)
    return _source(divide(config, tokenizer)[name], config, False, data_parallel)


def require(config: Config, name: str) -> None:
    """Raise DataError if the config names no rows for the `eval` or `test` side."""
    if getattr(config.data, name) is None and (name != "eval" or config.data.kfold is None):
        raise DataError(f"no {name} rows are named; set data.{name} to a file, or to a share of the training rows like 0.05")


def divide(config: Config, tokenizer: Any, survey: bool = False) -> dict[str, Documents]:
    """The documents of each non-empty side, without `data.replay`."""
    data, parts = config.data, {}
    if data.train:
        documents = _read(data.train, config, tokenizer, survey)
        side = splits.sides(documents, config)
        indices = {name: np.flatnonzero(side == number) for number, name in enumerate(splits.SIDES)}
        parts = {name: documents.select(index) for name, index in indices.items() if len(index)}
    for name, sources in (("eval", data.eval), ("test", data.test)):
        if isinstance(sources, tuple):
            parts[name] = _read(sources, config, tokenizer, survey)
    return screened(parts, config, survey)


def _read(sources: tuple[SourceConfig, ...], config: Config, tokenizer: Any, survey: bool) -> Documents:
    kinds = KINDS.get(config.objective, (Pair,))
    return Documents.join([_limited(tokenise(source, config, tokenizer, kinds, survey), source.limit) for source in sources])


def _source(documents: Documents, config: Config, training: bool, data_parallel: int) -> Source:
    data = config.data
    rows = data_parallel * (config.per_device_train_batch_size if training else config.per_device_eval_batch_size)
    seed = config.seed if config.data_seed is None else config.data_seed
    units = unit_kinds.make(documents, config, training)
    lengths, trained = unit_kinds.room(units, config) if training else (units.lengths, units.trained)
    longest = int(lengths.max())  # several answers together may exceed max_length
    plan = make_plan(lengths, trained, units.part, data.packing, max(data.max_length, longest), seed)
    if training and config.objective == "kto":
        unit_kinds.warn_of_one_label(units)
    if not training:
        return Source(units, plan, rows, seed=seed, shuffle=False)
    mix = mixture(units.part[plan.docs[plan.starts[:-1]]], config)
    return Source(units, plan, rows, config.gradient_accumulation_steps, seed, data.shuffle, mix)


def _limited(documents: Documents, limit: int | None) -> Documents:
    """At most `limit` rows: those with the lowest hashes, so that the choice is stable when rows are added."""
    if limit is None:
        return documents
    rows = np.unique(documents.rows)
    if len(rows) <= limit:
        return documents
    first = np.searchsorted(documents.rows, rows)  # a row's documents are adjacent, rows in the order of the file
    kept = rows[np.argsort(splits.places(documents.content[first], 0), kind="stable")[:limit]]
    return documents.select(np.flatnonzero(np.isin(documents.rows, kept)))


def held_out(config: Config, tokenizer: Any, name: str = "eval") -> Iterator[tuple[Row, Example]]:
    """The rows of the evaluation (or `test`) side, as `load` splits them, and their examples."""
    documents = divide(config, tokenizer)[name]
    for part, source in enumerate(sources_of(config, name)):
        kept = set(documents.rows[documents.part == part].tolist())
        yield from ((row, example) for row, example in examples(source, config) if row.index in kept)
