"""Cross-validation: `data.kfold: k` without `data.fold` runs every fold and averages their metrics.

Fold f is evaluated on the rows whose hash falls into the f-th of k parts, and trained on the others. All folds take the same number of
steps and, if their rows allow, have the same shapes (data/prepare.py), so one compiled step serves them all.
"""

import dataclasses
import json
import logging
import os
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxtune import cli, data, distributed, runfolder
from jaxtune.config import Config
from jaxtune.disk import write_text
from jaxtune.errors import CheckpointError
from jaxtune.runfolder import measured, read_entry
from jaxtune.runlog import chosen_evaluation

log = logging.getLogger("jaxtune")
FILE = "folds.json"


@dataclasses.dataclass
class CrossValidation:
    """The metrics of the folds.

    Attributes:
        folder: holds `fold_0`, `fold_1`, ..., each a run folder, and `folds.json`.
        folds: metrics of each finished fold, in order (with several processes, on the first); `eval_*` on its evaluation rows and,
            with `evaluate.metric`, `tuned_*`.
        metrics: their mean over the folds.
        spread: their sample standard deviation, sqrt(sum (x - mean)^2 / (k - 1)).
        interrupted: a signal stopped it before the last fold was done.
    """

    folder: Path
    folds: list[dict[str, float]]
    metrics: dict[str, float]
    spread: dict[str, float]
    interrupted: bool = False

    def show(self, console: Console | None = None) -> None:
        """Print a table: metric, mean, spread, and each fold."""
        table = Table(title=f"{len(self.folds)} folds", title_justify="left")
        for name in ("", "mean", "spread", *(f"fold {n}" for n in range(len(self.folds)))):
            table.add_column(name, justify="right" if name else "left", no_wrap=True)
        for name, mean in self.metrics.items():
            values = (mean, self.spread[name], *(fold[name] for fold in self.folds))
            table.add_row(name, *(f"{value:.4g}" for value in values))
        cli.print_table(console or Console(), table)


def cross_validate(config: Config, tokenizer: Any, data_parallel: int, train_one: Callable[[Config], Any]) -> CrossValidation:
    """Run the remaining folds: finished folds are skipped, and a stopped fold continues.

    Raises:
        CheckpointError: `output_dir` is not empty and `resume` is not set, or it holds another run or one on other rows.
    """
    distributed.on_first(lambda: _check_free(config))  # refuse a folder in use before any long work
    rows = [data.load(_of(config, number), tokenizer, data_parallel).train for number in range(config.data.kfold or 0)]
    # num_train_epochs of the fold with the most steps per epoch; the others have a few rows fewer and see some of them once more
    steps = max(data.total_steps(config, fold) for fold in rows)
    distributed.on_first(lambda: runfolder.write_config(runfolder.open_run(config), config))
    folder = runfolder.folder_of(config)
    done = _done(folder, rows)
    for number in range(len(done), len(rows)):
        log.info("fold %d of %d", number, len(rows))
        own = folder / f"fold_{number}"
        distributed.on_first(lambda own=own: _clear(own))
        if train_one(_fold(config, own, number, steps)).interrupted:  # keep nothing else: only one model in memory at a time
            log.warning("stopped in fold %d of %d; continue with: resume=true output_dir=%s", number, len(rows), folder)
            return _summary(folder, done, interrupted=True)
        done.append(_measured(config, own) if distributed.is_first() else {})
        if distributed.is_first():
            found = _summary(folder, done)
            record = {"kfold": len(rows), "steps": steps, "folds": done, "mean": found.metrics, "spread": found.spread}
            write_text(folder / FILE, json.dumps(record, indent=2))
    return _summary(folder, done)


def _check_free(config: Config) -> None:
    runfolder.check_free(config)
    if config.resume:
        runfolder.check_same(config)


def _done(folder: Path, rows: list[data.Source]) -> list[dict[str, float]]:
    """The metrics of finished folds, if they were trained on these rows."""
    file = folder / FILE
    done: list[dict[str, float]] = read_entry(file, "folds") if os.path.lexists(file) else []
    for number in range(len(done)):
        if read_entry(folder / f"fold_{number}" / "run.json", "data")["fingerprint"] != rows[number].fingerprint:
            raise CheckpointError(f"the rows are not those fold {number} of {folder} was trained on; put them back, or use another folder")
    return done


def _clear(folder: Path) -> None:
    """Remove the folder of a fold that was stopped before it wrote config.yaml, the first file that can be resumed."""
    if not folder.exists() or (folder / "config.yaml").is_file():
        return
    if runfolder.is_used(folder):
        raise CheckpointError(f"{folder} {runfolder.NO_CONFIG}, or move the folder away to train this fold again")
    shutil.rmtree(folder)


def _of(config: Config, number: int) -> Config:
    return config.replace(data=dataclasses.replace(config.data, fold=number))


def _fold(config: Config, folder: Path, number: int, steps: int) -> Config:
    return _of(config, number).replace(output_dir=str(folder), resume=(folder / "config.yaml").is_file(), max_steps=steps)


def _measured(config: Config, folder: Path) -> dict[str, float]:
    """The metrics of the last evaluation, or of the best one if that model is the result, and those of `evaluation.json`."""
    try:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        rows = []
    row = chosen_evaluation(config, rows)
    if row is None:
        raise CheckpointError(f"{folder / 'metrics.jsonl'} has no evaluation that can be read; move {folder} away to train this fold again")
    return measured(folder, row)


def _summary(folder: Path, folds: list[dict[str, float]], interrupted: bool = False) -> CrossValidation:
    names = [name for name in folds[0] if all(name in fold for fold in folds)] if folds else []
    values = {name: [fold[name] for fold in folds] for name in names}
    mean = {name: statistics.fmean(column) for name, column in values.items()}
    spread = {name: statistics.stdev(column) if len(column) > 1 else 0.0 for name, column in values.items()}
    return CrossValidation(folder, folds, mean, spread, interrupted)
