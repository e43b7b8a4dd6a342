"""Writes tests/goldens/quantised.safetensors and .json: a matrix in each format that is dequantised while it is read, as the format's own
package packs it, and `dense`, what that package makes of it in float32.

    python tools/make_quantised_goldens.py          needs torch, transformers, compressed-tensors (0.20.1) and gptqmodel (7.7.0)

CASE/TENSOR for the tensors of a module `proj`; the JSON has config.json's `quantization_config` of each case.
"""

import json
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm, pack_awq
from safetensors.torch import save_file
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

OUT = Path(__file__).parent.parent / "tests" / "goldens" / "quantised"
ROWS, COLS = 32, 64
FEWER_ROWS = 24  # of compressed-tensors, which asks for no multiple of 32: zero points of 3 bits end inside a word
COMPRESSED = {
    "float-quantized": [dict(type="float", strategy=strategy) for strategy in ("tensor", "channel")]
    + [dict(type="float", strategy="block", block_structure=[24, 20])],
    "int-quantized": [dict(strategy="channel"), dict(strategy="channel", symmetric=False)],
    "pack-quantized": [dict(num_bits=bits, strategy="group", group_size=16, symmetric=bits == 4) for bits in (3, 4)]
    + [dict(num_bits=bits, strategy="channel", symmetric=bits == 8) for bits in (4, 8)]
    + [dict(num_bits=4, strategy="group", group_size=16, symmetric=False)],
    "nvfp4-pack-quantized": [dict(num_bits=4, type="float", strategy="tensor_group", group_size=16)],
    "mxfp4-pack-quantized": [dict(num_bits=4, type="float", strategy="group", group_size=16, scale_dtype=torch.uint8)],
}


class Holder:
    """What transformers' operations look for their settings in."""

    def __init__(self, config):
        self.quantization_config = config


def fp8(scale_fmt: str):
    """Blocks that fit, as `Fp8Quantize` needs them."""
    block = (16, 32)
    holder = Holder(FineGrainedFP8Config(weight_block_size=block, scale_fmt=scale_fmt))
    parts = Fp8Quantize(holder)._quantize_one("proj.weight", torch.randn(ROWS, COLS))
    dense = Fp8Dequantize(holder)._dequantize_one(*parts.values(), torch.float32)
    return {"quant_method": "fp8", "weight_block_size": list(block)}, parts, dense


def compressed(format: str, settings: dict):
    """By the package's `compress`, with scales and zero points drawn."""
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**settings), format=format)
    args, compressor = scheme.weights, BaseCompressor.get_value_from_registry(format)
    rows, cols = args.block_structure or (1, args.group_size or COLS)
    shape = (1,) if args.strategy == "tensor" else (-(-FEWER_ROWS // rows), -(-COLS // cols))
    scale = 2.0 ** torch.randint(-8, -2, shape) if "mxfp" in format else torch.rand(shape) * 0.05 + 0.01
    state = {"weight": torch.randn(FEWER_ROWS, COLS), "weight_scale": scale}
    if "nvfp4" in format:
        state |= {"weight_scale": torch.rand(shape) * 30 + 1, "weight_global_scale": torch.tensor([300.0])}
    if not args.symmetric:
        least = -(2 ** (args.num_bits - 1))
        state["weight_zero_point"] = torch.randint(least, -least, shape, dtype=torch.int8)
    state = compressor.compress(state, scheme)
    dense = compressor.decompress(state, scheme)["weight"]
    if "nvfp4" in format:  # which computes in bfloat16 by itself
        codes = unpack_fp4_from_uint8(state["weight_packed"], FEWER_ROWS, COLS).float()
        scale, whole = state["weight_scale"].float(), state["weight_global_scale"]
        dense = dequantize(codes, scale, args=args, global_scale=whole, dtype=torch.float32)
    group = {"targets": ["Linear"], "weights": json.loads(args.model_dump_json())}
    said = {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}
    return said, {f"proj.{name}": tensor for name, tensor in state.items()}, dense


def gptq(bits: int, desc_act: bool, checkpoint_format: str):
    """By GPTQModel's CPU kernel; a file of the first format holds the zero points less one."""
    group = 16
    zeros = torch.randint(1, 2**bits, (ROWS, COLS // group)).float()
    order = torch.arange(COLS) // group
    order = order[torch.randperm(COLS)] if desc_act else order
    module = TorchLinear(
        bits=bits, group_size=group, sym=False, desc_act=desc_act, in_features=COLS, out_features=ROWS, bias=False, register_buffers=True
    )
    linear = torch.nn.Linear(COLS, ROWS, bias=False)
    module.pack(linear, torch.rand(ROWS, COLS // group) * 0.05 + 0.02, zeros, order.int())
    parts = {f"proj.{name}": getattr(module, name).clone() for name in ("qweight", "qzeros", "scales", "g_idx")}
    if checkpoint_format == "gptq":
        parts["proj.qzeros"] -= sum(1 << bits * place for place in range(32 // bits))
    module.scales, module.dequant_dtype = module.scales.float(), torch.int16
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": desc_act, "sym": False}
    return settings | {"checkpoint_format": checkpoint_format}, parts, super(TorchLinear, module).dequantize_weight().T


def awq():
    """By AutoAWQ's functions, which GPTQModel has."""
    codes, zeros = torch.randint(0, 16, (COLS, ROWS)), torch.randint(0, 16, (COLS // 16, ROWS))
    qweight, qzeros = pack_awq(codes, zeros, 4)
    scales = (torch.rand(COLS // 16, ROWS) * 0.05).half()
    parts = {"proj.qweight": qweight, "proj.qzeros": qzeros, "proj.scales": scales}
    dense = dequantize_gemm(qweight, qzeros, scales.float(), 4, 16).T
    return {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}, parts, dense


def main() -> None:
    """Make them all."""
    torch.manual_seed(0)
    cases = {f"fp8 {fmt}": fp8(fmt) for fmt in ("float", "ue8m0")}
    cases |= {f"{format} {n}": compressed(format, settings) for format, several in COMPRESSED.items() for n, settings in enumerate(several)}
    kinds = ((4, True, "gptq"), (4, False, "gptq_v2"), (2, False, "gptq"), (8, True, "gptq"), (3, True, "gptq_v2"))
    cases |= {" ".join(map(str, kind)): gptq(*kind) for kind in kinds}
    cases["awq"] = awq()
    tensors = {f"{case}/{name}": tensor.contiguous() for case, (_, parts, _) in cases.items() for name, tensor in parts.items()}
    tensors |= {f"{case}/dense": dense.float().contiguous() for case, (_, _, dense) in cases.items()}
    save_file(tensors, OUT.with_suffix(".safetensors"))
    OUT.with_suffix(".json").write_text(json.dumps({case: settings for case, (settings, _, _) in cases.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
