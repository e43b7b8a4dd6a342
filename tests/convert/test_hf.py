import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
import tiny
from safetensors.numpy import load_file

from jaxtune.convert import hf
from jaxtune.convert.load import load, open_config, open_model
from jaxtune.convert.peft_config import config_file
from jaxtune.convert.tensors import Safetensors
from jaxtune.errors import ConfigError, ModelError
from jaxtune.model import quant
from jaxtune.model.spec import abstract
from jaxtune.model.weight import dense, is_weight
from jaxtune.shapes import abstract_params
from jaxtune.tree import flatten


def test_a_row_is_its_tensors_stacked(tmp_path):
    tensors = tiny.write(tmp_path)
    params = load(tmp_path).params
    assert params["layers"]["0"]["q"].shape == (3, 64, 32)
    for layer in range(3):
        np.testing.assert_array_equal(params["layers"]["0"]["down"][layer], tensors[f"model.layers.{layer}.mlp.down_proj.weight"])
        np.testing.assert_array_equal(params["layers"]["0"]["k_bias"][layer], tensors[f"model.layers.{layer}.self_attn.k_proj.bias"])
    np.testing.assert_array_equal(params["head"], tensors["lm_head.weight"])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract(load(tmp_path).config))


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_in_and_out_is_the_same_bytes(tmp_path, dtype, tie):
    tensors = tiny.write(tmp_path / "in", tiny.LLAMA | {"tie_word_embeddings": tie}, dtype=dtype)
    model = load(tmp_path / "in", dtype=dtype)
    hf.save(model.config, model.params, tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    tiny.assert_same_bytes(tiny.read_all(tmp_path / "out"), tensors)
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((tmp_path / "in/config.json").read_text())


def test_mixed_dtypes_survive_auto(tmp_path):
    tensors = tiny.hf_tensors(dtype="bfloat16")
    tensors = {name: array.astype(np.float32) if "norm" in name else array for name, array in tensors.items()}
    tiny.write(tmp_path / "in", tensors=tensors)
    model = load(tmp_path / "in", dtype="auto")
    assert model.config.dtype == "bfloat16"
    hf.save(model.config, model.params, tmp_path / "out")
    tiny.assert_same_bytes(tiny.read_all(tmp_path / "out"), tensors)


def test_another_dtype_is_written_and_said(tmp_path):
    tiny.write(tmp_path / "in", tiny.LLAMA | {"torch_dtype": "float32"})
    model = load(tmp_path / "in")
    hf.save(model.config, model.params, tmp_path / "out", dtype="bfloat16")
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {str(array.dtype) for array in tiny.read_all(tmp_path / "out").values()} == {"bfloat16"}


def test_from_disk_to_disk_without_loading(tmp_path):
    tensors = tiny.write(tmp_path / "in", dtype="bfloat16")
    opened = open_model(tmp_path / "in")
    hf.save(opened.config, abstract(opened.config), tmp_path / "out", base=opened.checkpoint)
    tiny.assert_same_bytes(tiny.read_all(tmp_path / "out"), tensors)


def test_sharded_folders_load_like_single_ones(tmp_path):
    tiny.write(tmp_path / "in")
    model = load(tmp_path / "in")
    hf.save(model.config, model.params, tmp_path / "out", max_shard_size="10KB")
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "out").params, model.params)


# ---- names ----


def test_a_file_without_the_prefix_and_with_old_buffers(tmp_path):
    tensors = tiny.write(tmp_path / "a")
    renamed = {name.removeprefix("model."): array for name, array in tensors.items()}
    renamed |= {f"layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32) for i in range(3)}
    tiny.write(tmp_path / "b", tensors=renamed)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "b").params, load(tmp_path / "a").params)


