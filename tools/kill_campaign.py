"""SIGKILL a run at random moments and resume it until it ends; its result must be that of a run nobody disturbed, bit for bit.

    python tools/kill_campaign.py CONFIG.yaml [key=value ...] --trials 25 --seed 0

Each trial starts the run in a fresh folder, kills the process after a random time (during start-up, steps, and saves alike; the first
kills come early), resumes, kills again, up to `--kills` times, then lets it end. Prints one line a trial and exits 1 if any differs.
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


def kill_after(argv: list[str], seconds: float) -> bool:
    """Whether the run was still going and has been killed."""
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(timeout=seconds)
        return False
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True


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
        folder, moments = work / f"trial-{trial}", []
        for _ in range(given.kills):
            resume = (folder / "config.yaml").is_file()
            if not resume:
                shutil.rmtree(folder, ignore_errors=True)  # killed before the run began
            moments.append(rng.uniform(0.3, 1.0) * length)
            if not kill_after(command(given.config, given.overrides, folder, resume), moments[-1]):
                break
        run_to_end(command(given.config, given.overrides, folder, (folder / "config.yaml").is_file()))
        same = digest(folder) == expected
        wrong += not same
        times = ", ".join(f"{moment:.2f}" for moment in moments)
        print(f"trial {trial}: killed at {times} s: {'bit-equal' if same else 'DIFFERENT'}", flush=True)
        shutil.rmtree(folder)
    print(f"{given.trials - wrong} of {given.trials} trials bit-equal")
    shutil.rmtree(work)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
