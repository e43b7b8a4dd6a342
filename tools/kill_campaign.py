"""SIGKILL a run at random moments and resume it until it ends; its result must be that of a run nobody disturbed, bit for bit.

    python tools/kill_campaign.py CONFIG.yaml [key=value ...] --trials 25 --seed 0

Each trial starts the run in a fresh folder, kills the process, resumes, kills again, up to `--kills` times, then lets it end. Half of the
kills come after a random time (start-up and steps alike), half while a checkpoint is being written, the first one included. Prints one
line a trial, with what each kill hit, and exits 1 if any result differs.
"""

import argparse
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def command(config: str, overrides: list[str], folder: Path, resume: bool) -> list[str]:
    """The training command."""
    extra = [f"output_dir={folder}", *(["resume=true"] if resume else [])]
    return [sys.executable, "-m", "jaxtune.train", config, *overrides, *extra]


def digest(folder: Path) -> str:
    """sha256 of the result's tensors."""
    files = sorted([*folder.glob("adapter/*.safetensors"), *folder.glob("model/*.safetensors")])
    if not files:
        raise SystemExit(f"{folder} holds no result")
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def run_to_end(argv: list[str]) -> float:
    """Seconds of a run that must succeed."""
    started = time.monotonic()
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode}:\n{done.stderr[-3000:]}")
    return time.monotonic() - started


def unfinished(folder: Path) -> set[str]:
    """Checkpoints that are being written, or that a kill has left half-written: Orbax renames a folder when it is whole."""
    try:
        return {path.name for path in (folder / "checkpoints").iterdir() if "tmp" in path.name}
    except FileNotFoundError:
        return set()


def state_of(folder: Path, before: set[str]) -> str:
    """What a process that has just been killed was doing, from what it left."""
    if not (folder / "config.yaml").is_file():
        return "start-up"
    whole = [int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit()]
    if unfinished(folder) - before:
        return f"saving after checkpoint {max(whole)}" if whole else "the first save"
    return f"steps after checkpoint {max(whole)}" if whole else "steps before the first save"


def kill(argv: list[str], folder: Path, seconds: float, in_save: bool, pause: float) -> str | None:
    """Kill the run after `seconds`, or `pause` seconds into the first save; None: it had ended before."""
    before = unfinished(folder)
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    started = time.monotonic()
    while process.poll() is None:
        waited = time.monotonic() - started
        if in_save and unfinished(folder) - before:
            time.sleep(pause)
            break
        if not in_save and waited > seconds:
            break
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    if process.wait() == 0:
        return None
    return state_of(folder, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--trials", type=int, default=25)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    work = Path(tempfile.mkdtemp(prefix="kill-campaign-"))
    run_to_end(command(given.config, given.overrides, work / "warm", resume=False))  # compiles once, into the cache
    length = run_to_end(command(given.config, given.overrides, work / "whole", resume=False))
    expected, wrong = digest(work / "whole"), 0
    print(f"undisturbed: {length:.1f} s, {expected[:16]}", flush=True)
    for trial in range(1, given.trials + 1):
        folder, hits = work / f"trial-{trial}", []
        for _ in range(given.kills):
            resume = (folder / "config.yaml").is_file()
            if not resume:
                shutil.rmtree(folder, ignore_errors=True)  # killed before the run began
            argv = command(given.config, given.overrides, folder, resume)
            if (hit := kill(argv, folder, rng.uniform(0.3, 1.0) * length, rng.random() < 0.5, rng.uniform(0, 0.03))) is None:
                break
            hits.append(hit)
        run_to_end(command(given.config, given.overrides, folder, (folder / "config.yaml").is_file()))
        same = digest(folder) == expected
        wrong += not same
        print(f"trial {trial}: killed in {'; '.join(hits) or 'nothing'}: {'bit-equal' if same else 'DIFFERENT'}", flush=True)
        shutil.rmtree(folder)
    print(f"{given.trials - wrong} of {given.trials} trials bit-equal")
    shutil.rmtree(work)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
