"""The result of a plan, and how it is printed."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

VERDICT = {True: "fits", False: "does not fit", None: "memory of the machine not known"}


@dataclasses.dataclass
class Plan:
    """What one device needs for a step.

    Attributes:
        fits: whether `peak_bytes` is within the device's memory; None if that is unknown.
        peak_bytes: arguments + temporaries + outputs - what they share, from the compiled program: exact.
        bytes: peak_bytes by cause. Weights, scales, teacher (if any), trainable, optimizer and batch are exact; gradients, activations and
            logits are computed from shapes, and `other` is the remainder of the temporaries.
        flops: of a step on one device, computed from shapes (products only).
        seconds_at_least: flops or bytes divided by the chip's published rates, whichever takes longer; None if unknown.
        steps: of the whole run; None if neither `max_steps` nor the rows are known.
        hours_at_least: those steps at `seconds_at_least`, in proportion for shorter rows.
        rows: of an epoch (documents, tokens, rows, their length and fill), if the data is available.
        settings: the keys that the bytes depend on most.
        instead: if it does not fit, settings that do.
        notes: what is estimated, and what is unknown and why.
    """

    target: str
    devices: int
    fits: bool | None
    peak_bytes: int
    device_bytes: int | None
    bytes: dict[str, int]
    flops: float
    intensity: float
    seconds_at_least: float | None
    steps: int | None
    hours_at_least: float | None
    rows: dict[str, Any] | None
    settings: dict[str, Any]
    instead: list[dict[str, Any]]
    notes: list[str]

    def of(self, *causes: str) -> int:
        """The sum of the bytes of several causes."""
        return sum(self.bytes.get(cause, 0) for cause in causes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as printed by `--json`."""
        return dataclasses.asdict(self)


def show(result: Plan, console: Console) -> None:
    """Print a plan."""
    needs = size(result.peak_bytes) + (f" of {size(result.device_bytes)}" if result.device_bytes else "")
    console.print(f"[bold]{VERDICT[result.fits]}[/]: {needs} on each of {result.devices} device(s) of {result.target}")
    table = Table("what", "", "share", box=None)
    for name, count in result.bytes.items():
        table.add_row(name, size(count), f"{100 * count / result.peak_bytes:.1f} %")
    console.print(table)
    console.print("gradients, activations and logits are estimated from shapes; the total is the compiler's", style="dim", soft_wrap=True)
    bound = f"; a step takes at least {time(result.seconds_at_least)}" if result.seconds_at_least else ""
    console.print(f"{result.flops / 1e12:.3g} TFLOP a step and device, {result.intensity:.0f} FLOP a byte{bound}", soft_wrap=True)
    if rows := result.rows:
        filled = f"{rows['rows']:,} rows of {rows['length']:,} tokens ({100 * rows['efficiency']:.1f} % filled)"
        console.print(f"{rows['documents']:,} documents in {filled}, {rows['steps_per_epoch']:,} steps an epoch", soft_wrap=True)
    if result.steps:
        hours = f", at least {time(3600 * result.hours_at_least)}" if result.hours_at_least else ""
        console.print(f"the run: {result.steps:,} steps{hours}", soft_wrap=True)
    for row in result.instead:
        keys = " ".join(f"{key}={value}" for key, value in row["keys"].items())
        console.print(f"instead, {row['change']}: {keys}  ({size(row['peak_bytes'])})", highlight=False, soft_wrap=True)
    if result.fits is False and not result.instead:
        console.print("no single change makes it fit; take a larger target or a smaller model")
    for note in result.notes:
        console.print(note, style="dim", highlight=False, markup=False, soft_wrap=True)


def side_by_side(plans: Mapping[str, Plan | str], console: Console) -> None:
    """Print plans of the same run for several methods, one row each."""
    able = {name: one for name, one in plans.items() if isinstance(one, Plan)}
    if able:
        one = next(iter(able.values()))
        of = f" of {size(one.device_bytes)}" if one.device_bytes else ""
        console.print(f"[bold]{one.target}[/], memory of each of {one.devices} device(s){of}", soft_wrap=True)
    table = Table("method", "", "needs", "frozen", "trained", "the rest", "a step", "the run", box=None)
    for name, one in able.items():
        frozen, trained = one.of("weights", "scales", "teacher"), one.of("trainable", "optimizer", "gradients")
        rest = one.peak_bytes - frozen - trained
        times = (one.seconds_at_least, one.hours_at_least and 3600 * one.hours_at_least)
        table.add_row(name, VERDICT[one.fits], *map(size, (one.peak_bytes, frozen, trained, rest)), *(time(t) if t else "?" for t in times))
    console.print(table)
    said = "trained counts gradients and moments, the rest is activations, logits and temporaries; times are lower bounds"
    console.print(said, style="dim", soft_wrap=True)
    for name, one in plans.items():
        if isinstance(one, str):
            console.print(f"{name}: {one}", highlight=False, markup=False, soft_wrap=True)
        elif one.fits is False:
            keys = f"method={name} quantization={one.settings['quantization'] or 'null'}"
            console.print(f"{name}: for settings that fit, python -m jaxtune.plan CONFIG {keys}", highlight=False, soft_wrap=True)
    for note in dict.fromkeys(note for one in able.values() for note in one.notes):
        console.print(note, style="dim", highlight=False, markup=False, soft_wrap=True)


def size(count: int) -> str:
    """`1.234 GiB`, `12.3 MiB`."""
    return f"{count / 2**30:.3f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"


def time(seconds: float) -> str:
    """`1.2 h`, `3.4 min`, `0.56 s`, `7.8 ms`."""
    for unit, name in ((3600, "h"), (60, "min"), (1, "s")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{1000 * seconds:.3g} ms"
