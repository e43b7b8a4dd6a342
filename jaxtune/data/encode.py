"""From examples to token ids and masks: tokenised once, with offsets, and every mask verified by decoding."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np

from jaxtune.config import Config
from jaxtune.data import labels, steps
from jaxtune.data.examples import Chat, Classified, Completion, Example, Labelled, Pair, Prompt, Segments, Steps, Text, Tokens
from jaxtune.data.files import Row, RowError
from jaxtune.data.ledger import Ledger
from jaxtune.data.masks import Piece, added_after, same_text, trained_tokens, trained_turns
from jaxtune.data.templates import Template
from jaxtune.data.turns import KNOWN
from jaxtune.errors import DataError

CHUNK = 512  # rows that are tokenised together,
LONG = 1 << 20  # or fewer, once they have this many characters
SFT = (Text, Completion, Chat, Segments, Tokens)
HELP = {
    Text: "text", Completion: "prompt and completion", Chat: "messages", Segments: "segments", Tokens: "input_ids",
    Pair: "chosen and rejected", Labelled: "an answer with a label", Classified: "text with a label", Steps: "completions with labels",
    Prompt: "a prompt without an answer",
}  # fmt: skip
_HALF = re.compile("[\ud800-\udfff]")
Doc = tuple[list[int], np.ndarray]
MEDIA = ("images", "image", "videos", "audios")  # the columns of TRL and LLaMA-Factory
Value = float | tuple[float, ...]


@dataclass(frozen=True)
class Encoded:
    """A row's documents: for each, its token ids and the uint8 mask of trained targets."""

    row: Row
    docs: list[Doc]
    value: Value = 0.0  # a pair's margin, a text's class


