"""GGUF files in: containers, layouts, metadata; compared with the `gguf` package. Files out: test_gguf_out.py."""

import struct

import gguf
import numpy as np
import pytest
import references
import tiny
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.numpy import load_file

from jaxtune.convert import hf
from jaxtune.convert.gguf import GGUFCheckpoint, generation_config, gguf_config
from jaxtune.convert.gguf_file import GGUFFile
from jaxtune.convert.gguf_out import save_gguf
from jaxtune.convert.gguf_rope import llama3_divisors
from jaxtune.convert.load import load
from jaxtune.errors import ModelError
from jaxtune.model.families import from_hf

DECODED = [kind for kind in GGMLQuantizationType if kind in gguf.quants._type_traits]
ENCODED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"]


def write_llama(path, hf_config=tiny.LLAMA, tensors=None, drop=(), **metadata):
    """A file like those of llama.cpp's converter: q and k interleaved, with `GGUFWriter` alone."""
    tensors = tiny.hf_tensors(hf_config) if tensors is None else tensors
    writer = GGUFWriter(path, "llama")
    c = from_hf(hf_config)
    fields = {
        "block_count": c.num_layers, "context_length": c.max_position_embeddings, "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size, "attention.head_count": c.num_heads, "attention.head_count_kv": c.num_kv_heads,
        "attention.key_length": c.head_dim, "vocab_size": c.vocab_size,
    }  # fmt: skip
    for key, value in fields.items():
        if key not in drop:
            writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", c.norm_eps)
    writer.add_float32("llama.rope.freq_base", c.ropes[0].theta)
    for key, value in metadata.items():
        key = key.replace("__", ".")
        {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)](key, value)
    names = {"self_attn.": "attn_", "_proj": "", "mlp.": "ffn_", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for name, value in tensors.items():
        if ".q_proj" in name or ".k_proj" in name:
            heads = c.num_heads if ".q_proj" in name else c.num_kv_heads
            value = value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        name = name.replace("model.layers", "blk").replace("model.embed_tokens", "token_embd").replace("model.norm", "output_norm")
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        name = name.replace("lm_head", "output").replace("attn_o.", "attn_output.")
        if name not in drop:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_a_llama_file_is_the_hugging_face_model(tmp_path):
    tensors = write_llama(tmp_path / "m.gguf")
    model = load(tmp_path / "m.gguf")
    hf.save(model.config, model.params, tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[name], array)
    wanted = from_hf(tiny.LLAMA)
    assert {f: getattr(model.config, f) for f in ("ropes", "norm_eps", "qkv_bias", "out_bias", "head_dim")} == {
        "ropes": wanted.ropes, "norm_eps": pytest.approx(1e-5), "qkv_bias": True, "out_bias": True, "head_dim": 16,
    }  # fmt: skip


# ---- the container ----


@pytest.mark.parametrize("kind", ENCODED)
def test_quantised_blocks_decode_as_the_gguf_package_decodes_them(tmp_path, kind):
    values = np.random.default_rng(0).standard_normal((6, 512)).astype(np.float32)
    kind = GGMLQuantizationType[kind]
    packed = gguf.quantize(values, kind)
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("first", values[:3, :7].copy())
    writer.add_tensor("w", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "x.gguf")
    assert file.tensors["w"].shape == (6, 512)
    np.testing.assert_array_equal(file.read("w"), gguf.dequantize(packed, kind))
    np.testing.assert_array_equal(file.read("first"), values[:3, :7])


@pytest.mark.parametrize("kind", DECODED, ids=lambda kind: kind.name)
def test_every_type_the_package_decodes_is_read(tmp_path, kind):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(1).integers(0, 200, (2, 3 * size), dtype=np.uint8)
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("w", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with np.errstate(all="ignore"):
        found, wanted = GGUFFile(tmp_path / "x.gguf").read("w"), gguf.dequantize(data, kind)
    assert found.shape == (2, 3 * block)
    np.testing.assert_array_equal(found.astype(np.float32), wanted)


def test_metadata_of_every_kind(tmp_path):
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    values = {"a": ("uint8", 7), "b": ("int64", -(2**40)), "c": ("float64", 0.1), "d": ("bool", True), "e": ("string", "héllo")}
    for key, (kind, value) in values.items():
        getattr(writer, f"add_{kind}")(key, value)
    writer.add_array("f", ["x", "", "yy"])
    writer.add_array("g", [1, 2, 3])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = GGUFFile(tmp_path / "x.gguf").metadata
    assert {key: metadata[key] for key in "abcdefg"} == {k: v for k, (_, v) in values.items()} | {"f": ["x", "", "yy"], "g": [1, 2, 3]}


@pytest.mark.parametrize("size", [0, 10, 30, 100, 500, -1, -2000])
def test_a_cut_file_is_noticed_wherever_it_is_cut(tmp_path, size):
    write_llama(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[:size])
    with pytest.raises(ModelError, match=r"cut\.gguf"):
        load(tmp_path / "cut.gguf")


def test_other_files_and_versions(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04" + bytes(60))
    with pytest.raises(ModelError, match="is not a GGUF file"):
        load(tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 9, 0, 0))
    with pytest.raises(ModelError, match="GGUF version 9"):
        load(tmp_path / "b.gguf")


# ---- metadata -> config.json ----


@pytest.mark.parametrize(
    ("drop", "metadata", "message"),
    [
        (("blk.1.ffn_up.weight",), {}, "tensor model.layers.1.mlp.up_proj.weight is missing"),
        (("block_count",), {}, "the metadata lacks llama.block_count"),
        (("token_embd.weight",), {}, "tensor token_embd.weight is missing"),
        ((), {"general__architecture": "mamba"}, "architecture 'mamba' is not supported; supported are afmoe, apertus, arcee, "),
        ((), {"llama__rope__scaling__type": "su"}, "rope.scaling.type 'su' is not supported"),
        ((), {"tokenizer__ggml__model": "t5"}, "a tokenizer of kind 't5' is not supported"),
        ((), {"general__type": "adapter"}, "is an adapter, which llama.cpp adds to its base"),
    ],
)
def test_what_is_refused(tmp_path, drop, metadata, message):
    if "general__architecture" in metadata:
        metadata = {}
        write_llama(tmp_path / "m.gguf")
        data = (tmp_path / "m.gguf").read_bytes()
        (tmp_path / "m.gguf").write_bytes(data.replace(b"\x05" + bytes(7) + b"llama", b"\x05" + bytes(7) + b"mamba", 1))
    else:
        write_llama(tmp_path / "m.gguf", drop=drop, **metadata)
    with pytest.raises(ModelError, match=message) as caught:
        load(tmp_path / "m.gguf")
    assert "m.gguf" in str(caught.value)


def test_numbers_of_layers_that_are_damaged(tmp_path):
    """Apertus's activations are stored as metadata."""
    config = from_hf(references.load("apertus").config)
    save_gguf(config, references.tree(config, references.load("apertus").tensors), tmp_path / "m.gguf", type="f32")
    file = GGUFFile(tmp_path / "m.gguf")
    checkpoint, name = GGUFCheckpoint(file, config), "model.layers.1.mlp.act_fn.alpha_p"
    assert checkpoint.read(name) == np.float32(file.metadata["xielu.alpha_p"][1])
    for value in ([0.5], ["a", "b"], "a"):
        file.metadata["xielu.alpha_p"] = value
        with pytest.raises(ModelError, match=r"m.gguf: the metadata's xielu.alpha_p is no number for each of the model's 2 layers"):
            checkpoint.read(name)


def test_extra_tensors_are_refused_and_rope_tensors_are_not(tmp_path):
    tensors = tiny.hf_tensors()
    write_llama(tmp_path / "a.gguf", tensors=tensors | {"rope_freqs.weight": np.ones(8, np.float32)})
    load(tmp_path / "a.gguf")
    write_llama(tmp_path / "b.gguf", tensors=tensors | {"blk.0.attn_sinks.weight": np.ones(8, np.float32)})
    with pytest.raises(ModelError, match=r"tensor blk.0.attn_sinks.weight is not part of the model"):
        load(tmp_path / "b.gguf")


LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def test_rope_frequencies_are_known_again_or_kept(tmp_path):
    """llama.cpp stores Llama 3's scheme as divisors; other divisors have no name and stay numbers."""
    theta = {"rope_theta": 500000.0, "head_dim": 64}
    divisors = llama3_divisors(500000.0, 32, LLAMA3)
    wanted = from_hf(tiny.LLAMA | theta | {"rope_scaling": LLAMA3 | {"rope_type": "llama3"}})
    np.testing.assert_allclose(
        from_hf(tiny.LLAMA | theta).ropes[0].frequencies() / divisors, wanted.ropes[0].frequencies(), rtol=1e-6
    )
    for name, values in {"known": divisors, "unknown": divisors * 1.5}.items():
        tensors = tiny.hf_tensors(tiny.LLAMA | theta) | {"rope_freqs.weight": values}
        write_llama(tmp_path / f"{name}.gguf", tiny.LLAMA | theta, tensors)
    assert load(tmp_path / "known.gguf").config.ropes == wanted.ropes
    unknown = load(tmp_path / "unknown.gguf")
    np.testing.assert_allclose(unknown.config.ropes[0].frequencies(), wanted.ropes[0].frequencies() / 1.5, rtol=1e-6)
    with pytest.raises(ModelError, match="which config.json cannot say; export it as gguf"):
        hf.save(unknown.config, unknown.params, tmp_path / "out")
    save_gguf(unknown.config, unknown.params, tmp_path / "again.gguf", type="f32")
    assert load(tmp_path / "again.gguf").config.ropes == unknown.config.ropes


YARN = {"type": "yarn", "factor": 4.0, "original_context_length": 32, "yarn_beta_fast": 16.0}


@pytest.mark.parametrize(
    ("metadata", "scaling"),
    [
        ({"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"llama__rope__scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {f"llama__rope__scaling__{key}": value for key, value in YARN.items()},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0},
        ),
    ],
)
def test_rope_scaling_is_honoured(tmp_path, metadata, scaling):
    write_llama(tmp_path / "m.gguf", **metadata)
    assert load(tmp_path / "m.gguf").config.ropes == from_hf(tiny.LLAMA | {"rope_scaling": scaling}).ropes


def test_every_token_that_ends_a_turn_is_in_the_generation_config(tmp_path):
    ids = {"bos": 1, "eos": 2, "eot": 5, "eom": 6, "padding": 0}
    write_llama(tmp_path / "m.gguf", **{f"tokenizer__ggml__{key}_token_id": number for key, number in ids.items()})
    file = GGUFFile(tmp_path / "m.gguf")
    assert generation_config(file) == {"bos_token_id": 1, "eos_token_id": [2, 5, 6], "pad_token_id": 0}
    assert gguf_config(file)["eos_token_id"] == 2
