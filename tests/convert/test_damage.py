"""Damaged files: each is one error that names the file and the damage, and never a traceback."""

import json
import shutil
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

import jaxtune as jt
from jaxtune import errors
from jaxtune.convert.gguf_out import save_gguf
from jaxtune.export import export
from jaxtune.generation.prompts import stop_tokens

Q = "model.layers.0.self_attn.q_proj"
PAIR = f"base_model.model.{Q}.lora_"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An undamaged model, adapter and GGUF file."""
    root = tmp_path_factory.mktemp("sound")
    tiny.write_chat_model(root / "model", tiny.LLAMA | {"num_hidden_layers": 2})
    model = jt.load(root / "model")
    adapter = jt.init_adapter(jax.random.key(0), model, jt.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    jt.save_adapter(adapter, model, root / "adapter")
    save_gguf(model.config, model.params, root / "sound.gguf", type="q8_0", tokenizer=model.tokenizer)
    return root, model


@pytest.fixture
def folder(made, tmp_path):
    shutil.copytree(made[0] / "model", tmp_path / "m")
    return tmp_path / "m"


def message(function, *arguments):
    """What a command would print; any error that is not ours fails the test."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever is raised has to be explained
        function(*arguments)
    text = errors.explain(caught.value)
    assert text is not None, repr(caught.value)
    return text


def set_config(folder, name="config.json", **changes):
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(model_type=["llama"]), r"model_type ['llama'] is not supported"),
        (dict(model_type="mine", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"}), "model_type 'mine' is not supported"),
        (dict(architectures=[3], vocab_size=7), "shape [339, 32], but config.json asks for [7, 32]"),
        (dict(quantization_config="nf4"), "quantization_config='nf4'"),
        (dict(quantization_config={"quant_method": "gptq"}), "quantised as gptq, 4 bits, but none of them is"),
        (dict(quantization_config={"load_in_4bit": True, "llm_int8_skip_modules": ["a("]}), "llm_int8_skip_modules=['a(']"),
        (dict(quantization_config={"load_in_4bit": True}), "tensors are quantised by bitsandbytes, but none of them is"),
        (dict(num_key_value_heads="2"), "num_key_value_heads='2'"),
        (dict(num_key_value_heads=-2), "num_key_value_heads=-2"),
        (dict(head_dim="16"), "head_dim='16'"),
        (dict(rms_norm_eps=None), "rms_norm_eps=None"),
        (dict(rms_norm_eps=-1.0), "rms_norm_eps=-1.0"),
        (dict(rope_theta="x"), "rope_theta='x'"),
        (dict(rope_theta=0), "rope_theta=0"),
        (dict(model_type="mistral", sliding_window=2**40), "sliding_window=1099511627776; at most 2147483647"),
        (dict(rope_scaling={"type": "yarn", "factor": 2, "rope_theta": 1}), "rope_theta=1 of config.json"),
        (dict(rope_scaling={"type": "dynamic", "alpha": "x", "factor": 2}), "alpha='x'"),
        (dict(max_position_embeddings="128"), "max_position_embeddings='128'"),
        (dict(hidden_act=["silu"]), "hidden_act=['silu']"),
        (dict(tie_word_embeddings="false"), "tie_word_embeddings='false'"),
        (dict(rope_scaling="linear"), "has rope_scaling='linear'; it needs an object there"),
        (dict(rope_scaling={"type": "linear", "factor": "x"}), "factor='x'"),
        (dict(rope_scaling={"type": "linear", "factor": 0}), "factor=0"),
        (dict(rope_scaling={"type": ["linear"], "factor": 2}), "type=['linear']"),
        (dict(rope_scaling={"type": "longrope", "short_factor": 1, "long_factor": 2}), "short_factor=1"),
        (dict(rope_scaling={"type": "longrope", "short_factor": ["a"] * 8, "long_factor": [1] * 8}), "short_factor=['a'"),
    ],
)
def test_config(folder, change, said):
    set_config(folder, **change)
    assert said in message(jt.load, folder)


def test_errors_name_the_config(folder):
    set_config(folder, hidden_size=None)
    assert message(jt.load, folder).startswith(f"{folder}/config.json: this llama model has hidden_size=None")
    (folder / "config.json").write_text("{}")
    assert f"{folder}/config.json has no model_type" in message(jt.load, folder)


