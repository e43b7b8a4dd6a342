"""TRL + PEFT (and bitsandbytes for QLoRA): SFTTrainer, rows padded to the longest of a batch, checkpointing only where asked for."""

import json
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    """Times of the steps."""

    def __init__(self):
        self.times = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.times.append(time.monotonic())

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.monotonic())


def read_model(job: dict):
    """The model with its adapter on."""
    dtype = getattr(torch, job["dtype"])
    quantization, place = None, {"": "cuda:0" if torch.cuda.is_available() else "cpu"}
    if job["method"] == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, quantization_config=quantization, device_map=place)
    if job["method"] == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=job["remat"])
    return get_peft_model(model, LoraConfig(**job["lora"], lora_dropout=0.0, task_type="CAUSAL_LM"))


def longest(tokenizer, rows) -> int:
    """Tokens of the longest row, rounded up to the next 64, as jaxtune pads unpacked rows."""
    return -(-max(len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) + 1 for row in rows) // 64) * 64


def main(job: dict) -> dict:
    model = read_model(job)
    rows = [json.loads(line) for line in Path(job["rows"]).read_text().splitlines()]
    tokenizer, clock = AutoTokenizer.from_pretrained(job["model"]), Clock()
    rows = Dataset.from_list([{"prompt": row["question"], "completion": row["answer"]} for row in rows])
    arguments = SFTConfig(
        output_dir=f"{job['work']}/trl", num_train_epochs=1, per_device_train_batch_size=job["batch"], learning_rate=job["learning_rate"],
        logging_steps=1, save_strategy="no", report_to="none", bf16=job["dtype"] == "bfloat16", gradient_checkpointing=job["remat"],
        max_length=job["length"], use_cpu=not torch.cuda.is_available(), disable_tqdm=True, train_sampling_strategy="sequential",
        completion_only_loss=job["completion_only"],
    )  # fmt: skip
    if job.get("pad_alike"):
        arguments.pad_to_multiple_of = longest(tokenizer, rows)
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[clock])
    trainer.train()
    trainer.save_model(f"{job['work']}/trl/adapter")
    logs = [row for row in trainer.state.log_history if "loss" in row]
    seen = [0, *(int(row["num_tokens"]) for row in logs)]
    found = {"times": clock.times, "losses": [row["loss"] for row in logs]}
    found["tokens"] = [after - before for before, after in zip(seen, seen[1:], strict=False)]
    if torch.cuda.is_available():
        found["device_peak"] = torch.cuda.max_memory_allocated()
    return found


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    Path(given["work"], "result.json").write_text(json.dumps(main(given)))
