"""Generate many answers in batches: prompts of similar length together, with a cache that grows with the answers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtune import parallel
from jaxtune.errors import ModelError
from jaxtune.generation.answer import Answer
from jaxtune.generation.decode import NAN, NONE, Rows, State, decode, prefill, row_keys, with_slots
from jaxtune.generation.sampling import Sampling
from jaxtune.model import decoder, virtual_tokens
from jaxtune.model.attention import CACHE_BLOCK
from jaxtune.peft import compose
from jaxtune.peft.combine import Mixed
from jaxtune.tree import nbytes

CHUNK = 8  # tokens between two looks at the text, for streaming and stop strings
MOST_ROWS = 64  # rows per batch, on each device that holds its own rows, if no batch_size is given; or as many as
MOST_BYTES = 2**30  # fit here with their cache and attention scores
LEAST_TOKENS, LEAST_SLOTS = 16, 256  # padded prompts and caches have at least this size, so that few shapes are compiled


class Row(NamedTuple):
    """One answer to generate: which sample of which prompt, how its tokens are chosen, and the seed of its random key (`seed_words`)."""

    prompt: int
    sample: int
    ids: list[int]
    answer: Answer
    sampling: Sampling
    seed: np.ndarray


class Run(NamedTuple):
    """What all batches of one call share; on a mesh, the devices take rows in turn.

    new: the most tokens of a row; chunk: tokens between two looks at the text, None: only at the end; likely: as in `prefill`.
    """

    config: Any
    params: dict
    adapter: Any
    stops: jax.Array
    new: int
    chunk: int | None = None
    mesh: Mesh | None = None
    likely: int | None = None

    def all(self, rows: list[Row], batch_size: int | None = None) -> None:
        """Generate every answer, `batch_size` at a time."""
        devices = 1 if self.mesh is None else parallel.data_parallel(self.mesh)
        size = batch_size or devices * fitting_rows(self.config, max((len(row.ids) for row in rows), default=1), self.new)[0]
        in_order = sorted(rows, key=lambda row: -len(row.ids))  # longest first, so that what does not fit into memory fails at once
        for start in range(0, len(rows), size):
            self.batch(in_order[start : start + size], size, devices)

    def batch(self, rows: list[Row], size: int, devices: int = 1) -> None:
        """Answer a batch of prompts, padded with empty rows to a power of two, at most `size`."""
        B = -(-min(bucket(len(rows)), size) // devices) * devices
        T = length(max(len(row.ids) for row in rows))
        lengths_B, prompt_B = np.zeros(B, np.int32), None
        lengths_B[: len(rows)] = [len(row.ids) for row in rows]
        asked, own = [row.ids for row in rows], {tuple(row.ids): row.ids for row in rows}
        if len(own) < len(rows) and devices == 1 and not isinstance(self.adapter, Mixed):  # each prompt is read once
            asked, place = list(own.values()), {prompt: number for number, prompt in enumerate(own)}
            prompt_B = np.resize([place[tuple(row.ids)] for row in rows], B)
        prompts_PT = np.zeros((B if prompt_B is None else bucket(len(asked)), T), np.int32)
        for number, ids in enumerate(asked):
            prompts_PT[number, T - len(ids) :] = ids
        filled = [rows[number % len(rows)] for number in range(B)]
        places_B2 = np.asarray([(row.prompt, row.sample) for row in filled], np.int32)
        keys_B, sampling = row_keys(np.stack([row.seed for row in filled]), places_B2), Sampling.of_rows([row.sampling for row in filled])
        adapter = self.adapter.take(places_B2[:, 0]) if isinstance(self.adapter, Mixed) else self.adapter
        params = compose(self.params, adapter)
        T += virtual_tokens.count(params)  # virtual tokens take slots like prompts
        prompts_PT, lengths_B, keys_B, sampling = self._place((prompts_PT, jnp.asarray(lengths_B), keys_B, sampling))
        shared = Rows(lengths_B, keys_B, self.stops)
        state = prefill(self.config, params, sampling, shared, prompts_PT, self.new, prompt_B, self.likely)
        while True:
            step = int(state.step)
            self._look(rows, state)
            ended = [row.answer.finish_reason is not None for row in rows]
            if all(ended):
                return
            done_B = np.asarray(ended + [True] * (B - len(rows)))
            # The cache doubles, in whole blocks, as the answers grow, at most to what max_new_tokens needs; the newest token needs no slot.
            slots = state.cache.positions.shape[1]
            if step == slots - T + 1:
                slots = -(-min(max(LEAST_SLOTS, 2 * slots), T + self.new - 1) // CACHE_BLOCK) * CACHE_BLOCK
                state = with_slots(state, slots)
            until = min(slots - T + 1, step + (self.chunk or self.new), self.new)
            state = decode(self.config, params, sampling, shared, state.replace(done_B=self._place(done_B)), until)

    def _look(self, rows: list[Row], state: State) -> None:
        """Give every answer its tokens so far."""
        logps = None if state.logps is None else jax.tree.map(np.array, state.logps)  # copies, because the state is donated
        for number, (row, tokens) in enumerate(zip(rows, np.asarray(state.tokens_BN), strict=False)):
            tokens = tokens[tokens != NONE].tolist()
            if NAN in tokens:
                raise ModelError(
                    f"token {len(tokens)} of the answer to prompt {row.prompt + 1} has logits that are not numbers (NaN): the weights "
                    f"hold NaN, or {self.config.dtype} overflows; check the training run, or load with dtype=float32"
                )
            row.answer.update(tokens, logps and (logps.chosen_BN[number], logps.likely_BNK[number], logps.logps_BNK[number]))

    def _place(self, tree: Any) -> Any:
        """Put rows on devices; on a mesh, each row on the device that generates its answer."""
        return tree if self.mesh is None else jax.device_put(tree, parallel.batch_sharding(self.mesh, False))


def bucket(n: int, least: int = 1) -> int:
    """The next power of two: sizes are padded to it, so that a run compiles few programs."""
    return max(least, 1 << (n - 1).bit_length())


def length(n: int) -> int:
    """The padded length of prompts: the next of 16, 20, 24, 28, 32, 40, ..., four to each doubling; a padded token costs as much as a real
    one."""
    quarter = bucket(n, LEAST_TOKENS) // 8
    return max(LEAST_TOKENS, -(-n // quarter) * quarter)


def fitting_rows(config: Any, prompt: int, new: int) -> tuple[int, int]:
    """How many rows' caches, and attention scores while prompts are read, fit in `MOST_BYTES`; and the bytes of one row's cache."""
    prompt = length(prompt)
    cache = nbytes(jax.eval_shape(lambda: decoder.init_cache(config, 1, prompt + new).memory))
    scores = 2 * 4 * config.num_heads * min(prompt, 1024) * prompt
    return max(1, min(MOST_ROWS, MOST_BYTES // (cache + scores))), cache