class Encoder:
    """Turns examples into documents according to a config, and records what happens to them.

    A row of `kinds` SFT, Labelled or Steps gives one document; a Pair gives two, the chosen one first.
    """

    def __init__(self, config: Config, tokenizer: Any, ledger: Ledger, kinds: tuple[type, ...] = SFT):
        data = config.data
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                "the tokenizer gives no offsets (it is not a fast one), so trained text cannot be located; "
                "use a model that has a tokenizer.json"
            )
        if data.add_eos and tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no EOS token to end rows with; set data.add_eos: false")
        self.data, self.tokenizer, self.ledger = data, tokenizer, ledger
        self.kinds, self.objective, self.config = kinds, config.objective, config
        self._after = added_after(tokenizer)
        self._template: Template | None = None

    @property
    def template(self) -> Template:
        """Created at the first chat row: plain rows need none."""
        if self._template is None:
            self._template = Template(self.tokenizer)
        return self._template

    def encode(self, examples: Iterable[tuple[Row, Example]]) -> Iterator[Encoded]:
        """The rows' documents, in order. A row that is dropped is recorded and missing here."""
        rows: list[tuple[Row, list[Piece], Value]] = []
        characters = 0
        for row, example in examples:
            self.ledger.rows += 1
            try:
                if media := next((name for name in MEDIA if row.fields.get(name)), None):
                    unseen = f"the row has {media}, which are not trained: only text is, of any model"
                    self.ledger.problem("media", row, f"{unseen}; data.quality: {{media: keep}} trains on the text alone")
                pieces, value = self.pieces(row, example), self._value(row, example)
                _whole_characters(row, *(piece.text for piece in pieces))
            except RowError as error:
                self.ledger.fault(error)
                continue
            rows.append((row, pieces, value))
            characters += sum(len(piece.text) for piece in pieces)
            if len(rows) == CHUNK or characters >= LONG:
                yield from self._encode(rows)
                rows, characters = [], 0
        yield from self._encode(rows)

    def _encode(self, rows: list[tuple[Row, list[Piece], Value]]) -> Iterator[Encoded]:
        tokens = self._tokenise([piece for _, pieces, _ in rows for piece in pieces])
        for row, pieces, value in rows:
            own = [next(tokens) for _ in pieces]  # all of them, even if the first one is refused
            try:
                docs = [self._finish(piece, *parts) for piece, parts in zip(pieces, own, strict=True)]
                yield Encoded(row, self._fit(pieces, docs), value)
            except RowError as error:
                self.ledger.fault(error)

    def pieces(self, row: Row, example: Example) -> list[Piece]:
        """The texts of an example, one per document, and which parts are trained."""
        if not isinstance(example, self.kinds):
            needed = " or ".join(HELP[kind] for kind in self.kinds)
            raise row.fail(f"the row has {HELP[type(example)]}; objective {self.objective} needs {needed}")
        if isinstance(example, Pair):
            return self._pair(row, example)
        if isinstance(example, Labelled):
            piece = self._piece(row, example.example)
            return [replace(piece, marks=(1 + example.label,) * len(piece.spans))]
        if isinstance(example, Classified):
            return [self._whole(row, example.example)]
        if isinstance(example, Prompt):
            return [self._prompt(row, example)]
        if isinstance(example, Steps):
            _whole_characters(row, example.prompt, *example.steps)  # before they are tokenised, which happens here
            return [steps.piece(row, example, self.tokenizer, self.config, self.ledger)]
        return [self._piece(row, example)]

    def _value(self, row: Row, example: Example) -> Value:
        """A row's data besides its text."""
        if isinstance(example, Pair):
            return example.margin
        return labels.value(row, example.label, self.config) if isinstance(example, Classified) else 0.0

    def _whole(self, row: Row, example: Text | Chat) -> Piece:
        """A text to be judged as it is: without EOS, as in transformers at inference."""
        chat = isinstance(example, Chat)
        text = self.template.whole(row, with_system(example, self.data.system)) if chat else example.text
        return Piece(row, text, [(0, len(text))], special=not chat)

    def _prompt(self, row: Row, example: Prompt) -> Piece:
        """A prompt as the model reads it before answering; conversations that end with the assistant's turn are continued."""
        prompt = example.prompt
        if isinstance(prompt, str) and not self.data.system:
            return Piece(row, prompt, [], special=True)
        said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt  # after a system turn a text is the user's
        chat = with_system(Chat(said, 0, example.tools, example.template_kwargs), self.data.system)
        if goes_on := chat.messages[-1]["role"] == "assistant":
            chat = replace(chat, template_kwargs={**chat.template_kwargs, "continue_final_message": True})
        return Piece(row, self.template.whole(row, chat, generation=not goes_on), [])

    def _pair(self, row: Row, pair: Pair) -> list[Piece]:
        pieces = [self._piece(row, side) for side in (pair.chosen, pair.rejected)]
        if pieces[0].text == pieces[1].text:
            self.ledger.problem("chosen_equals_rejected", row, "chosen and rejected are the same")
        prompts = [piece.text[: piece.spans[0][0]] if piece.spans else piece.text for piece in pieces]
        if prompts[0] != prompts[1]:
            said = f"chosen follows {_short(prompts[0])}, rejected follows {_short(prompts[1])}"
            self.ledger.problem("prompts_differ", row, f"{said}; answers can be compared only if they are to the same prompt")
        elif not prompts[0].strip():
            self.ledger.problem("no_prompt", row, "chosen and rejected have no prompt in common")
        if Labelled in self.kinds:  # as two answers with one label each
            return [replace(piece, marks=(mark,) * len(piece.spans)) for piece, mark in zip(pieces, (2, 1), strict=True)]
        return pieces

    def _piece(self, row: Row, example: Example) -> Piece:
        mode = self.data.train_on
        if isinstance(example, Chat):
            return self._chat(row, example)
        if isinstance(example, Text):
            if mode not in ("completion", "all"):
                raise row.fail(f"a row of plain text has no turns, so train_on: {mode} trains nothing; set train_on: all")
            return Piece(row, example.text, [(0, len(example.text))], special=True, eos=True, splittable=True)
        if isinstance(example, Completion):
            if not example.completion.strip():
                self.ledger.problem("empty_answer", row, "the completion is empty")
            whole = example.prompt + example.completion
            return Piece(row, whole, [(0 if mode == "all" else len(example.prompt), len(whole))], special=True, eos=True)
        if isinstance(example, Tokens):
            if max(example.ids) >= len(self.tokenizer):
                raise row.fail(f"token id {max(example.ids)} is not in the tokenizer, which has {len(self.tokenizer)}")
            return Piece(row, "", [], ids=example.ids, mask=[int(mode == "all" or trained) for trained in example.trained])
        assert isinstance(example, Segments)
        ends = [0, *accumulate(len(text) for text, _ in example.parts)]
        spans = [(a, b) for a, b, (_, trained) in zip(ends, ends[1:], example.parts, strict=False) if trained or mode == "all"]
        return Piece(row, "".join(text for text, _ in example.parts), spans)

    def _chat(self, row: Row, chat: Chat) -> Piece:
        chat = with_system(chat, self.data.system)
        for number, message in enumerate(chat.messages, 1):
            if message["role"] not in KNOWN:
                said = f"message {number} has the role {_short(message['role'])}, not one of {', '.join(sorted(KNOWN))}"
                self.ledger.problem("unknown_role", row, f"{said}; data.quality: {{unknown_role: keep}} lets the template write it")
            if found := self.template.control.search(message.get("content") or ""):
                said = f"message {number} ({message['role']}) holds {found.group()!r}, which the tokenizer reads as a token of its own"
                self.ledger.problem("special_token", row, f"{said}: the model would read it as the end of the turn or as another one")
        if self.data.train_on == "all":
            text = self.template.locate(row, chat, set()).text
            return Piece(row, text, [(0, len(text))])
        trained = trained_turns(row, chat, self.data.train_on)
        rendered = self.template.locate(row, chat, trained)
        for turn in rendered.turns:
            if turn.role != "assistant":
                continue
            if not rendered.text[turn.start : turn.end].strip():
                self.ledger.problem("empty_answer", row, f"message {turn.number + 1} (assistant) is empty")
            if self.data.train_on_eos and turn.stop == turn.end:
                self.ledger.problem(
                    "stop_token_untrained", row,
                    f"the chat template follows message {turn.number + 1} (assistant) with {rendered.text[turn.end :][:20]!r}, which is "
                    "not a token that ends a turn, so the model would not learn to stop; use a template that ends answers with EOS",
                )  # fmt: skip
        eos = self.data.train_on_eos
        return Piece(row, rendered.text, [(t.start, t.stop if eos else t.end) for t in rendered.turns])

    def _tokenise(self, pieces: list[Piece]) -> Iterator[tuple[list[int], np.ndarray, list[tuple[str, str]]]]:
        """For each piece its ids, its mask, and for each trained run the intended text beside the decoded one."""
        # The Rust tokenizer itself: transformers' wrapper costs a fifth more, with the same ids.
        backend = self.tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        ids: list[list[int]] = [piece.ids or [] for piece in pieces]
        tails: list[list[int]] = [[]] * len(pieces)
        offsets: list[list[tuple[int, int]]] = [[]] * len(pieces)
        for special in (True, False):
            numbers = [n for n, piece in enumerate(pieces) if piece.special == special and piece.ids is None]
            for n, encoding in zip(
                numbers, backend.encode_batch([pieces[n].text for n in numbers], add_special_tokens=special), strict=True
            ):
                size = len(encoding.ids) - self._after * special
                ids[n], offsets[n], tails[n] = encoding.ids[:size], encoding.offsets[:size], encoding.ids[size:]
        masked = [trained_tokens(piece, row_offsets) for piece, row_offsets in zip(pieces, offsets, strict=True)]
        runs = [ids[n][lo:hi] for n, (_, places) in enumerate(masked) for lo, hi, _ in places]
        decoded = iter(backend.decode_batch(runs, skip_special_tokens=False))
        for n, (mask, places) in enumerate(masked):
            # otherwise it would be in the way of an answer, or of the EOS that _finish appends
            tail = tails[n] if Classified in self.kinds else []
            yield ids[n] + tail, np.append(mask, np.zeros(len(tail), np.uint8)), [(text, next(decoded)) for _, _, text in places]

    def _finish(self, piece: Piece, ids: list[int], mask: np.ndarray, runs: list[tuple[str, str]]) -> Doc:
        """The document with its EOS, verified."""
        row = piece.row
        for said, decoded in runs:
            if not same_text(said, decoded):
                raise row.fail(
                    f"the trained tokens decode to {_short(decoded)} where the row says {_short(said)}; "
                    "the tokenizer does not keep this text; write what it can keep, or remove the row",
                    "unfaithful_tokens",
                )
        bos = self.tokenizer.bos_token_id
        if len(ids) > 1 and bos is not None and ids[0] == ids[1] == bos:
            adder = "tokenizer" if piece.special else "chat template"
            self.ledger.problem(
                "double_bos", row, f"the row begins with {self.tokenizer.bos_token!r} twice; remove it from the text, the {adder} adds it"
            )
        if piece.eos and self.data.add_eos and (not ids or ids[-1] != self.tokenizer.eos_token_id):
            ids, mask = [*ids, self.tokenizer.eos_token_id], np.append(mask, np.uint8(self.data.train_on_eos * max(piece.marks, default=1)))
        mask[:1] = 0
        if not ids:
            raise row.fail("the prompt is empty; remove the row")
        if not mask.any() and not {Classified, Prompt} & set(self.kinds):
            raise row.fail("no token of the row is trained on: the answer is empty; remove the row", "no_trained_token")
        self.ledger.tokens += len(ids)
        return ids, mask

    def _fit(self, pieces: list[Piece], docs: list[Doc]) -> list[Doc]:
        """The documents cut to max_length by the length policy."""
        size, policy, row = self.data.max_length, self.data.length_policy, pieces[0].row
        longest = max(len(ids) for ids, _ in docs)
        if longest <= size:
            return docs
        if policy == "drop":
            raise row.fail(f"the row has {longest} tokens", "too_long", "drop")
        if policy == "split" and pieces[0].splittable:
            self.ledger.parts.append(row.place)
            return [part for doc in docs for part in _split(doc, size)]
        if policy == "truncate":
            return [self._cut(row, doc) for doc in docs]
        prompt = max(int(mask.argmax()) if mask.any() else len(mask) for _, mask in docs)
        what = f"its prompt alone has {prompt}" if prompt >= size else f"{prompt} of them prompt"
        choices = "drop, truncate or split" if pieces[0].splittable else "drop or truncate"
        raise row.fail(
            f"the row has {longest} tokens ({what}), max_length is {size}; raise data.max_length, or choose data.length_policy: {choices}",
            "too_long",
        )

    def _cut(self, row: Row, doc: Doc) -> Doc:
        (ids, mask), size, side = doc, self.data.max_length, self.data.truncation_side
        if len(ids) <= size:
            return doc
        if Prompt in self.kinds:  # on either side, since an answer follows the end
            self.ledger.cut[row.place] = len(ids) - size
            return ids[-size:], mask[-size:]
        keep = np.arange(size) if side == "right" else np.arange(len(ids) - size, len(ids))
        if side == "prompt" and ids[0] == self.tokenizer.bos_token_id:
            keep[0] = 0  # BOS stays in front
        kept = mask[keep]
        kept[0] = 0
        if not kept.any() or (side == "prompt" and np.count_nonzero(kept) < np.count_nonzero(mask)):
            raise row.fail(
                f"cut to max_length {size} (truncation_side: {side}), "
                + ("its answer would lose tokens" if kept.any() else f"nothing that is trained is left of its {len(ids)} tokens")
                + f"; use {'truncation_side: prompt, ' if side == 'right' else ''}length_policy: drop, or a larger max_length",
                "too_long",
            )
        self.ledger.cut[row.place] = self.ledger.cut.get(row.place, 0) + len(ids) - size
        return [ids[n] for n in keep], kept


def _whole_characters(row: Row, *texts: str) -> None:
    """Half a surrogate pair can occur in JSON, but is not text."""
    for text in texts:
        if not text.isascii() and (half := _HALF.search(text)):
            raise row.fail(
                f"the text holds {half.group()!r}, half a surrogate pair, which is not a character (a split emoji?); correct the row",
                "lone_surrogate",
            )


def with_system(chat: Chat, system: str | None) -> Chat:
    """The conversation with a system turn in front, if it has none."""
    if not system or chat.messages[0]["role"] in ("system", "developer"):
        return chat
    return replace(chat, messages=[{"role": "system", "content": system}, *chat.messages], start=chat.start + (chat.start > 0))


def _split(doc: Doc, size: int) -> list[Doc]:
    """Parts of at most `size` tokens. Each begins with the last token of the previous one, so that every target keeps its context."""
    ids, mask = doc
    parts = []
    for start in range(0, len(ids) - 1, size - 1):
        part = mask[start : start + size].copy()
        part[0] = 0
        parts.append((ids[start : start + size], part))
    return parts


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:40] + " ... " + text[-15:])
