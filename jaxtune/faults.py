"""Numerical faults of a run, reported with the rows of the batch: their places in the files, never their text."""

import json
import math
from pathlib import Path
from typing import Any

KNOWN = 100  # losses that a new one is compared with
AT_LEAST = 20  # losses needed before anything is reported
LISTED = 20  # rows named in a log line; files list all


def rows_in_words(rows: dict[str, list[int]]) -> str:
    """`data/train.jsonl rows 3, 17, 29 and 41 more`."""
    parts = []
    for path, numbers in rows.items():
        more = f" and {len(numbers) - LISTED} more" if len(numbers) > LISTED else ""
        parts.append(f"{path} row{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers[:LISTED]))}{more}")
    return "; ".join(parts) or "none"


def spike(losses: list[float], loss: float, sigma: float) -> dict[str, float] | None:
    """How many standard deviations `loss` lies above the previous losses, if more than `sigma`; else None.

    The deviation counts as at least 2 % of the mean, so a nearly constant loss raises no alarm.
    """
    if not sigma or len(losses) < AT_LEAST:
        return None
    mean = math.fsum(losses) / len(losses)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in losses) / len(losses))
    deviation = max(deviation, 0.02 * abs(mean))
    return {"loss": loss, "mean": mean, "deviation": deviation} if loss > mean + sigma * deviation else None


def remember(losses: list[float], loss: float) -> list[float]:
    """The last losses, with one more appended."""
    return [*losses, loss][-KNOWN:]


def write_spike(folder: Path, step: int, found: dict[str, float], rows: dict[str, list[int]]) -> str:
    """Append a line to `loss_spikes.jsonl`; returns the message."""
    record: dict[str, Any] = {"step": step, **found, "rows": rows}
    with (folder / "loss_spikes.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
    high = (found["loss"] - found["mean"]) / found["deviation"]
    return (
        f"loss spike at step {step}: {found['loss']:.4g} is {high:.1f} standard deviations above the {found['mean']:.4g} of the "
        f"previous steps; its batch was {rows_in_words(rows)}"
    )
