"""The converter scripts: a model and an adapter pass through all of them unchanged."""

import runpy
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

import jaxtune as jt

TOOLS = Path(__file__).parents[2] / "tools"
TOKENS = np.asarray([[5, 9, 33, 2, 71]], np.int32)
forward = jax.jit(jt.forward, static_argnums=0)


def tool(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TOOLS / f"{name}.py"), run_name="__main__")
    return ended.value.code


def test_every_converter(monkeypatch, capsys, tmp_path):
    tiny.write_chat_model(tmp_path / "model")
    model = jt.load(tmp_path / "model")
    adapter = jt.init_adapter(jax.random.key(0), model, jt.LoraConfig(r=2, target_modules=["q_proj"]))
    jt.save_adapter(jax.tree.map(lambda x: x + 0.1, adapter), model, tmp_path / "adapter")
    adapter = jt.load_adapter(tmp_path / "adapter", model)
    wanted = forward(model.config, jt.compose(model.params, adapter), TOKENS)

    assert tool(monkeypatch, "import_hf", tmp_path / "model", tmp_path / "copy") == 0
    tiny.assert_same_bytes(tiny.read_all(tmp_path / "copy"), tiny.read_all(tmp_path / "model"))
    assert tool(monkeypatch, "import_hf", tmp_path / "model", tmp_path / "packed", "--quantization", "nf4") == 0
    assert jt.load(tmp_path / "packed").hf_config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"

    assert tool(monkeypatch, "export_hf", tmp_path / "adapter", tmp_path / "merged") == 0
    assert tool(monkeypatch, "export_gguf", tmp_path / "adapter", tmp_path / "gguf", "--type", "f32") == 0
    assert (tmp_path / "gguf" / "Modelfile").read_text().startswith("FROM ./gguf-f32.gguf")
    for path in (tmp_path / "merged", tmp_path / "gguf" / "gguf-f32.gguf"):
        merged = jt.load(path)
        np.testing.assert_allclose(forward(merged.config, merged.params, TOKENS), wanted, atol=1e-4)

    (tmp_path / "adapter").rename(tmp_path / "r=2")  # a sweep's folders have such names
    assert tool(monkeypatch, "convert_adapter", tmp_path / "model", tmp_path / "again", tmp_path / "r=2") == 0
    half = [f"{tmp_path / 'r=2'}=0.5"] * 2
    assert tool(monkeypatch, "convert_adapter", tmp_path / "model", tmp_path / "sum", *half) == 0
    halves = jt.load_adapter(tmp_path / "sum", model)
    np.testing.assert_allclose(forward(model.config, jt.compose(model.params, halves), TOKENS), wanted, atol=1e-4)

    assert tool(monkeypatch, "import_hf", tmp_path / "model", tmp_path / "copy") == 2  # nothing is overwritten
    assert "not empty" in capsys.readouterr().err
