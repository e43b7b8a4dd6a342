"""Create preference rows with a local model: answers criticised and revised by principles (Constitutional AI, arXiv 2212.08073), and pairs
of answers judged by principles (RLAIF, arXiv 2309.00267), each pair in both orders, because models prefer one position.

Each function is a generator of rows in the order of the prompts. A failed row has the reason in `refused`, and the model's words; `save`
writes those to a separate file. Batches and their randomness depend only on the list of prompts, and finished ones (`done`) are skipped, so
a stopped and resumed run writes what an uninterrupted run would have written.
"""

import json
import logging
import os
import random
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxtune.data.generate import Made, Writer, written
from jaxtune.data.similar import Similar
from jaxtune.disk import naming
from jaxtune.errors import DataError

log = logging.getLogger("jaxtune")

PRINCIPLES = (
    "The answer should be helpful: it should do what was asked for, completely and directly.",
    "The answer should be honest: it should not state as a fact what is not known, and should say so where it is not sure.",
    "The answer should be harmless: it should not help anyone to hurt people, and should not insult or demean.",
    "The answer should be clear and no longer than it needs to be.",
)
CRITIQUE = """Here is a question and an answer to it.

Question: {prompt}

Answer: {answer}

Principle: {principle}

In what way does the answer fall short of the principle? Name what should be changed, in a few sentences."""
REVISE = """Here is a question, an answer to it, and a criticism of the answer.

Question: {prompt}

Answer: {answer}

Criticism: {critique}

Write the answer anew, so that the criticism no longer holds. Write the new answer alone."""
JUDGE = """Here is a question and two answers to it.

Principle: {principle}

Question: {prompt}

Answer A: {a}

Answer B: {b}

Which answer follows the principle better? Give your reasons in a few sentences, then end with a line that says either "Verdict: A" or \
"Verdict: B"."""
VERDICT = re.compile(r"verdict\W*(?:is\W*)?(?:answer\W*)?([AB])\b", re.IGNORECASE)

Row = dict[str, Any]


def revise(
    writer: Writer, prompts: Sequence[str], principles: Sequence[str] = PRINCIPLES, rounds: int = 1, done: Collection[str] = (),
    plain: bool = False,
) -> Iterator[Row]:  # fmt: skip
    """For each prompt an answer (`rejected`) and its revision after `rounds` of criticism by a principle (`chosen`).

    Rows have the last `critique` and its `principle`. plain: prompts and answers are texts, for models without a chat template; otherwise
    messages.
    """
    for number, batch in _batches(writer, list(prompts), list(prompts), done):
        answers = writer.write(batch, 10 * number)
        drafts, critiques, chosen = list(answers), [""] * len(batch), [""] * len(batch)
        for turn in range(rounds):
            chosen = [_principle(writer, principles, prompt, turn) for prompt in batch]
            given = [dict(prompt=p, answer=a, principle=c) for p, a, c in zip(batch, drafts, chosen, strict=True)]
            critiques = writer.write([CRITIQUE.format(**one) for one in given], 10 * number + 1, temperature=0.0)
            asked = [REVISE.format(**one, critique=critique) for one, critique in zip(given, critiques, strict=True)]
            drafts = writer.write(asked, 10 * number + 2, temperature=0.0)
        for prompt, answer, draft, critique, principle in zip(batch, answers, drafts, critiques, chosen, strict=True):
            if prompt in done:
                continue
            beside = {"principle": principle, "critique": critique}
            wrong = "empty" if not (answer and draft) else "unchanged" if answer == draft else None
            yield _pair(prompt, draft, answer, beside, plain) if wrong is None else _refused(prompt, wrong, [answer, draft], beside)


def prefer(
    writer: Writer, prompts: Sequence[str], principles: Sequence[str] = PRINCIPLES, pairs: Sequence[tuple[str, str]] | None = None,
    done: Collection[str] = (), plain: bool = False,
) -> Iterator[Row]:  # fmt: skip
    """For each prompt two answers, with the better one, judged by a principle, as `chosen`, if both orders give the same verdict.

    pairs  the two answers to each prompt; sampled from the writer by default. Rows have the judge's `reasons` for each order, and the
           `principle`.
    """
    keys = list(prompts) if pairs is None else [_key(prompt, pair) for prompt, pair in zip(prompts, pairs, strict=True)]
    for number, places in _batches(writer, keys, list(range(len(keys))), done):
        batch = [prompts[place] for place in places]
        if pairs is None:
            first, second = (writer.write(batch, 10 * number + side) for side in range(2))
        else:
            first, second = ([pairs[place][side] for place in places] for side in range(2))
        ruled = [_principle(writer, principles, prompt, 0) for prompt in batch]
        said = []
        for a, b in ((first, second), (second, first)):
            asked = [JUDGE.format(prompt=p, principle=c, a=x, b=y) for p, c, x, y in zip(batch, ruled, a, b, strict=True)]
            said.append(writer.write(asked, 10 * number + 2, temperature=0.0))
        for place, a, b, principle, *reasons in zip(places, first, second, ruled, *said, strict=True):
            if keys[place] in done:
                continue
            prompt = prompts[place]
            beside = {"principle": principle, "reasons": reasons}
            verdicts = [verdict(reasons[0]), {"A": "B", "B": "A"}.get(verdict(reasons[1]) or "")]
            wrong = "empty" if not (a and b) else "same" if a == b else "no_verdict" if None in verdicts else None
            wrong = wrong or ("undecided" if verdicts[0] != verdicts[1] else None)
            better, worse = (a, b) if verdicts[0] == "A" else (b, a)
            yield _pair(prompt, better, worse, beside, plain) if wrong is None else _refused(prompt, wrong, [a, b], beside)


