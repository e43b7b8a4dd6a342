"""Every family against transformers' logits, without torch: tests/goldens, written by tools/make_goldens.py."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

from jaxtune.errors import ModelError
from jaxtune.model import decoder
from jaxtune.model.families import from_hf
from jaxtune.model.spec import spec
from jaxtune.tree import flatten

TOLERANCE = 1e-4
forward = jax.jit(decoder.forward, static_argnums=0)


@pytest.fixture(scope="module", params=references.CASES)
def case(request):
    golden = references.load(request.param)
    config = from_hf(golden.config)
    return request.param, golden, config, references.tree(config, golden.tensors)


def difference(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    assert [a.shape for a in found] == [b.shape for b in wanted]
    return max(float(np.abs(a - b).max()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kind", ["right", "left", "packed"])
def test_logits(case, kind):
    _, golden, config, params = case
    batch = references.layout(golden.documents, kind, alike=True)
    logits = forward(config, params, batch.tokens, batch.positions, batch.segments)
    wanted = golden.logits["alone" if kind == "packed" else kind]
    assert logits.dtype == jnp.float32
    assert difference(batch.documents_of(logits), wanted) < TOLERANCE


def test_positions_and_segments_have_defaults():
    golden = references.load("smollm3_window")
    config = from_hf(golden.config)
    params = references.tree(config, golden.tensors)
    logits = forward(config, params, golden.documents[0][None])
    assert difference([np.asarray(logits[0])], golden.logits["alone"][:1]) < TOLERANCE
    for wrong in (golden.documents[0], [[1.0, 2.0]], [[]]):
        with pytest.raises(ModelError, match=r"they have to be whole numbers \[B, T\]"):
            decoder.forward(config, params, wrong)


def test_both_spellings_of_the_config_are_one_model(case):
    _, golden, config, _ = case
    assert from_hf(golden.hub) == config


def decode(config, params, batch, steps) -> list[np.ndarray]:
    """Logits of a batch's documents, computed in steps [start, stop) with a cache."""
    step = jax.jit(lambda cache, *now: decoder.hidden(config, params, *now, cache=cache))
    cache, found = decoder.init_cache(config, *batch.tokens.shape), []
    for start, stop in steps:
        out = step(cache, *(jnp.asarray(x[:, start:stop]) for x in batch[:3]))
        cache = out.cache
        found.append(decoder.logits(config, params, out.hidden_BTD))
    assert int(cache.length) == batch.tokens.shape[1]
    return batch.documents_of(jnp.concatenate(found, axis=1))


def remembered(c) -> tuple:
    """What distinguishes one model's memory of a text, and what layers read of it, from another's."""
    of_layers = ((np.sign(c.layer_windows[i]), c.layer_ropes[i], c.at(i) is c, c.kv_source(i) == i) for i in c.attending)
    recurrent = c.recurrent and (type(c.recurrent), c.recurrent.parallel_attention)
    return frozenset(of_layers), recurrent, c.latent is None, bool(c.feed_forward_only), c.qk_norm_last, c.bare_norms, c.query_growth.still


FIRST = {remembered(from_hf(references.load(name).config)): name for name in reversed(references.TEXT)}
# in the first, frequencies change as the text grows, and keys in the cache keep the earlier ones: not equal, as in transformers
DECODED = sorted({*FIRST.values(), "gpt2", "opt"} - {"dynamic", "phi4_mini"})


@pytest.mark.parametrize("name", DECODED)
def test_cached_decode_equals_the_full_forward(name):
    golden = references.load(name)
    config = from_hf(golden.config)
    params = references.tree(config, golden.tensors)
    batch = references.layout(golden.documents, "left")
    found = decode(config, params, batch, [(t, t + 1) for t in range(batch.tokens.shape[1])])
    assert difference(found, golden.logits["left"]) < TOLERANCE


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "mixtral"])
def test_cached_decode_in_pieces(name):
    golden = references.load(name)
    config = from_hf(golden.config)
    batch = references.layout(golden.documents, "right")
    found = decode(config, references.tree(config, golden.tensors), batch, [(0, 6), (6, 7), (7, 14)])
    assert difference(found, golden.logits["right"]) < TOLERANCE


def test_row_table_gives_back_the_files_tensors(case):
    _, golden, config, params = case
    leaves, back = flatten(params), {}
    for path, row in spec(config).items():
        assert leaves[path].shape == row.shape and len(row.axes) == len(row.shape), path
        depth = 2 if row.is_apart else 1 if row.layers else 0
        names = [references.called(name, golden.tensors) for name in row.hf_names()]
        for name, part in zip(names, np.asarray(leaves[path]).reshape(-1, *row.shape[depth:]), strict=True):
            back.setdefault(name, golden.tensors[name] * np.nan if row.part else part.T if row.transposed else part)
            if row.part:  # of a tensor that several rows share
                references.of_file(row, back[name])[:] = part
    assert back.keys() == golden.tensors.keys()
    assert all(np.array_equal(back[name], tensor) for name, tensor in golden.tensors.items())


@pytest.mark.parametrize("name", ["dynamic", "phi4_mini"])
def test_prompts_of_different_length_each_have_their_own_frequencies(name):
    """Read together and decoded, across the length at which the frequencies change, as each one alone; transformers uses the longest's."""
    golden = references.load(name)
    config = from_hf(golden.config)
    params = references.tree(config, golden.tensors)
    documents = [document[:n] for document, n in zip(golden.documents, (13, 7, 4), strict=True)]

    def last_four(documents):
        batch = references.layout(documents, "left")
        width = batch.tokens.shape[1]
        found = decode(config, params, batch, [(0, width - 3), *((t, t + 1) for t in range(width - 3, width))])
        return [logits[-4:] for logits in found]

    assert max(difference(last_four([document]), [one]) for document, one in zip(documents, last_four(documents), strict=True)) < TOLERANCE
