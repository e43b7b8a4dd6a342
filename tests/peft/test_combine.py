"""Several adapters on one base: a batch whose rows use different ones, and their weighted sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import jaxtune as jt
from jaxtune import generate, peft
from jaxtune.config import LoraConfig
from jaxtune.errors import ConfigError
from jaxtune.model.decoder import forward

TOKENS = np.asarray([[5, 9, 33, 2, 71], [1, 3, 3, 60, 4], [7, 7, 12, 80, 6], [2, 11, 90, 4, 4], [8, 1, 30, 20, 10]], np.int32)
# different matrices, ranks within a stack, layers; the embedding and the head, which are one matrix in a tied model
CONFIGS = {
    "a": LoraConfig(r=3, target_modules=("q_proj", "down_proj", "embed_tokens", "lm_head"), rank_pattern={"layers.1.self_attn.q_proj": 5}),
    "b": LoraConfig(r=4, lora_alpha=4, target_modules=("q_proj", "up_proj", "lm_head"), layers_to_transform=(0, 2), use_rslora=True),
}
CHOICES = ["a", "b", None, {"a": 0.5, "b": -1.5}, {"b": 1}]
logits = jax.jit(forward, static_argnums=0)


@pytest.fixture(scope="module", params=["int8", "tied"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("combine") / "model"
    tiny.write_chat_model(folder, tiny.LLAMA | {"tie_word_embeddings": request.param == "tied"})
    return jt.load(folder, quantization="int8" if request.param == "int8" else None)


@pytest.fixture(scope="module")
def adapters(model):
    return {name: strong(model, config, seed) for seed, (name, config) in enumerate(CONFIGS.items())}


def strong(model, config, seed=0):
    """An adapter that changes what is generated; noise only in ranks that a layer has."""
    adapter = peft.init_adapter(jax.random.key(seed), model, config)
    rng = np.random.default_rng(seed)
    for site in adapter.sites:
        live = np.arange(max(site.ranks)) < np.asarray(site.ranks)[:, None]
        b = adapter.params[site.path]["b"]
        adapter.params[site.path]["b"] = b + 0.1 * rng.standard_normal(b.shape) * live.reshape(*b.shape[:-2], 1, -1)
    return adapter


def alone(model, adapters, choice):
    """Logits under a choice, by the plain sum of merged differences: without the code of combine.py."""
    base = peft.merge(model.params)
    base.setdefault("head", base["embed"])
    total = base
    for name, weight in ({choice: 1.0} if isinstance(choice, str) else choice or {}).items():
        merged = peft.merge(model.params, adapters[name])
        merged.setdefault("head", merged["embed"])
        total = jax.tree.map(lambda t, m, b, weight=weight: t + weight * (m - b), total, merged, base)
    return logits(model.config, total, TOKENS)


def test_each_row_of_a_batch_has_its_own_adapter(model, adapters):
    mixed = logits(model.config, peft.compose(model.params, peft.combine.mix(adapters, CHOICES)), TOKENS)
    for row, choice in enumerate(CHOICES):
        np.testing.assert_allclose(mixed[row], alone(model, adapters, choice)[row], atol=2e-4, err_msg=str(choice))
    base = logits(model.config, model.params, TOKENS)
    np.testing.assert_array_equal(mixed[2], base[2])
    assert all(np.abs(mixed[row] - base[row]).max() > 0.1 for row in (0, 1, 3, 4))


@pytest.mark.parametrize("model", ["tied"], indirect=True)
def test_generated_together_as_alone(model, adapters, monkeypatch):
    monkeypatch.setattr(generate, "stop_tokens", lambda model: set())
    prompts = [[5, 9, 33], [7] * 9, [3, 2], [44, 12, 13, 14], [60]]

    def texts(adapter, prompts=prompts):
        return [done.tokens for done in generate.generate_tokens(model, prompts, adapter, max_new_tokens=12)]

    together = texts(jt.mix(adapters, CHOICES))
    assert together[0] == texts(adapters["a"])[0] and together[1] == texts(adapters["b"])[1] and together[2] == texts(None)[2]
    assert together[4] == texts(adapters["b"])[4]
    assert len({tuple(tokens) for tokens in together}) == 5 and together[0] != texts(None)[0]
    with pytest.raises(ConfigError, match="mixed for 5 prompts, but there are 2"):
        texts(jt.mix(adapters, CHOICES), prompts[:2])


def test_the_weighted_sum_is_one_adapter(model, adapters, tmp_path):
    total = jt.combine(model.config, list(adapters.values()), [0.5, -1.5])
    found = logits(model.config, peft.compose(model.params, total), TOKENS)
    np.testing.assert_allclose(found, alone(model, adapters, CHOICES[3]), atol=2e-4)
    assert {site.path: site.ranks for site in total.sites}["layers/0/q"] == (7, 5, 7)  # 3, 5, 3 and 4, none, 4
    jt.save_adapter(total, model, tmp_path / "sum")
    np.testing.assert_array_equal(logits(model.config, peft.compose(model.params, jt.load_adapter(tmp_path / "sum", model)), TOKENS), found)


def test_what_cannot_be_mixed_or_added(model, adapters):
    dora = peft.init_adapter(jax.random.key(0), model, LoraConfig(r=2, use_dora=True, target_modules=("q_proj",)))
    for call in (lambda: jt.combine(model.config, [dora], [2.0]), lambda: jt.mix({"d": dora}, ["d"])):
        with pytest.raises(ConfigError, match="DoRA"):
            call()
    with pytest.raises(ConfigError, match="1 adapters and 2 weights"):
        jt.combine(model.config, [adapters["a"]], [1.0, 2.0])
    with pytest.raises(ConfigError, match="the weights are nan; each has to be a finite number"):
        jt.combine(model.config, [adapters["a"]], [float("nan")])
    with pytest.raises(ConfigError, match="prompt 2 asks for adapter 'c'; there are a, b"):
        jt.mix(adapters, ["a", "c"])
    with pytest.raises(ConfigError, match="choice for prompt 1"):
        jt.mix(adapters, [["a"]])


def test_no_dense_sum_is_made(model, adapters):
    """Rows of different adapters share the base's product: what a layer adds has the size of the ranks."""
    mixed = peft.compose(model.params, jt.mix(adapters, ["a", "b"]))
    leaf = mixed["layers"]["0"]["q"]
    assert leaf.base is model.params["layers"]["0"]["q"] and leaf.gate.shape == (3, 2, 9)
    assert jnp.asarray(leaf.gate)[1, 1, 5:].max() == 0  # layer 1 has no b
