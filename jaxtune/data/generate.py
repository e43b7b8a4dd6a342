"""Create rows with a local model: new tasks from seed tasks, instructions for given texts, better answers to given prompts.

Each function is a generator of rows `{"prompt", "completion"}`, so that rows can be written as they are made (`save`). Every row passes
three filters: it is not empty, it is not similar to an earlier row (MinHash, as in `quality`), and `keep(row)` accepts it. Rejected rows
are counted in `Made`, which can be passed to each call.

    writer = Writer(functools.partial(jaxtune.generate, jaxtune.load("org/name")))
    save(self_instruct(writer, seeds, 1000, keep=lambda row: len(row["completion"]) > 20), "tasks.jsonl")
"""

import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtune.data.similar import Similar
from jaxtune.disk import naming
from jaxtune.errors import DataError

log = logging.getLogger("jaxtune")

NEW_TASK = """Here are some tasks that people ask of an assistant:

{tasks}

Write one more task of the same kind, different from all of these. Write the task alone, in one paragraph, without its answer."""
BACK = """Here is a text that an assistant wrote as an answer:

{text}

Write the question or instruction that this text answers best. Write the instruction alone."""
REWRITE = """Here is a question and an answer to it.

Question: {prompt}

Answer: {completion}

{how} Write the new answer alone."""
HOW = "Write a better answer: correct, complete, clear, and no longer than it needs to be."

Row = dict[str, str]
Keep = Callable[[Row], bool]


@dataclass
class Made:
    """How many rows were made, and how many were rejected, by reason."""

    rows: int = 0
    refused: dict[str, int] = field(default_factory=dict)

    def refuse(self, reason: str) -> None:
        """Count a rejected row."""
        self.refused[reason] = self.refused.get(reason, 0) + 1


@dataclass(frozen=True)
class Writer:
    """A model and how it is prompted.

    Attributes:
        generate: `(prompts, **settings) -> texts`: `jaxtune.generate` with its model (and adapter) filled in.
        settings: temperature, top_p, max_new_tokens, ...
        batch: prompts answered together.
        seed: for sampling and for the choice of examples.
    """

    generate: Callable[..., list[str]]
    settings: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0.8, "top_p": 0.95, "max_new_tokens": 256})
    batch: int = 16
    seed: int = 0

    def write(self, prompts: Sequence[str], number: int, **settings: Any) -> list[str]:
        """An answer to each prompt, stripped of surrounding white space. `number` gives each call its own randomness."""
        given = {**self.settings, **settings, "seed": self.seed * 1_000_003 + number}
        started = time.monotonic()
        texts = [text.strip() for text in self.generate(list(prompts), **given)]
        log.info("%d texts written in %.0f s", len(texts), time.monotonic() - started)
        return texts


def self_instruct(
    writer: Writer, seeds: Sequence[str], count: int, shown: int = 3, keep: Keep | None = None, made: Made | None = None,
    patience: int = 20,
) -> Iterator[Row]:  # fmt: skip
    """`count` new tasks similar to `seeds`, each with its answer (Wang et al., arXiv 2212.10560).

    Each prompt shows the model `shown` tasks, drawn from the seeds and from the tasks made so far, and asks for one more; accepted new
    tasks are then answered greedily. Stops early after `patience` batches without a new task.

    Raises:
        DataError: there are fewer seeds than `shown`.
    """
    if len(seeds) < shown:
        raise DataError(f"{len(seeds)} seed tasks were given, but each question shows {shown}; give more, or a smaller `shown`")
    gate = _Gate(keep, made, seeds)
    pool, rng, fruitless, number = list(seeds), random.Random(writer.seed), 0, 0
    while gate.made.rows < count and fruitless < patience:
        asked = [NEW_TASK.format(tasks="\n".join(f"- {_one_line(task)}" for task in rng.sample(pool, shown))) for _ in range(writer.batch)]
        tasks = []
        for task in writer.write(asked, number):
            task = re.sub(r"^(?:[-*]|\d+[.)]|(?:New )?[Tt]ask:)\s*", "", task.split("\n\n")[0]).strip()
            if gate.fresh(task):
                tasks.append(task)
        answers = writer.write(tasks, number + 1, temperature=0.0) if tasks else []
        number += 2
        before = gate.made.rows
        for task, answer in zip(tasks, answers, strict=True):
            if gate.made.rows < count and (row := gate.passed(task, answer)):
                pool.append(task)
                yield row
        fruitless = 0 if gate.made.rows > before else fruitless + 1