def test_special_tokens_beyond_the_vocabulary_are_told(folder, caplog):
    set_config(folder, pad_token_id=5000)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7777, -1, 1' + 30 * "0" + "]}")
    export(folder, folder.parent / "out", format="gguf")
    assert all(said in caplog.text for said in ("config.json: pad_token_id 5000 is beyond", "generation_config.json: eos_token_id 7777 is"))
    assert "null" not in (folder.parent / "out/Modelfile").read_text()
    assert jt.load(folder.parent / "out/out-f16.gguf").generation_config["eos_token_id"] != 7777


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    "content", [b"", b"[" * 100_000, b"\xff\xfe\x00\x01", b"[1]", b"version https://git-lfs.github.com/spec/v1\nsize 9\n"]
)
def test_another_file_in_its_place(folder, name, content):
    (folder / name).write_bytes(content)
    text = message(jt.load, folder)
    assert str(folder) in text and (name in text or name == "tokenizer.json")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_in_its_place(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    assert str(folder) in message(jt.load, folder)


@pytest.mark.parametrize("name", ["modeling_x.py", "configuration_x.py"])
def test_code_is_never_run(folder, name):
    (folder / name).write_text("raise SystemExit('run')")
    set_config(folder, auto_map={"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "configuration_x.C"})
    jt.load(folder)


def edit_header(file, edit):
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header[f"{Q}.weight"])
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda info: info.update(shape=[64.0, 32.0]), "no whole number"),
        (lambda info: info.update(data_offsets=["0", "5"]), "no whole number"),
        (lambda info: info.update(data_offsets=[0, 8192]), "but the one before it ends at"),
        (lambda info: info.update(dtype="F6_E2M3"), "dtype F6_E2M3"),
    ],
)
def test_safetensors_headers(folder, edit, said):
    edit_header(folder / "model.safetensors", edit)
    text = message(jt.load, folder)
    assert said in text and "model.safetensors" in text


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("row", ["q_proj", "v_proj"])
def test_weights_that_are_no_numbers(folder, value, row):
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.layers.0.self_attn.{row}.weight"] = np.full_like(tensors[f"model.layers.0.self_attn.{row}.weight"], value)
    save_file(tensors, folder / "model.safetensors")
    assert "logits that are not numbers" in message(lambda: jt.generate(jt.load(folder), "hi", max_new_tokens=1))


def test_weights_that_are_no_numbers_are_not_written(made, tmp_path):
    model, adapter = made[1], jt.load_adapter(made[0] / "adapter", made[1])
    params = adapter.params | {"layers/0/q": {name: x.at[0, 0, 0].set(np.nan) for name, x in adapter.params["layers/0/q"].items()}}
    large = jax.tree.map(lambda x: 1e6 * x, model.params)
    for said, write in (
        ("q_proj.lora_A.weight holds NaN", lambda: jt.save_adapter(adapter.replace(params=params), model, tmp_path / "o")),
        ("ends at 65504", lambda: jt.save(model.config, large, tmp_path / "o", dtype="float16", tokenizer=model.tokenizer)),
        ("ends at 65504", lambda: save_gguf(model.config, large, tmp_path / "o", type="f16", tokenizer=model.tokenizer)),
    ):
        assert said in message(write)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("dtype", "fine"), [(np.float64, True), (np.float16, True), (ml_dtypes.float8_e4m3fn, False), (np.int8, False)])
def test_dtypes(folder, dtype, fine):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.astype(dtype) for name, tensor in tensors.items()}, folder / "model.safetensors")
    if fine:
        assert jt.load(folder).params["embed"].dtype == "float32"
    else:
        assert f"tensor model.embed_tokens.weight is {np.dtype(dtype)}" in message(jt.load, folder)


@pytest.mark.parametrize("files", [{}, {Q: ".."}, {Q: "pytorch_model-00001-of-00001.bin"}, {Q: 3}, [Q]])
def test_index(folder, files):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model-00001-of-00001.bin").write_bytes(b"PK")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    text = message(jt.load, folder)
    assert ("is a pickle" if ".bin" in str(files) else "weight_map is not a map") in text


