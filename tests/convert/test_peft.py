"""PEFT folders out and in, without PEFT."""

import json

import jax
import numpy as np
import pytest
import references
import tiny
from safetensors.numpy import load_file, save_file

from jaxtune import peft
from jaxtune.config import LoraConfig
from jaxtune.convert.load import load
from jaxtune.convert.peft import load_adapter, save_adapter
from jaxtune.errors import ModelError
from jaxtune.model.weight import dense

VARIANTS = {
    "all-linear": LoraConfig(r=4),
    "patterns": LoraConfig(r=2, rank_pattern={"layers.1.self_attn.q_proj": 5}, alpha_pattern={"up_proj": 64}, use_rslora=True),
    "regex": LoraConfig(r=4, target_modules=r".*layers\.[02]\..*(k|up)_proj"),
    "layers": LoraConfig(r=4, target_modules=["v_proj"], layers_to_transform=[1]),
    "embedding": LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"]),
    "DoRA": LoraConfig(r=4, use_dora=True),
    "biases": LoraConfig(r=4, bias="lora_only", target_modules=["q_proj", "k_proj"], layers_to_transform=[0, 2]),
    "own biases": LoraConfig(r=4, lora_bias=True, target_modules=["q_proj", "o_proj"]),
    "modules": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "layers.1.mlp"], bias="all"),
    "tokens": LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[7, 2]),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "llama"
    tiny.write(folder)
    return load(folder)


