"""The goldens against the installed transformers; and what they lack: auxiliary loss, rotary configs, bfloat16."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import references
from safetensors.numpy import save_file

torch = pytest.importorskip("torch")

import jax.numpy as jnp  # noqa: E402

from jaxtune.model import decoder  # noqa: E402
from jaxtune.model.families import from_hf  # noqa: E402
from jaxtune.model.layers import NORMS  # noqa: E402
from jaxtune.model.moe import load_balancing_loss  # noqa: E402
from jaxtune.model.rope import Rope  # noqa: E402

_source = importlib.util.spec_from_file_location("make_goldens", Path(__file__).parents[2] / "tools" / "make_goldens.py")
oracle = importlib.util.module_from_spec(_source)
_source.loader.exec_module(oracle)
TOLERANCE = 1e-5


def test_there_is_a_golden_of_every_case():
    assert set(references.CASES) == set(oracle.CASES)


@pytest.mark.parametrize("case", oracle.CASES)
def test_goldens_are_what_transformers_computes(case, tmp_path):
    """jaxtune's logits are the goldens': tests/model/test_families.py."""
    golden = references.load(case)
    (tmp_path / "config.json").write_text(json.dumps(golden.config))
    save_file(golden.files, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, opener, how = oracle.auto_class(golden.hub)
    model, info = opener.from_pretrained(tmp_path, attn_implementation=how, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    found = oracle.reference(model, golden.documents)
    for kind, documents in golden.logits.items():
        for i, wanted in enumerate(documents):
            assert np.abs(found[f"{kind}/{i}"] - wanted).max() < TOLERANCE, (kind, i)


@pytest.mark.parametrize("case", ["ernie4_5_moe", "gpt_oss", "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_moe_raw"])
def test_load_balancing_loss(case):
    model, texts = oracle.make_model(oracle.CASES[case], 7), oracle.documents(case, 7)
    hf, tensors = oracle.saved(model)
    config = from_hf(hf)
    batch = references.layout(texts, "right")
    aux = decoder.hidden(config, references.tree(config, tensors), batch.tokens, batch.positions, batch.segments).aux
    with torch.no_grad():
        tokens, mask = (torch.tensor(x).long() for x in (batch.tokens, batch.segments > 0))
        theirs = model(tokens, attention_mask=mask, output_router_logits=True).aux_loss
    assert float(load_balancing_loss(aux)) == pytest.approx(float(theirs), abs=1e-5)
    assert config.moe.aux_loss_coef == model.config.router_aux_loss_coef


YARN = dict(factor=4.0, original_max_position_embeddings=32)
LONG = dict(short_factor=[1.0 + i / 10 for i in range(8)], long_factor=[2.0 + i for i in range(8)])
ROPES = {
    "default": {},
    "theta": dict(rope_theta=5e5),
    "new spelling": dict(rope_parameters=dict(rope_type="default", rope_theta=3e4)),
    "linear": dict(rope_scaling=dict(type="linear", factor=2.5)),
    "linear, new": dict(rope_parameters=dict(rope_type="linear", factor=2.5, rope_theta=3e4)),
    "dynamic": dict(rope_scaling=dict(rope_type="dynamic", factor=3.0)),
    "llama3": dict(
        rope_scaling=dict(
            rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
        )
    ),
    "yarn": dict(rope_scaling=dict(type="yarn") | YARN),
    "yarn, length of the config": dict(rope_scaling=dict(rope_type="yarn", factor=4.0)),
    "yarn, betas": dict(rope_scaling=dict(rope_type="yarn", beta_fast=8.0, beta_slow=0.5, truncate=False) | YARN),
    "yarn, factor of attention": dict(rope_scaling=dict(rope_type="yarn", attention_factor=0.7) | YARN),
    "yarn, mscale": dict(rope_scaling=dict(rope_type="yarn", mscale=1.3, mscale_all_dim=0.6) | YARN),
    "longrope": dict(rope_scaling=dict(rope_type="longrope", original_max_position_embeddings=32) | LONG),
    "longrope, length above": dict(rope_scaling=dict(type="longrope") | LONG, original_max_position_embeddings=32),
    "longrope, factor": dict(rope_scaling=dict(rope_type="longrope", factor=6.0, original_max_position_embeddings=32) | LONG),
    "both spellings": dict(
        rope_scaling=dict(rope_type="linear", factor=2.0), rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10.0)
    ),
}


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("length", [20, 100])
def test_rotary_configs(name, length):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    hf = dict(hidden_size=64, num_attention_heads=4, max_position_embeddings=64) | ROPES[name]
    ours = Rope.from_hf(hf | dict(model_type="llama"), 16)
    theirs = LlamaRotaryEmbedding(LlamaConfig(**hf))
    cos, sin = theirs(torch.zeros(1, length, 16), torch.arange(length)[None])
    lengths = jnp.full((1, length), length)
    angle = np.arange(length)[None, :, None] * np.broadcast_to(ours.frequencies(lengths), (1, length, 8))
    assert np.abs(np.cos(angle) * ours.attention_factor - cos[..., :8].numpy()).max() < 2e-5
    assert np.abs(np.sin(angle) * ours.attention_factor - sin[..., :8].numpy()).max() < 2e-5


def test_norms_in_bfloat16():
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

    torch.manual_seed(0)
    x = torch.randn(64, 48).bfloat16()
    for name, kind in {"rms": LlamaRMSNorm, "rms_float32": Olmo2RMSNorm, "rms_offset": Gemma2RMSNorm}.items():
        theirs = kind(48, eps=1e-5).bfloat16()
        with torch.no_grad():
            theirs.weight.add_(torch.randn(48).bfloat16())
            wanted = theirs(x).float().numpy()
        scale, ours = (jnp.asarray(t.detach().float().numpy(), jnp.bfloat16) for t in (theirs.weight, x))
        assert (np.asarray(NORMS[name](ours, scale, None, 1e-5), np.float32) == wanted).mean() > 0.999
