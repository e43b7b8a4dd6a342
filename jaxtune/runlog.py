"""A run's log: a progress bar, metrics.jsonl, TensorBoard, loss.png, reward.png. Takes Python floats, no device arrays."""

import contextlib
import errno
import json
import logging
import math
import os
import re
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from jaxtune.disk import naming, write_text
from jaxtune.errors import CheckpointError
from jaxtune.picture import draw_loss

PLOT_EVERY = 60.0  # seconds; drawing takes 0.3 of them, during which no step is dispatched; the end draws once more
FLUSH_EVERY = 10.0  # seconds, for TensorBoard
# names in metrics.jsonl that the terminal does not show
UNSHOWN = re.compile(
    r"epoch|tokens_per_second|num_tokens|(eval_)?(clip_ratio/(?!region).*|completions/((min|max)_.*|.*terminated.*)|.*/std)"
)
RATE_OVER = 30.0  # seconds that tokens/s and the time left are averaged over


class RunLog:
    """The log of one run, `metrics.jsonl` in `folder`; after a resume, it keeps the history up to `start` and continues from there.

    The bar (plain lines if stdout is not a terminal) counts steps from `start` to `total_steps`.

    Raises:
        CheckpointError: a line of the existing metrics.jsonl is not JSON (a truncated last line is ignored).
    """

    def __init__(self, folder: Path, total_steps: int, start: int = 0, report_to: Sequence[str] = ("tensorboard",)):
        self.folder, self.total = Path(folder), total_steps
        self.history = _history(self.folder / "metrics.jsonl", start)
        self._file = (self.folder / "metrics.jsonl").open("a", buffering=1, encoding="utf-8")
        self._events: _Events | None = None  # opened at the first line, when the device is busy: tensorboardX imports torch if installed
        self._report_to, self._start = report_to, start
        self._bar = _Bar(start, total_steps)
        self._drawn = time.monotonic()

    def advance(self, step: int, loss: float, tokens: int, name: str = "loss") -> None:
        """Move the bar after a step. `tokens` are those of this step over all processes; `name` says what the number is."""
        self._bar.advance(step, f"{name} {loss:.4f}", tokens)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write one line of metrics, under TRL's names; `eval_*` come from an evaluation. Non-finite numbers become null."""
        row = {"step": step} | {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self.history.append(row)
        with naming(self.folder):
            self._file.write(json.dumps(row) + "\n")
        self._bar.say(step, metrics, any(name.startswith("eval_") for name in metrics))
        if "tensorboard" in self._report_to:
            with naming(self.folder):
                self._events = self._events or _Events(self.folder / "tensorboard", self._start)
                self._events.write(step, metrics)
        if time.monotonic() - self._drawn > PLOT_EVERY:
            self._draw()

    def close(self) -> None:
        """Remove the bar, draw the last plot, close the files."""
        self._bar.close()
        with naming(self.folder), contextlib.ExitStack() as files:  # closes both, also if one cannot be written
            files.callback(self._file.close)
            if self._events is not None:
                files.callback(self._events.close)
        self._draw()

    def _draw(self) -> None:
        draw_loss(self.history, self.folder / "loss.png")
        draw_loss(self.history, self.folder / "reward.png", "reward")
        self._drawn = time.monotonic()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, each with its `step`. A last line truncated by a kill is ignored.

    Raises:
        CheckpointError: another line is not JSON, or has no step.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append(row | {"step": int(row["step"])})
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise CheckpointError(f"line {number} of {path} is not a line of metrics; remove it, or move the file away.") from None
    return rows


def chosen_evaluation(config: Any, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The evaluation of a run's result: the last, or the best one if that model is kept. None if there is none."""
    name = config.metric_for_best_model
    rows = [row for row in rows if row.get(name) is not None]
    if not rows or not config.load_best_model_at_end:
        return rows[-1] if rows else None
    return (max if config.greater_is_better else min)(rows, key=lambda row: row[name])


def _history(path: Path, start: int) -> list[dict[str, Any]]:
    """The rows up to step `start`; later ones, from steps that are repeated, are removed from the file."""
    if not path.exists():
        return []
    rows = [row for row in read_metrics(path) if 0 < start >= row["step"]]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


class _Events:
    """An event file for TensorBoard, which discards what an earlier process wrote about the steps after `start`.

    tensorboardX's SummaryWriter writes from a thread that a full disk ends, and its queue then blocks the run; here the run gets the error.
    """

    def __init__(self, folder: Path, start: int):
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter
        from tensorboardX.summary import scalar

        folder.mkdir(parents=True, exist_ok=True)
        self._event, self._scalar = Event, scalar
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        self._file, self._flushed = RecordWriter(str(folder / name)), 0.0
        for mark in ({"file_version": "brain.Event:2"}, {"session_log": SessionLog(status=SessionLog.START)}):
            self._write(start + 1 if start else 0, **mark)

    def _write(self, step: int, **what: Any) -> None:
        self._file.write(self._event(wall_time=time.time(), step=step, **what).SerializeToString())

    def write(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            tag = f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"
            self._write(step, summary=self._scalar(tag, value))
        if time.monotonic() - self._flushed > FLUSH_EVERY:
            self._file.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._file.close()


# ---- the terminal ----

HANGUP = (signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()  # the terminal was closed; Windows has no such signal


def leave_terminal() -> None:
    """Redirect stdout and stderr if their terminal is gone (a closed ssh session), since writing to it is an error."""
    import termios

    for number in (1, 2):
        try:
            termios.tcgetattr(number)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)


@contextlib.contextmanager
def _if_seen() -> Iterator[None]:
    """Ignore a terminal that is gone: a disowned run, which receives no SIGHUP, should continue."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        leave_terminal()


def duration(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class _Bar:
    """Steps, loss, tokens per second and time left; as plain lines without a terminal."""

    def __init__(self, start: int, total: int):
        self.total, self.step = total, start
        self.marks: deque[tuple[float, int, int]] = deque()  # time, step, tokens since the start
        self.tokens = 0
        self.console = Console(highlight=False, soft_wrap=True)
        self.streams: list[tuple[logging.StreamHandler, Any]] = []
        self.progress: Progress | None = None
        if self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self.progress = Progress(*columns, console=self.console, refresh_per_second=4)
            self.task = self.progress.add_task("compiling", total=total, completed=start)
            self.progress.start()
            self._redirect()

    def _redirect(self) -> None:
        """Print log lines above the bar: rich replaces sys.stderr, but handlers keep the stream they were given."""
        for name in (None, "jaxtune"):
            for handler in logging.getLogger(name).handlers:
                if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.__stderr__, sys.__stdout__):
                    self.streams.append((handler, handler.setStream(sys.stderr)))

    def advance(self, step: int, said: str, tokens: int) -> None:
        now = time.monotonic()
        self.step, self.tokens = step, self.tokens + tokens
        self.marks.append((now, step, self.tokens))
        while len(self.marks) > 2 and now - self.marks[0][0] > RATE_OVER:
            self.marks.popleft()
        if self.progress is not None:
            self.progress.update(self.task, completed=step, description=f"{said}{self._pace()}")

    def _pace(self) -> str:
        """`  1,234 tokens/s  0:42 left`, once two steps are known; the first includes compilation."""
        if len(self.marks) < 2:
            return ""
        (then, first, before), (now, last, after) = self.marks[0], self.marks[-1]
        seconds = max(now - then, 1e-9)
        left = (self.total - last) * seconds / (last - first)
        return f"  {(after - before) / seconds:,.0f} tokens/s  {duration(left)} left"

    def say(self, step: int, metrics: dict[str, float], evaluation: bool) -> None:
        """A line per logged step; with a bar, only for evaluations."""
        if self.progress is not None and not evaluation:
            return
        shown = [f"{name} {value:.4g}" for name, value in metrics.items() if not UNSHOWN.fullmatch(name)]
        line = f"step {step}/{self.total}  {'  '.join(shown)}{'' if evaluation else self._pace()}"
        with _if_seen():
            self.console.print(line, markup=False)

    def close(self) -> None:
        if self.progress is not None:
            with _if_seen():
                self.progress.stop()
        for handler, stream in self.streams:
            handler.setStream(stream)
