"""fp8 checkpoints as transformers dequantises them, and a merge over one as it opens it. The other formats' packages are not here: what
they make of their own files is in tests/goldens/quantised.safetensors."""

import json

import numpy as np
import pytest
import references
import tiny

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

import jax  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM, FineGrainedFP8Config  # noqa: E402
from transformers.integrations.finegrained_fp8 import Fp8Quantize  # noqa: E402

import jaxtune as jt  # noqa: E402
from jaxtune.convert.tensors import Safetensors  # noqa: E402
from jaxtune.export import export  # noqa: E402
from jaxtune.model.decoder import forward  # noqa: E402

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 13))
QWEN = references.load("qwen3_moe").config | {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2}


class Holder:
    """What transformers' operation looks for its settings in."""

    quantization_config = FineGrainedFP8Config(weight_block_size=(16, 32))


def write_fp8(folder, config):
    """A model whose linear layers, and experts by themselves, transformers has made fp8."""
    tiny.write(folder, config, dtype="bfloat16")
    files, tensors = Safetensors(folder), {}
    for name in files.entries:
        value = torch.tensor(files.read(name).astype(np.float32))
        tensors |= Fp8Quantize(Holder())._quantize_one(name, value) if name.endswith("proj.weight") else {name: value.bfloat16()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "fp8", "weight_block_size": [16, 32], "modules_to_not_convert": ["lm_head", "mlp.gate"]}
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16", "quantization_config": settings}))


def theirs(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize("config", [tiny.LLAMA | {"hidden_size": 64, "intermediate_size": 96}, QWEN], ids=["llama", "experts"])
def test_fp8(tmp_path, config):
    write_fp8(tmp_path / "fp8", config)
    model = jt.load(tmp_path / "fp8")
    np.testing.assert_allclose(forward(model.config, model.params, TOKENS), theirs(tmp_path / "fp8"), rtol=0, atol=1e-4)
    if config is QWEN:
        return
    adapter = jt.init_adapter(jax.random.key(0), model, jt.LoraConfig(r=2, lora_alpha=8))
    adapter = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), adapter)
    jt.save_adapter(adapter, model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(tmp_path / "fp8")
    export(tmp_path / "adapter", tmp_path / "merged", merge=True)
    merged = forward(model.config, jt.load(tmp_path / "merged").params, TOKENS)
    np.testing.assert_allclose(merged, theirs(tmp_path / "merged"), rtol=0, atol=1e-4)
