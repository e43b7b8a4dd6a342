"""From examples to token ids and masks: tokenised once, with offsets, and the mask read back by decoding."""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from jaxtune.data.files import Row
from jaxtune.data.formats import Chat, Completion, Example, Text
from jaxtune.data.ledger import Ledger
from jaxtune.data.templates import Template
from jaxtune.errors import DataError

CHUNK = 512


@dataclass(frozen=True)
class Piece:
    """Text to be tokenised, and the character ranges of it that are trained.

    Attributes:
        plain: the text is not the output of a chat template: the tokenizer adds its BOS, and we add EOS.
        splittable: nothing but text, which may be cut into several documents.
    """

    row: Row
    text: str
    spans: list[tuple[int, int]]
    plain: bool = False
    splittable: bool = False


class Encoder:
    """Turns examples into `(row number, ids, mask)` by the settings of a `DataConfig`."""

    def __init__(self, data: Any, tokenizer: Any, ledger: Ledger, template: str | None = None):
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                "the tokenizer gives no offsets (it is not a fast one), so trained text cannot be located; use a model with a tokenizer.json"
            )
        self.data, self.tokenizer, self.ledger = data, tokenizer, ledger
        self._override, self._template = template, None
        self.eos = tokenizer.eos_token_id
        if data.add_eos and self.eos is None:
            raise DataError("the tokenizer has no EOS token to end rows with; set data.add_eos: false")

    @property
    def template(self) -> Template:
        """Made on the first chat row: plain rows need none."""
        if self._template is None:
            self._template = Template(self.tokenizer, self._override)
        return self._template

    def encode(self, examples: Iterable[tuple[Row, Example]]) -> Iterator[tuple[Row, list[int], np.ndarray]]:
        """Documents in the order of their rows; `split` may make several of one row, `drop` none."""
        stream = iter(examples)
        while chunk := list(islice(stream, CHUNK)):
            pieces = [self.piece(row, example) for row, example in chunk]
            for plain in (True, False):  # order is restored below; a chunk is nearly always of one kind
                some = [p for p in pieces if p.plain == plain]
                if len(some) == len(pieces):
                    yield from self._tokenise(pieces)
                    break
            else:
                for p in pieces:
                    yield from self._tokenise([p])

    def piece(self, row: Row, example: Example) -> Piece:
        """The text of an example and what of it is trained."""
        mode = self.data.train_on
        if isinstance(example, Chat):
            return self._chat_piece(row, example)
        if isinstance(example, Text):
            if mode not in ("completion", "all"):
                raise row.fail(f"a row of plain text has no turns, so train_on: {mode} trains nothing; set train_on: all")
            return Piece(row, example.text, [(0, len(example.text))], plain=True, splittable=True)
        if isinstance(example, Completion):
            whole = example.prompt + example.completion
            return Piece(row, whole, [(0 if mode == "all" else len(example.prompt), len(whole))], plain=True)
        raise row.fail(f"a {type(example).__name__} row cannot be used for SFT")

    def _chat_piece(self, row: Row, chat: Chat) -> Piece:
        if self.data.system and chat.messages[0]["role"] not in ("system", "developer"):
            system = {"role": "system", "content": self.data.system}
            chat = Chat([system, *chat.messages], chat.start + (chat.start > 0), chat.tools, chat.template_kwargs)
        mode, eos = self.data.train_on, self.data.train_on_eos
        trained = trained_turns(row, chat, mode)
        if mode == "all":
            text = self.template.render(row, chat)
            return Piece(row, text, [(0, len(text))])
        rendered = self.template.locate(row, chat, trained)
        spans = []
        for turn in rendered.turns:
            if eos and turn.stop == turn.end and turn.role == "assistant":
                self.ledger.problem("stop_token_untrained", row.number)
            spans.append((turn.start, turn.stop if eos else turn.end))
        return Piece(row, rendered.text, [(a, b) for a, b in spans if b > a])

    def _tokenise(self, pieces: list[Piece]) -> Iterator[tuple[Row, list[int], np.ndarray]]:
        encoded = self.tokenizer(
            [p.text for p in pieces], add_special_tokens=pieces[0].plain, return_offsets_mapping=True, return_attention_mask=False,
            return_token_type_ids=False, verbose=False,
        )  # fmt: skip
        masked, runs, expected = [], [], []
        for piece, ids, offsets in zip(pieces, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            mask, places = trained_tokens(piece, offsets)
            for lo, hi, text in places:
                runs.append(ids[lo:hi])
                expected.append((piece.row, text))
            masked.append((piece, list(ids), mask))
        decoded = self.tokenizer.batch_decode(runs, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for (row, text), again in zip(expected, decoded, strict=True):
            if not same_text(text, again):
                raise row.fail(
                    f"the trained tokens decode to {_short(again)} where the row says {_short(text)}; the tokenizer does not keep this text"
                )
        for piece, ids, mask in masked:
            yield from self._finish(piece, ids, mask)

    def _finish(self, piece: Piece, ids: list[int], mask: np.ndarray) -> Iterator[tuple[Row, list[int], np.ndarray]]:
        row, bos = piece.row, self.tokenizer.bos_token_id
        if len(ids) > 1 and bos is not None and ids[0] == ids[1] == bos:
            raise row.fail(
                f"the row begins with {self.tokenizer.bos_token!r} twice; take it out of the text, since the "
                + ("tokenizer adds it" if piece.plain else "chat template adds it")
            )
        if piece.plain and self.data.add_eos and (not ids or ids[-1] != self.eos):
            ids, mask = [*ids, self.eos], np.append(mask, np.uint8(self.data.train_on_eos))
        if len(mask):
            mask[0] = 0
        if not mask.any():
            raise row.fail("no token of the row is trained on: the answer is empty; remove the row, or change data.train_on")
        self.ledger.read(len(ids))
        yield from self._fit(piece, ids, mask)

    def _fit(self, piece: Piece, ids: list[int], mask: np.ndarray) -> Iterator[tuple[Row, list[int], np.ndarray]]:
        size, policy, row = self.data.max_length, self.data.length_policy, piece.row
        if len(ids) <= size:
            yield row, ids, mask
        elif policy == "drop":
            self.ledger.drop("too_long", row.number, len(ids))
        elif policy == "split" and piece.splittable:
            self.ledger.parts.append(row.number)
            for start in range(0, len(ids), size):
                part = mask[start : start + size].copy()
                part[0] = 0
                if part.any():
                    yield row, ids[start : start + size], part
        elif policy == "truncate":
            keep = slice(len(ids) - size, None) if self.data.truncation_side == "left" else slice(0, size)
            kept = mask[keep].copy()
            kept[0] = 0
            if not kept.any():
                raise row.fail(
                    f"cut to max_length {size} on the {self.data.truncation_side}, nothing that is trained is left "
                    f"(the row has {len(ids)} tokens); use truncation_side: left, length_policy: drop, or a larger max_length"
                )
            self.ledger.cut_row(row.number, len(ids) - size)
            yield row, ids[keep], kept
        else:
            prompt = int(mask.argmax())
            what = f"its prompt alone has {prompt}" if prompt >= size else f"{prompt} of them prompt"
            raise row.fail(
                f"the row has {len(ids)} tokens ({what}), max_length is {size}; raise data.max_length, or say what to do with "
                "data.length_policy: drop, truncate" + (" or split" if piece.splittable else "")
            )


def trained_turns(row: Row, chat: Chat, mode: str) -> set[int]:
    """Numbers of the turns that are trained: by mode, unless the message's own `train` (or `weight`, `training`) says otherwise."""
    answers = [n for n, message in enumerate(chat.messages) if message["role"] == "assistant"]
    chosen = {"completion": [n for n in answers if n >= chat.start], "assistant": answers, "last": answers[-1:], "all": answers}[mode]
    turns = set(chosen)
    for number, message in enumerate(chat.messages):
        for flag in ("train", "training", "weight"):
            if flag in message:
                (turns.add if message[flag] else turns.discard)(number)
    if not turns:
        raise row.fail("no message of the row is trained on; it needs an answer with role 'assistant'" if not answers else
                       "no message of the row is trained on: every answer is marked train: false")  # fmt: skip
    return turns


def trained_tokens(piece: Piece, offsets: list[tuple[int, int]]) -> tuple[np.ndarray, list[tuple[int, int, str]]]:
    """Mask of the tokens that hold any character of the piece's spans, and each run of them as (from, to, text).

    A token that straddles the seam between prompt and completion is trained, because it holds text of the completion; its prompt
    characters are then part of the run's text. Token i is taken to begin where the one before it ended, if its own
    offset is later: byte-level tokenizers leave the white space out of theirs.
    """
    own = np.asarray(offsets, np.int64).reshape(-1, 2)
    ends = np.maximum.accumulate(own[:, 1])
    starts = np.maximum.accumulate(np.minimum(own[:, 0], np.concatenate([[0], ends[:-1]])))
    mask, places = np.zeros(len(own), np.uint8), []
    for a, b in piece.spans:
        lo, hi = int(np.searchsorted(ends, a, "right")), int(np.searchsorted(starts, b, "left"))
        if hi > lo:
            mask[lo:hi] = 1
            places.append((lo, hi, piece.text[starts[lo] : ends[hi - 1]]))
    return mask, places


def same_text(a: str, b: str) -> bool:
    """Equal but for white space (sentencepiece drops a leading space) and for Unicode's compatibility forms (a tokenizer may normalise)."""
    return a == b or _plain(a) == _plain(b)


def _plain(text: str) -> str:
    return re.sub(r"\s+", "", unicodedata.normalize("NFKC", text))


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:40] + " ... " + text[-15:])
