"""Multimodal checkpoints: the language model is read and written, the other tensors come out unchanged."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
import tiny
from chat import make_tokenizer
from safetensors.numpy import load_file, save_file

from jaxtune.config import LoraConfig
from jaxtune.convert import hf
from jaxtune.convert.load import load, open_model
from jaxtune.convert.peft import load_adapter, save_adapter
from jaxtune.errors import ModelError
from jaxtune.export import export
from jaxtune.model.families import from_hf, nested
from jaxtune.model.spec import abstract
from jaxtune.peft import init_adapter, partial

GOLDEN = references.load("gemma3_nested")


def write(folder, files=GOLDEN.files):
    tiny.write(folder, GOLDEN.config, files)
    (folder / "preprocessor_config.json").write_text('{"do_resize": true}')
    return folder


def test_what_is_beside_is_written_though_the_folder_is_gone(tmp_path):
    model = load(write(tmp_path / "in"))
    shutil.rmtree(tmp_path / "in")
    params = jax.tree.map(lambda x: x * 2, model.params)
    hf.save(model.config, params, tmp_path / "out", other_tensors=model.other_tensors)
    written = tiny.read_all(tmp_path / "out")
    assert written.keys() == GOLDEN.files.keys()
    others = {name: array for name, array in GOLDEN.files.items() if references.BESIDE.match(name)}
    assert others and all(np.array_equal(written[name], GOLDEN.files[name] * (1 if name in others else 2)) for name in written)
    assert json.loads((tmp_path / "out/config.json").read_text()) == GOLDEN.config
    assert (tmp_path / "out/preprocessor_config.json").read_text() == '{"do_resize": true}'
    with pytest.raises(ModelError, match=r"other_tensors=model\.other_tensors"):
        hf.save(model.config, params, tmp_path / "alone")


def test_a_head_of_its_own_is_said_inside_and_outside(tmp_path):
    model = load(write(tmp_path / "in"))
    hf.save(model.config, model.params | {"head": model.params["embed"] * 2}, tmp_path / "out", other_tensors=model.other_tensors)
    said = json.loads((tmp_path / "out/config.json").read_text())
    assert said["tie_word_embeddings"] is said["text_config"]["tie_word_embeddings"] is False
    assert "language_model.lm_head.weight" in tiny.read_all(tmp_path / "out") and "head" in load(tmp_path / "out").params


# the hub's names of the language model, and of other tensors, where no golden has them
NAMES = {
    "apertus1p5": ("model.language_model.", "model.vision_tokenizer.x", "model.audio_tokenizer.x"),
    "aya_vision": ("language_model.model.", "vision_tower.x", "multi_modal_projector.x"),
    "exaone4_5": ("model.language_model.", "model.visual.x", "mtp.layers.0.x"),
    "gemma3n": ("model.language_model.", "model.vision_tower.x", "model.audio_tower.x", "model.embed_audio.x"),
    "glm46v": ("model.language_model.", "model.visual.x"),
    "glm4v_moe": ("model.language_model.", "model.visual.x"),
    "granite4_vision": ("model.language_model.", "model.vision_tower.x", "model.image_newline", "model.layerwise_projectors.0.x"),
    "idefics3": ("model.text_model.", "model.vision_model.x", "model.connector.x"),
    "internvl": ("language_model.model.", "vision_tower.x", "multi_modal_projector.x"),
    "lfm2_vl": ("model.language_model.", "model.vision_tower.x", "model.multi_modal_projector.x"),
    "lfm3_vl": ("model.language_model.", "model.vision_tower.x", "model.multi_modal_projector.x"),
    "llava_next": ("language_model.model.", "vision_tower.x", "image_newline"),
    "llava_onevision": ("language_model.model.", "vision_tower.x", "image_newline"),
}


@pytest.mark.parametrize("outer", references.ALIKE)
def test_names_of_a_type_without_a_golden(tmp_path, outer):
    stem, *others = NAMES[outer]
    config = references.alike(outer)
    text = tiny.hf_tensors(nested.text_config(config))
    head = "language_model.lm_head." if stem.startswith("language_model") else "lm_head."
    files = {re.sub(r"^model\.", stem, name).replace("lm_head.", head): a for name, a in text.items()}
    tiny.write(tmp_path / "in", config, files | {name: np.ones((2, 3), np.float32) for name in others})
    model = load(tmp_path / "in")
    assert model.config.outer == outer and model.other_tensors.entries.keys() == {*others}
    hf.save(model.config, model.params, tmp_path / "out", other_tensors=model.other_tensors)
    tiny.assert_same_bytes(tiny.read_all(tmp_path / "out"), tiny.read_all(tmp_path / "in"))
    modules = "model.text_model.layers" if outer == "idefics3" else "model.language_model.layers"
    assert nested.module(model.config, "model.layers.0.mlp") == f"{modules}.0.mlp"


def test_layers_that_text_passes_over_keep_their_numbers(tmp_path):
    golden = references.load("mllama")
    tiny.write(tmp_path / "in", golden.config, golden.files)
    model = load(tmp_path / "in")
    assert model.config.num_layers == 3 and {"language_model.model.layers.3.cross_attn.q_proj.weight"} < model.other_tensors.entries.keys()
    assert partial.cuts(model.config, ["layers.4."]) == (2,)
    assert partial.lowest(dataclasses.replace(model.config, cuts=(2,)), ["layers.4."]) == 2
    hf.save(model.config, model.params, tmp_path / "out", other_tensors=model.other_tensors)
    tiny.assert_same_bytes(tiny.read_all(tmp_path / "out"), tiny.read_all(tmp_path / "in"))
    adapter = init_adapter(jax.random.key(0), model, LoraConfig(r=2, target_modules=("q_proj",)))
    save_adapter(adapter, model, tmp_path / "adapter")
    excluded = json.loads((tmp_path / "adapter/adapter_config.json").read_text())["exclude_modules"]
    outside = [f"model.language_model.layers.{layer}.cross_attn.q_proj" for layer in (1, 3)]
    inside = [f"model.language_model.layers.{layer}.self_attn.q_proj" for layer in (0, 2, 4, 13)]
    assert [bool(re.fullmatch(excluded, name)) for name in outside + inside] == [True] * 2 + [False] * 4
    assert len(tensors := load_file(tmp_path / "adapter/adapter_model.safetensors")) == 6
    name = next(name for name in tensors if ".layers.0." in name).replace("0.self_attn", "1.cross_attn")
    save_file(tensors | {name: np.ones((2, 16), np.float32)}, tmp_path / "adapter/adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"what is beside the language model, the first .*layers\.1\.cross_attn"):
        load_adapter(tmp_path / "adapter", model)
    for format, why in (("text", "export it with --format hf"), ("gguf", "llama.cpp has no mllama models")):
        with pytest.raises(ModelError, match=why):
            export(tmp_path / "in", tmp_path / "other", format=format)
    config = golden.config | {"text_config": golden.config["text_config"] | {"cross_attention_layers": [0, 1, 2, 3, 4]}}
    with pytest.raises(ModelError, match="text passes through none"):
        from_hf(config)


def test_the_template_of_an_older_processor(tmp_path):
    tokenizer = make_tokenizer("chatml")
    template, tokenizer.chat_template = tokenizer.chat_template, None
    tokenizer.save_pretrained(write(tmp_path / "in"))
    (tmp_path / "in/chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert load(tmp_path / "in").tokenizer.chat_template == template


@pytest.mark.parametrize("stem", ["model.language_model.", "language_model.model."])
def test_names_of_either_age(tmp_path, stem):
    head = "lm_head" if stem.startswith("model.") else "language_model.lm_head"
    files = {references.PREFIX.sub("", name): a for name, a in GOLDEN.files.items() if not references.BESIDE.match(name)}
    files = {stem + name: a for name, a in files.items()} | {f"{head}.weight": GOLDEN.tensors["model.embed_tokens.weight"]}
    files |= {name: a for name, a in GOLDEN.files.items() if references.BESIDE.match(name)}
    jax.tree.map(np.testing.assert_array_equal, load(write(tmp_path / "in", files)).params, load(write(tmp_path / "usual")).params)
    with pytest.raises(ModelError, match=r"tensor model\.layers\.7.* is not part of the model"):
        load(write(tmp_path / "more", files | {f"{stem}layers.7.mlp.up_proj.weight": np.ones((2, 2), np.float32)}))


def test_experts_that_lie_turned_as_on_the_hub(tmp_path):
    golden = references.load("qwen3_vl_moe")
    turned = {name: np.ascontiguousarray(a.swapaxes(1, 2)) if ".mlp.experts." in name else a for name, a in golden.files.items()}
    tiny.write(tmp_path / "hub", golden.config, turned)
    tiny.write(tmp_path / "usual", golden.config, golden.files)
    model, opened = load(tmp_path / "hub"), open_model(tmp_path / "hub")
    jax.tree.map(np.testing.assert_array_equal, model.params, load(tmp_path / "usual").params)
    hf.save(model.config, model.params, tmp_path / "loaded", other_tensors=model.other_tensors)
    hf.save(opened.config, abstract(opened.config), tmp_path / "streamed", base=opened.checkpoint, other_tensors=opened.other_tensors)
    tiny.assert_same_bytes(tiny.read_all(tmp_path / "loaded"), turned)
    tiny.assert_same_bytes(tiny.read_all(tmp_path / "streamed"), turned)
    with pytest.raises(ModelError, match="hold experts as a text model's do not"):
        export(tmp_path / "hub", tmp_path / "alone", format="text")


def test_experts_in_one_tensor_as_on_the_hub_where_transformers_writes_each_by_itself(tmp_path):
    golden = references.load("qwen3_5_moe_nested")
    together, experts = {}, {}
    for name, array in golden.files.items():
        prefix, found, rest = name.partition(".mlp.experts.")
        if found:
            experts.setdefault((prefix, rest.split(".")[1]), []).append(array)
        else:
            together[name] = array
    for prefix in {prefix for prefix, _ in experts}:
        gate, up, down = (np.stack(experts[prefix, part]) for part in ("gate_proj", "up_proj", "down_proj"))
        together |= {f"{prefix}.mlp.experts.gate_up_proj": np.concatenate([gate, up], 1), f"{prefix}.mlp.experts.down_proj": down}
    tiny.write(tmp_path / "hub", golden.config, together)
    tiny.write(tmp_path / "usual", golden.config, golden.files)
    model = load(tmp_path / "hub")
    jax.tree.map(np.testing.assert_array_equal, model.params, load(tmp_path / "usual").params)
    hf.save(model.config, model.params, tmp_path / "out", other_tensors=model.other_tensors)
    tiny.assert_same_bytes(tiny.read_all(tmp_path / "out"), together)
    export(tmp_path / "usual", tmp_path / "alone", format="text")
    assert tiny.read_all(tmp_path / "alone").keys() == golden.tensors.keys()


def test_the_language_model_alone(tmp_path):
    export(write(tmp_path / "in"), tmp_path / "out", format="text")
    assert tiny.read_all(tmp_path / "out").keys() == GOLDEN.tensors.keys()
    whole, alone = load(tmp_path / "in"), load(tmp_path / "out")
    assert (alone.hf_config["model_type"], alone.hf_config["architectures"]) == ("gemma3_text", ["Gemma3ForCausalLM"])
    assert alone.config == dataclasses.replace(whole.config, outer="") and not (tmp_path / "out/preprocessor_config.json").exists()
    jax.tree.map(np.testing.assert_array_equal, alone.params, whole.params)
    with pytest.raises(ModelError, match="is not a multimodal checkpoint"):
        export(tmp_path / "out", tmp_path / "again", format="text")


def test_an_adapter_stays_within_the_language_model(tmp_path):
    model = load(write(tmp_path / "in"))
    fresh = init_adapter(jax.random.key(0), model, LoraConfig(r=2, exclude_modules=("o_proj",), modules_to_save=("q_norm",)))
    pairs = {path: pair | {"b": jnp.ones_like(pair["b"])} for path, pair in fresh.params.items()}
    adapter = dataclasses.replace(fresh, params=pairs)
    save_adapter(adapter, model, tmp_path / "adapter")
    said = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert said["exclude_modules"] == r"(?!model\.language_model\.|lm_head$).*|(.*\.)?(o_proj)"
    assert said["modules_to_save"] == [f"model.language_model.layers.{layer}.self_attn.q_norm" for layer in (0, 1)]
    jax.tree.map(np.testing.assert_array_equal, load_adapter(tmp_path / "adapter", model).params, adapter.params)
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name.replace("model.language_model.", "language_model.model."): a for name, a in tensors.items()}, file)
    jax.tree.map(np.testing.assert_array_equal, load_adapter(tmp_path / "adapter", model).params, adapter.params)  # an older file
    save_file(tensors | {"base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight": np.ones((2, 8))}, file)
    with pytest.raises(ModelError, match=r"1 tensors change what is beside the language model"):
        load_adapter(tmp_path / "adapter", model)
    idle = {"lora_A": np.ones((2, 8), np.float32), "lora_B": np.zeros((8, 2), np.float32)}  # as after PEFT's training on text
    tower = "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj"
    save_file(tensors | {f"{tower}.{name}.weight": a for name, a in idle.items()}, file)
    jax.tree.map(np.testing.assert_array_equal, load_adapter(tmp_path / "adapter", model).params, adapter.params)
    export(tmp_path / "in", tmp_path / "merged")  # and a model is exported as it is
    assert tiny.read_all(tmp_path / "merged").keys() == GOLDEN.files.keys()
