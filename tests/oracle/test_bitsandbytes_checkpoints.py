"""bitsandbytes checkpoints made by transformers load here bit for bit, and ours open there."""

import json

import numpy as np
import pytest
import tiny

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")

import jax  # noqa: E402
from bitsandbytes.functional import QuantState, dequantize_4bit  # noqa: E402
from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: E402

from jaxtune.convert.hf import save  # noqa: E402
from jaxtune.convert.load import load  # noqa: E402
from jaxtune.convert.tensors import Safetensors  # noqa: E402
from jaxtune.model.decoder import forward  # noqa: E402
from jaxtune.model.weight import dense  # noqa: E402
from jaxtune.tree import flatten  # noqa: E402

HF = tiny.LLAMA | {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": False}
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 13))
KINDS = {
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4-dq": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": dict(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "fp4-dq": dict(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True),
    "nf4-dq in bfloat16": dict(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_quant_storage=torch.bfloat16
    ),
    "int8": dict(load_in_8bit=True),
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bnb") / "llama"
    tiny.write(folder, HF)
    return folder


def open_with_transformers(folder, **settings):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **settings)
    return model.train()  # in eval mode bitsandbytes repacks the weights of AVX512-BF16 CPUs and rounds their scales


def dequantised(folder, name):
    """What a packed tensor stands for, by bitsandbytes' own code."""
    files = Safetensors(folder)
    if f"{name.removesuffix('.weight')}.SCB" in files.entries:
        scales = torch.tensor(files.read(f"{name.removesuffix('.weight')}.SCB"))
        return (torch.tensor(files.read(name)) * scales.view(-1, 1) * 7.874015718698502e-3).numpy()
    parts = {part: torch.tensor(files.read(part)) for part in files.entries if part.startswith(f"{name}.")}
    state = QuantState.from_dict({part.removeprefix(f"{name}."): value for part, value in parts.items()}, device=torch.device("cpu"))
    codes = torch.tensor(files.read(name).reshape(-1).view(np.uint8))
    return dequantize_4bit(codes, state).float().numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_made_by_transformers(model_folder, tmp_path, kind):
    settings = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **KINDS[kind])
    theirs = open_with_transformers(model_folder, quantization_config=settings)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    for path, leaf in flatten(ours.params).items():
        if path.rpartition("/")[2] in ("q", "down"):
            name = {"q": "model.layers.{}.self_attn.q_proj.weight", "down": "model.layers.{}.mlp.down_proj.weight"}[path.rpartition("/")[2]]
            for layer in range(3):
                one = jax.tree.map(lambda x, i=layer: x[i], leaf)
                np.testing.assert_array_equal(dense(one, "float32"), dequantised(tmp_path, name.format(layer)))
    with torch.no_grad():
        wanted = theirs(torch.tensor(TOKENS)).logits.numpy()
    bound = 1e-4 if "4" in kind else 0.05  # int8: bitsandbytes also rounds the activations, to 8 bits a row
    np.testing.assert_allclose(forward(ours.config, ours.params, TOKENS), wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("kind", ["nf4", "nf4-dq", "fp4", "int8"])
def test_transformers_opens_ours(model_folder, tmp_path, kind):
    ours = load(model_folder, quantization=kind)
    save(ours.config, ours.params, tmp_path / "out", keep_packed=True)
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["quant_method"] == "bitsandbytes"
    theirs = open_with_transformers(tmp_path / "out")
    with torch.no_grad():
        found = theirs(torch.tensor(TOKENS)).logits.numpy()
    bound = 1e-4 if "4" in kind else 0.05
    np.testing.assert_allclose(found, forward(ours.config, ours.params, TOKENS), rtol=0, atol=bound)
    again = load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, again.params, ours.params)
