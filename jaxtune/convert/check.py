"""Whether two models agree: compare their logits on the same prompts."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.model import decoder
from jaxtune.model.families import ModelConfig

LENGTH = 64  # tokens per prompt that are compared

# Prompts to use if there are no rows: prose, another script, code, numbers, a list.
PROMPTS = (
    "The quick brown fox jumps over the lazy dog. Then it sat down under a tree and",
    "Question: A farmer has 17 sheep and buys 25 more. How many sheep does the farmer have now?\nAnswer:",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(",
    "Translate to French: Where is the nearest railway station?",
    "Die Hauptstadt von Frankreich ist",
    "1. Wash the rice.\n2. Add two cups of water.\n3. ",
)


class Comparison(NamedTuple):
    """The largest difference between two logits, and how often both models predict the same next token."""

    difference: float
    agreement: float
    tokens: int

    def __str__(self) -> str:
        return f"largest logit difference {self.difference:.2g}, same next token {self.agreement:.1%}, over {self.tokens} tokens"


def prompt_ids(tokenizer, vocab_size: int, texts: Sequence[str] = PROMPTS) -> list[list[int]]:
    """Token ids of prompts; without a tokenizer, random tokens from the whole vocabulary."""
    if tokenizer is None:
        return np.random.default_rng(0).integers(0, vocab_size, (4, LENGTH)).tolist()
    return [tokenizer(text)["input_ids"][:LENGTH] for text in texts]


def logits(config: ModelConfig, params: dict, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """float32 logits `[T, V]` of each prompt, or scores `[T, num_labels]` of a model that scores; computed in float32 whatever dtype the
    parameters have."""
    config = dataclasses.replace(config, dtype="float32", remat="none")
    return [np.asarray(_logits(config, params, *_padded(prompt)))[: len(prompt)] for prompt in prompts]


def compare(left: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> Comparison:
    """Compare two models' logits of the same prompts."""
    differences = [float(np.abs(a - b).max()) for a, b in zip(left, right, strict=True)]
    same = [a.argmax(-1) == b.argmax(-1) for a, b in zip(left, right, strict=True)]
    worst = max(differences) if np.isfinite(differences).all() else float("inf")
    return Comparison(worst, float(np.concatenate(same).mean()), sum(map(len, same)))


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, tokens, segments):
    hidden = decoder.hidden(config, params, tokens, None, segments).hidden_BTD
    return (decoder.scores if config.num_labels else decoder.logits)(config, params, hidden)[0]


def _padded(prompt: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    tokens = np.zeros((2, 1, LENGTH), np.int32)  # one shape, one compilation
    tokens[0, 0, : len(prompt)], tokens[1, 0, : len(prompt)] = prompt, 1
    return jnp.asarray(tokens[0]), jnp.asarray(tokens[1])
