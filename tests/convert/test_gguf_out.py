"""GGUF files out, and in again: every family, types and metadata; compared with the `gguf` package."""

import dataclasses
import re

import gguf
import numpy as np
import pytest
import references
import tiny
from chat import make_tokenizer
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from jaxtune.convert.gguf_architectures import ARCHITECTURES, MODEL_TYPES
from jaxtune.convert.gguf_file import GGUFFile
from jaxtune.convert.gguf_layout import pairs
from jaxtune.convert.gguf_out import save_gguf
from jaxtune.convert.gguf_types import TYPES
from jaxtune.convert.load import load, open_model
from jaxtune.errors import ModelError
from jaxtune.model.families import from_hf
from jaxtune.model.families.factors import Multipliers
from jaxtune.model.layers import ACTIVATIONS
from jaxtune.model.spec import abstract, spec
from jaxtune.tree import flatten

# what llama.cpp supports of each family (checked with it, see docs/decisions.md), if the golden model differs; "": unspecified
LIKE_LLAMA_CPP = {
    "apertus": dict(),
    "arcee": dict(mlp_bias=False),
    "cohere": dict(use_qk_norm=False),
    "cohere2": dict(attention_bias=False, num_hidden_layers=4, layer_types=""),
    "deepseek_v2": dict(topk_method="greedy"),
    "deepseek_v3": dict(attention_bias=False),
    "ernie4_5": dict(use_bias=False),
    "dots1": dict(num_key_value_heads=4, layer_types="", max_window_layers="", sliding_window=None),
    "exaone4": dict(sliding_window=None, layer_types="", hidden_size=64),
    "falcon": dict(bias=False),
    "glm4_moe_lite": dict(mlp_layer_types=["dense", "sparse"], num_hidden_layers=2),
    "granitemoehybrid": dict(),
    "granitemoehybrid_dense": dict(),
    "lfm2": dict(hidden_size=64),
    "lfm2_moe": dict(hidden_size=64, routed_scaling_factor=1.0),
    "gpt_neox_sequential": dict(attention_bias=True),
    "gpt_oss": dict(swiglu_limit=7.0),
    "glm": dict(hidden_size=64),
    "granite": dict(mlp_bias=True),
    "nemotron": dict(hidden_size=64),
    "olmo3": dict(hidden_size=64, rope_parameters=None, rope_theta=5e5),
    "qwen2": dict(use_sliding_window=False, sliding_window="", layer_types="", head_dim=""),
    "qwen2_full": dict(head_dim=""),
    "qwen2_moe": dict(use_sliding_window=False, sliding_window="", layer_types="", hidden_size=64),
    "qwen3_5": dict(num_hidden_layers=4, layer_types="", full_attention_interval=4, rms_norm_eps=1e-6),
    "qwen3_5_moe_nested": dict(num_hidden_layers=4, layer_types="", full_attention_interval=4, rms_norm_eps=1e-6),
    "qwen3_next": dict(
        num_hidden_layers=4, layer_types="", full_attention_interval=4, rms_norm_eps=1e-6, mlp_only_layers="", norm_topk_prob=True
    ),
    "qwen3_yarn": dict(attention_bias=False),
    "qwen3_moe": dict(decoder_sparse_step=1, mlp_only_layers=""),
    "gemma2": dict(query_pre_attn_scalar=16),
    "gemma3": dict(query_pre_attn_scalar=16, num_hidden_layers=7, layer_types="", sliding_window_pattern=6, _sliding_window_pattern=6),
    "olmo2": dict(hidden_size=64),
    "olmoe": dict(num_key_value_heads=4),
    "phi": dict(qk_layernorm=False),
    "seed_oss": dict(attention_out_bias=False),
    "smollm3": dict(layer_types="", no_rope_layers=""),
    "afmoe": dict(num_hidden_layers=5, layer_types="", global_attn_every_n_layers=4),
    "falcon_h1": dict(projectors_bias=False, mamba_norm_before_gate=False)
    | dict.fromkeys(("key_multiplier", "attention_in_multiplier", "attention_out_multiplier", "ssm_in_multiplier"), 1.0)
    | dict.fromkeys(("ssm_out_multiplier", "embedding_multiplier", "lm_head_multiplier"), 1.0)
    | dict(mlp_multipliers=None, ssm_multipliers=None),
    "llama4": dict(num_hidden_layers=4, layer_types="", no_rope_layers="", no_rope_layer_interval=4, moe_layers="")
    | dict(attention_chunk_size=8192, floor_scale=8192, attn_scale=0.1),
    "nemotron_h": dict(layers_block_type=["linear_attention", "moe", "full_attention", "moe"], hybrid_override_pattern="")
    | dict(mlp_bias=False, time_step_min=0.0, intermediate_size=12),
}
FAMILIES = ["ernie4_5_moe", "falcon_one_head", "gemma", "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neox", "granitemoe"]
FAMILIES += ["granitemoeshared", "hunyuan", "linear", "llama", "llama3", "ministral", "ministral3", "mistral", "mixtral", "olmo"]
FAMILIES += ["phi3", "phi4_mini", "qwen3", "stablelm", "starcoder2", *LIKE_LLAMA_CPP]
FAMILIES += ["exaone", "gemma4", "gemma4_nested", "gemma4_unified", "hunyuan_moe", "internlm3", "jais2", "minimax_m2"]
# what a file lacks, or expresses differently: compared by hand, or irrelevant for the computation
UNSAID = {"model_type", "ropes", "moe", "hidden_act", "padding_idx", "initializer_range", "max_position_embeddings", "hf_json"}


