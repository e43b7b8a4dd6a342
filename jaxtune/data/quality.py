"""What may be wrong with rows, and what to do about it.

Some problems show while a row is encoded (`encode.py` records them), the others when rows are compared: `examine`, which the report always
runs, and training if `data.quality` drops rows or stops for one of its problems.
"""

import collections
import difflib
import functools
import math
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from jaxtune.config import Config
from jaxtune.data.examples import Chat, Classified, Completion, Example, Labelled, Pair, Prompt, Segments, Steps, Text
from jaxtune.data.similar import Similar
from jaxtune.errors import ConfigError

# problem -> default action: drop the row, keep it (and count it), or stop with an error
ENCODING_TIME = {
    "double_bos": "error", "stop_token_untrained": "error", "prompts_differ": "error", "lone_surrogate": "error", "media": "error",
    "unknown_role": "error",
    "chosen_equals_rejected": "keep", "no_prompt": "keep", "empty_answer": "keep", "special_token": "keep",
}  # fmt: skip
DEFAULTS = ENCODING_TIME | dict.fromkeys(
    (
        "exact_duplicate", "near_duplicate", "leakage", "repeated_answer", "short_answer", "truncated_answer", "label_imbalance",
        "length_outlier", "encoding", "language", "secret", "email_address",
    ),
    "keep",
)  # fmt: skip

SIMILAR = 0.8  # Jaccard similarity of word triples from which two rows are near duplicates
FEW = 20  # with fewer rows, nothing is judged as unusual
REPEATED = 5  # different prompts with the same answer
IMBALANCED = 0.8  # share of the most common label
OUTLYING = 5  # standard deviations of the logarithm of the length
SURE = 0.99  # of a language
SECRETS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36}|\bgithub_pat_\w{22,}"
    r"|\bsk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,}"
    r"|\bxox[abprs]-[A-Za-z0-9-]{10,}|\bAIza[0-9A-Za-z_-]{35}\b|\bhf_[A-Za-z0-9]{34}\b|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"
)
EMAIL = re.compile(r"\b[A-Za-z0-9._%+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}\b")
SCRIPTS = {
    "Latin": re.compile(r"[A-Za-z\u00c0-\u024f]"), "Cyrillic": re.compile(r"[\u0400-\u04ff]"), "Greek": re.compile(r"[\u0370-\u03ff]"),
    "Chinese or Japanese": re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]"), "Hangul": re.compile(r"[\uac00-\ud7af]"),
    "Arabic": re.compile(r"[\u0600-\u06ff]"), "Hebrew": re.compile(r"[\u0590-\u05ff]"), "Devanagari": re.compile(r"[\u0900-\u097f]"),
    "Thai": re.compile(r"[\u0e00-\u0e7f]"),
}  # fmt: skip
_BROKEN = re.compile("\ufffd|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|[\ud800-\udfff]")


def policies(config: Config) -> dict[str, str]:
    """What to do about each problem."""
    for name, policy in config.data.quality:
        if name not in DEFAULTS:
            near = difflib.get_close_matches(name, DEFAULTS, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(DEFAULTS)}"
            raise ConfigError(f"data.quality.{name}: {policy} names no problem that is looked for; {hint}")
    return DEFAULTS | dict(config.data.quality)


@dataclass(frozen=True)
class Item:
    """A row to examine.

    Attributes:
        side: `train`, `eval` or `test`.
        source: number of its source on that side.
        row: its index in that source.
        place: its place in words.
        prompt: everything before the answer, as text.
        answer: the answer; for plain text, the text.
        other: further text: the rejected answer.
        seam: the text around the place where a plain prompt joins its answer without a space or newline; otherwise empty.
    """

    side: str
    source: int
    row: int
    place: str
    prompt: str
    answer: str
    other: str = ""
    seam: str = ""

    @property
    def text(self) -> str:
        """Prompt and answer."""
        return f"{self.prompt}\n{self.answer}".strip()


@dataclass
class Findings:
    """Problem -> the rows that have it, each with the reason."""

    rows: dict[str, list[tuple[Item, str]]] = field(default_factory=dict)

    def add(self, name: str, item: Item, reason: str) -> None:
        """Book a row."""
        self.rows.setdefault(name, []).append((item, reason))


