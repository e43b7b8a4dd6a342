"""One growing answer, on the host: tokens to text, stop strings, and pieces of text that are released as soon as they are certain."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Reader(NamedTuple):
    """How tokens are read: the tokenizer, and the tokens and strings that end an answer."""

    tokenizer: Any
    stop_tokens: frozenset[int]
    stop_strings: tuple[str, ...] = ()

    def text(self, tokens: list[int]) -> str:
        """The text of an answer, without special tokens and without the stop token."""
        spoken = tokens[:-1] if tokens and tokens[-1] in self.stop_tokens else tokens
        return self.tokenizer.decode(spoken, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def stop_at(self, text: str) -> int | None:
        """Where the first stop string in a text begins."""
        return min((at for at in map(text.find, self.stop_strings) if at >= 0), default=None)

    def certain(self, text: str) -> int:
        """The length of the text that stays whatever follows: without an incomplete character or a possible beginning of a stop string."""
        whole = len(text.rstrip("\ufffd"))  # bytes of an incomplete character
        for string in self.stop_strings:
            beginnings = (n for n in range(len(string) - 1, 0, -1) if text.endswith(string[:n]))
            whole = min(whole, len(text) - next(beginnings, 0))
        return whole


class Answer:
    """Tokens, text and `finish_reason` ("stop", "length", or None while unfinished) of one answer."""

    def __init__(self, reader: Reader, most: int, on_text: Callable[[str], None] | None = None):
        self.reader, self.most, self.on_text = reader, most, on_text
        self.tokens: list[int] = []
        self.logps: tuple[np.ndarray, ...] | None = None  # `decode.Logps` of at least these tokens, if requested
        self.text, self.finish_reason, self._sent = "", None, 0

    def update(self, tokens: list[int], logps: tuple[np.ndarray, ...] | None = None) -> None:
        """Take all tokens so far, at most `most`. Nothing changes once the answer has ended."""
        if self.finish_reason is not None:
            return
        known, self.tokens, self.logps = len(self.tokens), tokens[: self.most], logps
        self.text = self.reader.text(self.tokens)
        if self.reader.stop_at(self.text) is not None:
            self._cut(known)
            self.finish_reason = "stop"
        elif self.tokens[-1] in self.reader.stop_tokens:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.most:
            self.finish_reason = "length"
        if self.on_text is not None:
            certain = len(self.text) if self.finish_reason else self.reader.certain(self.text)
            if certain > self._sent:
                self.on_text(self.text[self._sent : certain])
                self._sent = certain

    def _cut(self, known: int) -> None:
        """End the tokens with the one that completed a stop string, and the text before that string."""
        for count in range(known + 1, len(self.tokens) + 1):
            text = self.reader.text(self.tokens[:count])
            if (at := self.reader.stop_at(text)) is not None:
                self.tokens, self.text = self.tokens[:count], text[:at]
                return
