"""Tokenise answers in steps: each step is scored at the last token of the separator after it."""

from typing import Any

from jaxtune.config import Config
from jaxtune.data.examples import Steps
from jaxtune.data.files import Row
from jaxtune.data.ledger import Ledger
from jaxtune.data.masks import Piece


def step_tokens(tokenizer: Any, prompt: str, steps: list[str], separator: str) -> tuple[list[int], list[int]]:
    """Token ids of prompt and steps, and the position of each step's last token (its separator's).

    The prompt begins with BOS if there is such a token; each part is tokenised separately, so that a step ends with the same token whatever
    follows (as in TRL's PRMTrainer).
    """

    def plain(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    ids, ends, between = ([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]) + plain(prompt), [], plain(separator)
    for step in steps:
        ids += plain(step) + between
        ends.append(len(ids) - 1)
    return ids, ends


def piece(row: Row, example: Steps, tokenizer: Any, config: Config, ledger: Ledger) -> Piece:
    """The row as token ids with a mark at the end of each step, 1 for wrong and 2 for right; cut to `max_completion_length`."""
    ids, ends = step_tokens(tokenizer, example.prompt, example.steps, config.step_separator)
    start = len(step_tokens(tokenizer, example.prompt, [], config.step_separator)[0])
    if config.max_completion_length is not None and len(ids) > start + config.max_completion_length:
        ledger.cut[row.place] = ledger.cut.get(row.place, 0) + len(ids) - start - config.max_completion_length
        ids = ids[: start + config.max_completion_length]
    marks = dict(zip(ends, example.labels, strict=True))
    if min(ends) >= len(ids):
        raise row.fail(f"no step ends within max_completion_length {config.max_completion_length}; raise it", "no_trained_token")
    return Piece(row, "", [], ids=ids, mask=[1 + marks[place] if place in marks else 0 for place in range(len(ids))])