def texts(example: Example) -> tuple[str, str, str]:
    """Prompt, answer and other answer of an example, as text."""
    if isinstance(example, Pair):
        prompt, answer, _ = texts(example.chosen)
        return prompt, answer, texts(example.rejected)[1]
    if isinstance(example, Labelled | Classified):
        return texts(example.example)
    if isinstance(example, Text):
        return "", example.text, ""
    if isinstance(example, Completion):
        return example.prompt, example.completion, ""
    if isinstance(example, Steps):
        return example.prompt, "\n".join(example.steps), ""
    if isinstance(example, Segments):
        read, said = ("".join(text for text, trained in example.parts if trained == wanted) for wanted in (False, True))
        return read, said, ""
    if isinstance(example, Chat | Prompt):
        said = example.messages if isinstance(example, Chat) else example.prompt
        if isinstance(said, str):
            return said, "", ""
        contents = [f"{m.get('content') or ''}{m.get('tool_calls') or ''}" for m in said if m["role"] not in ("system", "developer")]
        return "\n".join(contents[:-1]), contents[-1] if contents else "", ""
    return "", "", ""  # token ids carry no text


def seam(example: Example) -> str:
    """The text around the place where a plain prompt joins its answer, as in `... altogether?She has`; empty if they are separated."""
    if isinstance(example, Pair):
        example = example.chosen
    if not isinstance(example, Completion):
        return ""
    ends, begins = example.prompt[-1:], example.completion[:1]
    together = (ends.isalnum() or ends in (*".?!",)) and begins.isalnum() and (ends + begins).isascii()
    return f"{example.prompt[-12:]}{example.completion[:12]}" if together else ""


def examine(items: list[Item]) -> Findings:
    """Every problem that shows when rows are compared."""
    found = Findings()
    kept = [item for item in items if item.text]
    for item, reason, name in (*_duplicates(kept), *_leaks(kept), *_answers(kept), *_lengths(kept), *_languages(kept)):
        found.add(name, item, reason)
    for item in kept:
        for name, reason in _row_problems(item):
            found.add(name, item, reason)
    return found


Found = Iterator[tuple[Item, str, str]]


def _row_problems(item: Item) -> Iterator[tuple[str, str]]:
    text = f"{item.text}\n{item.other}"
    if match := SECRETS.search(text):
        yield "secret", f"holds what looks like a key or token: {match.group()[:8]}..."
    if match := EMAIL.search(text):
        yield "email_address", f"holds {match.group()}"
    if match := _BROKEN.search(text):
        yield "encoding", f"holds the broken character {match.group()!r}: {_around(text, match.start())}"
    elif not text.isascii():
        import ftfy.badness

        if ftfy.badness.is_bad(text):
            at = ftfy.badness.BADNESS_RE.search(text)
            yield "encoding", f"was decoded with the wrong encoding: {_around(text, at.start() if at else 0)}"


def _duplicates(items: list[Item]) -> Found:
    """Rows whose text occurred before on the same side: equal except for white space, or similar."""
    for side in ("train", "eval", "test"):
        here = [item for item in items if item.side == side]
        first: dict[str, Item] = {}
        for item in here:
            text = " ".join(item.text.split())
            if text in first:
                yield item, f"is the same as {first[text].place}", "exact_duplicate"
            else:
                first[text] = item
        yield from _near(list(first.values()))


def _near(items: list[Item]) -> Found:
    index = Similar(SIMILAR)
    for item in items:
        signed = index.sign(item.text)
        if (other := index.find(signed)) is not None:
            yield item, f"is {other[1]:.0%} like {items[other[0]].place}", "near_duplicate"
        index.add(signed)


def _leaks(items: list[Item]) -> Found:
    """Evaluation and test rows whose prompt (for plain text: whole text) occurs in training, or a similar one."""
    train = [item for item in items if item.side == "train"]
    rest = [item for item in items if item.side != "train"]
    if not rest:
        return
    index, exact = Similar(SIMILAR), {}
    for item in train:
        text = item.prompt or item.answer
        index.add(index.sign(text))
        exact.setdefault(" ".join(text.split()), item)
    for item in rest:
        text = item.prompt or item.answer
        same = exact.get(" ".join(text.split()))
        if same is not None:
            yield item, f"is in the training rows too, {same.place}", "leakage"
        elif (other := index.find(index.sign(text))) is not None:
            yield item, f"is {other[1]:.0%} like training row {train[other[0]].place}", "leakage"


