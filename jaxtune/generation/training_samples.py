"""Sample answers during training, with the weights of a step."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtune.generation.answer import Answer, Reader
from jaxtune.generation.batches import Row, Run
from jaxtune.generation.sampling import Sampling
from jaxtune.model.families import ModelConfig


def sample_answers(
    config: ModelConfig, params: dict, prompts: Sequence[list[int]], each: int, most: int, *,
    sampling: Sampling, reader: Reader, seed: tuple[int, ...], mesh: Mesh,
) -> tuple[list[Answer], np.ndarray]:  # fmt: skip
    """`each` answers of at most `most` tokens to every prompt (token ids), those to one prompt next to each other, and whether each ended
    by itself.

    A pure function of all arguments: a token's key is the seed folded with the numbers of the prompt, the sample and the token.
    """
    words = np.random.SeedSequence(seed).generate_state(2, np.uint32)
    run = Run(
        config=dataclasses.replace(config, remat="none"),
        params=params,
        adapter=None,
        stops=jnp.asarray(sorted(reader.stop_tokens), jnp.int32),
        new=most,
        mesh=mesh,
    )
    rows = [Row(place, sample, ids, Answer(reader, most), sampling, words) for place, ids in enumerate(prompts) for sample in range(each)]
    run.all(rows)
    return [row.answer for row in rows], np.array([row.answer.finish_reason == "stop" for row in rows])
