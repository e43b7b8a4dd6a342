"""Mistakes of Python callers: arguments in the wrong order, a model instead of its parameters."""

import jax
import numpy as np
import pytest
import tiny

import jaxtune as jt
from jaxtune.errors import ModelError

TOKENS = np.array([[1, 2, 3]], np.int32)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arguments")
    tiny.write(folder, tiny.LLAMA | {"num_hidden_layers": 1})
    model = jt.load(folder)
    return model, jt.init_adapter(jax.random.key(0), model, jt.LoraConfig(r=2)), folder / "out"


def test_tokens_may_be_constants_of_a_traced_function(given):
    model, tokens = given[0], jax.numpy.asarray(TOKENS)
    logits = jax.jit(lambda params: jt.forward(model.config, params, tokens))(model.params)
    np.testing.assert_allclose(logits, jt.forward(model.config, model.params, tokens), atol=1e-5)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda model, adapter, out: jt.compose(adapter, model.params), r"jt.compose\(model.params, adapter\)"),
        (lambda model, adapter, out: jt.merge(model, adapter), r"jt.merge\(model.params, adapter\)"),
        (lambda model, adapter, out: jt.forward(model.params, model.config, TOKENS), r"jt.forward\(model.config, model.params"),
        (lambda model, adapter, out: jt.forward(model.config, model.params, TOKENS[0]), r"tokens\[None\]"),
        (lambda model, adapter, out: jt.forward(model.config, model.params, TOKENS + 93), "from 94 to 96; this model's are from 0 to 95"),
        (lambda model, adapter, out: jt.forward(model.config, model.params, TOKENS - 2), "from -1 to 1"),
        (lambda model, adapter, out: jt.save(model.params, model.config, out), r"jt.save\(model.config, model.params, out"),
        (lambda model, adapter, out: jt.save_adapter(model, adapter, out), r"jt.save_adapter\(adapter, model, out\)"),
        (lambda model, adapter, out: jt.load_adapter(model, out), r"jt.load_adapter\(folder, model\)"),
        (lambda model, adapter, out: jt.generate("folder", "a"), r"jt.generate\(jt.load\(folder\), prompts\)"),
        (lambda model, adapter, out: jt.serve("folder"), r"jt.serve\(jt.load\(folder\)\)"),
    ],
)
def test_arguments_of_another_kind(given, call, words):
    with pytest.raises(ModelError, match=words):
        call(*given)
    assert not given[2].exists()
