"""The decoding loop on the device: a padded batch of prompts in, tokens out, without host communication in between.

`prefill` reads the prompts and chooses each row's first token; `decode` continues in one `lax.while_loop` until every row has ended.
Prompts are at the right end of their rows (left padding, segment 0), so that all rows write the same slot of the cache.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxtune.generation.sampling import Sampling, choose
from jaxtune.model import decoder, virtual_tokens
from jaxtune.model.families import ModelConfig

NONE, NAN = -1, -2  # in `tokens_BN`: no token because the row had ended, or because the logits are NaN


class Rows(struct.PyTreeNode):
    """What is constant within a batch: prompt lengths (0: an empty padding row), random keys, stop tokens."""

    lengths_B: jax.Array  # int32
    keys_B: jax.Array  # a token's random key is its row's key folded with the token's number in the answer
    stops_S: jax.Array  # int32


class Logps(struct.PyTreeNode):
    """Log-probabilities, before penalty, temperature and filters: of the chosen tokens, and of the K most likely tokens."""

    chosen_BN: jax.Array  # float32
    likely_BNK: jax.Array  # int32
    logps_BNK: jax.Array  # float32


class State(struct.PyTreeNode):
    """A batch between two tokens."""

    cache: decoder.Cache
    tokens_BN: jax.Array  # int32, the tokens chosen so far, NONE or NAN
    last_B: jax.Array  # int32, the newest token, not yet in the cache
    done_B: jax.Array  # bool
    seen_BV: jax.Array | None  # bool, tokens of prompt and answer; only with a repetition penalty
    logps: Logps | None  # only if requested
    step: jax.Array  # int32 [], the number of tokens of each row


@jax.jit
def row_keys(seeds_B2: jax.Array, places_B2: jax.Array) -> jax.Array:
    """The random key of each row: its seed (uint32, `seed_words`) folded with the prompt's number, then with the sample's."""

    def one(seed: jax.Array, place: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), place[0]), place[1])

    return jax.vmap(one)(seeds_B2, places_B2)


def seed_words(seed: int) -> np.ndarray:
    """A seed as the two words of a threefry key."""
    return np.asarray(jax.random.key_data(jax.random.key(seed, impl="threefry2x32")))


@functools.partial(jax.jit, static_argnames=("config", "new", "likely"))
def prefill(
    config: ModelConfig, params: dict, sampling: Sampling, rows: Rows, prompts_PT: jax.Array, new: int, prompt_B: jax.Array | None = None,
    likely: int | None = None,
) -> State:
    """The state after the first of `new` tokens, with its cache just full. Logits are computed for the last position only.

    prompt_B: the prompt of each row, if rows share prompts, each of which is then read once; None: each row has its own. likely: how many
    of the most likely tokens to record with their log-probabilities, besides the chosen one; None: record nothing.
    """
    (P, T), B = prompts_PT.shape, len(rows.lengths_B)
    lengths_P = rows.lengths_B if prompt_B is None else jnp.zeros(P, jnp.int32).at[prompt_B].max(rows.lengths_B)
    offsets_PT = jnp.arange(T)[None] - (T - lengths_P)[:, None]
    real_PT = offsets_PT >= 0
    empty = decoder.init_cache(config, P, T + virtual_tokens.count(params))
    out = decoder.hidden(config, params, prompts_PT, jnp.maximum(offsets_PT, 0), real_PT.astype(jnp.int32), cache=empty, first=True)
    assert out.cache is not None  # one was given
    seen_BV = None
    if sampling.repetition_penalty is not None:
        seen_BV = jnp.zeros((P, config.vocab_size), bool).at[jnp.arange(P)[:, None], prompts_PT].max(real_PT)
    cache, hidden_BD = out.cache, out.hidden_BTD[:, -1]
    if prompt_B is not None:
        seen_BV, hidden_BD = jax.tree.map(lambda x: x[prompt_B], (seen_BV, hidden_BD))
        memory = jax.tree.map(lambda x: x[:, prompt_B], cache.memory)
        cache = cache.replace(memory=memory, positions=cache.positions[prompt_B], segments=cache.segments[prompt_B])
    state = State(
        cache=cache,
        tokens_BN=jnp.full((B, new), NONE, jnp.int32),
        last_B=jnp.zeros(B, jnp.int32),
        done_B=rows.lengths_B == 0,
        seen_BV=seen_BV,
        logps=None if likely is None else _no_logps((B, new), likely),
        step=jnp.zeros((), jnp.int32),
    )
    return _append(config, params, sampling, rows, state, hidden_BD)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def decode(config: ModelConfig, params: dict, sampling: Sampling, rows: Rows, state: State, until: jax.Array) -> State:
    """Continue until every row has ended or has `until` tokens. `state` is donated: the cache is updated in place."""

    def going(state: State) -> jax.Array:
        return (state.step < until) & ~state.done_B.all()

    def advance(state: State) -> State:
        positions_B1 = (rows.lengths_B + state.step - 1)[:, None]
        out = decoder.hidden(config, params, state.last_B[:, None], positions_B1, cache=state.cache)
        return _append(config, params, sampling, rows, state.replace(cache=out.cache), out.hidden_BTD[:, -1])

    return jax.lax.while_loop(going, advance, state)


def _append(config: ModelConfig, params: dict, sampling: Sampling, rows: Rows, state: State, hidden_BD: jax.Array) -> State:
    """Choose and record the next token of each row; a row that has ended gets NONE, one with NaN logits gets NAN and ends."""
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(rows.keys_B, state.step)
    logits_BV = decoder.logits(config, params, hidden_BD)
    tokens_B, nan_B = choose(sampling, logits_BV, keys_B, state.seen_BV), jnp.isnan(logits_BV).any(-1)
    written_B = jnp.where(state.done_B, NONE, jnp.where(nan_B, NAN, tokens_B))
    seen_BV = state.seen_BV
    if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(len(tokens_B)), tokens_B].set(True)
    logps = None if state.logps is None else _write_logps(state.logps, logits_BV, tokens_B, state.step)
    return state.replace(
        tokens_BN=jax.lax.dynamic_update_slice(state.tokens_BN, written_B[:, None], (0, state.step)),
        last_B=tokens_B,
        done_B=state.done_B | nan_B | (tokens_B[:, None] == rows.stops_S[None]).any(-1),
        seen_BV=seen_BV,
        logps=logps,
        step=state.step + 1,
    )


def _no_logps(shape: tuple[int, int], likely: int) -> Logps:
    return Logps(jnp.zeros(shape), jnp.zeros((*shape, likely), jnp.int32), jnp.zeros((*shape, likely)))


def _write_logps(logps: Logps, logits_BV: jax.Array, tokens_B: jax.Array, step: jax.Array) -> Logps:
    logps_BV = jax.nn.log_softmax(logits_BV)
    largest_BK, likely_BK = jax.lax.top_k(logps_BV, logps.likely_BNK.shape[-1])
    new = Logps(jnp.take_along_axis(logps_BV, tokens_B[:, None], 1), likely_BK[:, None], largest_BK[:, None])
    return jax.tree.map(lambda all, one: jax.lax.dynamic_update_slice_in_dim(all, one, step, 1), logps, new)


@functools.partial(jax.jit, static_argnames="size")
def with_slots(state: State, size: int) -> State:
    """The same state with its cache grown to `size` slots.

    Except on CPUs, a step costs as much as the cache has slots, filled or not, so every answer that ends early would pay for a cache made
    for `max_new_tokens` at once; everywhere it would take the memory.
    """
    extra = size - state.cache.positions.shape[1]

    def grow(x: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(x, [(0, extra if n == axis else 0) for n in range(x.ndim)])

    c = state.cache
    memory = c.memory._replace(k=tuple(grow(k, 3) for k in c.memory.k), v=tuple(grow(v, 3) for v in c.memory.v))
    return state.replace(cache=c.replace(memory=memory, positions=grow(c.positions, 1), segments=grow(c.segments, 1)))
