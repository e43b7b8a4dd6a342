"""Take the same LoRA DPO steps with TRL and with jaxtune: same pairs in the same order, same initial adapter, float32; compare loss,
margins, accuracies.

    python tools/compare_dpo.py MODEL_FOLDER PAIRS.json --out docs/dpo_curve      (needs the [oracle] extra; writes .png and .json)
    python tools/compare_dpo.py MODEL_FOLDER PAIRS.json --speed --max-length 512  (tokens per second only)

With `--speed` each trains one epoch on the same 32 pairs as its users would: TRL four padded pairs per step, jaxtune two packed rows.

TRL gets jaxtune's token ids: by itself it would also train on the newline that ChatML writes after an answer's end token. Pairs longer than
`--max-length` are excluded from both. Times are measured in the same process tree, and tokens are counted as in TRL, each answer with its
prompt, so that their ratio is the ratio of work done per second.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

RATE, BETA = 1e-4, 0.1
LORA = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
NAMES = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}


class Case(NamedTuple):
    """What is compared: the same steps of one pair each, or (`speed`) an epoch on the same pairs."""

    model: str
    file: str
    work: str
    max_length: int
    speed: bool

    @property
    def rows(self) -> int:
        """TRL's pairs of a step."""
        return 4 if self.speed else 1

    @property
    def steps(self) -> int:
        """TRL's steps."""
        return 8 if self.speed else 20

    def config(self, cached: bool = False) -> dict:
        """jaxtune's config; cached: with cached log-probabilities of the reference, which are computed if missing."""
        data = {"max_length": self.max_length, "length_policy": "drop", "cache_dir": f"{self.work}/cache"}
        train = {"path": self.file, "limit": self.rows * self.steps} if self.speed else self.file
        return {
            "model": self.model, "init_adapter": f"{self.work}/init", "output_dir": f"{self.work}/jaxtune{cached}", "objective": "dpo",
            "dtype": "float32", "data": data | {"train": [train], "packing": self.speed, "shuffle": False},
            "max_steps": -1 if self.speed else self.steps, "num_train_epochs": 1,
            "per_device_train_batch_size": 2 if self.speed else 1, "learning_rate": RATE, "lr_scheduler_type": "linear", "beta": BETA,
            "logging_steps": 1, "report_to": [], "save_strategy": "no", "gradient_checkpointing": False, "mesh": {"data": 1},
            "precompute_ref_log_probs": cached,
        }  # fmt: skip

    def source(self):
        """jaxtune's rows."""
        from jaxtune import data
        from jaxtune.config import load_config
        from jaxtune.convert.load import open_model

        source = data.load(load_config(self.config()), open_model(self.model).tokenizer).train
        if len(source.documents) < 2 * self.steps * self.rows:
            raise SystemExit(f"{self.file} has {len(source.documents) // 2} pairs of up to {self.max_length} tokens, too few")
        return source


def pairs(case: Case) -> list[dict]:
    """jaxtune's token ids of the training pairs, up to each answer's end token, under TRL's names."""
    source, rows = case.source(), []
    for unit in range(case.steps * case.rows):
        (chosen, chosen_mask), (rejected, rejected_mask) = source.documents[2 * unit], source.documents[2 * unit + 1]
        start = int(chosen_mask.argmax())
        assert (chosen[:start] == rejected[:start]).all() and start == rejected_mask.argmax()
        ends = [int(np.flatnonzero(mask)[-1]) + 1 for mask in (chosen_mask, rejected_mask)]
        assert chosen_mask[start : ends[0]].all() and rejected_mask[start : ends[1]].all()
        ids = chosen[:start], chosen[start : ends[0]], rejected[start : ends[1]]
        rows.append(dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), (part.tolist() for part in ids), strict=True)))
    return rows


def tokens_of_steps(case: Case) -> tuple[list[int], list[int]]:
    """Tokens of each of TRL's and jaxtune's steps, counting each answer with its prompt."""
    counts = [2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in pairs(case)]
    theirs = np.reshape(counts, (case.steps, case.rows)).sum(1).tolist()
    source = case.source()
    units = {int(row): unit for unit, row in enumerate(source.documents.rows[::2])}
    steps = case.steps if not case.speed else source.steps_per_epoch
    ours = [sum(counts[units[row]] for rows in source.rows_at(step).values() for row in rows) for step in range(steps)]
    return theirs, ours


