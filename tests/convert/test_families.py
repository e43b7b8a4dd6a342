"""Other layouts of families' files. In and out gives the same bytes: tests/laws/test_model_files.py."""

import re

import jax
import numpy as np
import pytest
import references
import tiny
from tiny import assert_same_bytes, read_all

from jaxtune.convert import hf
from jaxtune.convert.load import load


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_experts_stacked_as_transformers_5_can_write_them(tmp_path, case):
    golden = references.load(case)
    tensors = tiny.write(tmp_path / "apart", golden.config)
    stacked, experts = {}, {}
    for name, array in tensors.items():
        match = re.fullmatch(r"(.*)\.(block_sparse_moe|mlp)\.experts\.(\d+)\.(\w+)\.weight", name)
        if match:
            kind = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(match[4], match[4])
            experts.setdefault((match[1], kind), {})[int(match[3])] = array
        else:
            stacked[name.replace("block_sparse_moe.gate", "mlp.gate")] = array
    parts = {key: np.stack([by_number[number] for number in sorted(by_number)]) for key, by_number in experts.items()}
    for prefix in {prefix for prefix, _ in parts}:
        stacked[f"{prefix}.mlp.experts.gate_up_proj"] = np.concatenate([parts[prefix, "gate_proj"], parts[prefix, "up_proj"]], axis=1)
        stacked[f"{prefix}.mlp.experts.down_proj"] = parts[prefix, "down_proj"]
    tiny.write(tmp_path / "stacked", golden.config, stacked)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "stacked").params, load(tmp_path / "apart").params)


def test_mxfp4_is_read_as_the_numbers_it_stands_for(tmp_path):
    """Every code and many scales, in gpt-oss's layout: codes packed for 32 numbers with one scale; by hand, number by number."""
    config = references.load("gpt_oss").config | {"hidden_size": 64, "intermediate_size": 32, "head_dim": 16}
    tensors, rng = tiny.hf_tensors(config, "bfloat16"), np.random.default_rng(0)
    packed, values = dict(tensors), [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        E, width, out = packed.pop(name).shape
        blocks, scales = rng.integers(0, 256, (E, out, width // 32, 16), np.uint8), rng.integers(110, 130, (E, out, width // 32), np.uint8)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        for e, i, o in np.ndindex(E, width, out):
            code = blocks[e, o, i // 32, i % 32 // 2] >> (4 if i % 2 else 0) & 15
            tensors[name][e, i, o] = values[code] * 2.0 ** (int(scales[e, o, i // 32]) - 127)
    tiny.write(tmp_path / "packed", config | {"quantization_config": {"quant_method": "mxfp4"}}, packed)
    model = load(tmp_path / "packed", "bfloat16")
    hf.save(model.config, model.params, tmp_path / "dense")
    assert_same_bytes(read_all(tmp_path / "dense"), tensors)
    assert "quantization_config" not in (tmp_path / "dense/config.json").read_text()


@pytest.mark.parametrize(
    ("case", "rename", "buffers"),
    [
        ("gpt2", lambda name: name.removeprefix("transformer."), ["h.0.attn.bias", "h.0.attn.masked_bias"]),
        ("gpt_neox", lambda name: name.replace("embed_out", "lm_head"), ["gpt_neox.layers.0.attention.rotary_emb.inv_freq"]),
        ("gpt_neox", lambda name: name, ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.1.attention.masked_bias"]),
        ("llama", lambda name: name.removeprefix("model."), []),
        ("deepseek_v3", lambda name: name, ["model.layers.2.enorm.weight"]),  # layers that predict the token after next
    ],
)
def test_names_that_older_files_have(tmp_path, case, rename, buffers):
    golden = references.load(case)
    tensors = tiny.write(tmp_path / "usual", golden.config)
    other = {rename(name): array for name, array in tensors.items()} | {name: np.ones((1, 1), np.float32) for name in buffers}
    tiny.write(tmp_path / "other", golden.config, other)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "other").params, load(tmp_path / "usual").params)