def back_translate(writer: Writer, texts: Iterable[str], keep: Keep | None = None, made: Made | None = None) -> Iterator[Row]:
    """For each text an instruction that it could be the answer to; the text itself is the completion (Li et al., arXiv 2308.06259)."""
    gate = _Gate(keep, made)
    for number, batch in enumerate(_batches(texts, writer.batch)):
        prompts = writer.write([BACK.format(text=text) for text in batch], number)
        for prompt, text in zip(prompts, batch, strict=True):
            if gate.fresh(prompt) and (row := gate.passed(prompt, text)):
                yield row


def rewrite(writer: Writer, rows: Iterable[Row], how: str = HOW, keep: Keep | None = None, made: Made | None = None) -> Iterator[Row]:
    """The same prompts with rewritten completions, following the instruction `how`. Prompts are kept even if they are similar."""
    gate = _Gate(keep, made)
    for number, batch in enumerate(_batches(rows, writer.batch)):
        asked = [REWRITE.format(prompt=row["prompt"], completion=row["completion"], how=how) for row in batch]
        for row, answer in zip(batch, writer.write(asked, number), strict=True):
            if new := gate.passed(row["prompt"], answer):
                yield new


def save(rows: Iterable[Row], file: str | os.PathLike) -> int:
    """Append rows to a JSONL file as they are made; returns their number."""
    count = 0
    with naming(Path(file)), open(file, "a", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            stream.flush()
            count += 1
    return count


def written(file: str | os.PathLike, *fields: str) -> list[dict[str, Any]]:
    """The rows with these fields that an earlier run has left in a JSONL file; a truncated last line is removed.

    Raises:
        DataError: the file holds other rows.
    """
    path = Path(file)
    if not path.exists():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    rows = [_row(line) for line in lines if line.strip()]
    if not all(isinstance(row, dict) and row.keys() >= {*fields} for row in rows):
        raise DataError(f"{path} holds other rows than those that are made ({', '.join(fields)}); name another file")
    if _row(last) is not None:  # complete except for its newline
        rows.append(_row(last))
        with path.open("ab") as stream:
            stream.write(b"\n")
    elif last:
        os.truncate(path, path.stat().st_size - len(last))
    return rows


def _row(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


class _Gate:
    """Decides which rows are accepted, and counts the others."""

    def __init__(self, keep: Keep | None, made: Made | None, known: Iterable[str] = ()):
        self.keep, self.made, self.seen = keep, made if made is not None else Made(), Similar(0.7)
        for text in known:
            self.seen.add(self.seen.sign(text))

    def fresh(self, prompt: str) -> bool:
        """Whether the prompt is not empty and unlike those before it."""
        signed = self.seen.sign(prompt)
        if not prompt or self.seen.find(signed) is not None:
            self.made.refuse("similar" if prompt else "empty")
            return False
        self.seen.add(signed)
        return True

    def passed(self, prompt: str, completion: str) -> Row | None:
        """The row, if it has an answer and the caller accepts it."""
        row = {"prompt": prompt, "completion": completion}
        if not completion:
            self.made.refuse("empty")
        elif self.keep is not None and not self.keep(row):
            self.made.refuse("filtered")
        else:
            self.made.rows += 1
            return row
        return None


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _one_line(text: str) -> str:
    return " ".join(text.split())