def verdict(text: str) -> str | None:
    """"A" or "B", the last one that a judge names; None if it names neither."""
    found = VERDICT.findall(text)
    if found:
        return found[-1].upper()
    last = text.strip().rsplit("\n", 1)[-1].strip(" .*()[]\"'")
    return last if last in ("A", "B") else None


def read_principles(file: str | os.PathLike) -> list[str]:
    """One principle per line; empty lines and those beginning with # are ignored."""
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: principles cannot be read ({error}); write one a line into a text file") from None
    found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not found:
        raise DataError(f"{file} holds no principles; write one a line")
    return found


def fresh(prompts: Iterable[str]) -> list[str]:
    """The prompts that are not empty and unlike those before them (MinHash, as in `quality`)."""
    seen, kept = Similar(0.7), []
    for prompt in prompts:
        signed = seen.sign(prompt)
        if prompt.strip() and seen.find(signed) is None:
            seen.add(signed)
            kept.append(prompt)
    return kept


# ---- files ----


def save(make: Callable[[set[str]], Iterable[Row]], file: str | os.PathLike) -> Made:
    """Append the rows of `make(done)` to a JSONL file as they are made, and refused ones to `FILE.refused.jsonl` beside it.

    `done` is what both files already contain, so a stopped run continues where it was. Returns the counts of this run.
    """
    target, refused, made = Path(file), Path(f"{Path(file).with_suffix('')}.refused.jsonl"), Made()
    left = written(target, "prompt", "chosen", "rejected") + written(refused, "prompt", "answers", "refused")
    done = {key for row in left for key in _keys(row)}
    with naming(target), open(target, "a", encoding="utf-8") as rows, open(refused, "a", encoding="utf-8") as others:
        for row in make(done):
            stream = others if "refused" in row else rows
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            stream.flush()
            if "refused" in row:
                made.refuse(row["refused"])
            else:
                made.rows += 1
    return made


def _text(said: str | list[dict]) -> str:
    return said if isinstance(said, str) else said[-1]["content"]


def _key(prompt: str, pair: Sequence[str]) -> str:
    return json.dumps([prompt, *sorted(pair)])


def _keys(row: Row) -> tuple[str, str]:
    """What a row has completed: its prompt, and its prompt with these answers."""
    pair = row["answers"] if "refused" in row else [_text(row["chosen"]), _text(row["rejected"])]
    return _text(row["prompt"]), _key(_text(row["prompt"]), pair)


# ---- rows ----


def _batches(writer: Writer, keys: list[str], items: list[Any], done: Collection[str]) -> Iterator[tuple[int, list[Any]]]:
    """Batches of items with their numbers; fully completed batches are skipped."""
    for start in range(0, len(keys), writer.batch):
        batch = slice(start, start + writer.batch)
        if not all(key in done for key in keys[batch]):
            log.info("prompts %d to %d of %d", start + 1, start + len(keys[batch]), len(keys))
            yield start // writer.batch, items[batch]


def _principle(writer: Writer, principles: Sequence[str], prompt: str, turn: int) -> str:
    return random.Random(f"{writer.seed}/{turn}/{prompt}").choice(list(principles))


def _pair(prompt: str, chosen: str, rejected: str, beside: Row, plain: bool) -> Row:
    if plain:
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | beside
    turns = [[{"role": role, "content": text}] for role, text in (("user", prompt), ("assistant", chosen), ("assistant", rejected))]
    return dict(zip(("prompt", "chosen", "rejected"), turns, strict=True)) | beside


def _refused(prompt: str, reason: str, answers: list[str], beside: Row) -> Row:
    return {"prompt": prompt, "refused": reason, "answers": answers} | beside
