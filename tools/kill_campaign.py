"""SIGKILL a run at random moments and resume it until it finishes; its result must equal that of an undisturbed run, bit for bit.

    python tools/kill_campaign.py CONFIG.yaml [key=value ...] --trials 25 --seed 0

Each trial starts the run in a fresh folder, kills the process at a random moment, resumes it, kills it again, up to `--kills` times, and
then lets it finish. A moment is defined by what the run has written so far (`MOMENTS`), and the kill comes a random few milliseconds after
it, so none comes after the end. Prints one line per trial, with what each kill hit, and exits with 1 if any result differs or a trial had
no kill.
"""

import argparse
import hashlib
import json
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


def partial(folder: Path) -> set[str]:
    """Checkpoints being written, or left incomplete by a kill: Orbax renames a folder when it is complete."""
    return {path.name for path in (folder / "checkpoints").glob("*tmp*")}


def lines(folder: Path) -> int:
    """Steps in the log."""
    try:
        return (folder / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def whole(folder: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    return [int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit()]


# name -> is it now? (folder, incomplete checkpoints before the start, log lines before it, a random number from 1 to 25)
MOMENTS = {
    "start-up": lambda folder, before, logged, some: True,
    "the folder's first files": lambda folder, before, logged, some: (folder / "config.yaml").exists(),
    "the first save": lambda folder, before, logged, some: not whole(folder) and bool(partial(folder) - before),
    "a save": lambda folder, before, logged, some: lines(folder) > logged + some and bool(partial(folder) - before),
    "steps": lambda folder, before, logged, some: lines(folder) > logged + some,
    "the result": lambda folder, before, logged, some: any(folder.glob(".adapter.new*")) or any(folder.glob(".model.new*")),
}


def kill(argv: list[str], folder: Path, rng: random.Random) -> str | None:
    """Kill the run at a random moment; returns what it hit, or None if the run had finished before."""
    moment, before, logged, some = rng.choice(list(MOMENTS)), partial(folder), lines(folder), rng.randint(1, 25)
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not MOMENTS[moment](folder, before, logged, some):
        time.sleep(0.0003)
    time.sleep(rng.uniform(0.05, 4) if moment == "start-up" else rng.uniform(0, 0.02))
    process.send_signal(signal.SIGKILL)
    if process.wait() == 0:
        return None
    if process.returncode != -signal.SIGKILL:
        raise SystemExit(f"exit code {process.returncode} before the kill, in {folder}")
    saved = f"checkpoint {max(whole(folder))}" if whole(folder) else "no checkpoint"
    return f"{moment} ({saved}, {lines(folder)} lines of the log{', one half-written' if partial(folder) - before else ''})"


def tiny_run(folder: Path) -> str:
    """The config of a run of seconds: a random Llama of two layers (tests/tiny.py), LoRA with dropout, a checkpoint every third step."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import tiny
    import yaml

    tiny.write_chat_model(folder / "model", tiny.LLAMA | {"num_hidden_layers": 2})
    rows = [{"prompt": f"Say {n}.", "completion": f" {n} {n}"} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": str(folder / "model"), "data": {"train": str(folder / "rows.jsonl"), "max_length": 64, "cache_dir": str(folder / "cache")},
        "lora": {"r": 4, "lora_dropout": 0.1}, "per_device_train_batch_size": 1, "max_steps": 40, "save_steps": 3, "save_total_limit": 2,
        "compilation_cache": str(folder / "xla"), "logging_steps": 1, "report_to": [],
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return str(folder / "run.yaml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="left out: a tiny model of its own")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--trials", type=int, default=25)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    work = Path(tempfile.mkdtemp(prefix="kill-campaign-"))
    given.config = given.config or tiny_run(work)
    length = run_to_end(command(given.config, given.overrides, work / "whole", resume=False))  # which fills the compilation cache
    expected, wrong = digest(work / "whole"), 0
    print(f"undisturbed: {length:.1f} s, {expected[:16]}", flush=True)
    for trial in range(1, given.trials + 1):
        folder, hits = work / f"trial-{trial}", []
        while len(hits) < given.kills:
            resume = (folder / "config.yaml").is_file()
            if hit := kill(command(given.config, given.overrides, folder, resume), folder, rng):
                hits.append(hit)
            elif hits:
                break  # it has ended
            else:
                shutil.rmtree(folder)  # the moment was missed: try again
        run_to_end(command(given.config, given.overrides, folder, (folder / "config.yaml").is_file()))
        same = bool(hits) and digest(folder) == expected
        wrong += not same
        print(f"trial {trial}: killed in {'; '.join(hits) or 'nothing'}: {'bit-equal' if same else 'DIFFERENT'}", flush=True)
        shutil.rmtree(folder)
    print(f"{given.trials - wrong} of {given.trials} trials bit-equal")
    shutil.rmtree(work)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
