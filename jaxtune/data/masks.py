"""Which tokens are trained: from turns to characters to tokens, and back to text."""

import re
import unicodedata
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np

from jaxtune.data.examples import Chat
from jaxtune.data.files import Row

FLAGS = ("train", "training", "weight")  # ours, Axolotl's, OpenAI's


@dataclass(frozen=True)
class Piece:
    """Text to be tokenised, and the character ranges of it that are trained.

    Attributes:
        row: where it came from.
        text: the whole text.
        spans: ranges [from, to) of `text`, in order.
        special: the tokenizer adds its special tokens (BOS). False for the output of a chat template, which contains its own.
        eos: append EOS unless the text ends with it. False for the output of a chat template.
        splittable: plain text, which may be split into several documents.
        marks: the mask value of each span; none: 1. Objectives with labels use 1 for a bad answer or step, 2 for a good one.
        ids: token ids given as such, with `mask`; the text is then empty.
    """

    row: Row
    text: str
    spans: list[tuple[int, int]]
    special: bool = False
    eos: bool = False
    splittable: bool = False
    marks: tuple[int, ...] = ()
    ids: list[int] | None = None
    mask: list[int] | None = None


def trained_turns(row: Row, chat: Chat, mode: str) -> set[int]:
    """Numbers of the trained turns.

    `completion`: answers that are not part of the prompt; `assistant`: every answer; `last`: the last one; `all`: every turn. A message's
    own `train` (or OpenAI's `weight`, Axolotl's `training`) takes precedence over the mode.
    """
    answers = [n for n, message in enumerate(chat.messages) if message["role"] == "assistant"]
    chosen = {
        "completion": [n for n in answers if n >= chat.start],
        "assistant": answers,
        "last": answers[-1:],
        "all": range(len(chat.messages)),
    }
    turns = set(chosen[mode])
    for number, message in enumerate(chat.messages):
        for flag in FLAGS:
            if flag in message:
                if message[flag] not in (True, False):  # including 0 and 1
                    raise row.fail(f"{flag!r} of message {number + 1} is {message[flag]!r}; write true to train it, or false")
                (turns.add if message[flag] else turns.discard)(number)
    if not turns:
        reason = "every answer is marked train: false" if answers else "it has no answer, a message with role 'assistant'"
        raise row.fail(f"no message of the row is trained on: {reason}", "no_trained_token")
    return turns


def trained_tokens(piece: Piece, offsets: list[tuple[int, int]]) -> tuple[np.ndarray, list[tuple[int, int, str]]]:
    """Mask (uint8) of the tokens that contain any character of the spans, and each run of them as (from, to, its text).

    A token that straddles the boundary between prompt and completion is trained, because it contains text of the completion; its prompt
    characters are then part of the run's text. (TRL trains from where the tokens of the prompt alone and of the whole diverge, which may be
    tokens earlier; if the prompt's tokens are a prefix of the whole, the two agree.) A token is taken to begin where the previous one
    ended, if its own offset is later: byte-level tokenizers exclude white space from their offsets.
    """
    if piece.mask is not None:
        return np.asarray(piece.mask, np.uint8), []
    own = np.asarray(offsets, np.int64).reshape(-1, 2)
    ends = np.maximum.accumulate(own[:, 1])
    starts = np.maximum.accumulate(np.minimum(own[:, 0], np.concatenate([[0], ends[:-1]])))
    mask, runs = np.zeros(len(own), np.uint8), []
    for (a, b), mark in zip(piece.spans, piece.marks or repeat(1), strict=False):
        lo, hi = int(np.searchsorted(ends, a, "right")), int(np.searchsorted(starts, b, "left"))
        if hi > lo:
            mask[lo:hi] = mark
            runs.append((lo, hi, piece.text[starts[lo] : ends[hi - 1]]))
    return mask, runs


def added_after(tokenizer: Any) -> int:
    """How many tokens the tokenizer appends to every text (EOS, or BERT's [SEP]) together with special tokens."""
    special = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
    return next((number for number, one in enumerate(reversed(special)) if not one), 0)


def open_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text to be continued: with BOS, and without what the tokenizer appends to every text."""
    ids = tokenizer(text)["input_ids"]
    return ids[: len(ids) - added_after(tokenizer)]


def same_text(a: str, b: str) -> bool:
    """Equal except for white space (sentencepiece drops a leading space) and Unicode's compatibility forms (a tokenizer may normalise)."""
    return a == b or squeeze(a) == squeeze(b)


def squeeze(text: str) -> str:
    """Text without white space, in compatibility form."""
    return re.sub(r"\s+", "", unicodedata.normalize("NFKC", text))
