"""From the start of `python -m jaxtune.train` to its first step, by phases: with an empty cache of compiled programs, then with it.

    python tools/start_time.py MODEL_FOLDER ROWS.jsonl [--rows 500] [key=value ...]          (ROWS.jsonl has `question` and `answer`)

The real command is run and its lines are timed as they come; what jax says of compiling (JAX_LOG_COMPILES) gives the rest.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MARKS = {  # what is done when such a line comes
    r"^model=": "imports, config",
    r"^data: .* documents": "tokenizer, rows",
    r"^model: .* weights": "weights",
    r"^(adapter|full): ": "adapter",
    r"Finished XLA compilation of jit\(step\)": "step compiled",
    r"^step 1/": "first step done",
    r"^result: ": "result",
}
COLUMNS = {"prompt": "question", "completion": "answer"}
COMPILING = re.compile(
    r"Finished (tracing|jaxpr to MLIR|XLA compilation)(?: module conversion| of)? (?:jit\((\w+)\)|(\w+) for jit) in (\S+) sec"
)


def processor_time(pid: int) -> float:
    """Seconds of processor that a process has used, all its threads together (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def started(command: list[str], environment: dict[str, str]) -> tuple[list[tuple[str, float, float]], dict[str, float], int]:
    """Phases with the second each ended in, by the clock and of the processor; seconds of tracing, lowering and compiling the step; how
    many programs were compiled."""
    begin = time.monotonic()
    done: list[tuple[str, float, float]] = []
    compiling, programs = {}, 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    lines = []
    for line in process.stdout:
        lines.append(line)
        for pattern, phase in MARKS.items():
            if re.search(pattern, line) and phase not in (name for name, *_ in done):
                done.append((phase, time.monotonic() - begin, processor_time(process.pid)))
        if found := COMPILING.search(line):
            programs += found[1].startswith("XLA")
            if (found[2] or found[3]) == "step":
                compiling[found[1]] = float(found[4])
    if process.wait():
        sys.exit("".join(lines))
    return done, compiling, programs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows_file", metavar="ROWS.jsonl")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--rows", type=int, default=500)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        rows = [line for line in Path(given.rows_file).read_text().splitlines() if line][: given.rows]
        (work / "rows.jsonl").write_text("\n".join(rows) + "\n")
        data = {"train": str(work / "rows.jsonl"), "columns": COLUMNS, "max_length": 512, "length_policy": "drop"}
        config = {"model": given.model, "data": data, "per_device_train_batch_size": 4, "max_steps": 2, "logging_steps": 1}
        (work / "config.yaml").write_text(json.dumps(config))
        environment = os.environ | {"JAX_LOG_COMPILES": "1", "XDG_CACHE_HOME": str(work / "cache"), "PYTHONUNBUFFERED": "1"}
        for kind in ("cold", "warm"):
            command = [sys.executable, "-m", "jaxtune.train", str(work / "config.yaml"), f"output_dir={work / kind}", *given.overrides]
            phases, compiling, programs = started(command, environment)
            print(f"{kind}, seconds (of the processor): " + ", ".join(f"{phase} {wall:.1f} ({cpu:.1f})" for phase, wall, cpu in phases))
            parts = " + ".join(f"{what} {seconds:.1f}" for what, seconds in compiling.items())
            print(
                f"      the step: {parts} = {sum(compiling.values()):.1f} s; {programs} programs compiled or read from the cache",
                flush=True,
            )


if __name__ == "__main__":
    main()
