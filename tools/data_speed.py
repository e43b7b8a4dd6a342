"""python tools/data_speed.py MODEL ROWS.jsonl [--rows 100000] [--form plain|chat|text] [--data key=value ...]

Measure time and memory of `jaxtune.data.load`. ROWS (prompt and answer, under the columns that --columns names) are repeated, each with its
own number, until there are --rows of them; then they are tokenised, packed and planned, once with an empty cache and once from it, each in
its own process. CPU seconds include all threads; memory is the process's own (RssAnon), since the system can reclaim the pages of the
memory-mapped cache.
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


def write_rows(source: Path, target: Path, count: int, form: str, columns: tuple[str, str]) -> None:
    """`count` rows, no two alike."""
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    with target.open("w") as stream:
        for number, row in enumerate(itertools.islice(itertools.cycle(rows), count)):
            prompt, answer = f"[{number}] {row[columns[0]]}", row[columns[1]]
            made = {
                "plain": {"prompt": prompt + "\n", "completion": answer},
                "chat": {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]},
                "text": {"text": f"{prompt}\n{answer}"},
            }[form]
            stream.write(json.dumps(made) + "\n")


def measure(config: dict) -> dict:
    """Load once, and say what it took."""
    from transformers import AutoTokenizer

    from jaxtune import data
    from jaxtune.config import load_config

    tokenizer = AutoTokenizer.from_pretrained(config["model"])
    peak, done = [0], threading.Event()
    before = _anonymous()

    def watch() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], _anonymous())

    threading.Thread(target=watch, daemon=True).start()
    cpu, clock = _cpu(), time.monotonic()
    loaded = data.load(load_config(config), tokenizer)
    train = loaded.train
    out = {"seconds": time.monotonic() - clock, "cpu_seconds": _cpu() - cpu}
    for step in (0, 1_000_000):
        train.batch_at(step)  # the first batch of an epoch draws its order
        clock = time.perf_counter()
        for _ in range(20):
            train.batch_at(step)
        out[f"batch_at({step}) ms"] = 50 * (time.perf_counter() - clock)
    done.set()
    return out | {
        "MB before": before / 1e6, "MB at most": peak[0] / 1e6, "rows": len(train.documents), "tokens": train.tokens,
        "tokens a row": train.tokens / len(train.documents), "packing_efficiency": train.efficiency,
    }  # fmt: skip


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _anonymous() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("source", type=Path)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--form", choices=("plain", "chat", "text"), default="plain")
    parser.add_argument("--columns", nargs=2, default=("question", "answer"))
    parser.add_argument("--data", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(json.loads(args.measure))))
        return
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "rows.jsonl"
        write_rows(args.source, target, args.rows, args.form, tuple(args.columns))
        keys = dict(pair.split("=", 1) for pair in args.data)
        data = {"train": str(target), "cache_dir": f"{folder}/cache"} | {key: json.loads(value) for key, value in keys.items()}
        config = json.dumps({"model": args.model, "output_dir": f"{folder}/run", "data": data})
        print(f"{args.rows:,} {args.form} rows, {target.stat().st_size / 1e6:.0f} MB, on {len(os.sched_getaffinity(0))} cores")
        for title in ("empty cache", "from cache"):
            argv = [sys.executable, __file__, args.model, str(args.source), "--measure", config]
            found = json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)
            words = [f"{name} {value:,.3g}" if isinstance(value, float) else f"{name} {value:,}" for name, value in found.items()]
            print(f"{title}: {', '.join(words)}", flush=True)


if __name__ == "__main__":
    main()