def test_a_tensor_in_two_files_is_that_of_the_index(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    name = "model.norm.weight"
    save_file(tensors, folder / "a.safetensors")
    save_file({name: tensors[name] + 1, "lm_head.weight": tensors["lm_head.weight"]}, folder / "b.safetensors")
    where = dict.fromkeys(tensors, "a.safetensors") | {"lm_head.weight": "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    np.testing.assert_array_equal(jt.load(folder).params["norm"], tensors[name])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", "{}", "'added_tokens'; fetch its files again"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", '{"model_max_length": "x"}', "tokenizer_config.json has model_max_length='x'"),
    ],
)
def test_a_damaged_tokenizer(folder, name, content, said):
    (folder / name).write_text(content)
    assert said in message(jt.load, folder)


def test_a_template_that_is_no_template(folder):
    (folder / "chat_template.jinja").write_text("{% for m in messages %}")
    assert "the chat template is not valid Jinja (line 1: " in message(lambda: jt.generate(jt.load(folder), "hi", max_new_tokens=1))


def test_a_stop_token_that_no_integer_holds(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": 1' + 30 * "0" + "}")
    assert 10**30 not in stop_tokens(jt.load(folder))


@pytest.mark.parametrize("ends", ["x", {"a": 1}, [[1]], [1, 2.5]])
def test_stop_tokens_that_are_none(folder, ends):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    assert "generation_config.json: eos_token_id is" in message(jt.load, folder)


def test_a_tokenizer_of_a_larger_vocabulary(folder):
    """A token beyond the embedding would otherwise become its last row."""
    tensors = load_file(folder / "model.safetensors")
    save_file({name: x[:80].copy() if len(x) == 339 else x for name, x in tensors.items()}, folder / "model.safetensors")
    set_config(folder, vocab_size=80)
    model = jt.load(folder)
    assert "no token id of this model; ids go from 0 to 79" in message(lambda: jt.generate(model, "zebra, xylophone", max_new_tokens=1))


# ---- adapters ----


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(r="2"), "lora.r is '2'"),
        (dict(r=0), f"rank of {Q} is 0"),
        (dict(r=3), f"A of {Q} is (2, 32)"),
        (dict(target_modules="(q"), "'(q' is not a regular expression"),
        (dict(layers_to_transform=[0], layers_pattern="(q"), "is not a regular expression"),
        (dict(rank_pattern={"(q": 3}), "is not a regular expression"),
        (dict(target_modules=["w_q"]), "adapter_config.json does not name"),
        (dict(target_modules=["q_proj", "v_proj", "k_proj"]), "2 modules that adapter_config.json names have no tensors, the first"),
        (dict(exclude_modules=["q_proj"]), "does not name"),
        (dict(use_dora=True), f"tensor {PAIR}magnitude_vector is missing"),
        (dict(lora_bias=True), f"tensor {PAIR}B.bias is missing"),
        (dict(lora_alpha=float("nan")), "lora.lora_alpha is nan, but has to be a whole number or a finite number"),
        (dict(modules_to_save=["lm_head"]), "tensor base_model.model.lm_head.weight is missing"),
        (dict(use_qalora=True), "use_qalora=True"),
        *((dict(peft_type=kind), f"of type {kind}") for kind in ("HRA", "POLY", None)),
        *((dict(peft_type=kind), "fit no module of this model") for kind in ("IA3", "ADALORA", "VERA")),
        (dict(peft_type="PREFIX_TUNING"), "has to hold prompt_embeddings"),
    ],
)
def test_adapter_configs(made, tmp_path, change, said):
    shutil.copytree(made[0] / "adapter", tmp_path / "a")
    set_config(tmp_path / "a", "adapter_config.json", **change)
    text = message(jt.load_adapter, tmp_path / "a", made[1])
    assert said in text and str(tmp_path / "a") in text


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.clear(), "4 modules that adapter_config.json names have no tensors"),
        (lambda t: t.update({f"{PAIR}A.weight": t[f"{PAIR}A.weight"].astype(np.int32)}), f"tensor {PAIR}A.weight is int32"),
        (lambda t: t.update({f"{PAIR}A.weight": t[f"{PAIR}A.weight"].astype(ml_dtypes.float8_e5m2)}), "is float8_e5m2"),
        (lambda t: [t.pop(name) for name in list(t) if "layers.1" in name], "the first model.layers.1.self_attn.q_proj"),
        (lambda t: [t.update({name[17:]: t.pop(name)}) for name in list(t)], "8 tensors fit no module of this model"),
    ],
)
def test_adapter_tensors(made, tmp_path, edit, said):
    shutil.copytree(made[0] / "adapter", tmp_path / "a")
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "a/adapter_model.safetensors")
    assert said in message(jt.load_adapter, tmp_path / "a", made[1])


