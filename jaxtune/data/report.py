"""What the model will see, counted before the first step."""

import collections
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from jaxtune.config import Config
from jaxtune.data import quality
from jaxtune.data.prepare import divide, load, total_steps
from jaxtune.data.rollout_prompts import Prompts
from jaxtune.data.screen import items, sources_of
from jaxtune.data.source import Source
from jaxtune.data.tokenizer import run_tokenizer
from jaxtune.data.units import Pairs, Stepwise
from jaxtune.errors import DataError

SHOWN = 10  # rows with their masks
EXAMPLES = 5  # of each problem
BINS = 24


@dataclass(frozen=True)
class Preview:
    """One row as the model sees it: `runs` of (text, trained), and its place."""

    place: str
    tokens: int
    trained: int
    runs: list[tuple[str, bool]]


@dataclass(frozen=True)
class Report:
    """Counts are of the training rows unless stated otherwise.

    Attributes:
        rows: training rows.
        tokens: tokens of an epoch, without padding.
        trained_tokens: those of them that are trained.
        packing_efficiency: tokens divided by token slots.
        packed_rows: rows of the batches that hold all documents once; `row_length` is their length in tokens.
        steps_per_epoch: optimiser steps of an epoch.
        steps: of the whole run.
        sides: `train`, `eval`, `test` -> rows.
        sources: for each source its ledger in numbers, and its share of an epoch's rows.
        dropped: reason -> dropped rows, on all sides together.
        cut: rows cut to max_length, and the tokens this removed; rows that were split.
        examined: rows that were compared with each other; fewer than all for a stream.
        problems: name -> rows that have it, on all sides together, including those dropped for it.
        stops: names of the problems that stop a run under the current `data.quality`.
        examples: name -> place and problem of the first few rows.
        lengths: minimum, quartiles, 95th and 99th percentile and maximum of the tokens per document.
        histogram: upper edges and counts of the documents' lengths.
        previews: ten rows with their masks.
        notes: remarks that concern no single row.
    """

    rows: int
    tokens: int
    trained_tokens: int
    packing_efficiency: float
    packed_rows: int
    row_length: list[int]
    steps_per_epoch: int
    steps: int
    sides: dict[str, int]
    sources: list[dict]
    dropped: dict[str, int]
    cut: dict[str, int]
    examined: int
    problems: dict[str, int]
    stops: list[str]
    examples: dict[str, list[str]]
    lengths: dict[str, int]
    histogram: list[tuple[int, int]]
    previews: list[Preview]
    notes: list[str]

    def losses(self) -> list[str]:
        """What is dropped, cut and split, in words, a line each."""
        lines = [f"{count:,} rows dropped: {name.replace('_', ' ')}" for name, count in self.dropped.items()]
        if self.cut["rows"]:
            lines.append(f"{self.cut['rows']:,} rows cut, by {self.cut['tokens']:,} tokens")
        if self.cut["split"]:
            lines.append(f"{self.cut['split']:,} rows split")
        return lines

    def to_dict(self) -> dict:
        """For JSON."""
        return asdict(self)


def report(config: Config, tokenizer: Any, data_parallel: int = 1, vocabulary: int | None = None) -> Report:
    """Examine the data of `config`: everything `load` does, and every check of `quality`, without stopping at a row.

    `vocabulary`: the number of tokens that the model knows, if known.

    Raises:
        DataError: a source cannot be read at all, or none of its rows can be used.
    """
    tokenizer = run_tokenizer(config, tokenizer)
    data = load(config, tokenizer, data_parallel, survey=True)
    sides = {name: source for name in ("train", "eval", "test") if (source := getattr(data, name)) is not None}
    parts = divide(config, tokenizer, survey=True)
    compared = items(config, parts)
    findings = quality.examine(compared)
    places, examples = _problems(data.ledger, findings)
    policies = quality.policies(config)
    stops = sorted(name for name in places if policies.get(name, "error") == "error")
    lengths = data.train.documents.lengths
    steps = total_steps(config, data.train)
    return Report(
        rows=_rows(data.train),
        tokens=data.train.tokens,
        trained_tokens=data.train.trained_tokens,
        packing_efficiency=round(data.train.efficiency, 4),
        packed_rows=len(data.train.plan),
        row_length=list(data.train.plan.lengths),
        steps_per_epoch=data.train.steps_per_epoch,
        steps=steps,
        sides={name: _rows(source) for name, source in sides.items()},
        sources=_sources(config, data.ledger, data.train),
        dropped=_dropped(data.ledger),
        cut={
            "rows": sum(len(info["cut"]) for info in data.ledger["train"]),
            "tokens": sum(sum(info["cut"].values()) for info in data.ledger["train"]),
            "split": sum(len(info["parts"]) for info in data.ledger["train"]),
        },
        examined=len(compared),
        problems={name: len(rows) for name, rows in sorted(places.items())},
        stops=stops,
        examples=examples,
        lengths={
            name: int(value)
            for name, value in zip(
                ("min", "25%", "median", "75%", "95%", "99%", "max"), np.percentile(lengths, [0, 25, 50, 75, 95, 99, 100]), strict=True
            )
        },
        histogram=_histogram(lengths),
        previews=_previews(data.train, config, tokenizer),
        notes=[
            *_unknown(sides.values(), tokenizer, vocabulary),
            *_notes(compared, sum(map(_rows, sides.values())), tokenizer),
            *_prompt_notes(data.train, tokenizer),
        ],
    )


