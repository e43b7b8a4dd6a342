"""The one thread that computes. Waiting requests for the same model are taken together and decoded in one batch."""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxtune import errors
from jaxtune.compilation import in_32_bits
from jaxtune.generation.answer import Answer, Reader
from jaxtune.generation.batches import CHUNK, Row, Run, bucket
from jaxtune.generation.decode import seed_words
from jaxtune.generation.prompts import stop_tokens, token_ids
from jaxtune.peft import virtual_tokens
from jaxtune.serving.requests import MOST_LIKELY, Refusal, Request

MOST_WAITING = 256  # requests
GATHER = 0.01  # seconds that the first request of a batch waits for others sent at the same time
LEAST_NEW = 256  # lower limit for token buffers, so that few programs are compiled
log = logging.getLogger("jaxtune")


class Piece(NamedTuple):
    """What an answer has gained since the last piece: final text, and its tokens up to `end`."""

    number: int
    text: str
    start: int
    end: int
    finish_reason: str | None


class ReportingAnswer(Answer):
    """An answer that reports each of its changes."""

    def __init__(self, reader: Reader, most: int, number: int, report: Callable[[Piece], None]):
        super().__init__(reader, most, self._add)
        self.number, self.report, self._new_text = number, report, ""

    def _add(self, text: str) -> None:
        self._new_text += text

    def update(self, tokens: list[int], logps: Any = None) -> None:
        """Update the answer and report the change."""
        if self.finish_reason is not None:
            return
        start = len(self.tokens)
        super().update(tokens, logps)
        self.report(Piece(self.number, self._new_text, start, len(self.tokens), self.finish_reason))
        self._new_text = ""


class Job:
    """A request in progress. Its answers are those of one call of `generate_tokens`: `request.each` consecutive ones to every prompt."""

    def __init__(self, request: Request, reader: Reader):
        self.request, self.reader = request, reader
        self.events: queue.SimpleQueue[Piece | Refusal] = queue.SimpleQueue()
        places = range(len(request.ids) * request.each)
        self.answers = [ReportingAnswer(reader, request.most[n // request.each], n, self.events.put) for n in places]

    def rows(self) -> list[Row]:
        """Its part of a batch."""
        request, words = self.request, seed_words(self.request.seed)
        places = [divmod(n, request.each) for n in range(len(self.answers))]  # of each answer: its prompt, and which sample of it
        answers = zip(places, self.answers, strict=True)
        return [Row(prompt, sample, request.ids[prompt], one, request.sampling, words) for (prompt, sample), one in answers]

    def pieces(self, gone: Callable[[], bool]) -> Iterator[Piece]:
        """Pieces of the answers as they arrive, until all have ended; `gone` says whether the client has disconnected. Raises Refusal."""
        going = len(self.answers)
        while going:
            try:
                event = self.events.get(timeout=0.5)
            except queue.Empty:
                event = None
            if gone():
                raise ConnectionAbortedError
            if isinstance(event, Refusal):
                raise event
            if event is not None:
                going -= event.finish_reason is not None
                yield event

    def cancel(self) -> None:
        """End all unfinished answers, since nobody waits for them any more."""
        for answer in self.answers:
            answer.finish_reason = answer.finish_reason or "cancelled"


class Worker:
    """A model with its adapters by name (None: the model alone), and the requests that wait for them. Under each name of `models` it is the
    same model, with the tokenizer of that adapter."""

    def __init__(self, models: Mapping[str, Any], adapters: Mapping[str, Any], batch_size: int | None = None):
        self.models, self.adapters, self.batch_size = models, adapters, batch_size
        self.names = {name: virtual_tokens(adapter) for name, adapter in adapters.items()}
        self.stops = {name: frozenset(stop_tokens(model)) for name, model in models.items()}
        self._tokenizer, self._changed = threading.Lock(), threading.Condition()
        self._waiting: deque[Job] = deque()
        self._stopping = False
        for name in models:  # this disables a tokenizer's own truncation and padding now, rather than while other threads use it
            self.encode(name, "x", "prompt", chat=False)
        self.thread = threading.Thread(target=self._work, name="jaxtune-worker", daemon=True)

    def encode(self, model: str, prompt: Any, name: str, chat: bool | None = None) -> list[int]:
        """`prompts.token_ids`, for one prompt at a time."""
        with self._tokenizer:
            return token_ids(self.models[model], prompt, name, chat)

    def submit(self, request: Request) -> Job:
        """Queue a request."""
        job = Job(request, Reader(self.models[request.model].tokenizer, self.stops[request.model], request.stop))
        with self._changed:
            if self._stopping:
                raise Refusal(503, "the server is stopping; try again after it restarts")
            if len(self._waiting) >= MOST_WAITING:
                raise Refusal(429, f"{MOST_WAITING} requests are already waiting; try again later, or send fewer at a time")
            self._waiting.append(job)
            self._changed.notify()
        return job

    def stop(self) -> None:
        """Refuse waiting requests and finish the running ones."""
        with self._changed:
            self._stopping = True
            for job in self._waiting:
                job.events.put(Refusal(503, "the server is stopping, and this request was still waiting; try again after it restarts"))
            self._waiting.clear()
            self._changed.notify()
        self.thread.join()

    def _next(self) -> list[Job]:
        """The requests of the next batch: those for the model that has been waited for longest; [] if none are left and the worker is
        stopping."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopping)
        time.sleep(GATHER)
        with self._changed:
            name = self._waiting[0].request.model if self._waiting else None
            jobs = [job for job in self._waiting if job.request.model == name]
            self._waiting = deque(job for job in self._waiting if job.request.model != name)
        return jobs

    @in_32_bits
    def _work(self) -> None:
        while jobs := self._next():
            try:
                self._answer(jobs)
            except Exception as error:
                said = errors.explain(error)
                if said is None:  # a bug of ours
                    log.exception("a batch of %d requests failed", len(jobs))
                for job in jobs:
                    job.events.put(Refusal(500, said or "the server failed; see its log"))

    def _answer(self, jobs: list[Job]) -> None:
        rows = [row for job in jobs for row in job.rows() if row.answer.finish_reason is None]
        wanted = [job.request.likely for job in jobs if job.request.likely is not None]
        name = jobs[0].request.model
        run = Run(
            config=replace(self.models[name].config, remat="none"),
            params=self.models[name].params,
            adapter=self.adapters[name],
            stops=jnp.asarray(sorted(self.stops[name]), jnp.int32),
            new=bucket(max(most for job in jobs for most in job.request.most), LEAST_NEW),
            chunk=1 if any(job.request.stream for job in jobs) else CHUNK,
            likely=(MOST_LIKELY if max(wanted) else 0) if wanted else None,
        )
        run.all(rows, self.batch_size)