# families stored as another's files
READ_AS = {"ministral": "mistral", "glm4_moe_lite": "deepseek_v3", "granitemoehybrid": "granite", "internlm3": "llama",
           "gemma4_unified_text": "gemma4_text"}  # fmt: skip


def family_config(case):
    changes = LIKE_LLAMA_CPP.get(case, {})
    config = references.load(case).config
    return {key: value for key, value in (config.get("text_config", config) | changes).items() if value != ""}


def assert_same_config(found, wanted):
    """Both compute the same."""
    assert found.model_type in (wanted.model_type, READ_AS.get(wanted.model_type))
    for field in dataclasses.fields(wanted):
        if field.name not in UNSAID:
            value = getattr(wanted, field.name)
            value = pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
            windows = field.name == "layer_windows" and wanted.model_type == "ministral"  # there are none in that file but its length
            assert windows or getattr(found, field.name) == value, field.name
    acts = [ACTIVATIONS.get(config.hidden_act, config.hidden_act) for config in (found, wanted)]
    assert acts[0] == acts[1] and len(found.ropes) == len(wanted.ropes)
    for a, b in zip(found.ropes, wanted.ropes, strict=True):
        np.testing.assert_allclose(a.frequencies(), b.frequencies(), rtol=1e-6)
        assert (a.dim, a.interleaved, a.long_factor) == (b.dim, b.interleaved, pytest.approx(b.long_factor))
        assert a.attention_factor == pytest.approx(b.attention_factor, rel=1e-6)
        assert b.kind != "longrope" or a.original_max == b.original_max
    assert (found.moe is None) == (wanted.moe is None)
    if found.moe and wanted.moe:
        assert dataclasses.replace(found.moe, aux_loss_coef=None) == dataclasses.replace(wanted.moe, aux_loss_coef=None)


def known_names(architecture):
    """The tensors and metadata that the gguf package knows for an architecture."""
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    keys = [vars(group) for group in vars(gguf.Keys).values() if isinstance(group, type)]
    return {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[number]}, {key for group in keys for key in group.values()}