def _unknown(sources: Iterable[Source], tokenizer: Any, vocabulary: int | None) -> Iterator[str]:
    """The first token in a row that the model lacks, which stops training."""
    if vocabulary is None or max(tokenizer.get_vocab().values(), default=0) < vocabulary:
        return
    for source in sources:
        try:
            source.check_vocabulary(vocabulary)
        except DataError as error:
            yield f"Training will stop at {error}."
            return


def _notes(compared: list[quality.Item], rows: int, tokenizer: Any) -> Iterator[str]:
    seams = [item.seam for item in compared if item.seam]
    if len(seams) > len(compared) / 2:
        chat = ", or write columns: {instruction: ..., output: ...} to make messages of them for the chat template" * bool(
            tokenizer.chat_template
        )
        yield (
            f"In {len(seams):,} rows the prompt joins the answer without a space ({seams[0]!r}). Prompt and completion are concatenated as "
            f"they are: put a space or line break into one of them{chat}."
        )
    if len(compared) < rows:
        yield f"Of the stream, the first {len(compared):,} rows were compared with each other."


def _prompt_notes(train: Source, tokenizer: Any) -> Iterator[str]:
    if not isinstance(train, Prompts):
        return
    layout, columns = train.layout, list(train.fields[0])
    yield (
        f"Rows are prompts: {layout.answers} answers of up to {layout.most} tokens are drawn to each of {layout.prompts} at a time. "
        f"Rewards see the columns {', '.join(columns) or '(none beside prompt)'}."
    )
    if tokenizer.chat_template and any(isinstance(prompt, str) for prompt in train.originals):
        yield (
            "Text prompts are continued as they are, without the tokenizer's chat template; for a model that chats "
            'write them as messages: [{"role": "user", "content": ...}].'
        )


def _rows(source: Source) -> int:
    documents = source.documents  # those of a row are adjacent
    return 1 + int(np.count_nonzero((np.diff(documents.part) != 0) | (np.diff(documents.rows) != 0)))


def _dropped(ledger: dict[str, list[dict]]) -> dict[str, int]:
    """A source that is split into sides is in the ledger of each; count its rows once."""
    rows: dict[str, set] = collections.defaultdict(set)
    for infos in ledger.values():
        for info in infos:
            for reason, numbers in info["dropped"].items():
                rows[reason].update((info["path"], number) for number in numbers)
    return {reason: len(numbers) for reason, numbers in sorted(rows.items())}


def _problems(ledger: dict[str, list[dict]], findings: quality.Findings) -> tuple[dict[str, set], dict[str, list[str]]]:
    rows: dict[str, set] = collections.defaultdict(set)
    examples: dict[str, dict[str, None]] = collections.defaultdict(dict)
    for infos in ledger.values():
        for info in infos:
            for name, numbers in info["problems"].items():
                rows[name].update((info["path"], number) for number in numbers)
                examples[name].update(dict.fromkeys(f"{info['path']}, {example}" for example in info["examples"][name]))
    for name, found in findings.rows.items():
        rows[name].update((item.place, item.side) for item, _ in found)
        examples[name].update(dict.fromkeys(f"{item.place}: {reason}" for item, reason in found[:EXAMPLES]))
    return rows, {name: list(lines)[:EXAMPLES] for name, lines in sorted(examples.items())}


def _sources(config: Config, ledger: dict[str, list[dict]], train: Source) -> list[dict]:
    """Each source once, with the rows that an epoch takes of it."""
    taken, tokens = train.by_source()
    out = []
    for side, infos in ledger.items():
        if side != "train" and sources_of(config, side) is config.data.train:
            continue
        for number, info in enumerate(infos):
            counts = {key: info[key] for key in ("path", "rows", "tokens", "documents", "kept_tokens", "trained_tokens")}
            share = {"row_share": taken[number] / taken.sum(), "token_share": tokens[number] / tokens.sum()} if side == "train" else {}
            out.append({"side": side, **counts} | {name: round(float(value), 4) for name, value in share.items()})
    return out


def _histogram(lengths: np.ndarray) -> list[tuple[int, int]]:
    step = max(int(np.ceil(lengths.max() / BINS)), 1)
    counts = np.bincount((lengths - 1) // step)
    return [(int((n + 1) * step), int(count)) for n, count in enumerate(counts)]


def _previews(train: Source, config: Config, tokenizer: Any) -> list[Preview]:
    """Rows at even distances, as text in runs of trained and untrained tokens."""
    documents, found = train.documents, []
    for doc in np.unique(np.linspace(0, len(documents) - 1, min(SHOWN, len(documents))).astype(int)):
        ids, mask = documents[doc]
        edges = np.flatnonzero(np.diff(mask > 0)) + 1
        runs = [(part.tolist(), bool(marks[0])) for part, marks in zip(np.split(ids, edges), np.split(mask, edges), strict=True)]
        decoded = [(tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False), on) for part, on in runs]
        place = f"{documents.info[documents.part[doc]]['path']}, row {documents.rows[doc]}"
        if isinstance(train.units, Pairs):
            place += ", rejected" if doc % 2 else ", chosen"
        elif train.answers[-1] and not isinstance(train.units, Stepwise):
            place += f", label {int(mask.max()) - 1}"
        found.append(Preview(place, len(ids), int((mask > 0).sum()), decoded))
    return found