@pytest.fixture
def saved(model, tmp_path):
    save_adapter(peft.init_adapter(jax.random.key(0), model, VARIANTS["all-linear"]), model, tmp_path / "a")
    return tmp_path / "a"


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip(model, tmp_path, name):
    adapter = peft.init_adapter(jax.random.key(0), model, VARIANTS[name])
    adapter = jax.tree.map(lambda x: x + (x != 0) * 0.5, adapter)
    save_adapter(adapter, model, tmp_path / "a")
    again = load_adapter(tmp_path / "a", model)
    assert again.sites == adapter.sites
    for left, right in zip(jax.tree.leaves(adapter), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(left, right)


def test_names_and_config_are_pefts(model, saved):
    tensors = load_file(saved / "adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.2.mlp.down_proj.lora_A.weight"].shape == (4, 48)
    assert tensors["base_model.model.model.layers.2.mlp.down_proj.lora_B.weight"].shape == (32, 4)
    assert len(tensors) == 3 * 7 * 2
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM" and config["r"] == 4
    assert set(config["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_a_base_that_was_packed_in_training_is_told(model, saved, caplog):
    (saved.parent / "config.yaml").write_text("quantization: nf4\n")
    load_adapter(saved, load(model.source, quantization="nf4"))
    assert not caplog.text
    load_adapter(saved, model)
    assert "over a base packed as nf4, and this one is not" in caplog.text


def test_a_folder_in_use_is_left_alone(model, saved):
    with pytest.raises(ModelError, match="not empty"):
        save_adapter(load_adapter(saved, model), model, saved)


def _edit(saved, **changes):
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "field, value",
    [("layer_replication", [[0, 2]]), ("init_lora_weights", "pissa"), ("init_lora_weights", "OLoRA"), ("peft_type", "POLY")],
)
def test_a_field_that_cannot_be_honoured_is_named(model, saved, field, value):
    _edit(saved, **{field: value})
    with pytest.raises(ModelError, match=str(value if field == "peft_type" else field)):
        load_adapter(saved, model)


def test_targets_that_were_not_recorded_are_those_of_the_file(model, saved, tmp_path):
    wanted = set(json.loads((saved / "adapter_config.json").read_text())["target_modules"])
    _edit(saved, target_modules=None)
    again = save_adapter(load_adapter(saved, model), model, tmp_path / "again")
    found = json.loads((again / "adapter_config.json").read_text())["target_modules"]
    assert {name.rpartition(".")[2] for name in found} == wanted


def test_tensors_that_do_not_fit(model, saved):
    file = saved / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(tensors | {name: tensors[name][:2]}, file)
    with pytest.raises(ModelError, match=r"A of model.layers.0.self_attn.q_proj is \(2, 32\).*\(4, 32\)"):
        load_adapter(saved, model)
    save_file(tensors | {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": tensors[name]}, file)
    with pytest.raises(ModelError, match="layers.9.*another model"):
        load_adapter(saved, model)
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    with pytest.raises(ModelError, match="q_proj lacks its A matrix"):
        load_adapter(saved, model)


def test_embeddings_that_peft_writes_beside_an_adapter(model, saved, tmp_path):
    """If the vocabulary was resized, PEFT saves embedding and head whole, and those that it trains whole three times."""
    file, stems = saved / "adapter_model.safetensors", {"embed": "base_model.model.model.embed_tokens", "head": "base_model.model.lm_head"}
    new = np.asarray(model.params["embed"]) + 1
    more = {f"{stems['embed']}.weight": new, f"{stems['head']}.weight": np.asarray(model.params["head"]),
            f"{stems['head']}.modules_to_save.weight": new, f"{stems['head']}.original_module.weight": new}  # fmt: skip
    save_file(load_file(file) | more, file)
    adapter = load_adapter(saved, model)
    assert adapter.saved.keys() == {"embed"} and adapter.config.modules_to_save == ("embed_tokens",)
    np.testing.assert_array_equal(peft.compose(model.params, adapter)["embed"], new)
    save_adapter(adapter, model, tmp_path / "again")
    np.testing.assert_array_equal(load_adapter(tmp_path / "again", model).saved["embed"], new)
    save_file(load_file(file) | {f"{stems['embed']}.weight": np.concatenate([new, new[:8]])}, file)
    with pytest.raises(ModelError, match=r"\(104, 32\), but this model's is \(96, 32\).*resize_token_embeddings\(104\)"):
        load_adapter(saved, model)


def test_the_matrix_beside_trained_tokens(model, saved):
    """As PEFT saves them if the vocabulary was resized: the tokens, and the matrix that they replace rows of."""
    file, stem = saved / "adapter_model.safetensors", "base_model.model.model.embed_tokens.token_adapter."
    own, tokens = np.asarray(model.params["embed"]), np.full((2, 32), 0.5, np.float32)
    pairs, expected = load_file(file), np.array(own)
    _edit(saved, trainable_token_indices=[3, 9])
    expected[[3, 9]] = tokens
    for changed in ([3, 9], [3, 90]):  # token 90 is not trained: then the matrix is another
        matrix = np.array(own)
        matrix[changed] += 1
        expected[90] = matrix[90]
        save_file(pairs | {f"{stem}base_layer.weight": matrix, f"{stem}trainable_tokens_delta": tokens}, file)
        adapter = load_adapter(saved, model)
        assert (adapter.config.trainable_token_indices is None) == (90 in changed)
        np.testing.assert_array_equal(dense(peft.compose(model.params, adapter)["embed"]), expected)


def test_parameters_that_are_no_experts(model, saved):
    _edit(saved, target_modules=["q_proj"], target_parameters=["down_proj.weight"])
    with pytest.raises(ModelError, match="target_parameters: down_proj.weight matches no parameter.*go into target_modules"):
        load_adapter(saved, model)


def test_no_adapter_there(model, tmp_path):
    with pytest.raises(ModelError, match="no adapter_config.json; give the folder"):
        load_adapter(tmp_path, model)
    for name in ("one", "two"):  # as PEFT saves several
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").touch()
    with pytest.raises(ModelError, match="give .*one or .*two"):
        load_adapter(tmp_path, model)


@pytest.mark.parametrize("settings", [{"target_modules": ["embed_out"]}, {"target_modules": ["dense"], "modules_to_save": ["embed_out"]}])
def test_the_head_of_gpt_neox_by_both_its_names(tmp_path, settings):
    """transformers 4 (and the files) name it embed_out, transformers 5 lm_head."""
    golden = references.load("gpt_neox")
    tiny.write(tmp_path / "model", golden.config, {name: np.ascontiguousarray(tensor) for name, tensor in golden.tensors.items()})
    model = load(tmp_path / "model")
    adapter = jax.tree.map(lambda x: x + 0.1, peft.init_adapter(jax.random.key(0), model, LoraConfig(r=2, **settings)))
    save_adapter(adapter, model, tmp_path / "new")
    tensors = load_file(tmp_path / "new/adapter_model.safetensors")
    assert any(".lm_head." in name for name in tensors) and not any("embed_out" in name for name in tensors)
    (tmp_path / "old").mkdir()
    config = (tmp_path / "new/adapter_config.json").read_text()
    (tmp_path / "old/adapter_config.json").write_text(config.replace("lm_head", "embed_out"))
    save_file({name.replace("lm_head", "embed_out"): x for name, x in tensors.items()}, tmp_path / "old/adapter_model.safetensors")
    for folder in ("new", "old"):
        for left, right in zip(jax.tree.leaves(load_adapter(tmp_path / folder, model)), jax.tree.leaves(adapter), strict=True):
            np.testing.assert_array_equal(left, right)
