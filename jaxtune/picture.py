"""Plots of losses over steps."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune.disk import replacing

TRAIN, EVAL = "#4477aa", "#cc6633"
MANY = ("#4477aa", "#cc6633", "#228833", "#aa3377", "#66ccee", "#ccbb44", "#555555", "#ee6677")
History = Sequence[Mapping[str, Any]]  # rows of a metrics.jsonl


def draw_loss(history: History, path: Path, name: str = "loss") -> None:
    """Plot `loss` and `eval_loss` (or `reward` and `eval_reward`) over steps, as an atomically replaced PNG; nothing if there are none."""
    train, evals = _points(history, name), _points(history, f"eval_{name}")
    if not train and not evals:
        return
    figure, axes = _figure()
    if train:
        steps, values = zip(*train, strict=True)
        smooth = smoothed(values)
        if smooth != list(values):
            axes.plot(steps, values, color=TRAIN, alpha=0.25, linewidth=1)
        axes.plot(steps, smooth, color=TRAIN, linewidth=2, label=f"train  {smooth[-1]:.3f}", marker="." if len(train) < 3 else None)
    if evals:
        steps, values = zip(*evals, strict=True)
        best = (max if name == "reward" else min)(range(len(values)), key=values.__getitem__)
        note = "" if values[best] == values[-1] else f"  (best {values[best]:.3f} at step {steps[best]})"
        axes.plot(steps, values, color=EVAL, linewidth=2, marker="o", markersize=4, label=f"eval  {values[-1]:.3f}{note}")
    axes.legend(frameon=False, loc="best")
    _save(figure, axes, [train], [evals], name, path)


def draw_runs(histories: Mapping[str, History], path: Path, name: str = "loss") -> None:
    """Plot several runs: smoothed `loss` as lines, `eval_loss` as dots on dashes, one colour per run; nothing if there are none."""
    points = {run: (_points(rows, name), _points(rows, f"eval_{name}")) for run, rows in histories.items()}
    points = {run: both for run, both in points.items() if any(both)}
    if not points:
        return
    figure, axes = _figure(4.5 + 0.17 * len(points))
    for number, (run, (train, evals)) in enumerate(points.items()):
        colour, label = MANY[number % len(MANY)], run
        if train:
            steps, values = zip(*train, strict=True)
            axes.plot(steps, smoothed(values), color=colour, linewidth=1.5, label=label, marker="." if len(train) < 3 else None)
            label = None
        if evals:
            steps, values = zip(*evals, strict=True)
            axes.plot(steps, values, color=colour, linewidth=1.5, linestyle="--", marker="o", markersize=4, label=label)
    figure.legend(frameon=False, fontsize="small", loc="outside upper left")
    trains, evals = ([pair[side] for pair in points.values()] for side in (0, 1))
    _save(figure, axes, trains, evals, f"{name} (dashed: eval_{name})" if any(evals) else name, path)


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about a fiftieth of the curve, with bias correction as for Adam's moments."""
    decay = 1 - min(1.0, 50 / len(values))
    mean, out = 0.0, []
    for number, value in enumerate(values, 1):
        mean = decay * mean + (1 - decay) * value
        out.append(mean / (1 - decay**number))
    return out


Points = Sequence[tuple[int, float]]


def _points(history: History, name: str) -> Points:
    return [(row["step"], row[name]) for row in history if row.get(name) is not None]


def _figure(height: float = 4.5) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _save(figure: Any, axes: Any, trains: Sequence[Points], evals: Sequence[Points], name: str, path: Path) -> None:
    """Set axis limits that a single outlier does not stretch, and save the file."""
    tops = [sorted(value for _, value in train)[math.ceil(0.99 * len(train)) - 1] for train in trains if train]
    seen = [value for points in (*trains, *evals) for _, value in points]
    low, high = min(seen), max(tops + [value for points in evals for _, value in points])
    pad = 0.06 * (high - low) or 0.1
    axes.set_ylim(low - pad, high + pad)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.set_xlabel("step")
    axes.set_ylabel(name)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as scratch:
        figure.savefig(scratch, format="png")
