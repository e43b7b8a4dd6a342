"""What `plan` says a step needs beside what the run really takes: each a fresh process, on this machine, one after the other.

    python tools/plan_check.py MODEL_FOLDER ROWS.jsonl [--only N ...]          (ROWS.jsonl has `question` and `answer`, as gsm8k has)

The run's figure is the highest resident memory (VmHWM, less files that are mapped) in the second of two equal runs of one process, above
what was resident before it read the weights: what is imported and compiled once is there already by then. Memory of things that are
gone is given back to the system before each step, since glibc keeps it. The last column is that of the first run, compiler and all.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

COLUMNS = {"prompt": "question", "completion": "answer"}
RUNS: list[tuple[str, str, int, int, dict[str, Any]]] = [  # method, dtype, rows, length, other keys
    ("lora", "float32", 4, 512, {}),
    ("lora", "float32", 4, 512, {"gradient_checkpointing": "full"}),
    ("lora", "bfloat16", 4, 512, {}),
    ("lora", "float32", 1, 2048, {}),
    ("lora", "float32", 8, 512, {"data.packing": False}),
    ("qlora", "float32", 4, 512, {}),
    ("qlora", "bfloat16", 2, 1024, {"gradient_accumulation_steps": 2}),
    ("full", "float32", 2, 512, {}),
    ("full", "float32", 2, 512, {"optimizer_in_bwd": True, "max_grad_norm": 0}),
    ("full", "bfloat16", 4, 256, {"param_dtype": "bfloat16", "optim": "adamw_8bit"}),
]


def status(*names: str) -> list[int]:
    """Bytes of lines of /proc/self/status."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [1024 * int(lines[name].split()[0]) for name in names]


def give_back() -> None:
    """Memory of things that are gone, to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def highest(function, *args: Any) -> tuple[Any, int]:
    """What a function returns, and the most memory that was resident (less files mapped) while it ran."""
    import jax

    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
    out = jax.block_until_ready(function(*args))
    high, files = status("VmHWM", "RssFile")
    return out, high - files


def measured(config: str, keys: list[str], out: Path) -> None:
    """Two equal runs in this process, and the memory they took above what was there before the weights were read."""
    from jaxtune import startup
    from jaxtune.train import train

    runs = []
    load, programs = startup.read_weights, startup.programs

    def loading(*args):
        give_back()
        runs.append({"baseline": status("RssAnon")[0], "steps": []})
        result, high = highest(load, *args)
        give_back()
        runs[-1] |= {"loading": high - runs[-1]["baseline"], "loaded": status("RssAnon")[0] - runs[-1]["baseline"]}
        return result

    def prepared(*args):
        step, eval_step = programs(*args)

        def watched(state, base, batch):
            give_back()
            runs[-1].setdefault("rest", status("RssAnon")[0] - runs[-1]["baseline"])
            result, high = highest(step, state, base, batch)
            runs[-1]["steps"].append(high - runs[-1]["baseline"])
            return result

        return watched, eval_step

    startup.read_weights, startup.programs = loading, prepared
    startup.compile_ahead = lambda *args: None  # the compiler's memory comes with the first step, and so not with that of reading
    for number in range(2):
        train(config, [*keys, f"output_dir={out.parent}/run-{number}"])
    out.write_text(json.dumps(runs))


def settings_of(number: int) -> list[str]:
    """`key=value` of a row."""
    method, dtype, rows, length, more = RUNS[number]
    keys = {"method": method, "dtype": dtype, "per_device_train_batch_size": rows, "data.max_length": length} | more
    return [f"{key}={json.dumps(value)}" for key, value in keys.items()]


def compared(number: int, given, work: Path) -> str:
    """One row of the table."""
    config = {
        "model": given.model, "max_steps": 3, "save_strategy": "no", "report_to": [], "mesh": {"data": 1}, "compilation_cache": False,
        "output_dir": str(work / "run"),
        "data": {"train": str(work / "rows.jsonl"), "columns": COLUMNS, "length_policy": "drop", "cache_dir": str(work / "data")},
    }  # fmt: skip
    (work / "config.json").write_text(json.dumps(config))
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "jaxtune.plan", str(work / "config.json"), "--json", *settings_of(number)]
    plan = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)
    command = [sys.executable, __file__, given.model, given.rows, "--run", str(work), "--only", str(number)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=None if given.verbose else subprocess.DEVNULL, env=environment)
    first, second = json.loads((work / "run.json").read_text())
    if given.verbose:
        print(first, second, plan["bytes"], sep="\n", file=sys.stderr)
    real, planned = max(second["loading"], *second["steps"]), plan["peak_bytes"]
    whole = max(first["loading"], *first["steps"])
    method, dtype, rows, length, more = RUNS[number]
    name = ", ".join([f"{method} {dtype} {rows} x {length}", *(f"{key.rpartition('.')[2]}: {value}" for key, value in more.items())])
    return f"| {name} | {planned / 1e9:.3f} | {real / 1e9:.3f} | {100 * (planned / real - 1):+.1f} % | {whole / 1e9:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("--only", type=int, nargs="*", default=range(len(RUNS)), metavar="N", help="rows of the table, from 0")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        measured(str(given.run / "config.json"), settings_of(given.only[0]), given.run / "run.json")
        return
    print("| step | plan, GB | run, GB | difference | with the compiler, GB |\n|---|---|---|---|---|")
    for number in given.only:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            lines = [line for line in Path(given.rows).read_text().splitlines() if line][:120]
            (work / "rows.jsonl").write_text("\n".join(lines) + "\n")
            print(compared(number, given, work), flush=True)


if __name__ == "__main__":
    main()
