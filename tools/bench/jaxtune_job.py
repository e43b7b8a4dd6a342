"""jaxtune: `jt.train`, with the run's keys as given; rungs of the ladder that are no key are taken away here by hand."""

import json
import sys
import time
from pathlib import Path

import jax

import jaxtune as jt
from jaxtune.data.source import Source
from jaxtune.loop import Loop
from jaxtune.runlog import read_metrics


def watch() -> list[float]:
    """Times: the loop's start, and when the metrics of each step were there, which is when the step was done."""
    times, call, read = [], Loop.__call__, Loop._read

    def timed_call(self, *args):
        times.append(time.monotonic())
        return call(self, *args)

    def timed_read(self, *args):
        read(self, *args)
        times.append(time.monotonic())

    Loop.__call__, Loop._read = timed_call, timed_read
    return times


def all_logits() -> None:
    """Logits of every place, as if nothing told which tokens are trained."""
    batch_at = Source.batch_at
    Source.batch_at = lambda self, *args: batch_at(self, *args).replace(capacity=None)


def main(job: dict) -> dict:
    times, logits = watch(), job.get("logits")  # "all": of every place; "all at once": and not by chunks
    if logits:
        all_logits()
    data = {"train": job["rows"], "columns": {"prompt": "question", "completion": "answer"}, "max_length": job["length"]}
    data["cache_dir"] = f"{job['work']}/cache"
    keys = job["keys"] | ({"logits_chunk_size": 10**9} if logits == "all at once" else {})
    jt.train({
        "model": job["model"], "method": job["method"], "lora": job["lora"], "output_dir": f"{job['work']}/jaxtune", "dtype": job["dtype"],
        "num_train_epochs": 1, "per_device_train_batch_size": job["batch"], "learning_rate": job["learning_rate"], "logging_steps": 1,
        "report_to": [], "save_strategy": "no", "mesh": {"data": 1}, "compilation_cache": False,
    } | keys | {"data": data | keys.get("data", {})})  # fmt: skip
    rows = read_metrics(Path(job["work"], "jaxtune", "metrics.jsonl"))
    seen = [0, *(row["num_tokens"] for row in rows)]
    found = {"times": times, "losses": [row["loss"] for row in rows]}
    found["tokens"] = [after - before for before, after in zip(seen, seen[1:], strict=False)]
    if jax.default_backend() != "cpu":
        found["device_peak"] = jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
    return found


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    Path(given["work"], "result.json").write_text(json.dumps(main(given)))
