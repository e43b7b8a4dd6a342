"""Run LoRA GRPO with TRL and with jaxtune, as their users would: same model, prompts, reward, answers per step, learning rate, float32.

    python tools/compare_grpo.py MODEL_FOLDER PROMPTS.jsonl --steps 12 --completions 16       (needs the [oracle] extra)

The reward is whether the answer's last number is the row's `answer` (jaxtune's numeric_match, given to both). Both sample their answers at
random, so these differ: rewards are shown next to each other, and times are compared. One process runs after the other, on the same cores;
the first two steps, which compile, are excluded from the seconds per step and included in the total.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RATE, SEED = 2e-4, 0
LORA = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}


def right(completions, answer, **_):
    """The reward: TRL's signature."""
    from jaxtune.metrics import numeric_match

    return numeric_match([said[0]["content"] for said in completions], answer, [])


def by_trl(job: dict) -> None:
    """TRL's GRPOTrainer with transformers' generate (vLLM needs a GPU)."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rows = [json.loads(line) for line in Path(job["prompts"]).read_text().splitlines()]
    config = GRPOConfig(
        output_dir=job["work"] + "/trl", max_steps=job["steps"], per_device_train_batch_size=job["answers"], num_generations=8,
        max_completion_length=job["completions"], temperature=1.0, beta=0.0, learning_rate=RATE, lr_scheduler_type="constant", seed=SEED,
        logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, gradient_checkpointing=False, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32), [right], config, Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job["model"]), peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM"),
    )  # fmt: skip
    times: list[float] = []
    log = trainer.log
    trainer.log = lambda logs, *rest: times.append(time.monotonic()) or log(logs, *rest)
    trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    Path(job["out"]).write_text(json.dumps({"rewards": rewards, "times": times[: len(rewards)]}))


def by_jaxtune(job: dict) -> None:
    """The same by jaxtune."""
    from jaxtune.runlog import RunLog
    from jaxtune.train import train

    times: list[float] = []
    advance = RunLog.advance
    RunLog.advance = lambda self, *rest: times.append(time.monotonic()) or advance(self, *rest)  # type: ignore[method-assign]
    config = {
        "model": job["model"], "objective": "grpo", "lora": LORA, "output_dir": job["work"] + "/jaxtune", "dtype": "float32",
        "data": {"train": job["prompts"], "max_length": 256, "cache_dir": job["work"] + "/cache"}, "max_steps": job["steps"],
        "per_device_train_batch_size": job["answers"], "num_generations": 8, "max_completion_length": job["completions"],
        "learning_rate": RATE, "lr_scheduler_type": "constant", "seed": SEED, "logging_steps": 1, "report_to": [], "save_strategy": "no",
        "gradient_checkpointing": False, "mesh": {"data": 1},
    }  # fmt: skip
    train(config, reward_funcs=[right])
    rows = [json.loads(line) for line in (Path(job["work"]) / "jaxtune" / "metrics.jsonl").read_text().splitlines()]
    Path(job["out"]).write_text(json.dumps({"rewards": [row["reward"] for row in rows], "times": times}))


def main() -> None:
    """Run both, and print a line for each."""
    if sys.argv[1:2] == ["--job"]:
        job = json.loads(sys.argv[2])
        return {"trl": by_trl, "jaxtune": by_jaxtune}[job["by"]](job)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("prompts")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--answers", type=int, default=32, help="of a step")
    parser.add_argument("--completions", type=int, default=16, help="tokens of an answer, at most")
    parser.add_argument("--only", choices=("jaxtune", "trl"))
    given = parser.parse_args()
    for by in [given.only] if given.only else ["jaxtune", "trl"]:
        with tempfile.TemporaryDirectory() as work:
            job = {**vars(given), "by": by, "work": work, "out": f"{work}/out.json"}
            began, used = time.monotonic(), _processor()
            done = subprocess.run([sys.executable, __file__, "--job", json.dumps(job)], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{by}: {done.stderr[-2000:]}")
            whole, found = time.monotonic() - began, json.loads(Path(job["out"]).read_text())
        times, rewards = found["times"], found["rewards"]
        step = (times[-1] - times[1]) / (len(times) - 2)
        said = f"{step:6.2f} s a step, {whole:6.1f} s in all, {_processor() - used:6.1f} s of a processor"
        print(f"{by:8} {said}; reward {' '.join(f'{r:.2f}' for r in rewards)}", flush=True)


def _processor() -> float:
    """Processor seconds of the jobs so far, which other jobs on the machine disturb less than wall time."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