@pytest.mark.parametrize("case", FAMILIES)
def test_out_and_in_is_the_same_model(tmp_path, case):
    config = from_hf(family_config(case))
    params = references.tree(config, tiny.hf_tensors(family_config(case)))
    save_gguf(config, params, tmp_path / "m.gguf", type="f32")
    again, file = load(tmp_path / "m.gguf"), GGUFFile(tmp_path / "m.gguf")
    found = flatten(again.params)
    for path, leaf in flatten(params).items():
        # a norm stored plus one, a decay stored as its logarithm's argument: these are rounded
        rounds = config.norm.endswith("_offset") and path.endswith("norm") or path.endswith("a_log")
        if again.config.model_type == "granite" and path.endswith("gate_up"):  # which are two matrices there
            found[path] = np.concatenate([found[path.replace("gate_up", name)] for name in ("gate", "up")], axis=1)
        np.testing.assert_allclose(found[path], leaf, rtol=0, atol=1e-6 if rounds else 0, err_msg=path)
    assert_same_config(again.config, config)
    architecture = file.metadata["general.architecture"]
    tensors, keys = known_names(architecture)
    stems = {re.sub(r"\.(weight|bias|scale)$", "", re.sub(r"^blk\.\d+", "blk.{bid}", name)) for name in file.tensors}
    if architecture == "gemma4":  # its loader takes them apart too, as all others do
        tensors |= {"blk.{bid}.ffn_gate_exps", "blk.{bid}.ffn_up_exps"}
    assert stems <= tensors | {"rope_freqs", "rope_factors_long", "rope_factors_short"}
    assert {key.replace(architecture + ".", "{arch}.", 1) for key in file.metadata} <= keys