def trl(case: Case) -> None:
    """TRL's run: saves the initial adapter to `work/init`, then trains; logs to `work/trl.json`."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Tokenised(DPOTrainer):
        """Passes token ids through unchanged and in order."""

        def _prepare_dataset(self, dataset, *_):
            return dataset

        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    times = [now()]

    class Clock(TrainerCallback):
        """The end of each step."""

        def on_step_end(self, args, state, control, **kwargs):
            times.append(now())

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(**LORA, lora_dropout=0.0, task_type="CAUSAL_LM"))
    model.save_pretrained(f"{case.work}/init")
    rows = pairs(case)
    arguments = DPOConfig(
        output_dir=f"{case.work}/trl", max_steps=case.steps, per_device_train_batch_size=case.rows, learning_rate=RATE,
        lr_scheduler_type="linear", logging_steps=1, save_strategy="no", report_to="none", bf16=False, gradient_checkpointing=False,
        max_length=case.max_length, beta=BETA, use_cpu=True, max_grad_norm=1.0, weight_decay=0.0, disable_tqdm=True,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(case.model)
    trainer = Tokenised(model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Clock()])
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    write(Path(case.work, "trl.json"), logs, times)


def jaxtune(case: Case) -> None:
    """jaxtune's runs from the same initial adapter; logged to `work/jaxtune.json` and `work/cached.json`."""
    import jaxtune as jt
    from jaxtune import loop
    from jaxtune.runlog import RunLog, read_metrics

    class Timed(RunLog):
        """Records the time whenever a step's metrics are available."""

        def write(self, step, metrics):
            times.append(now())
            super().write(step, metrics)

    loop.RunLog = Timed
    for name, cached in (("jaxtune", False), ("cached", True)):
        times = [now()]
        folder = jt.train(case.config(cached)).folder
        write(Path(case.work, f"{name}.json"), read_metrics(folder / "metrics.jsonl"), times)


def now() -> tuple[float, float]:
    """Wall-clock seconds, and processor seconds of this process."""
    return time.monotonic(), time.process_time()


def write(path: Path, logs: list[dict], times: list[tuple[float, float]]) -> None:
    """The compared numbers of each step, and its seconds; the first step's include everything before it."""
    record = {ours: [row[name] for row in logs] for name, ours in NAMES.items()}
    wall, processors = np.diff(times, axis=0).T.tolist()
    path.write_text(json.dumps(record | {"seconds": wall, "processor_seconds": processors}))


def draw(ours: dict, theirs: dict, path: Path) -> None:
    """Both runs' numbers step by step, and their absolute differences below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(NAMES), sharex=True, height_ratios=[3, 1])
    steps = range(1, len(ours["loss"]) + 1)
    for name, top, bottom in zip(NAMES.values(), axes[0], axes[1], strict=True):
        top.plot(steps, theirs[name], color="#cc6633", linewidth=4, alpha=0.5, label="TRL + PEFT")
        top.plot(steps, ours[name], color="#4477aa", linewidth=1.5, marker="o", markersize=3, label="jaxtune")
        top.set_title(f"DPO {name}", fontsize=10)
        bottom.semilogy(steps, [max(abs(a - b), 1e-9) for a, b in zip(ours[name], theirs[name], strict=True)], color="#555555", marker=".")
        bottom.axhline(1e-3, color="#aa3333", linewidth=1, linestyle="--")
        bottom.set_xlabel("step")
        bottom.xaxis.get_major_locator().set_params(integer=True)
        for panel in (top, bottom):
            panel.grid(alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False)
    axes[1, 0].set_ylabel("difference")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("pairs")
    parser.add_argument("--out", default="docs/dpo_curve")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--only", choices=("trl", "jaxtune"))
    parser.add_argument("--work")
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work = given.work or stack.enter_context(tempfile.TemporaryDirectory())
        case = Case(given.model, given.pairs, work, given.max_length, given.speed)
        if given.only:
            return {"trl": trl, "jaxtune": jaxtune}[given.only](case)
        for side in ("trl", "jaxtune"):  # a process each, so that the libraries' threads do not interfere
            if not Path(work, f"{side}.json").exists():
                subprocess.run([sys.executable, *sys.argv, "--only", side, "--work", work], check=True)
        runs = {name: json.loads(Path(work, f"{name}.json").read_text()) for name in ("trl", "jaxtune", "cached")}
        tokens = dict(zip(("trl", "jaxtune"), tokens_of_steps(case), strict=True))
    # of all steps but the first, which compiles
    speeds = {
        kind: {name: sum(tokens.get(name, tokens["jaxtune"])[1:]) / sum(run[kind][1:]) for name, run in runs.items()}
        for kind in ("seconds", "processor_seconds")
    }
    if not case.speed:
        curves(runs, speeds, Path(given.out))
    for name in runs:
        told = ", ".join(
            f"{speed[name]:.0f} a {kind[:-1].replace('_', ' ')} ({speed[name] / speed['trl']:.2f}x)" for kind, speed in speeds.items()
        )
        print(f"{name:>8}: real tokens {told}")


def curves(runs: dict[str, dict], speeds: dict, out: Path) -> None:
    """The plot, the numbers, and their differences."""
    theirs, ours, cached = (runs[name] for name in ("trl", "jaxtune", "cached"))
    largest = {
        name: max(abs(a - b) for run in (ours, cached) for a, b in zip(run[name], theirs[name], strict=True)) for name in NAMES.values()
    }
    draw(ours, theirs, out.with_suffix(".png"))
    out.with_suffix(".json").write_text(json.dumps({"largest_difference": largest, "tokens_per": speeds} | runs, indent=1) + "\n")
    print("largest difference of a step: " + ", ".join(f"{name} {value:.1e}" for name, value in largest.items()))


if __name__ == "__main__":
    main()