def test_a_tied_model_may_repeat_its_embedding(tmp_path):
    config = tiny.LLAMA | {"tie_word_embeddings": True}
    tensors = tiny.hf_tensors(config)
    tiny.write(tmp_path, config, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    model = load(tmp_path)
    assert model.config.tie_word_embeddings and "head" not in model.params


def test_a_tied_model_may_name_its_matrix_after_the_head(tmp_path):
    """As safetensors' `save_model` writes it."""
    config = tiny.LLAMA | {"tie_word_embeddings": True}
    tensors = tiny.hf_tensors(config)
    matrix = tensors.pop("model.embed_tokens.weight")
    tiny.write(tmp_path, config, tensors | {"lm_head.weight": matrix})
    np.testing.assert_array_equal(load(tmp_path).params["embed"], matrix)


def test_a_tied_model_with_another_head_is_untied(tmp_path):
    config = tiny.LLAMA | {"tie_word_embeddings": True}
    head = tiny.hf_tensors(seed=1)["lm_head.weight"]
    tensors = tiny.hf_tensors(config) | {"lm_head.weight": head}
    tiny.write(tmp_path / "in", config, tensors)
    model = load(tmp_path / "in")
    assert not model.config.tie_word_embeddings and model.hf_config["tie_word_embeddings"] is False
    np.testing.assert_array_equal(model.params["head"], head)
    hf.save(model.config, model.params, tmp_path / "out")
    tiny.assert_same_bytes(tiny.read_all(tmp_path / "out"), tensors)


def test_a_tree_with_a_head_of_its_own_unties_what_is_written(tmp_path):
    tiny.write(tmp_path / "in", tiny.LLAMA | {"tie_word_embeddings": True})
    model = load(tmp_path / "in")
    hf.save(model.config, model.params | {"head": model.params["embed"] * 2}, tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.hf_config["tie_word_embeddings"] is False
    np.testing.assert_array_equal(again.params["head"], 2 * model.params["embed"])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "tensor model.layers.1.mlp.up_proj.weight is missing;"),
        (lambda t: t.pop("lm_head.weight"), "tensor lm_head.weight is missing;.*write tie_word_embeddings: true there"),
        (lambda t: [t.update({f"module.{name}": t.pop(name)}) for name in list(t)], "there is module.model.*take 'module.' out"),
        (lambda t: [t.pop(name) for name in list(t) if ".0." in name], r"tensor model.layers.0.\S+ is missing \(and 12 more, such as"),
        (lambda t: t.update(extra=t["lm_head.weight"]), "tensor extra is not part of the model"),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:90]}), r"lm_head.weight has shape \[90, 32\].* asks for \[96, 32\]"),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].astype(np.int32)}), "tensor lm_head.weight is int32"),
    ],
)
def test_tensors_missing_extra_misshapen(tmp_path, edit, message):
    tensors = tiny.hf_tensors()
    edit(tensors)
    tiny.write(tmp_path, tensors=tensors)
    with pytest.raises(ModelError, match=message) as caught:
        load(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(caught.value)


# ---- packed ----


@pytest.mark.parametrize("kind", quant.QUANTIZERS)
def test_packed_while_loading_is_packed_layer_by_layer(tmp_path, kind):
    tensors = tiny.write(tmp_path, tiny.LLAMA | {"hidden_size": 64})
    leaves = flatten(load(tmp_path, quantization=kind).params)
    assert not is_weight(leaves["embed"]) and not is_weight(leaves["head"]) and leaves["layers/0/attn_norm"].shape == (3, 64)
    for layer in range(3):
        alone = quant.quantize(jnp.asarray(tensors[f"model.layers.{layer}.mlp.gate_proj.weight"]), kind)
        jax.tree.map(lambda a, b, i=layer: np.testing.assert_array_equal(a[i], b), leaves["layers/0/gate"], alone)


def test_what_is_dense_beside_packed_matrices_has_one_dtype(tmp_path, caplog):
    """transformers casts no tensor of a quantised model, and GGUF files hold norms in float32 beside matrices in 16 bits."""
    tensors = tiny.hf_tensors(tiny.LLAMA, "float16")
    tensors = {name: t.astype(np.float32) if t.ndim == 1 else t for name, t in tensors.items()}
    tiny.write(tmp_path / "in", tensors=tensors, dtype="float16")
    model = load(tmp_path / "in", dtype="auto", quantization="nf4")
    hf.save(model.config, model.params, tmp_path / "out", keep_packed=True)
    written = load_file(tmp_path / "out/model.safetensors")
    assert {str(written[name].dtype) for name in ("model.norm.weight", "lm_head.weight", "model.embed_tokens.weight")} == {"float16"}
    with caplog.at_level("INFO"):
        assert load(tmp_path / "out", quantization="int8").params["layers"]["0"]["q"].kind == "nf4"
    assert "quantised as nf4 and stay so; int8 does not apply" in caplog.text


def test_experts_are_packed_too(tmp_path):
    """In memory; bitsandbytes has no quantised experts, so they are written dense."""
    golden = references.load("mixtral")
    tiny.write(tmp_path / "in", golden.config, {name: np.ascontiguousarray(tensor) for name, tensor in golden.tensors.items()})
    model = load(tmp_path / "in", quantization="nf4")
    layer = model.params["layers"]["0"]
    assert {name for name, leaf in layer.items() if is_weight(leaf)} == {"q", "k", "v", "o", "experts_gate", "experts_up", "experts_down"}
    hf.save(model.config, model.params, tmp_path / "out", keep_packed=True)
    again = load(tmp_path / "out").params["layers"]["0"]
    assert is_weight(again["q"]) and not is_weight(again["experts_up"])
    np.testing.assert_array_equal(again["experts_up"], dense(layer["experts_up"]))


def test_layers_that_are_left_dense(tmp_path):
    """As in checkpoints that quantise some modules of some layers (`llm_int8_skip_modules`): layers quantised alike form a stack."""
    tiny.write(tmp_path / "in", tiny.LLAMA | {"hidden_size": 64})
    config = dataclasses.replace(open_model(tmp_path / "in").config, cuts=(1, 2))
    pack = lambda path, w: quant.quantize(w, "nf4") if "/q" in path and "/1/" not in path and w.ndim == 2 else w  # noqa: E731
    hf.save(config, hf.load_params(Safetensors(tmp_path / "in"), config, quantize=pack), tmp_path / "out", keep_packed=True)
    skipped = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert "model.layers.1.self_attn.q_proj" in skipped and "model.layers.0.self_attn.q_proj" not in skipped and "lm_head" in skipped
    again = load(tmp_path / "out")
    assert again.config.cuts == open_config(tmp_path / "out").cuts == (1, 2)
    assert [is_weight(again.params["layers"][stack]["q"]) for stack in "012"] == [True, False, True]
    foreseen = abstract_params(again.config, "float32", None)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), again.params) == jax.tree.map(lambda x: (x.shape, x.dtype), foreseen)


