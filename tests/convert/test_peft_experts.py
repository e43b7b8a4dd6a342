"""Adapters with a pair for every expert, as PEFT wrote them under transformers 4, against the merged matrices themselves."""

import json

import jax
import numpy as np
import pytest
import references
import tiny
from safetensors.numpy import load_file, save_file

import jaxtune as jt
from jaxtune.convert.load import load
from jaxtune.errors import ModelError

TOKENS = np.asarray([[5, 9, 33, 2, 71, 8, 40]], np.int32)
forward = jax.jit(jt.forward, static_argnums=0)
TARGETS = {"mixtral": ["gate", "q_proj", "w1", "w2", "w3"], "qwen3_moe": ["down_proj", "gate", "gate_proj", "k_proj", "up_proj"]}


@pytest.fixture(params=TARGETS)
def adapted(request, tmp_path):
    """A model, an adapter over it, and the model with that adapter merged by numpy."""
    golden, targets = references.load(request.param), TARGETS[request.param]
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in golden.tensors.items()}
    tiny.write(tmp_path / "model", golden.config, tensors)
    rng, pairs, merged = np.random.default_rng(0), {}, dict(tensors)
    for name, w in tensors.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in targets and w.ndim == 2:
            a, b = (rng.standard_normal(shape).astype(np.float32) * 0.2 for shape in ((3, w.shape[1]), (w.shape[0], 3)))
            pairs |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
            merged[name] = w + 6 / 3 * b @ a
    (tmp_path / "adapter").mkdir()
    save_file(pairs, tmp_path / "adapter/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": targets}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    tiny.write(tmp_path / "merged", golden.config, merged)
    return tmp_path


def test_logits_are_those_of_the_merged_matrices(adapted):
    model, merged = load(adapted / "model"), load(adapted / "merged")
    adapter = jt.load_adapter(adapted / "adapter", model)
    wanted = forward(merged.config, merged.params, TOKENS)
    assert np.abs(wanted - forward(model.config, model.params, TOKENS)).max() > 1e-2
    np.testing.assert_allclose(forward(model.config, jt.compose(model.params, adapter), TOKENS), wanted, atol=1e-4)


def test_a_missing_expert_is_named(adapted):
    file = adapted / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if ".experts.1." in name and "lora_A" in name)
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    with pytest.raises(ModelError, match=r"adapter_model.safetensors: lora_A of expert 1's \w+ in .* is missing"):
        jt.load_adapter(adapted / "adapter", load(adapted / "model"))
