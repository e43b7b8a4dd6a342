"""The laws of adapters over every row of METHODS: a fresh one changes nothing, merged equals composed, only what is trained gets a
gradient, save and load round-trip, and a document's result does not depend on what precedes it in its row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
import tiny
from methods import CASES, stir

from jaxtune import config, peft
from jaxtune.convert.load import load
from jaxtune.convert.peft import load_adapter, save_adapter
from jaxtune.errors import ConfigError
from jaxtune.model.decoder import forward, hidden

TOKENS = np.asarray([[5, 9, 33, 2, 71, 8, 40], [1, 3, 3, 60, 4, 9, 12]], np.int32)
FIRST = {case.method: name for name, case in reversed(CASES.items())}  # one case per method
PROMPTS = [name for name, case in CASES.items() if not case.merges]
logits = jax.jit(forward, static_argnums=0)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny.write(folder / "llama")
    for kind in ("gpt2", "gemma2"):
        golden = references.load(kind)
        tiny.write(folder / kind, golden.config, {name: np.ascontiguousarray(tensor) for name, tensor in golden.tensors.items()})
    found = {name: load(folder / name) for name in ("llama", "gpt2", "gemma2")}
    return found | {"packed": load(folder / "llama", quantization="int8")}


def test_every_method_has_a_case():
    assert {case.method for case in CASES.values()} | {"full", "lora", "qlora"} == peft.METHODS.keys()


@pytest.mark.parametrize("name", CASES)
def test_fresh_and_merged_and_written(models, tmp_path, name, caplog):
    case = CASES[name]
    model = models[case.model]
    fresh = peft.init_adapter(jax.random.key(0), model, case.config())
    base = logits(model.config, model.params, TOKENS)
    adapter = stir(fresh, model)
    composed = logits(model.config, peft.compose(model.params, adapter), TOKENS)
    assert np.abs(composed - base).max() > 1e-2
    if case.merges:
        np.testing.assert_array_equal(logits(model.config, peft.compose(model.params, fresh), TOKENS), base)
        np.testing.assert_allclose(logits(model.config, peft.merge(model.params, adapter), TOKENS), composed, atol=2e-4)
    else:
        with pytest.raises(ConfigError, match="no change of a matrix, so there is nothing to merge"):
            peft.merge(model.params, adapter)
    save_adapter(adapter, model, tmp_path / "a")
    again = load_adapter(tmp_path / "a", model)
    assert not caplog.records
    assert [site[:2] for site in again.sites] == [site[:2] for site in adapter.sites] and again.shared == adapter.shared
    for site in adapter.sites:
        live = np.flatnonzero(site.ranks)
        for leaf, value in adapter.params[site.path].items():
            np.testing.assert_array_equal(again.params[site.path][leaf][live], value[live])
    jax.tree.map(np.testing.assert_array_equal, again.saved, adapter.saved)
    np.testing.assert_allclose(logits(model.config, peft.compose(model.params, again), TOKENS), composed, atol=1e-5)


@pytest.mark.parametrize("method", [method for method in FIRST if method != "p_tuning"])  # whose network is outside the model
def test_gradients_over_a_packed_base(models, method):
    """Every array of the adapter gets one, also in layers that are adapted alone, through the stack's hand-written backward pass."""
    model, case = models["packed"], CASES[FIRST[method]]
    adapter = stir(peft.init_adapter(jax.random.key(0), model, case.config()), model)

    def gradient(remat):
        how = dataclasses.replace(model.config, remat=remat)
        return jax.jit(jax.grad(lambda a: jnp.square(forward(how, peft.compose(model.params, a), TOKENS)).mean()))(adapter)

    grads = gradient("full")
    if method in ("loha", "prefix_tuning"):  # one recomputes inside a recomputed layer, one has another kind of leaf
        for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(gradient("none")), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5 * float(jnp.abs(other).max()))
    ranks = {site.path: site.ranks for site in adapter.sites}
    assert jax.tree.leaves(grads)
    for path, leaves in grads.params.items():
        for leaf, grad in leaves.items():
            for number, rank in enumerate(ranks.get(path, (1,))):
                assert bool(np.any(grad[number] != 0)) == (rank > 0), (path, leaf, number)
    assert all(np.any(grad != 0) for grad in grads.saved.values())


@pytest.mark.parametrize("name", PROMPTS)
def test_virtual_tokens_are_each_documents_own(models, name):
    """Law 3: documents packed into a row, one of them a prompt with an answer that continues it, get the same results as alone."""
    case = CASES[name]
    model = models[case.model]
    params = peft.compose(model.params, stir(peft.init_adapter(jax.random.key(0), model, case.config()), model))
    ids = np.asarray([5, 9, 33, 2, 71, 8, 40, 12, 3, 77, 15, 6], np.int32)
    rows = np.ones((4, 14), np.int32)  # three rows of one document each, and all of them in one
    segments, parents, positions = (np.zeros((4, 14), np.int32) for _ in range(3))
    alone = [ids[:4], ids[4:9], ids[4:]]
    for number, one in enumerate(alone):
        rows[number, : len(one)], segments[number, : len(one)], positions[number, : len(one)] = one, 1, np.arange(len(one))
    rows[3, :12], segments[3], parents[3] = ids, np.repeat([1, 2, 3, 0], [4, 5, 3, 2]), np.repeat([0, 0, 2, 0], [4, 5, 3, 2])
    positions[3, :12] = [*range(4), *range(5), *range(5, 8)]
    states = jax.jit(lambda params: hidden(model.config, params, rows, positions, segments, parents_BT=parents).hidden_BTD)(params)
    assert states.shape[:2] == rows.shape
    for part, one in ((slice(0, 4), states[0, :4]), (slice(4, 9), states[1, :5]), (slice(9, 12), states[2, 5:8])):
        np.testing.assert_allclose(states[3, part], one, atol=2e-5)
    np.testing.assert_allclose(states[0, :4], jax.jit(lambda p: hidden(model.config, p, ids[None, :4]).hidden_BTD[0])(params), atol=2e-5)


def test_a_conv1d_that_peft_cannot_adapt_is_named(models):
    for name in ("LoHaConfig", "LoKrConfig", "OFTConfig", "BOFTConfig"):
        with pytest.raises(ConfigError, match="c_attn is a Conv1D, which PEFT's .* cannot adapt"):
            peft.init_adapter(jax.random.key(0), models["gpt2"], getattr(config, name)(target_modules=("c_attn",)))
