"""Adapters of every method written by PEFT open here with its logits (tools/make_adapter_goldens.py); and errors in a file."""

import json

import jax
import numpy as np
import pytest
import references
import tiny
from methods import CASES, TOKENS
from safetensors.numpy import save_file

from jaxtune import peft
from jaxtune.convert.load import load
from jaxtune.convert.peft import load_adapter
from jaxtune.errors import ModelError
from jaxtune.model.decoder import forward

logits = jax.jit(forward, static_argnums=0)


@pytest.fixture(scope="module")
def goldens():
    return dict(np.load(references.GOLDENS / "adapters" / "methods.npz"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny.write(folder / "llama")
    for kind in {case.model for case in CASES.values()} - {"llama"}:
        golden = references.load(kind)
        tiny.write(folder / kind, golden.config, {name: np.ascontiguousarray(tensor) for name, tensor in golden.tensors.items()})
    return {path.name: load(path) for path in folder.iterdir()}


def write(folder, goldens, name, **changes):
    """The adapter of a case as a folder."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(json.loads(str(goldens[f"{name}/config"])) | changes))
    start = f"{name}/tensor/"
    tensors = {key.removeprefix(start): value.astype(np.float32) for key, value in goldens.items() if key.startswith(start)}
    save_file(tensors, folder / "adapter_model.safetensors")
    return tensors


@pytest.mark.parametrize("name", CASES)
def test_pefts_opens_with_its_logits(goldens, models, tmp_path, name, caplog):
    model = models[CASES[name].model]
    write(tmp_path / "a", goldens, name)
    adapter = load_adapter(tmp_path / "a", model)
    assert not caplog.records  # no field of PEFT's is unknown
    found = logits(model.config, peft.compose(model.params, adapter), TOKENS)[:, -1:]
    np.testing.assert_allclose(found, goldens[f"{name}/logits"], atol=1e-4)


@pytest.mark.parametrize(("name", "tensor", "message"), [
    ("loha", "base_model.model.model.layers.1.self_attn.q_proj.hada_w2_b", "is missing"),
    ("vera", "base_model.vera_A", "tensor base_model.vera_A is missing"),
    ("norms", "base_model.model.model.norm.ln_tuning_layers.weight", "is missing"),
    ("prompt tuning", "prompt_embeddings", "has to hold prompt_embeddings"),
    ("ia3", "base_model.model.model.layers.0.mlp.down_proj.ia3_l", "have no tensors, the first model.layers.0.mlp.down_proj"),
])  # fmt: skip
def test_a_tensor_that_is_missing_is_named(goldens, models, tmp_path, name, tensor, message):
    tensors = write(tmp_path / "a", goldens, name)
    del tensors[tensor]
    save_file(tensors or {"x": np.zeros(1, np.float32)}, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=message):
        load_adapter(tmp_path / "a", models["llama"])


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("oft", {"coft": True}, "has coft=True, which is not supported"),
    ("oft", {"oft_block_size": 4}, "WEIGHT of model.layers.0.* is .*, but this model and its config ask for"),
    ("prefix tuning", {"num_virtual_tokens": 9}, "prompt_embeddings is .* ask for .9, "),
    ("boft", {"boft_n_butterfly_factor": 2}, "without its CUDA kernel"),
    ("adalora", {"target_modules": ["q_proj"]}, "which adapter_config.json does not name|that adapter_config.json does not name"),
])  # fmt: skip
def test_a_config_that_the_file_does_not_fit_is_told(goldens, models, tmp_path, name, changes, message):
    write(tmp_path / "a", goldens, name, **changes)
    with pytest.raises(ModelError, match=message):
        load_adapter(tmp_path / "a", models["llama"])