def test_packed_leaves_are_written_as_what_they_stand_for(tmp_path):
    tiny.write(tmp_path / "in", tiny.LLAMA | {"hidden_size": 64})
    model = load(tmp_path / "in", dtype=jnp.bfloat16, quantization="nf4")
    hf.save(model.config, model.params, tmp_path / "out")
    wanted = dense(model.params["layers"]["0"]["gate"], jnp.bfloat16)
    np.testing.assert_array_equal(load_file(tmp_path / "out/model.safetensors")["model.layers.2.mlp.gate_proj.weight"], wanted[2])


# ---- what load refuses ----


def test_unknown_dtype_and_quantization():
    with pytest.raises(ConfigError, match="dtype 'bf16' is not one of float32"):
        load("x", dtype="bf16")
    with pytest.raises(ConfigError, match="dtype .* is not one of float32"):
        load("x", dtype=jnp.int8)
    with pytest.raises(ConfigError, match="quantization 'q4' is not one of nf4"):
        load("x", quantization="q4")


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(ModelError, match="config.json is missing"):
        load(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(ModelError, match="is an adapter, not a model; give its base model .org/base."):
        load(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").touch()
    with pytest.raises(ModelError, match="is a run without a result"):
        open_config(run)
    shutil.copytree(tmp_path, run / "adapter", ignore=shutil.ignore_patterns("run"))
    with pytest.raises(ModelError, match=f"is a run of .*base model .org/base., and {run}/adapter as --adapter or init_adapter"):
        load(run)
    with pytest.raises(ModelError, match=f"holds no adapter_config.json; give {run}/adapter"):
        config_file(run)
    (run / "model").mkdir()
    with pytest.raises(ModelError, match=f"is a run, whose model is in there; give {run}/model"):
        load(run)


def test_a_folder_of_runs_or_models(tmp_path):
    for number in (2, 10):
        (tmp_path / f"run-{number}").mkdir()
        (tmp_path / f"run-{number}/run.json").touch()
    with pytest.raises(ModelError, match=f"holds no model itself, but the folders run-2, run-10; name one. {tmp_path}/run-2 is a run with"):
        load(tmp_path)
    (tmp_path / "run-10/config.json").touch()
    with pytest.raises(ModelError, match=f"holds no config.json, but folders in it do; give one, like {tmp_path}/run-10 .there are run-2,"):
        load(tmp_path)


def test_an_existing_folder_is_left_alone(tmp_path):
    tiny.write(tmp_path / "in")
    model = load(tmp_path / "in")
    before = (tmp_path / "in/config.json").stat().st_mtime_ns
    with pytest.raises(ModelError, match="exists and is not empty"):
        hf.save(model.config, model.params, tmp_path / "in")
    assert (tmp_path / "in/config.json").stat().st_mtime_ns == before


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    tiny.write(tmp_path / "in")
    model = load(tmp_path / "in")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf, "write_tensors", full)
    with pytest.raises(OSError, match=f"No space.*{tmp_path}/out'"):
        hf.save(model.config, model.params, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
