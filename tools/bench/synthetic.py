"""A model of random weights from a config.json alone, and rows of exactly so many tokens: all a speed test needs, with no download.

    python tools/bench/synthetic.py CONFIG_FOLDER OUT --length 2048 --rows 20 --dtype bfloat16        (writes OUT/model and OUT/rows.jsonl)
"""

import argparse
import json
import random
from pathlib import Path

import jax
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import jaxtune as jt
from jaxtune.model.families import from_hf
from jaxtune.model.spec import init_params

WORDS = 100


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: w0, w1, ..."""
    words = ["<eos>", "<unk>", *(f"w{i}" for i in range(WORDS))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>")


def row(draw: random.Random, length: int) -> dict:
    """A row of `length` tokens, the end token included; a quarter of them are the prompt."""
    words = [f"w{draw.randrange(WORDS)}" for _ in range(length - 1)]
    return {"question": " ".join(words[: length // 4]), "answer": " " + " ".join(words[length // 4 :])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("out", type=Path)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--dtype", default="bfloat16")
    given = parser.parse_args()
    config = from_hf(json.loads(Path(given.config, "config.json").read_text()))
    jt.save(config, init_params(jax.random.key(0), config, given.dtype), given.out / "model", tokenizer=tokenizer())
    draw = random.Random(0)
    (given.out / "rows.jsonl").write_text("".join(json.dumps(row(draw, given.length)) + "\n" for _ in range(given.rows)))


if __name__ == "__main__":
    main()