def test_an_adapter_as_a_pickle(made, tmp_path):
    shutil.copytree(made[0] / "adapter", tmp_path / "a")
    (tmp_path / "a/adapter_model.safetensors").rename(tmp_path / "a/adapter_model.bin")
    assert "torch.load(" in message(jt.load_adapter, tmp_path / "a", made[1])


def test_a_field_of_a_newer_peft_is_told(made, tmp_path, caplog):
    shutil.copytree(made[0] / "adapter", tmp_path / "a")
    set_config(tmp_path / "a", "adapter_config.json", brand_new=True, other_new=None)
    jt.load_adapter(tmp_path / "a", made[1])
    assert "brand_new=True" in caplog.text and "other_new" not in caplog.text


# ---- GGUF ----


def key(name, *new):
    """Overwrite the value of a metadata key."""

    def edit(data):
        place = bytes(data).index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)
        struct.pack_into(new[0], data, place + 4, *new[1:])

    return edit


def tensor(offset, *new, name="blk.0.attn_q.weight"):
    """Overwrite a number of a matrix's entry: 0 dimensions, 4 and 12 sizes, 20 type, 24 place."""

    def edit(data):
        struct.pack_into(new[0], data, bytes(data).index(name.encode()) + len(name) + offset, *new[1:])

    return edit


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (tensor(20, "<I", 99), "tensor blk.0.attn_q.weight has type 99"),
        (tensor(12, "<I", 26, name="blk.0.attn_norm.weight"), "tensor blk.0.attn_norm.weight is I32"),
        (tensor(20, "<I", 15), "but the one before it ends at byte"),
        (tensor(24, "<Q", 64), "tensor blk.0.attn_q.weight (Q8_0 [64, 32]) begins at byte"),
        (lambda data: data.__setitem__(8, data[8] - 1), "bytes long, but its header describes"),
        (tensor(20, "<I", 2, name="\0output.weight"), "bytes long, but its header describes"),
        (tensor(4, "<Q", 2**62), "tensor blk.0.attn_q.weight"),
        (tensor(24, "<Q", 2**40), "tensor blk.0.attn_q.weight"),
        (tensor(0, "<I", 2**31), "the header is cut or corrupt"),
        (tensor(4, "<QQ", 64, 32), f"tensor {Q}.weight has shape [32, 64]"),
        (key("llama.attention.head_count", "<I", 0), "llama.attention.head_count is 0"),
        (key("llama.attention.key_length", "<I", 0), "llama.attention.key_length is 0"),
        (key("llama.block_count", "<I", 3), "tensor model.layers.2.input_layernorm.weight is missing"),
        (key("tokenizer.ggml.tokens", "<IQ", 8, 2**60), "the header is cut or corrupt"),
        (key("llama.rope.freq_base", "<f", float("nan")), "rope_theta=nan"),
    ],
)
def test_gguf(made, tmp_path, edit, said):
    data = bytearray((made[0] / "sound.gguf").read_bytes())
    edit(data)
    (tmp_path / "m.gguf").write_bytes(data)
    assert said in message(jt.load, tmp_path / "m.gguf")


def test_bytes_after_a_gguf(made, tmp_path, caplog):
    """llama.cpp does not look at them."""
    (tmp_path / "m.gguf").write_bytes((made[0] / "sound.gguf").read_bytes() + b"a signature" * 9)
    found, wanted = jt.load(tmp_path / "m.gguf").params, jt.load(made[0] / "sound.gguf").params
    assert jax.tree.all(jax.tree.map(np.array_equal, found, wanted)) and "99 bytes follow the last tensor" in caplog.text
