"""Compare runs: the keys in which they differ, their losses, and their metrics.

    jaxtune report runs/a runs/b --plot losses.png

RUN is a run folder, or a folder of such folders (from a sweep or cross-validation). Only files written by the runs are read.
"""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxtune import cli, errors
from jaxtune.config.load import word
from jaxtune.errors import CheckpointError, ConfigError
from jaxtune.picture import History, draw_runs, smoothed
from jaxtune.runfolder import leaves, measured, read_config, read_entry
from jaxtune.runlog import chosen_evaluation, read_metrics

WIDEST = 100  # characters per line of the plot's legend; runs whose differing keys need more are labelled by their folders
NAMES = {"output_dir", "resume", "run_name"}  # keys that identify a run and do not affect it


@dataclasses.dataclass
class Entry:
    """One run.

    Attributes:
        run: its folder.
        keys: values of the keys that differ between runs whose objective and method have them; without those that this run's have not.
        step: the last step, of `steps`.
        finished: whether its result exists.
        metrics: `loss` and `reward` (smoothed, as in their plots), the `eval_*` of the relevant evaluation (the last, or the best one
            if that model is the result), and `tuned_*` from its evaluation.json.
    """

    run: str
    keys: dict[str, Any]
    step: int
    steps: int | None
    finished: bool
    metrics: dict[str, float]
    history: History = dataclasses.field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the history."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "history"}


@dataclasses.dataclass
class Report:
    """Runs in comparison, the best first if they have the metric `by`.

    Attributes:
        by: the metric they are sorted by, or None.
        runs: one `Entry` per run.
    """

    by: str | None
    runs: list[Entry]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as printed by `--json`."""
        return {"by": self.by, "runs": [run.to_dict() for run in self.runs]}

    def draw(self, path: str | os.PathLike) -> None:
        """Plot the losses of all runs over their steps, or their rewards if each has some, as a PNG named `path`.

        Raises ConfigError for a name that does not end in .png (it would replace a file of another kind), CheckpointError if no run has
        logged a loss.
        """
        path = Path(path).expanduser()
        if path.suffix.lower() != ".png":
            raise ConfigError(f"the plot is written as a PNG, and {path} is not named like one; write {path}.png")
        logged = [run.metrics for run in self.runs if run.history]
        if not any("loss" in metrics for metrics in logged):
            raise CheckpointError("no run has logged a loss yet, so there is nothing to plot; wait for its first logging_steps")
        names = {run.run: ", ".join(f"{key}={word(value)}" for key, value in run.keys.items()) or run.run for run in self.runs}
        clear = len(set(names.values())) == len(names) and max(map(len, names.values()), default=0) <= WIDEST
        name = "reward" if all("reward" in metrics for metrics in logged) else "loss"
        draw_runs({names[run.run] if clear else run.run: run.history for run in self.runs}, path, name)

    def show(self, console: Console | None = None) -> None:
        """Print a table with one row per run."""
        keys, metrics = _all(run.keys for run in self.runs), _all(run.metrics for run in self.runs)
        table = Table(box=None)
        for name in ("run", *keys, "step", *metrics):
            table.add_column(name, justify="right" if name in metrics or name == "step" else "left", no_wrap=True)
        for run in self.runs:
            values = (f"{run.metrics[name]:.4g}" if name in run.metrics else "" for name in metrics)
            step = f"{run.step}" if run.finished else f"{run.step} of {run.steps or '?'}"
            table.add_row(run.run, *(word(run.keys[key]) if key in run.keys else "" for key in keys), step, *values)
        cli.print_table(console or Console(), table)


def report(runs: str | os.PathLike | Sequence[str | os.PathLike], by: str | None = None) -> Report:
    """Compare what these runs have written.

    runs  run folders, or folders of such folders
    by    the metric to sort by (one of the rows' `metrics`); None: the first run's `metric_for_best_model`, if all have it

    Raises CheckpointError for a folder without a run or with unreadable files; ConfigError for a metric that no run has.
    """
    given = [runs] if isinstance(runs, (str, os.PathLike)) else runs
    folders = [folder for one in given for folder in _runs_in(Path(one).expanduser())]
    configs = [read_config(folder) for folder in folders]
    keys = _differing([config.to_dict() for config in configs])
    found = [_entry(*one) for one in zip(folders, configs, keys, strict=True)]
    known = _all(entry.metrics for entry in found)
    if by is not None and by not in known:
        raise ConfigError(f"--by {by}: no run has measured it; there are {', '.join(known) or 'no metrics yet'}")
    if by is None and configs[0].metric_for_best_model in known:
        by = configs[0].metric_for_best_model
    if by is not None:
        sign = 1 if by.endswith(("loss", "perplexity")) else -1
        found.sort(key=lambda entry: sign * entry.metrics[by] if by in entry.metrics else math.inf)
    return Report(by, found)


def _differing(configs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each config, the keys whose values differ; one of an objective or method is compared among the runs that have it."""
    flat = [{key: value for key, value in leaves(config).items() if key not in NAMES} for config in configs]

    def values(key: str) -> list[Any]:
        return [one.get(key) for one, config in zip(flat, configs, strict=True) if key.partition(".")[0] in config]

    differ = [key for key in _all(flat) if any(value != values(key)[0] for value in values(key))]
    return [{key: one.get(key) for key in differ if key.partition(".")[0] in config} for one, config in zip(flat, configs, strict=True)]


def _runs_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}; give the folder that a run was written to")
    if (folder / "run.json").is_file():
        return [folder]
    inside = sorted(path.parent for path in folder.glob("*/run.json"))
    if not inside:
        raise CheckpointError(f"{folder} holds no run (no run.json), nor do folders in it; give the folder that a run was written to")
    return inside


def _entry(folder: Path, config: Any, keys: dict[str, Any]) -> Entry:
    file = folder / "metrics.jsonl"
    history = read_metrics(file) if file.is_file() else []
    logged = {name: [row[name] for row in history if row.get(name) is not None] for name in ("loss", "reward")}
    metrics = {name: smoothed(values)[-1] for name, values in logged.items() if values}
    metrics |= measured(folder, chosen_evaluation(config, history) or {})
    steps = read_entry(folder / "run.json", "counts").get("steps")
    return Entry(str(folder), keys, history[-1]["step"] if history else 0, steps, is_finished(folder), metrics, history)


def is_finished(folder: Path) -> bool:
    """Whether the run in this folder has a result."""
    return (folder / "adapter").is_dir() or (folder / "model").is_dir()


def _all(tables: Any) -> list[str]:
    """The keys of all tables, in order."""
    return list(dict.fromkeys(key for table in tables for key in table))


def main() -> None:
    """`python -m jaxtune.report`."""
    parser = cli.parser("report", __doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's folder, or a folder of such folders")
    parser.add_argument("--by", metavar="METRIC", help="sort by this metric (default: the config's metric_for_best_model)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the losses of all runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")
    arguments = parser.parse_args()
    found = report(arguments.runs, arguments.by)
    if arguments.plot:
        found.draw(arguments.plot)
        print(f"plot: {arguments.plot}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(found.to_dict(), default=str))
    else:
        found.show()


cli.callable_module(__name__, report)

if __name__ == "__main__":
    errors.run(main)
