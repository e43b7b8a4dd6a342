"""Unsloth (GPU only): its model and its checkpointing under the same SFTTrainer as tools/bench/trl_job.py."""

import json
import sys
from pathlib import Path

import unsloth  # isort: skip  (before trl and transformers, which it changes)
import torch
import trl_job


def read_model(job: dict):
    """The model with its adapter on."""
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        job["model"], max_seq_length=job["length"], dtype=getattr(torch, job["dtype"]), load_in_4bit=job["method"] == "qlora"
    )
    remat = "unsloth" if job["remat"] else False
    return unsloth.FastLanguageModel.get_peft_model(model, **job["lora"], lora_dropout=0, bias="none", use_gradient_checkpointing=remat)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    trl_job.read_model = read_model
    Path(given["work"], "result.json").write_text(json.dumps(trl_job.main(given)))
