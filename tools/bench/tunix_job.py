"""Tunix: PeftTrainer over a Llama 3 model with qwix's LoRA, as its LoRA examples put them together; rows padded to the longest of all.

Tunix reads no config.json, brings no loader of rows for SFT and packs none, so the first two are written here as a user has to. Its one
shape is as short as the rows allow, and it is not told to recompute anything (its default). Rotary positions are its own: its Llama code
rotates by a base of 1,000,000 whatever its config says, so its losses are not those of the others.
"""

import json
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx
from transformers import AutoTokenizer
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as weights
from tunix.sft import peft_trainer, utils
from tunix.sft.hooks import TrainingHooks
from tunix.utils.mesh import create_mesh


def read_model(folder: Path, dtype, mesh, remat: bool) -> llama.Llama3:
    """The checkpoint as Tunix's Llama, its sizes taken from config.json; remat: of attention and feed-forward."""
    hf = json.loads((folder / "config.json").read_text())
    config = llama.ModelConfig(
        num_layers=hf["num_hidden_layers"], vocab_size=hf["vocab_size"], embed_dim=hf["hidden_size"], hidden_dim=hf["intermediate_size"],
        num_heads=hf["num_attention_heads"], head_dim=hf["head_dim"], num_kv_heads=hf["num_key_value_heads"], norm_eps=hf["rms_norm_eps"],
        rope_theta=hf["rope_parameters"]["rope_theta"], weight_tying=hf["tie_word_embeddings"],
        remat_config=llama.RematConfig.BLOCK if remat else llama.RematConfig.NONE,
    )  # fmt: skip
    return weights.create_model_from_safe_tensors(str(folder), config, mesh, dtype)


def batches(tokenizer, file: str, size: int) -> list[peft_trainer.TrainingInput]:
    """Rows in their order, `size` at a time, padded to the longest of all; the mask is on the answer and its end token."""
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    pairs = [(tokenizer(row["question"])["input_ids"], tokenizer(row["question"] + row["answer"])["input_ids"]) for row in rows]
    length = max(len(whole) for _, whole in pairs) + 1
    tokens, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for i, (prompt, whole) in enumerate(pairs):
        tokens[i, : len(whole) + 1] = [*whole, tokenizer.eos_token_id]
        mask[i, len(prompt) : len(whole) + 1] = True
    starts = range(0, len(rows), size)
    return [peft_trainer.TrainingInput(tokens[at : at + size], mask[at : at + size]) for at in starts]


def model_input(batch: peft_trainer.TrainingInput) -> dict:
    """What Tunix's loss takes: everything before a row's padding is seen."""
    live = batch.input_tokens != 0
    return {
        "input_tokens": batch.input_tokens, "input_mask": batch.input_mask,
        "positions": utils.build_positions_from_mask(live), "attention_mask": utils.make_causal_attn_mask(live),
    }  # fmt: skip


class Clock(TrainingHooks):
    """Times and losses of the steps."""

    def __init__(self):
        self.times, self.losses = [], []

    def on_train_start(self, trainer):
        self.times.append(time.monotonic())

    def on_train_step_end(self, trainer, step, loss):
        self.times.append(time.monotonic())
        self.losses.append(float(loss))

    def on_train_end(self, trainer): ...
    def on_train_step_start(self, trainer): ...
    def on_eval_step_start(self, trainer): ...
    def on_eval_step_end(self, trainer, loss): ...


def main(job: dict) -> dict:
    mesh = create_mesh((1, 1), ("fsdp", "tp"))
    dtype = jnp.dtype(job["dtype"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    rows = batches(tokenizer, job["rows"], job["batch"])
    model = read_model(Path(job["model"]), dtype, mesh, job["remat"])
    paths = "|".join(f".*{name}" for name in job["lora"]["target_modules"])
    lora = qwix.LoraProvider(module_path=paths, rank=job["lora"]["r"], alpha=float(job["lora"]["lora_alpha"]))
    model = qwix.apply_lora_to_model(model, lora, rngs=nnx.Rngs(0), **model.get_model_input())
    schedule = optax.linear_schedule(job["learning_rate"], 0.0, len(rows))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.0))
    training = peft_trainer.TrainingConfig(
        eval_every_n_steps=10**6, max_steps=len(rows), checkpoint_root_directory=f"{job['work']}/checkpoints"
    )
    trainer = peft_trainer.PeftTrainer(model, optimizer, training).with_gen_model_input_fn(model_input)
    clock = Clock()
    trainer.with_training_hooks(clock)
    with mesh:
        trainer.train(rows)
    return {"times": clock.times, "losses": clock.losses, "tokens": [int((row.input_tokens != 0).sum()) for row in rows]}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    Path(given["work"], "result.json").write_text(json.dumps(main(given)))