def test_other_arithmetic_than_llama_cpps_is_refused(tmp_path):
    for changes, message in (
        ({"hidden_act": "relu"}, "computes silu in a llama model; this one has hidden_act relu"),
        ({"model_type": "gemma2", "attention_bias": False, "hidden_activation": "silu"}, "computes gelu_pytorch_tanh"),
        ({"model_type": "gemma2", "attention_bias": False, "query_pre_attn_scalar": 16, "final_logit_softcapping": None}, "caps attention"),
        ({"model_type": "smollm3", "mlp_bias": True, "attention_bias": False}, "no biases of the feed-forward part"),
    ):
        config = from_hf(tiny.LLAMA | changes)
        with pytest.raises(ModelError, match=message):
            save_gguf(config, abstract(config), tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("opt", "a model of type opt cannot be written as GGUF"),
        ("llama4", "a full layer every 4"),
        ("nemotron_h", "experts in every layer"),
        ("falcon_h1", "knows no|without biases, its norm after the gate"),
        ("gpt_oss", "swiglu_limit 7"),
        ("arcee", "no biases of the feed-forward part"),
        ("cohere", "use_qk_norm if it has 64 layers"),
        ("deepseek_v2", "groups of experts as DeepSeek V3 does"),
        ("deepseek_v3", "no bias of the attention.s output"),
        ("dots1", "llama.cpp has no windows in a dots1 model"),
        ("exaone4", "head_dim of a exaone4 model"),
        ("lfm2_moe", "takes hidden_size / num_attention_heads"),
        ("gpt2_unscaled", "computes gelu_pytorch_tanh"),
        ("gpt_neox_sequential", "wants all biases"),
        ("qwen3_5", "takes rms_norm_eps for what is 1e-6"),
        ("olmoe", "as many heads of keys as of queries"),
        ("phi", "no norms of queries and keys"),
        ("dynamic", "rope_type 'dynamic' cannot be written"),
        ("qwen2", "use_sliding_window"),
        ("qwen2_full", "takes hidden_size / num_attention_heads for the head_dim"),
        ("qwen2_moe", "takes hidden_size / num_attention_heads for the head_dim"),
        ("qwen3_yarn", "no bias of the attention's output"),
        ("qwen3_moe", "experts in every layer"),
        ("gemma2", "takes 16 as query_pre_attn_scalar"),
        ("smollm3", "without positions in every fourth layer"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused(tmp_path, case, message):
    golden = references.load(case)
    config = from_hf(golden.config)
    with pytest.raises(ModelError, match=message):
        save_gguf(config, references.tree(config, golden.tensors), tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("type", [type for type in TYPES if "_k" not in type])
def test_types_and_metadata_as_the_gguf_package_reads_them(tmp_path, type):
    config = tiny.LLAMA | {"hidden_size": 64, "vocab_size": 400}
    tensors = tiny.write(tmp_path / "m", config)
    opened = open_model(tmp_path / "m")
    model = load(tmp_path / "m")
    save_gguf(opened.config, model.params, tmp_path / "m.gguf", type=type, tokenizer=make_tokenizer("chatml"), name="a name")
    reader = GGUFReader(tmp_path / "m.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    matrix, table, number = TYPES[type].matrix, TYPES[type].table, TYPES[type].file
    assert found["blk.0.attn_v.weight"].tensor_type == matrix and found["token_embd.weight"].tensor_type == table
    assert found["blk.0.ffn_down.weight"].tensor_type == (matrix if type in ("f32", "bf16") else GGMLQuantizationType.F16)  # rows of 48
    assert found["blk.0.attn_norm.weight"].tensor_type == found["blk.0.attn_q.bias"].tensor_type == GGMLQuantizationType.F32
    assert reader.fields["general.name"].contents() == "a name" and reader.fields["general.file_type"].contents() == number
    assert reader.fields["tokenizer.ggml.model"].contents() == "gpt2" and reader.fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    value = tensors["model.layers.0.self_attn.v_proj.weight"]
    wanted = gguf.dequantize(gguf.quantize(value, matrix), matrix)
    np.testing.assert_array_equal(gguf.dequantize(found["blk.0.attn_v.weight"].data, matrix), wanted)
    np.testing.assert_array_equal(load(tmp_path / "m.gguf").params["layers"]["0"]["v"][0], wanted)


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path, monkeypatch):
    config = from_hf(tiny.LLAMA)
    params = references.tree(config, tiny.hf_tensors())
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(ModelError, match="exists; nothing is overwritten"):
        save_gguf(config, params, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_text() == "mine"
    monkeypatch.setattr(GGUFWriter, "write_tensor_data", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        save_gguf(config, params, tmp_path / "n.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    with pytest.raises(ModelError, match="'q2' is not a GGUF type"):
        save_gguf(config, params, tmp_path / "n.gguf", type="q2")


def test_every_architecture_goes_both_ways():
    assert {from_hf(family_config(case)).model_type for case in FAMILIES} == set(ARCHITECTURES)
    assert {architecture.name for architecture in ARCHITECTURES.values()} | {"nemotron_h_moe"} == set(MODEL_TYPES)


def test_falcon_h1s_multipliers_are_in_the_matrices(tmp_path):
    """Of a pair of LoRA too, by the same numbers."""
    hf_config = references.load("falcon_h1").config | dict(projectors_bias=False, mamba_norm_before_gate=False)
    config = from_hf(hf_config)
    params = references.tree(config, tiny.hf_tensors(hf_config))
    save_gguf(config, params, tmp_path / "m.gguf", type="f32")
    again = load(tmp_path / "m.gguf")
    assert again.config.multipliers == Multipliers() and again.config.embedding_multiplier == again.config.logits_scaling == 1
    before, after = (flatten(tree) for tree in (params, again.params))
    parts = 1.2 * np.repeat([0.5, 1.5, 0.7, 1.3, 2.0], [24, 24, 12, 12, 6])[:, None]
    layer = {"q": 1.5, "k": 4.5, "v": 1.5, "o": 0.6, "gate": 0.7, "up": 1.0, "down": 1.6, "in_gudt": parts, "out": 2.0}
    for path, by in {"embed": 5.0, "head": 1.5, **{f"layers/0/{name}": by for name, by in layer.items()}}.items():
        np.testing.assert_allclose(after[path], before[path] * by, rtol=1e-6, err_msg=path)
    ((_, b),) = pairs(config, "layers/0/in_gudt", spec(config)["layers/0/in_gudt"], np.ones((1, 16)), before["layers/0/in_gudt"][0])
    np.testing.assert_allclose(b, after["layers/0/in_gudt"][0], rtol=1e-6)
