"""EasyDeL: its SFTTrainer over a model that it converts from the Hugging Face folder, with its LoRA (which has no alpha).

Not packed: its packing takes rows that it has already padded, and drops the mask of what is to be trained. It pads every row to its
`max_length`, which is therefore set to the longest of the rows. Importing it needs Pillow and converting torch, which do not come with it.
"""

import json
import sys
import time
from pathlib import Path

import easydel
import jax.numpy as jnp
from datasets import Dataset
from transformers import AutoTokenizer


class Trainer(easydel.SFTTrainer):
    """With the times and losses of the steps."""

    def on_step_end(self, state, metrics, step):
        self.losses.append(float(metrics.loss))
        self.times.append(time.monotonic())
        return super().on_step_end(state, metrics, step)


def main(job: dict) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    dtype, single = jnp.dtype(job["dtype"]), (1, 1, 1, 1, 1)
    model = easydel.AutoEasyDeLModelForCausalLM.from_pretrained(job["model"], dtype=dtype, param_dtype=dtype, sharding_axis_dims=single)
    model = model.apply_lora_to_layers(job["lora"]["r"], "|".join(job["lora"]["target_modules"]))
    rows = [json.loads(line) for line in Path(job["rows"]).read_text().splitlines()]
    lengths = [len(tokenizer(row["question"] + row["answer"])["input_ids"]) + 1 for row in rows]
    arguments = easydel.SFTConfig(
        save_directory=f"{job['work']}/easydel", num_train_epochs=1, total_batch_size=job["batch"], max_length=-(-max(lengths) // 64) * 64,
        learning_rate=job["learning_rate"], log_steps=1, report_steps=1, use_wandb=False, do_last_save=True, save_optimizer_state=False,
        clip_grad=1.0, weight_decay=0.0, shuffle_train_dataset=False, assistant_only_loss=True, progress_bar_type="json",
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": row["question"], "completion": row["answer"]} for row in rows])
    trainer = Trainer(arguments=arguments, processing_class=tokenizer, model=model, train_dataset=data)
    trainer.times, trainer.losses = [time.monotonic()], []
    trainer.train()
    starts = range(0, len(rows), job["batch"])
    return {"times": trainer.times, "losses": trainer.losses, "tokens": [sum(lengths[at : at + job["batch"]]) for at in starts]}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    Path(given["work"], "result.json").write_text(json.dumps(main(given)))
