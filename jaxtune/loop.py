"""The training loop: dispatch a step, read the metrics of the previous one, evaluate, save, stop."""

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from jaxtune import data, distributed, faults, parallel, schedules
from jaxtune.checkpoint import Checkpoints
from jaxtune.config import Config, interval
from jaxtune.errors import JaxtuneError
from jaxtune.objectives.symptoms import symptoms
from jaxtune.on_policy import OnPolicy
from jaxtune.rollout import Rollouts
from jaxtune.runlog import HANGUP, RunLog, leave_terminal
from jaxtune.step import TrainState, with_reference

log = logging.getLogger("jaxtune")


class TrainingError(JaxtuneError):
    """A run that cannot continue: its loss is not finite."""


class Loop:
    """One run's loop. `notes` is what it must remember beside the state; every checkpoint carries it."""

    def __init__(
        self, config: Config, mesh, rows: data.Data, total_steps: int, checkpoints: Checkpoints, folder: Path, notes: dict,
        rollouts: Rollouts | None = None, on_policy: OnPolicy | None = None,
    ):  # fmt: skip
        self.config, self.mesh, self.rows, self.total, self.rollouts = config, mesh, rows, total_steps, rollouts
        self.on_policy = rollouts or on_policy
        self.checkpoints, self.folder, self.notes = checkpoints, folder, notes
        self.part = parallel.row_part(mesh)
        self.rate = schedules.schedule(config, total_steps)
        self.stop_requested = self.interrupted = False  # a signal has arrived; and the step to stop after
        self.done = 0
        self.headline = ("reward", math.nan)  # of the newest rollout
        self.window: list[dict[str, float]] = []  # metrics since the last log line
        self.last: dict[str, float] = {}
        self.said: set[str] = set()  # warnings already given
        checkpoints.best = notes["best_step"]

    def __call__(self, state: TrainState, base: dict, step: Callable, eval_step: Callable) -> tuple[TrainState, dict[str, float]]:
        """Run the remaining steps. Returns the state (the best one, if so configured) and the last metrics by name."""
        start = int(state.step)
        handlers = {number: signal.signal(number, self._interrupt) for number in _heard()}
        self.log = RunLog(self.folder, self.total, start, self.config.report_to) if distributed.is_first() else None
        try:
            state = self._run(start, state, base, step, eval_step)
            self.checkpoints.close()
        except BaseException as error:
            # otherwise the other processes would not take part in closing it
            if jax.process_count() == 1 or isinstance(error, JaxtuneError):
                self.checkpoints.close()
            elif isinstance(error, jax.errors.JaxRuntimeError):
                raise distributed.lost(error, self.done) from error
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if self.log:
                self.log.close()
        return state, self.last

    def _run(self, start: int, state: TrainState, base: dict, step: Callable, eval_step: Callable) -> TrainState:
        config, waiting, stop = self.config, None, False
        if config.eval_on_start and start == 0:
            self._evaluate(0, state, base, eval_step)
        self.clock = time.monotonic()
        for number in range(start + 1, self.total + 1):
            if self.on_policy and waiting:  # before answers are sampled from the weights of that step
                waiting = self._read(*waiting)
            batch, more = self._batch(number - 1, state, base)
            state, metrics = step(state, base, self._put(batch))
            if waiting:  # the device is computing this step, so reading the previous metrics stalls nothing
                self._read(*waiting)
            waiting = (number, metrics | more)
            evaluate = self._due(number, config.eval_strategy, config.eval_steps)
            save = self._due(number, config.save_strategy, config.save_steps)
            prove = number == 1 and config.save_strategy != "no"
            self._hear(number)
            if evaluate or save or prove or self.interrupted or number == self.total:
                waiting = self._read(*waiting)
            if evaluate:
                stop, better = self._evaluate(number, state, base, eval_step)
                save = save or (better and config.save_strategy == "best")
            stop = stop or self.interrupted
            save = save or self.interrupted or ((stop or number == self.total) and config.save_strategy != "no")
            if prove:
                state = self.checkpoints.prove(number, state, self.notes, keep=save)
            elif save:
                self.checkpoints.save(number, state, self.notes)
            if self.rollouts and self.rollouts.train.repeats > 1:
                self.rollouts.forget(min(self.checkpoints.steps(), default=number))
            if stop:
                break
        if self.interrupted:
            log.warning("interrupted after step %d, which is saved; continue with: resume=true output_dir=%s", int(state.step), self.folder)
        elif config.load_best_model_at_end and (best := self.notes["best_step"]) not in (None, int(state.step)):
            self.checkpoints.wait()
            state, _ = self.checkpoints.restore(state, best)
            log.info("the best model is from step %d (%s %.4f)", best, config.metric_for_best_model, self.notes["best"])
        return state

    def _interrupt(self, number: int, frame: Any) -> None:
        if self.stop_requested:  # a second signal quits immediately
            raise KeyboardInterrupt
        self.stop_requested = True
        if number in HANGUP:
            leave_terminal()
        log.warning("%s: finishing this step, then saving; a second signal quits immediately", signal.Signals(number).name)
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # which JAX hears

    def _hear(self, number: int) -> None:
        """Whether to stop after this step: on a signal here, or one to any of several processes (including a TPU's maintenance notice)."""
        self.done = number
        self.interrupted = self.stop_requested if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(number)

    def _batch(self, step: int, state: TrainState, base: dict) -> tuple[data.Batch, dict[str, float]]:
        """The batch of a step (from 0), and the metrics of making it."""
        if self.on_policy:
            return self.on_policy.batch_at(step, state, base)
        return self.rows.train.batch_at(step, *self.part), {}

    def _put(self, batch: data.Batch, micro_batches: bool = True) -> data.Batch:
        return parallel.put(batch, self.mesh, micro_batches)

    def _due(self, number: int, strategy: str, every: float | None) -> bool:
        if number == self.total:  # as HF's Trainer does
            return strategy != "no"
        if strategy == "steps":
            return number % max(1, interval(every or 1, self.total)) == 0
        return strategy == "epoch" and number % self.rows.train.steps_per_epoch == 0

    # ---- metrics ----

    def _read(self, number: int, metrics: dict[str, jax.Array]) -> None:
        """Fetch a step's metrics, handle non-finite numbers, and write a log line when it is due."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.notes["num_tokens"] += int(values["tokens"])
        if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
            self.window.append(values)
            self._watch(number, values["loss"])
        else:
            self._unsound(number, values)
        if self.log:
            self.headline = ("reward", values["reward"]) if "reward" in values else self.headline
            name, value = self.headline if self.rollouts else ("loss", values["loss"])
            self.log.advance(number, value, int(values["tokens"]), name)
        if number % max(1, interval(self.config.logging_steps, self.total)) == 0 or number == self.total:
            self._write(number)

    def _watch(self, number: int, loss: float) -> None:
        """Warn about a loss far above the previous ones. With sampled answers the loss is about 0 whatever they are worth."""
        if self.rollouts:
            return
        if found := faults.spike(self.notes["losses"], loss, self.config.loss_spike_sigma):
            if self.log:
                log.warning("%s", faults.write_spike(self.folder, number, found, self.rows.train.rows_at(number - 1)))
        self.notes["losses"] = faults.remember(self.notes["losses"], loss)

    def _unsound(self, number: int, values: dict[str, float]) -> None:
        """Handle a non-finite loss or gradient: skip it while that is allowed (the step has changed nothing), else stop."""
        if self.notes["skipped_steps"] >= self.config.max_skipped_steps:
            raise TrainingError(self._fault(number, values))
        self.notes["skipped_steps"] += 1
        log.warning(
            "step %d skipped (%d of at most %d): loss %s, grad_norm %s; its batch was %s", number, self.notes["skipped_steps"],
            self.config.max_skipped_steps, values["loss"], values["grad_norm"], faults.rows_in_words(self.rows.train.rows_at(number - 1)),
        )  # fmt: skip

    def _write(self, number: int) -> None:
        window, self.window = self.window, []
        seconds, self.clock = time.monotonic() - self.clock, time.monotonic()
        if not window:  # every step was skipped
            return
        names = dict.fromkeys(name for row in window for name in row if name not in ("tokens", "weight"))
        mean = {name: _mean([row[name] for row in window if name in row]) for name in names}
        mean = {name: value for name, value in mean.items() if value is not None}
        mean |= {"grad_norm": window[-1]["grad_norm"], "learning_rate": self.rate(number - 1), "num_tokens": self.notes["num_tokens"]}
        if self.config.max_skipped_steps:
            mean["skipped_steps"] = self.notes["skipped_steps"]
        mean["tokens_per_second"] = sum(row["tokens"] for row in window) / seconds
        self._log(number, mean)
        if not self.log:  # the first process reports for all
            return
        for name, said in symptoms(self.config, self.log.history).items():
            if name not in self.said:
                self.said.add(name)
                log.warning("step %d: %s", number, said)

    def _log(self, number: int, metrics: dict[str, float]) -> None:
        self.last |= metrics
        if self.log:
            self.log.write(number, {"epoch": number / self.rows.train.steps_per_epoch} | metrics)

    def _fault(self, number: int, values: dict[str, float]) -> str:
        saved = self.checkpoints.steps()
        kept = f"the checkpoint of step {saved[-1]} is kept" if saved else "there is no checkpoint yet"
        skipped = f" ({self.notes['skipped_steps']} steps were skipped before)" if self.notes["skipped_steps"] else ""
        steps = "Lower learning_rate or max_grad_norm, allow max_skipped_steps"
        if self.notes["skipped_steps"] == number - 1:
            steps = "No step has changed the weights yet: see whether the model answers (python -m jaxtune.generate), try another dtype"
        return (
            f"loss is {values['loss']} and grad_norm {values['grad_norm']} at step {number}{skipped}; {kept}. The batch was "
            f"{faults.rows_in_words(self.rows.train.rows_at(number - 1))}. {steps}, "
            f"or look at those rows: python -m jaxtune.data {self.folder / 'config.yaml'}"
        )

    # ---- evaluation ----

    def _evaluate(self, number: int, state: TrainState, base: dict, eval_step: Callable) -> tuple[bool, bool]:
        """Log `eval_*`; returns whether to stop early, and whether this is the best so far."""
        metrics = self.rollouts.evaluate(state, base) if self.rollouts else self._losses(state, base, eval_step)
        self._log(number, metrics)
        return self._judge(number, metrics)

    def _losses(self, state: TrainState, base: dict, eval_step: Callable) -> dict[str, float]:
        total = None
        for batch in self.rows.eval.batches(*self.part):
            rows = self._put(jax.tree.map(lambda x: x[0], batch), micro_batches=False)
            out = eval_step(state.trainable, with_reference(base, state), rows)
            total = out if total is None else jax.tree.map(jnp.add, total, out)
        loss = jax.device_get(total)
        metrics = {"eval_loss": float(loss.total / loss.weight)}
        return metrics | {f"eval_{name}": float(value / weight) for name, (value, weight) in loss.metrics.items() if weight}

    def _judge(self, number: int, metrics: dict[str, float]) -> tuple[bool, bool]:
        config, best = self.config, self.notes["best"]
        if config.metric_for_best_model not in metrics:
            raise TrainingError(f"metric_for_best_model is {config.metric_for_best_model}, but there are {', '.join(metrics)}")
        value = metrics[config.metric_for_best_model]
        gain = math.inf if best is None else (value - best if config.greater_is_better else best - value)
        if gain > 0:
            self.notes |= {"best": value, "best_step": number}
            self.checkpoints.best = number
        self.notes["bad_evals"] = 0 if gain > config.early_stopping_threshold else self.notes["bad_evals"] + 1
        patience = config.early_stopping_patience
        if patience is not None and self.notes["bad_evals"] >= patience:
            log.info("%s has not improved for %d evaluations: stopping at step %d", config.metric_for_best_model, patience, number)
            return True, gain > 0
        return False, gain > 0


def _heard() -> list[signal.Signals]:
    """The signals that end a run with a checkpoint: SIGHUP only if the process does not ignore it (nohup), and none outside the main
    thread, which alone may set handlers. With several processes, JAX's own SIGTERM handler notifies all of them of the step to stop at."""
    if threading.current_thread() is not threading.main_thread():
        return []
    hangups = [number for number in HANGUP if signal.getsignal(number) != signal.SIG_IGN]
    return [signal.SIGINT, *hangups, *((signal.SIGTERM,) if jax.process_count() == 1 else ())]


def _mean(values: list[float]) -> float | None:
    """The mean over the steps that measured something; None if none did."""
    measured = [value for value in values if not math.isnan(value)]
    return sum(measured) / len(measured) if measured else None
