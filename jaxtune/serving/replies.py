"""Answers as JSON in OpenAI's form, complete or streamed."""

import secrets
import time
from typing import Any

from jaxtune.serving.worker import Job, Piece

_LEAST = -9999.0  # JSON has no infinity


class Reply:
    """The reply to one request."""

    def __init__(self, job: Job):
        self.job, self.chat = job, job.request.chat
        self._head = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": "chat.completion" if self.chat else "text_completion",
            "created": int(time.time()),
            "model": job.request.model,
        }
        self._offsets = [0] * len(job.answers)  # of the next token's text in each answer

    def usage(self) -> dict:
        """How many tokens were read and written, including the one that ended an answer."""
        read, written = sum(map(len, self.job.request.ids)), sum(len(answer.tokens) for answer in self.job.answers)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def whole(self) -> dict:
        """All answers, once they have ended."""
        choices = []
        for answer in self.job.answers:
            said: dict = {"message": {"role": "assistant", "content": answer.text}} if self.chat else {"text": answer.text}
            logprobs = self._logprobs(Piece(answer.number, answer.text, 0, len(answer.tokens), answer.finish_reason))
            choices.append({"index": answer.number, **said, "logprobs": logprobs, "finish_reason": answer.finish_reason})
        return {**self._head, "choices": choices, "usage": self.usage()}

    def first(self) -> list[dict]:
        """The first event of a stream: for a chat, the role."""
        return [self._chunk(n, {"delta": {"role": "assistant", "content": ""}}) for n in range(len(self.job.answers) * self.chat)]

    def piece(self, piece: Piece) -> list[dict]:
        """A piece of a stream."""
        logprobs = self._logprobs(piece)
        if not piece.text and piece.finish_reason is None and logprobs is None:
            return []
        said: dict = {"delta": {"content": piece.text}} if self.chat else {"text": piece.text}
        if piece.finish_reason is not None and self.chat:  # the end is a separate event, as in OpenAI's API
            more = [self._chunk(piece.number, said, logprobs)] if piece.text or logprobs else []
            return [*more, self._chunk(piece.number, {"delta": {}}, None, piece.finish_reason)]
        return [self._chunk(piece.number, said, logprobs, piece.finish_reason)]

    def last(self) -> list[dict]:
        """The last event of a stream, if requested: token counts."""
        return [{**self._stream_head(), "choices": [], "usage": self.usage()}] if self.job.request.include_usage else []

    def _stream_head(self) -> dict:
        return self._head | ({"object": "chat.completion.chunk"} if self.chat else {})

    def _chunk(self, number: int, said: dict, logprobs: Any = None, finish_reason: str | None = None) -> dict:
        return {**self._stream_head(), "choices": [{"index": number, **said, "logprobs": logprobs, "finish_reason": finish_reason}]}

    def _logprobs(self, piece: Piece) -> dict | None:
        """Log-probabilities of a piece's tokens under the model itself: before penalty, temperature and filters."""
        answer, likely = self.job.answers[piece.number], self.job.request.likely
        if likely is None or answer.logps is None:
            return None
        chosen_N, likely_NK, logps_NK = answer.logps
        at = range(piece.start, piece.end)
        tokens = [_told(self._text(answer.tokens[n]), chosen_N[n]) for n in at]
        others = [[_told(self._text(k), logp) for k, logp in zip(likely_NK[n, :likely], logps_NK[n], strict=False)] for n in at]
        if self.chat:
            return {"content": [token | {"top_logprobs": other} for token, other in zip(tokens, others, strict=True)]}
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[piece.number])
            self._offsets[piece.number] += len(token["token"])
        by_text = [
            {one["token"]: one["logprob"] for one in [token, *reversed(other)]} for token, other in zip(tokens, others, strict=True)
        ]  # the likelier of two equal texts is kept
        return {
            "tokens": [token["token"] for token in tokens],
            "token_logprobs": [token["logprob"] for token in tokens],
            "top_logprobs": by_text if likely else None,
            "text_offset": offsets,
        }

    def _text(self, token: Any) -> str:
        return self.job.reader.tokenizer.decode([int(token)], clean_up_tokenization_spaces=False)


def _told(text: str, logprob: Any) -> dict:
    part = "\ufffd" in text  # part of a character, whose bytes cannot be known from the text
    return {"token": text, "logprob": max(float(logprob), _LEAST), "bytes": None if part else list(text.encode())}
