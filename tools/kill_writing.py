"""SIGKILL while a cache or a result is written; the next run must leave the same bytes as an undisturbed one, and no incomplete files.

    python tools/kill_writing.py [data programs export] --trials 10 --seed 0

data      `jaxtune.data` while rows are tokenised: the documents in `data.cache_dir`
programs  `jaxtune.train` while compiled programs are cached: the adapter, and no message about a damaged program at the next start
export    `jaxtune.export --merge` while the merged model is written and verified: the model folder

Each trial waits for the first sign of writing, lets a random time pass, kills, and starts the same command again. Prints one line per trial
and exits with 1 if anything differs. (Kills during whole training runs: tools/kill_campaign.py.)
"""

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from kill_campaign import command, run_to_end, tiny_run


class Writer(NamedTuple):
    """A command that writes: the sign that it has begun, the files that must have the same bytes, the longest time until the kill."""

    argv: list[str]
    begun: Callable[[], bool]
    files: Callable[[], list[Path]]
    longest: float


def make_writers(work: Path, config: str, trial: Path) -> dict[str, Writer]:
    """The commands, all of which write below `trial`."""
    rows, run, python = work / "many.jsonl", work / "trained", [sys.executable, "-m"]
    rows.write_text("".join(json.dumps({"prompt": f"Say {n}.", "completion": f" {n} {n}"}) + "\n" for n in range(20_000)))
    run_to_end(command(config, ["max_steps=2"], run, resume=False))
    return {
        "data": Writer(
            [*python, "jaxtune.data", config, f"data.train={rows}", f"data.cache_dir={trial}", "--json"],
            lambda: any(trial.glob(".making.*")),
            lambda: [file for file in trial.glob("*/*") if not file.parent.name.startswith(".")],
            3.0,
        ),
        "programs": Writer(
            command(config, [f"compilation_cache={trial}", "max_steps=2"], trial / "run", resume=False),
            lambda: any(trial.glob("jit_step*-cache")),
            lambda: list(trial.glob("run/adapter/*")),
            0.02,
        ),
        "export": Writer(
            [*python, "jaxtune.export", str(run), str(trial / "merged"), "--merge"],
            lambda: any(trial.glob(".merged.*")),
            lambda: list(trial.glob("merged/*")),
            4.0,
        ),
    }


def digest(files: list[Path]) -> str | None:
    """sha256 of files and their names; None where there are none."""
    named = sorted((f"{file.parent.name}/{file.name}", file) for file in files)
    return hashlib.sha256(b"".join(name.encode() + file.read_bytes() for name, file in named)).hexdigest() if files else None


def kill(writer: Writer, rng: random.Random) -> float | None:
    """Seconds after the first sign of writing at which the command was killed; None if it finished before."""
    process = subprocess.Popen(writer.argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not writer.begun():
        time.sleep(0.0002)
    waited = rng.uniform(0, writer.longest)
    time.sleep(waited)
    process.kill()
    return waited if process.wait() else None


def one_trial(writer: Writer, trial: Path, expected: str | None, rng: random.Random) -> tuple[str, bool]:
    """What happened, and whether everything is as it should be."""
    waited = None
    while waited is None:
        shutil.rmtree(trial, ignore_errors=True)
        trial.mkdir()
        waited = kill(writer, rng)
    said = f"killed after {waited:.3f} s"
    if (seen := digest(writer.files())) not in (None, expected):
        return f"{said}: half a result in sight", False
    shutil.rmtree(trial / "run", ignore_errors=True)  # otherwise it would have to be resumed
    if seen is None:
        done = subprocess.run(writer.argv, capture_output=True, text=True)
        if done.returncode or "persistent compilation cache" in done.stderr or "Traceback" in done.stderr:
            return f"{said}; then exit code {done.returncode}: {done.stderr.strip()[-300:]}", False
    same = digest(writer.files()) == expected
    return f"{said}{', whole' if seen else ''}: {'the same bytes' if same else 'DIFFERENT'}", same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("writers", nargs="*", help="of data, programs, export; all, if none is named")
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng, work, wrong = random.Random(given.seed), Path(tempfile.mkdtemp(prefix="kill-writing-")), 0
    trial = work / "trial"
    writers = make_writers(work, tiny_run(work), trial)
    for name in given.writers or writers:
        shutil.rmtree(trial, ignore_errors=True)
        trial.mkdir()
        run_to_end(writers[name].argv)
        expected = digest(writers[name].files())
        for number in range(1, given.trials + 1):
            said, right = one_trial(writers[name], trial, expected, rng)
            wrong += not right
            print(f"{name} {number}: {said}", flush=True)
    print(f"{wrong} wrong")
    shutil.rmtree(work)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