def _answers(items: list[Item]) -> Found:
    """Answers that are the same for many prompts, stop in the middle, or are one word where others are long."""
    asked = [item for item in items if item.prompt and item.answer.strip()]
    if len(asked) < FEW:
        return
    same: dict[str, list[Item]] = collections.defaultdict(list)
    for item in asked:
        same[" ".join(item.answer.split())].append(item)
    if len(same) <= max(20, len(asked) // 50):  # few answers for many prompts: these are labels
        most, commonest = max(same.items(), key=lambda pair: len(pair[1]))
        share = len(commonest) / len(asked)
        if len(same) > 1 and share > IMBALANCED:
            yield from ((item, f"has the answer {most[:30]!r}, as {share:.0%} of the rows have", "label_imbalance") for item in commonest)
        return
    for answer, rows in same.items():
        prompts = {item.prompt for item in rows}
        if len(prompts) >= REPEATED:
            yield from ((item, f"answers {answer[:40]!r}, as {len(prompts)} prompts are answered", "repeated_answer") for item in rows)
    words = [len(item.answer.split()) for item in asked]
    if statistics.median(words) >= 8:
        yield from (
            (item, f"answers with one word, {item.answer.strip()[:30]!r}", "short_answer")
            for item, count in zip(asked, words, strict=True)
            if count <= 1
        )
    ends = [_stops(item.answer) for item in asked]
    if sum(ends) >= 0.9 * len(ends):
        yield from (
            (item, f"stops in the middle: ...{item.answer.rstrip()[-30:]!r}", "truncated_answer")
            for item, stops in zip(asked, ends, strict=True)
            if not stops
        )


def _stops(answer: str) -> bool:
    """Whether the answer ends like a sentence, a number, a short line or code, not in the middle of a long line, clause or code block."""
    end = answer.rstrip()
    last = end.rpartition("\n")[2]
    return not (end[-1:] in ",;:-–—(" or end[-1:].isalpha() and len(last.split()) >= 8) and end.count("```") % 2 == 0


def _lengths(items: list[Item]) -> Found:
    """Rows whose length is far from their source's median, measured by the spread of its logarithm (median absolute deviation)."""
    for source in sorted({(item.side, item.source) for item in items}):
        here = [item for item in items if (item.side, item.source) == source]
        if len(here) < FEW:
            continue
        logs = [math.log(len(item.text)) for item in here]
        middle = statistics.median(logs)
        spread = max(1.4826 * statistics.median(abs(value - middle) for value in logs), 0.25)
        for item, value in zip(here, logs, strict=True):
            if abs(value - middle) > OUTLYING * spread:
                yield item, f"has {len(item.text):,} characters, the median is {math.exp(middle):,.0f}", "length_outlier"


def _languages(items: list[Item]) -> Found:
    """Rows in another script than nine tenths of their source, or clearly in another language."""
    for source in sorted({(item.side, item.source) for item in items}):
        here = [item for item in items if (item.side, item.source) == source]
        if len(here) < FEW:
            continue
        for kind in (_script, _language):
            said = [kind(item.text) for item in here]
            common, count = collections.Counter(filter(None, said)).most_common(1)[0] if any(said) else (None, 0)
            known = sum(map(bool, said))
            if count < 0.9 * known or known < FEW / 2:
                break
            for item, found in zip(here, said, strict=True):
                if found not in (common, None):
                    yield item, f"is written in {found}, where {count / known:.0%} of its source is in {common}", "language"
            here = [item for item, found in zip(here, said, strict=True) if found == common]


def _language(text: str) -> str | None:
    """The ISO code of a text's language (py3langid); None if the text is short or the guess uncertain."""
    words = text[:1000].split()
    if len(words) < 15:
        return None
    code, probability = _identifier().classify(" ".join(words))
    return code if probability >= SURE else None


@functools.cache
def _identifier() -> Any:
    from py3langid import langid

    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


def _script(text: str) -> str | None:
    """The script of most letters; None without letters."""
    if text.isascii():
        return "Latin" if any(map(str.isalpha, text)) else None
    counts = {name: len(pattern.findall(text)) for name, pattern in SCRIPTS.items()}
    script = max(counts, key=counts.__getitem__)
    return script if counts[script] else None


def _around(text: str, at: int) -> str:
    return repr(text[max(at - 15, 0) : at + 15])
