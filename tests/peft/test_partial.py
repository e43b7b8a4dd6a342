"""Full tuning of some parameters: the gradients of full tuning where they are trained, and no backward pass below them."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import references
import tiny

from jaxtune.config import load_config
from jaxtune.convert import heads
from jaxtune.data.batch import Batch
from jaxtune.errors import ConfigError
from jaxtune.model.families import from_hf
from jaxtune.model.spec import init_params, spec
from jaxtune.objectives.sft import sft
from jaxtune.peft import METHODS, compose, partial
from jaxtune.tree import flatten

CONFIG = from_hf(tiny.LLAMA)
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 9)).astype(np.int32)
BATCH = Batch(TOKENS, np.ones((2, 9), np.float32), np.broadcast_to(np.arange(9, dtype=np.int32), (2, 9)), np.ones((2, 9), np.int32))


def run(*patterns, **keys):
    return load_config({"model": "m", "method": "full", "trainable_parameters": list(patterns)} | keys)


def test_gradients_are_those_of_full_tuning_and_stop_below():
    config = run(r"layers\.1\.mlp.*", "lm_head")
    cut = heads.cut(config, from_hf(tiny.LLAMA | {"num_hidden_layers": 2}))
    assert cut.stacks == ((0,), (1,))
    params = init_params(jax.random.key(0), cut)
    trained = METHODS["full"].init(jax.random.key(0), cut, params, config)
    frozen = partial.rest(params, trained)
    assert flatten(trained).keys() == {"head", *(f"layers/1/{name}" for name in ("gate", "up", "down"))}
    assert flatten(trained).keys() | flatten(frozen).keys() == spec(cut).keys()

    def loss(tree, remat="full"):
        return sft(config, dataclasses.replace(cut, remat=remat), compose(frozen, tree), {}, BATCH).total

    ours, whole = jax.jit(jax.grad(loss))(trained), jax.jit(jax.grad(loss))(params)
    for path, grad in flatten(ours).items():
        np.testing.assert_allclose(grad, flatten(whole)[path], atol=1e-6)
    for remat in ("dots", "full"):
        gradient = jax.grad(functools.partial(loss, remat=remat))
        backward = [str(jax.make_jaxpr(gradient)(tree)).count("reverse=True") for tree in (trained, params)]
        assert backward == [1, 2]  # loops over layers; layer 0 has none


@pytest.mark.parametrize(
    ("pattern", "keys", "says"),
    [
        ("layers.28.", {}, "'layers.28.' matches none of the model's 42 tensors; they are called model.layers.0"),
        ("lm_head", {"tie_word_embeddings": True}, "head is its embedding; write embed_tokens"),
        ("layers.(2", {}, "is no regular expression"),
    ],
)
def test_a_pattern_that_is_none_is_refused(pattern, keys, says):
    with pytest.raises(ConfigError, match=says):
        heads.cut(run("norm", pattern), from_hf(tiny.LLAMA | keys))


def test_experts_of_a_layer_go_together():
    config = from_hf(references.load("mixtral").config)
    with pytest.raises(ConfigError, match=r"experts.0.*without .*experts.1.*take all or none"):
        partial.cuts(config, [r"layers.1.*experts.0."])
    assert partial.cuts(config, [r"layers.1.*experts."]) == (1, 2)


def test_a_new_scoring_head_is_always_trained():
    config = run("layers.2.", objective="reward")
    cut = heads.headed(heads.cut(config, CONFIG), heads.head_of(config))
    layer = {path for path in spec(cut) if path.startswith("layers/1")}
    assert partial.trained_paths(cut, config.trainable_parameters) == layer | {"score"}
    assert partial.dtypes(cut, config.trainable_parameters, "float32", "bfloat16")("score") == "float32"
