"""Take the same LoRA SFT steps with TRL and with jaxtune: same rows in the same order, same initial adapter, float32; compare the losses
step by step.

    python tools/compare_sft.py MODEL_FOLDER ROWS.jsonl --out docs/sft_curve      (needs the [oracle] extra; writes .png and .json)

ROWS.jsonl has `question` and `answer` (gsm8k). Both train on the answer and its EOS, with rows padded to the longest of a batch, AdamW and
a linear schedule. Prints the largest relative difference of a step's loss and, timed in the same process tree, tokens per second.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

STEPS, ROWS, RATE = 20, 8, 2e-4
COLUMNS = {"prompt": "question", "completion": "answer"}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}


def trl(model_folder: str, rows_file: str, work: str) -> None:
    """TRL's run: saves the initial adapter to `work/init`, then trains; losses to `work/trl.json`."""
    import time

    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(**LORA, lora_dropout=0.0, task_type="CAUSAL_LM"))
    model.save_pretrained(f"{work}/init")
    rows = [json.loads(line) for line in Path(rows_file).read_text().splitlines()[: STEPS * ROWS]]
    rows = Dataset.from_list([{"prompt": row["question"], "completion": row["answer"]} for row in rows])
    arguments = SFTConfig(
        output_dir=f"{work}/trl", max_steps=STEPS, per_device_train_batch_size=ROWS, learning_rate=RATE, lr_scheduler_type="linear",
        logging_steps=1, save_strategy="no", report_to="none", bf16=False, gradient_checkpointing=False, max_length=1024,
        train_sampling_strategy="sequential", use_cpu=True, max_grad_norm=1.0, weight_decay=0.0, disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    times = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            times.append(time.monotonic())

    trainer.add_callback(Clock())
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    tokens = [row["num_tokens"] for row in logs]
    Path(work, "trl.json").write_text(
        json.dumps({
            "loss": [row["loss"] for row in logs], "grad_norm": [row["grad_norm"] for row in logs],
            "tokens_per_second": (tokens[-1] - tokens[0]) / (times[-1] - times[0]),
        })
    )  # fmt: skip


def jaxtune(model_folder: str, rows_file: str, work: str) -> None:
    """jaxtune's run from the same initial adapter; losses to `work/jaxtune.json`."""
    import jaxtune as jt
    from jaxtune.runlog import read_metrics

    rows = Path(rows_file).read_text().splitlines()[: STEPS * ROWS]
    Path(work, "rows.jsonl").write_text("\n".join(rows) + "\n")
    jt.train(
        {
            "model": model_folder, "init_adapter": f"{work}/init", "output_dir": f"{work}/jaxtune", "dtype": "float32", "max_steps": STEPS,
            "data": {"train": f"{work}/rows.jsonl", "columns": COLUMNS, "packing": False, "shuffle": False},
            "per_device_train_batch_size": ROWS, "learning_rate": RATE, "lr_scheduler_type": "linear", "logging_steps": 1, "report_to": [],
            "save_strategy": "no", "mesh": {"data": 1},
        }
    )  # fmt: skip
    logs = read_metrics(Path(work, "jaxtune", "metrics.jsonl"))
    speeds = [row["tokens_per_second"] for row in logs[1:]]
    Path(work, "jaxtune.json").write_text(
        json.dumps({
            "loss": [row["loss"] for row in logs], "grad_norm": [row["grad_norm"] for row in logs],
            "tokens_per_second": len(speeds) / sum(1 / speed for speed in speeds),
        })
    )  # fmt: skip


def differences(ours: dict, theirs: dict) -> list[float]:
    """Relative difference of each step's loss."""
    return [abs(a - b) / b for a, b in zip(ours["loss"], theirs["loss"], strict=True)]


def draw(ours: dict, theirs: dict, path: Path) -> None:
    """Both curves, and their relative difference below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    steps = range(1, len(ours["loss"]) + 1)
    top.plot(steps, theirs["loss"], color="#cc6633", linewidth=4, alpha=0.5, label="TRL + PEFT")
    top.plot(steps, ours["loss"], color="#4477aa", linewidth=1.5, marker="o", markersize=3, label="jaxtune")
    top.set_ylabel("loss")
    top.legend(frameon=False)
    bottom.semilogy(steps, [max(d, 1e-9) for d in differences(ours, theirs)], color="#555555", marker=".")
    bottom.axhline(1e-3, color="#aa3333", linewidth=1, linestyle="--")
    bottom.set_ylabel("rel. difference")
    bottom.set_xlabel("step")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("--out", default="docs/sft_curve")
    parser.add_argument("--only", choices=("trl", "jaxtune"))
    parser.add_argument("--work")
    given = parser.parse_args()
    if given.only:
        {"trl": trl, "jaxtune": jaxtune}[given.only](given.model, given.rows, given.work)
        return
    with tempfile.TemporaryDirectory() as work:
        for side in ("trl", "jaxtune"):  # a process each, so that the libraries' threads do not interfere
            subprocess.run([sys.executable, __file__, given.model, given.rows, "--only", side, "--work", work], check=True)
        theirs, ours = (json.loads(Path(work, f"{side}.json").read_text()) for side in ("trl", "jaxtune"))
    difference = max(differences(ours, theirs))
    draw(ours, theirs, Path(given.out).with_suffix(".png"))
    record = {"jaxtune": ours, "trl": theirs, "largest_relative_difference": difference}
    Path(given.out).with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"largest relative difference of a step's loss: {difference:.2e}")
    print(f"real tokens per second: TRL {theirs['tokens_per_second']:.0f}, jaxtune {ours['tokens_per_second']:.0f} (both padded, unpacked)")


if __name__ == "__main__":
    main()
