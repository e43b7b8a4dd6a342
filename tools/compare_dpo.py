"""The same LoRA DPO steps by TRL and by jaxtune: same pairs in the same order, same initial adapter, float32; loss, margins, accuracies.

    python tools/compare_dpo.py MODEL_FOLDER PAIRS.json --out docs/dpo_curve      (needs the [oracle] extra; writes .png and .json)

TRL is given jaxtune's token ids: by itself it would also train on the line break that ChatML writes after an answer's end token. Pairs that
are longer than `--max-length` are left out of both. Seconds are taken in the same process tree, and tokens counted as TRL sees them, each
answer with its prompt, so that their ratio is the ratio of the work done per second.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

STEPS, ROWS, RATE, BETA = 20, 1, 1e-4, 0.1
LORA = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
NAMES = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}


def config(model_folder: str, pairs_file: str, work: str, max_length: int, cached: bool = False) -> dict:
    """jaxtune's config of the run; cached: with log-probabilities of the reference from the cache, computed where they are not there."""
    return {
        "model": model_folder, "init_adapter": f"{work}/init", "output_dir": f"{work}/jaxtune{cached}", "objective": "dpo",
        "dtype": "float32",
        "data": {
            "train": pairs_file, "packing": False, "shuffle": False, "max_length": max_length, "length_policy": "drop",
            "cache_dir": f"{work}/cache",
        },
        "max_steps": STEPS, "per_device_train_batch_size": ROWS, "learning_rate": RATE, "lr_scheduler_type": "linear", "beta": BETA,
        "logging_steps": 1, "report_to": [], "save_strategy": "no", "gradient_checkpointing": False, "mesh": {"data": 1},
        "precompute_ref_log_probs": cached,
    }  # fmt: skip


def pairs(model_folder: str, pairs_file: str, work: str, max_length: int) -> list[dict]:
    """jaxtune's token ids of the pairs that are trained on, up to each answer's end token, under TRL's names."""
    from jaxtune import data
    from jaxtune.config import load_config
    from jaxtune.convert.load import open_model

    source = data.load(load_config(config(model_folder, pairs_file, work, max_length)), open_model(model_folder).tokenizer).train
    rows = []
    for unit in range(min(STEPS * ROWS, len(source.documents) // 2)):
        (chosen, chosen_mask), (rejected, rejected_mask) = source.documents[2 * unit], source.documents[2 * unit + 1]
        start = int(chosen_mask.argmax())
        assert (chosen[:start] == rejected[:start]).all() and start == rejected_mask.argmax()
        ends = [int(np.flatnonzero(mask)[-1]) + 1 for mask in (chosen_mask, rejected_mask)]
        assert chosen_mask[start : ends[0]].all() and rejected_mask[start : ends[1]].all()
        ids = chosen[:start], chosen[start : ends[0]], rejected[start : ends[1]]
        rows.append(dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), (part.tolist() for part in ids), strict=True)))
    if len(rows) < STEPS * ROWS:
        raise SystemExit(f"{pairs_file} has {len(rows)} pairs of up to {max_length} tokens, {STEPS * ROWS} are needed")
    return rows


def trl(model_folder: str, pairs_file: str, work: str, max_length: int) -> None:
    """TRL's run: saves the initial adapter to `work/init`, then trains; what it logged to `work/trl.json`."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Tokenised(DPOTrainer):
        """Takes token ids as they are, in the order they have."""

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
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(**LORA, lora_dropout=0.0, task_type="CAUSAL_LM"))
    model.save_pretrained(f"{work}/init")
    rows = pairs(model_folder, pairs_file, work, max_length)
    arguments = DPOConfig(
        output_dir=f"{work}/trl", max_steps=STEPS, per_device_train_batch_size=ROWS, learning_rate=RATE, lr_scheduler_type="linear",
        logging_steps=1, save_strategy="no", report_to="none", bf16=False, gradient_checkpointing=False, max_length=max_length, beta=BETA,
        use_cpu=True, max_grad_norm=1.0, weight_decay=0.0, disable_tqdm=True,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    trainer = Tokenised(model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Clock()])
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    write(Path(work, "trl.json"), logs, times)


def jaxtune(model_folder: str, pairs_file: str, work: str, max_length: int) -> None:
    """jaxtune's runs from the same initial adapter; what they logged to `work/jaxtune.json` and `work/cached.json`."""
    import jaxtune as jt
    from jaxtune import loop
    from jaxtune.runlog import RunLog, read_metrics

    class Timed(RunLog):
        """Takes the time whenever a step's metrics are there."""

        def write(self, step, metrics):
            times.append(now())
            super().write(step, metrics)

    loop.RunLog = Timed
    for name, cached in (("jaxtune", False), ("cached", True)):
        times = [now()]
        folder = jt.train(config(model_folder, pairs_file, work, max_length, cached)).folder
        write(Path(work, f"{name}.json"), read_metrics(folder / "metrics.jsonl"), times)


def now() -> tuple[float, float]:
    """The clock's seconds, and those the processors have worked for this process."""
    return time.monotonic(), time.process_time()


def write(path: Path, logs: list[dict], times: list[tuple[float, float]]) -> None:
    """The compared numbers of each step, and its seconds; the first step's are those of all that went before it, too."""
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
    steps = range(1, STEPS + 1)
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
    parser.add_argument("--only", choices=("trl", "jaxtune"))
    parser.add_argument("--work")
    given = parser.parse_args()
    if given.only:
        {"trl": trl, "jaxtune": jaxtune}[given.only](given.model, given.pairs, given.work, given.max_length)
        return
    with contextlib.ExitStack() as stack:
        work = given.work or stack.enter_context(tempfile.TemporaryDirectory())
        options = ["--work", work, "--max-length", str(given.max_length)]
        for side in ("trl", "jaxtune"):  # a process each: neither library's threads are in the other's way
            if not Path(work, f"{side}.json").exists():
                subprocess.run([sys.executable, __file__, given.model, given.pairs, "--only", side, *options], check=True)
        theirs, ours, cached = (json.loads(Path(work, f"{name}.json").read_text()) for name in ("trl", "jaxtune", "cached"))
        rows = pairs(given.model, given.pairs, work, given.max_length)
    lengths = [2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows]
    tokens = sum(lengths[ROWS:])  # of all steps but the first, which compiles
    runs = {"trl": theirs, "jaxtune": ours, "cached": cached}
    speeds = {kind: {name: tokens / sum(run[kind][1:]) for name, run in runs.items()} for kind in ("seconds", "processor_seconds")}
    largest = {
        name: max(abs(a - b) for run in (ours, cached) for a, b in zip(run[name], theirs[name], strict=True)) for name in NAMES.values()
    }
    draw(ours, theirs, Path(given.out).with_suffix(".png"))
    record = {"largest_difference": largest, "tokens_per": speeds} | runs
    Path(given.out).with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print("largest difference of a step: " + ", ".join(f"{name} {value:.1e}" for name, value in largest.items()))
    for name in runs:
        told = ", ".join(
            f"{speed[name]:.0f} a {kind[:-1].replace('_', ' ')} ({speed[name] / speed['trl']:.2f}x)" for kind, speed in speeds.items()
        )
        print(f"{name:>8}: real tokens {told}")


if __name__ == "__main__":
    main()
