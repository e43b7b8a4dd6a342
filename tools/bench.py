"""LoRA SFT of the same rows by TRL + PEFT and by jaxtune, each a process of its own, one after the other: real tokens per second.

    python tools/bench.py MODEL_FOLDER ROWS.jsonl [--rows 64] [--batch 8] [--rounds 2]        (needs the [oracle] extra)

ROWS.jsonl has `question` and `answer` (gsm8k). Real tokens are those of the rows, padding not counted; both sides see each row once.
"job" is the whole process, imports, loading, compilation and saving included; "training" is from the first step's start to the end of
the last. jaxtune packs its rows (micro-batches of as many places as TRL's padded ones, about) and compiles from an empty cache.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LORA = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}


def trl(given, work: Path) -> None:
    """TRL's job: padded rows, no gradient checkpointing (its fastest setting where memory allows)."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32), LoraConfig(**LORA, lora_dropout=0.0, task_type="CAUSAL_LM")
    )
    rows = [json.loads(line) for line in (work / "rows.jsonl").read_text().splitlines()]
    rows = Dataset.from_list([{"prompt": row["question"], "completion": row["answer"]} for row in rows])
    arguments = SFTConfig(
        output_dir=str(work / "trl"), num_train_epochs=1, per_device_train_batch_size=given.batch, learning_rate=2e-4, logging_steps=1,
        save_strategy="no", report_to="none", bf16=False, gradient_checkpointing=False, max_length=1024, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    started = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - started
    trainer.save_model(str(work / "trl" / "adapter"))
    logs = [row for row in trainer.state.log_history if "loss" in row]
    report(work / "trl.json", seconds, logs[-1]["num_tokens"], logs[-1]["loss"])


def jaxtune(given, work: Path) -> None:
    """jaxtune's job: packed rows, its defaults."""
    import jaxtune as jt
    from jaxtune.loop import Loop
    from jaxtune.runlog import read_metrics

    call, spent = Loop.__call__, []

    def timed(self, *args):
        started = time.monotonic()
        result = call(self, *args)
        spent.append(time.monotonic() - started)
        return result

    Loop.__call__ = timed
    columns = {"prompt": "question", "completion": "answer"}
    jt.train({
        "model": given.model, "lora": LORA, "output_dir": str(work / "jaxtune"), "dtype": "float32", "num_train_epochs": 1,
        "data": {"train": str(work / "rows.jsonl"), "columns": columns, "max_length": 512, "cache_dir": str(work / "cache")},
        "per_device_train_batch_size": given.batch // 2, "learning_rate": 2e-4, "logging_steps": 1, "report_to": [], "save_strategy": "no",
        "mesh": {"data": 1}, "compilation_cache": False,
    })  # fmt: skip
    last = read_metrics(work / "jaxtune" / "metrics.jsonl")[-1]
    report(work / "jaxtune.json", spent[0], last["num_tokens"], last["loss"])


def report(path: Path, seconds: float, tokens: float, loss: float) -> None:
    """What one side measured of itself."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    path.write_text(json.dumps({"training_seconds": seconds, "tokens": tokens, "loss": loss, "peak_gb": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("file")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=("trl", "jaxtune"))
    parser.add_argument("--work")
    given = parser.parse_args()
    if given.only:
        {"trl": trl, "jaxtune": jaxtune}[given.only](given, Path(given.work))
        return
    print(f"{'':10} {'job tok/s':>10} {'training tok/s':>15} {'peak GB':>8} {'last loss':>10}")
    for _ in range(given.rounds):
        with tempfile.TemporaryDirectory() as name:
            work, speed = Path(name), {}
            (work / "rows.jsonl").write_text("\n".join(Path(given.file).read_text().splitlines()[: given.rows]) + "\n")
            for side in ("trl", "jaxtune"):
                started = time.monotonic()
                command = [sys.executable, __file__, given.model, given.file, "--only", side, "--work", name, "--batch", str(given.batch)]
                subprocess.run(command, check=True, capture_output=True)
                job = time.monotonic() - started
                one = json.loads((work / f"{side}.json").read_text())
                speed[side] = one["tokens"] / job, one["tokens"] / one["training_seconds"]
                print(f"{side:10} {speed[side][0]:10.0f} {speed[side][1]:15.0f} {one['peak_gb']:8.2f} {one['loss']:10.3f}", flush=True)
            print(f"{'ratio':10} {speed['jaxtune'][0] / speed['trl'][0]:10.2f} {speed['jaxtune'][1] / speed['trl'][1]:15.2f}", flush=True)


if __name__ == "__main__":
    main()
