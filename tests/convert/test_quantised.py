"""Checkpoints quantised by other tools, read as the numbers they stand for: quantised here by hand, number by number, and by the tools
themselves (tests/goldens/quantised.safetensors)."""

import json
import logging
import re

import jax
import ml_dtypes
import numpy as np
import pytest
import references
import tiny
from safetensors.numpy import save_file
from tiny import assert_same_bytes, read_all

from jaxtune import parallel
from jaxtune.config import MeshConfig
from jaxtune.convert import hf
from jaxtune.convert.load import load, open_config, open_model, read_model
from jaxtune.convert.quantised import format_of
from jaxtune.convert.tensors import Safetensors
from jaxtune.errors import ModelError
from jaxtune.shapes import abstract_params

LLAMA = tiny.LLAMA | {"num_hidden_layers": 1, "attention_bias": False}
F8, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def words(codes, bits):
    """Codes as the digits of one large number, lowest first."""
    number = sum(int(code) << bits * place for place, code in enumerate(codes))
    return np.frombuffer(number.to_bytes(-(-len(codes) * bits // 32) * 4, "little"), np.int32)


def spread(blocks, block, shape):
    """One number per block expanded to one per element."""
    return np.kron(np.asarray(blocks, np.float32), np.ones(block, np.float32))[: shape[0], : shape[1]]


def float8(shape, rng):
    return (rng.standard_normal(shape) * 50).astype(F8)


def fp8(name, shape, rng, block=None, scale="_scale_inv", scales=None):
    block = block or shape
    grid = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    codes, stored = float8(shape, rng), rng.uniform(0.001, 0.02, grid).astype(np.float32)
    stored, numbers = scales(stored) if scales else (stored, stored)
    return {name: codes, name + scale: stored}, codes.astype(np.float32) * spread(numbers, block, shape)


def powers(dtype):
    """Scales that are powers of two, stored as their exponents + 127."""

    def make(scales):
        exponents = np.round(np.log2(scales)).astype(np.int32)
        return (exponents + 127).astype(np.uint8).view(dtype), np.float32(2) ** exponents

    return make


def pack_quantized(name, shape, rng, bits=4, group=16, zeros=False, order=False):
    groups = shape[1] // group
    codes, scales = rng.integers(0, 1 << bits, shape), rng.uniform(0.01, 0.05, (shape[0], groups)).astype(ml_dtypes.bfloat16)
    zero = rng.integers(0, 1 << bits, (shape[0], groups)) if zeros else np.full((shape[0], groups), 1 << bits - 1)
    of = rng.permutation(np.arange(shape[1]) // group) if order else np.arange(shape[1]) // group
    parts = {"_packed": np.stack([words(row, bits) for row in codes]), "_scale": scales, "_shape": np.asarray(shape)}
    parts |= {"_zero_point": np.stack([words(column, bits) for column in zero.T], axis=1)} if zeros else {}
    parts |= {"_g_idx": of.astype(np.int32)} if order else {}
    return {name + end: part for end, part in parts.items()}, (codes - zero[:, of]).astype(np.float32) * scales.astype(np.float32)[:, of]


def int8(name, shape, rng):
    codes, zero = rng.integers(-128, 128, shape).astype(np.int8), rng.integers(-9, 9, (shape[0], 1)).astype(np.int8)
    scales = rng.uniform(0.001, 0.002, (shape[0], 1)).astype(np.float32)
    parts = {name: codes, name + "_scale": scales, name + "_zero_point": zero}
    return parts, (codes.astype(np.float32) - zero) * scales


def fp4(name, shape, rng, group, divided):
    codes = rng.integers(0, 16, shape)
    exponents = rng.integers(120, 126, (shape[0], shape[1] // group)).astype(np.uint8)
    scales = np.float32(2) ** (exponents.astype(np.int32) - 127)
    parts = {name + "_packed": (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8), name + "_scale": exponents}
    if divided:
        stored = rng.uniform(1, 30, scales.shape).astype(F8)
        parts |= {name + "_scale": stored, name + "_global_scale": np.asarray([64.0], np.float32)}
        scales = stored.astype(np.float32) / 64
    return parts, np.asarray(E2M1, np.float32)[codes] * spread(scales, (1, group), shape)


def gptq(name, shape, rng, bits=4, group=16, stored="less one", order=True):
    out, width = shape
    groups, stem = -(-width // group), name.removesuffix("weight")
    codes, zeros = rng.integers(0, 1 << bits, (width, out)), rng.integers(0, 1 << bits, (groups, out))
    zeros = np.full_like(zeros, 1 << bits - 1) if stored == "symmetric" else zeros
    kept = (zeros - 1) % (1 << bits) if stored == "less one" else zeros
    scales, of = rng.uniform(0.01, 0.05, (groups, out)).astype(np.float16), np.arange(width) // group
    of = rng.permutation(of) if order else of
    parts = {"qweight": np.stack([words(column, bits) for column in codes.T], axis=1)}
    parts |= {"qzeros": np.stack([words(row, bits) for row in kept]), "scales": scales}
    parts |= {"g_idx": of.astype(np.int32)} if order is not None else {"bias": np.zeros(out, np.float16)}  # as in old files
    return {stem + end: part for end, part in parts.items()}, ((codes - zeros[of]).astype(np.float32) * scales.astype(np.float32)[of]).T


def awq(name, shape, rng, group=16):
    (out, width), stem = shape, name.removesuffix("weight")
    codes, zeros = rng.integers(0, 16, (width, out)), rng.integers(0, 16, (width // group, out))
    scales = rng.uniform(0.01, 0.05, zeros.shape).astype(np.float16)

    def packed(rows):
        return np.stack([words(row.reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1), 4) for row in rows])

    numbers = (codes - zeros.repeat(group, 0)).astype(np.float32) * scales.astype(np.float32).repeat(group, 0)
    return {stem + "qweight": packed(codes), stem + "qzeros": packed(zeros), stem + "scales": scales}, numbers.T


def compressed(format, targets=("Linear",), **weights):
    group = {"targets": list(targets), "weights": weights, "input_activations": None}
    # of a module that does not exist here
    other = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int"}, "format": "int-quantized"}
    groups = {"group_0": other, "group_1": group} if targets != ("Linear",) else {"group_0": group}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": groups, "ignore": ["lm_head"]}


MX4 = dict(num_bits=4, type="float", strategy="group", group_size=16)
CASES = {
    "fp8": ({"quant_method": "fp8", "weight_block_size": [24, 20]}, lambda *a: fp8(*a, block=(24, 20))),
    "fp8, powers of two": ({"quant_method": "fp8", "weight_block_size": [16, 16]}, lambda *a: fp8(*a, block=(16, 16), scales=powers(E8M0))),
    "fp8, one scale": ({"quant_method": "fp8"}, lambda *a: fp8(*a, scale="_scale", scales=lambda scales: (scales[0, 0], scales))),
    "fp8, rows": ({"quant_method": "fbgemm_fp8"}, lambda name, shape, rng: fp8(name, shape, rng, (1, shape[1]), "_scale")),
    "mxfp8": ({"quant_method": "mxfp8"}, lambda *a: fp8(*a, block=(1, 32), scales=powers(np.uint8))),
    "float-quantized": (compressed("float-quantized", num_bits=8, type="float", strategy="tensor"), lambda *a: fp8(*a, scale="_scale")),
    "int-quantized": (compressed("int-quantized", num_bits=8, strategy="channel", symmetric=False), int8),
    "pack-quantized": (
        compressed("pack-quantized", num_bits=4, group_size=16, actorder="group"), lambda *a: pack_quantized(*a, order=True)
    ),
    "3 bits": (
        compressed("pack-quantized", ["re:.*proj$"], num_bits=3, strategy="group", group_size=16, symmetric=False),
        lambda *a: pack_quantized(*a, bits=3, zeros=True),
    ),
    "nvfp4": (compressed("nvfp4-pack-quantized", **MX4 | {"strategy": "tensor_group"}), lambda *a: fp4(*a, 16, True)),
    "mxfp4": (compressed("mxfp4-pack-quantized", **MX4), lambda *a: fp4(*a, 16, False)),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": True}, gptq),
    "gptq, 3 bits": (
        {"quant_method": "gptq", "bits": 3, "group_size": 20, "sym": False, "checkpoint_format": "gptq_v2"},
        lambda *a: gptq(*a, bits=3, group=20, stored="as it is", order=False),
    ),
    "gptq, symmetric": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"+:.*": {"bits": 8, "group_size": 16}}},
        lambda *a: gptq(*a, bits=8, stored="symmetric"),
    ),
    "gptq, no order": ({"quant_method": "gptq", "bits": 4, "group_size": 16}, lambda *a: gptq(*a, order=None)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "GEMM"}, awq),
}  # fmt: skip


def write_both(folder, case, config=LLAMA, seed=0):
    """`packed` and `dense`, the same model."""
    settings, pack = CASES[case]
    rng, dense, stored = np.random.default_rng(seed), tiny.hf_tensors(config, "bfloat16"), {}
    for name, tensor in dense.items():
        if tensor.ndim < 2 or not re.search(r"proj\.weight$|_linear\.weight$", name):
            stored[name] = tensor
        elif tensor.ndim == 2:
            parts, dense[name] = pack(name, tensor.shape, rng)
            stored |= parts | {name.replace("weight", "input_scale"): np.ones((), np.float32)}
        else:  # all experts of a layer together
            each = [pack(name, tensor.shape[1:], rng) for _ in tensor]
            stored |= {part: np.stack([parts[part] for parts, _ in each]) for part in each[0][0]}
            dense[name] = np.stack([numbers for _, numbers in each])
    dense, stored = ({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()} for tensors in (dense, stored))
    tiny.write(folder / "packed", config | {"quantization_config": settings}, stored, "bfloat16")
    tiny.write(folder / "dense", config, dense, "bfloat16")
    return dense


@pytest.mark.parametrize("case", CASES)
def test_numbers(tmp_path, case, caplog):
    caplog.set_level(logging.INFO, "jaxtune")
    write_both(tmp_path, case)
    found, wanted = load(tmp_path / "packed"), load(tmp_path / "dense")
    jax.tree.map(np.testing.assert_array_equal, found.params, wanted.params)
    assert "7 tensors are quantised" in caplog.text and "7 scales of activations" in caplog.text


@pytest.mark.parametrize(
    ("family", "case"), [("qwen3_moe", "fp8"), ("qwen3_moe", "gptq, no order"), ("granitemoe", "fp8"), ("granitemoe", "fp8, rows")]
)
def test_experts(tmp_path, family, case):
    """Separately, and a layer's together in one tensor."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    config = references.load(family).config | sizes
    write_both(tmp_path, case, config)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "packed").params, load(tmp_path / "dense").params)


def test_a_dense_model_is_saved(tmp_path):
    """In the dtype of the unquantised tensors, and config.json no longer says that it is quantised; quantised again, and onto a mesh."""
    dense = write_both(tmp_path, "fp8")
    model = load(tmp_path / "packed", "auto")
    assert model.config.dtype == "bfloat16" and {str(x.dtype) for x in jax.tree.leaves(model.params)} == {"bfloat16"}
    hf.save(model.config, model.params, tmp_path / "saved")
    assert_same_bytes(read_all(tmp_path / "saved"), {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in dense.items()})
    assert "quantization_config" not in (tmp_path / "saved/config.json").read_text()
    mesh = parallel.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    wanted, found = load(tmp_path / "dense", "float32", "nf4"), read_model(open_model(tmp_path / "packed"), "float32", "nf4", mesh)
    jax.tree.map(np.testing.assert_array_equal, found.params, wanted.params)
    packed, plain = open_config(tmp_path / "packed"), open_config(tmp_path / "dense")
    assert abstract_params(packed, "float32", "nf4") == abstract_params(plain, "float32", "nf4")


@pytest.mark.parametrize("family", ["mistral3", "qwen3_vl_moe"])
def test_models_that_see(tmp_path, family):
    """The language model, the tower and experts stored as `[E, in, out]` are quantised; config.json says so in `text_config`."""
    golden, rng, stored = references.load(family), np.random.default_rng(0), {}
    dense = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in golden.files.items()}
    for name, tensor in list(dense.items()):
        if not name.endswith("_proj.weight") and ".experts." not in name:
            stored[name] = tensor
            continue
        *lead, rows, cols = tensor.shape
        each = [fp8(name, (rows, cols), rng, (16, 24)) for _ in range(lead[0] if lead else 1)]
        parts = {part: np.stack([parts[part] for parts, _ in each]) for part in each[0][0]}
        stored |= {part: array if lead else array[0] for part, array in parts.items()}
        dense[name] = np.stack([numbers for _, numbers in each]).reshape(tensor.shape).astype(ml_dtypes.bfloat16)
    settings = {"quant_method": "fp8", "weight_block_size": [16, 24]}
    inside = golden.config | {"text_config": golden.config["text_config"] | {"quantization_config": settings}}
    tiny.write(tmp_path / "packed", inside, stored, "bfloat16")
    model = load(tmp_path / "packed", "auto")
    hf.save(model.config, model.params, tmp_path / "saved", other_tensors=model.other_tensors)
    assert_same_bytes(read_all(tmp_path / "saved"), dense)
    assert "quantization_config" not in (tmp_path / "saved/config.json").read_text()


def test_what_the_tools_have_packed():
    """See tools/make_quantised_goldens.py; what its own package makes of each file."""
    file = Safetensors(references.GOLDENS / "quantised.safetensors")
    cases = json.loads((references.GOLDENS / "quantised.json").read_text())
    assert len(cases) > 12
    for case, settings in cases.items():
        entries = {name.removeprefix(f"{case}/"): entry for name, entry in file.entries.items() if name.startswith(f"{case}/")}
        wanted = entries.pop("dense")
        format = format_of({"quantization_config": settings})
        [(name, shape, packed)] = format.tensors(entries)
        assert name == "proj.weight" and shape == wanted.shape, case
        np.testing.assert_array_equal(packed.read((slice(None),) * 2), file.read(f"{case}/dense"), err_msg=case)


# ---- what is refused ----

K = "model.layers.0.self_attn.k_proj."


@pytest.mark.parametrize(
    ("case", "name", "tensor", "said"),
    [
        ("fp8", "weight_scale_inv", None, "k_proj.weight_scale_inv is missing; .*k_proj.weight is packed"),
        ("fp8", "weight", None, "k_proj.weight is missing; .*weight_scale_inv is its scale"),
        ("fp8", "weight_scale_inv", np.ones((2, 1), np.float32), r"weight_scale_inv has shape \[2, 1\]; .* ask for .*\[2, 2\]"),
        ("fp8", "weight", np.ones((32, 32), ml_dtypes.bfloat16), "k_proj.weight is bfloat16, though it has a scale"),
        ("fp8", "weight", np.ones((0, 32), F8), r"k_proj.weight has shape \[0, 32\], which is no matrix"),
        ("fp8", "weight_scale_inv", np.ones((2, 2), np.int32), "weight_scale_inv is int32, and has to be"),
        ("int-quantized", "weight_scale", None, "k_proj.weight_scale is missing"),
        ("int-quantized", "weight_zero_point", None, "k_proj.weight_zero_point is missing"),
        ("int-quantized", "weight", np.ones((32, 32), F8), "k_proj.weight is float8_e4m3fn, and has to be int8"),
        ("3 bits", "weight_packed", None, "k_proj.weight_packed is missing"),
        ("3 bits", "weight_shape", np.asarray([32, 64]), r"which does not hold \[32, 64\] codes"),
        ("nvfp4", "weight_global_scale", None, "k_proj.weight_global_scale is missing"),
        ("gptq", "qzeros", None, "k_proj.qzeros is missing"),
        ("gptq", "scales", np.ones((3, 32), np.float16), r"k_proj.scales has shape \[3, 32\]"),
        ("gptq", "g_idx", np.full(32, 2, np.int32), "k_proj.g_idx has groups 2 to 2, and there are scales of 2"),
        ("gptq", "g_idx", None, "k_proj.g_idx is missing"),
        ("pack-quantized", "weight_g_idx", None, "k_proj.weight_g_idx is missing"),
        ("gptq", "g_idx", np.zeros(64, np.int32), "k_proj.qweight .* does not hold 64 inputs"),
        ("gptq", "qweight", np.zeros((0, 32), np.int32), "k_proj.qweight .* no packed matrix"),
        ("awq", "qweight", np.zeros((32, 3), np.int32), r"k_proj.qzeros has shape \[2, 4\]; .* ask for \[2, 3\]"),
        ("awq", "act.scales", np.ones(4, np.float16), "act.scales scales activations"),
    ],
)  # fmt: skip
def test_damaged_parts(tmp_path, case, name, tensor, said):
    write_both(tmp_path, case)
    tensors = read_all(tmp_path / "packed")
    tensors.pop(K + name, None)
    tensors |= {} if tensor is None else {K + name: tensor}
    save_file(tensors, tmp_path / "packed/model.safetensors")
    with pytest.raises(ModelError, match=f"model.safetensors: tensor .*{said}"):
        load(tmp_path / "packed")


GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 16}}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "hqq"}, "quant_method 'hqq'; .*fp8.*gptq, awq can be read. Give the model"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size=128"),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, "expert_dtype='fp4'"),
        ({"quant_method": "gptq", "bits": 5}, "bits=5 .* one of 2, 3, 4, 8"),
        ({"quant_method": "gptq", "group_size": 0}, "group_size=0"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        ({"quant_method": "awq", "bits": 8}, "bits=8 .* has to be 4"),
        ({"quant_method": "awq", "version": "gemv"}, "version='gemv'"),
        ({"quant_method": "awq", "zero_point": False}, "zero_point=False"),
        ({"quant_method": "compressed-tensors"}, "config_groups=None"),
        (compressed("marlin-24", num_bits=4), "format='marlin-24'"),
        (compressed("float-quantized", num_bits=8, strategy="token"), "strategy='token'"),
        (compressed(["float-quantized"], num_bits=8, strategy="token"), r"format=\['float"),
        (compressed("pack-quantized", ["re:("], num_bits=4), "targets=."),
        (compressed("pack-quantized", num_bits=4) | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config=.*2"),
    ],
)  # fmt: skip
def test_what_is_not_read(tmp_path, settings, said):
    """Judged by config.json alone, which is all that `plan` has."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"quantization_config": settings}))
    with pytest.raises(ModelError, match=f"config.json says {said}"):
        open_config(tmp_path)


def test_matrices_that_lie_the_other_way(tmp_path):
    config = references.load("gpt2").config | {"quantization_config": {"quant_method": "gptq"}}
    tiny.write(tmp_path, config)
    with pytest.raises(ModelError, match="gpt2 models are not read from gptq"):
        load(tmp_path)
