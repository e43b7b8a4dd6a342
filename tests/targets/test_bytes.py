"""Law 8 on chips that are not present: the memory of a QLoRA step on a TPU v5e and on an H100, according to their own compilers.

Needs libtpu, jax-cuda13-plugin and jax-cuda13-pjrt (the last two with `pip install --no-deps`); no chip.
"""

import json

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.sharding import SingleDeviceSharding

pytest.importorskip("libtpu")
pytest.importorskip("jax_cuda13_plugin")

from jaxtune import plan
from jaxtune.model import nf4_kernel, quant
from jaxtune.plan_targets import find_target

pytestmark = pytest.mark.usefixtures("all_optimizations")
# One worker per target: what it has compiled for one test serves the next.
TPU, GPU = (pytest.param(target, marks=pytest.mark.xdist_group(target)) for target in ("v5e-1", "h100"))
SHAPE = tiny.LLAMA | {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
DENSE = 2 * (4 * 512 * 512 + 3 * 512 * 2048)  # bytes of a layer's matrices in bfloat16
ROW = 256


@pytest.fixture(scope="module")
def peak(tmp_path_factory):
    """`peak(target, layers, **keys)`: bytes of the step, without what is always there: weights, adapter, moments."""
    known = {}

    def measure(target, layers, **keys):
        name = (target, layers, repr(keys))
        if name not in known:
            folder = tmp_path_factory.mktemp("model")
            (folder / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": layers}))
            data = {"train": "x.jsonl", "max_length": ROW}
            config = {"model": str(folder), "method": "qlora", "data": data, "output_dir": "x", "dtype": "bfloat16"}
            result = plan(config | {"lora": {"r": 4}, "per_device_train_batch_size": 1} | keys, target=target, alternatives=False)
            held = sum(result.bytes[cause] for cause in ("weights", "scales", "trainable", "optimizer", "batch"))
            known[name] = result.peak_bytes - held
        return known[name]

    return measure


@pytest.mark.parametrize("target", [TPU, GPU])
def test_a_layer_leaves_its_input_and_its_gradients(peak, target):
    """Not its dequantised matrices, nor a copy of its codes in another order (a quarter of them)."""
    growth = (peak(target, 12) - peak(target, 4)) / 8
    residual, gradients = ROW * 512 * 2, 4 * 4 * (4 * 1024 + 3 * 2560)
    assert growth < 1.25 * (residual + gradients) < 0.1 * DENSE


@pytest.mark.parametrize("target", [TPU, GPU])
def test_offload_leaves_the_gradients(peak, target):
    growth = (peak(target, 12, gradient_checkpointing="offload") - peak(target, 4, gradient_checkpointing="offload")) / 8
    assert growth < 1.25 * 4 * 4 * (4 * 1024 + 3 * 2560)


@pytest.mark.xdist_group("h100")
def test_a_step_in_the_backward_pass_leaves_one_layers_gradients(peak):
    """Full tuning: the float32 gradients of the others do not exist. (On a TPU, which compiles for two minutes, it is the same.)"""
    keys = {"method": "full", "max_grad_norm": 0.0, "gradient_checkpointing": "full"}
    saved = peak("h100", 12, **keys) - peak("h100", 12, **keys, optimizer_in_bwd=True)
    print(saved / 2 / DENSE)
    assert saved > 0.9 * (12 - 1) * 2 * DENSE


@pytest.mark.parametrize("target", [TPU, GPU])
def test_groups_leave_the_inputs_of_groups(peak, target):
    """For 12 layers 4 groups of 3: 4 inputs, and 3 of the current group, instead of 12."""
    tokens = 2048 if target == "v5e-1" else ROW  # shorter rows, and splash's, are in a v5e's VMEM
    row = {} if tokens == ROW else {"attention": "xla", "data": {"train": "x.jsonl", "max_length": tokens}}
    saved = peak(target, 12, **row) - peak(target, 12, gradient_checkpointing="groups", **row)
    assert saved > 0.9 * (12 - 4 - 3) * tokens * 512 * 2


@pytest.mark.xdist_group("h100")
def test_a_long_row_leaves_its_residual_stream_and_a_few_more_of_its_size(peak):
    """Neither scores (`8 T^2` of them, 256 MiB in bfloat16) nor the feed-forward part's `[T, F]` for all tokens."""
    tokens = 4096
    long = peak("h100", 4, data={"train": "x.jsonl", "max_length": tokens}, mlp_chunk_size=512)
    assert long < (4 + 16) * tokens * 512 * 2  # 18.5 of that size; the whole `[T, F]` would add some 9


@pytest.mark.parametrize("target", [TPU, GPU])
def test_a_kernel_compiles_and_takes_no_more_memory(peak, target):
    """`auto` is the kernel there (tests/test_kernels.py)."""
    assert peak(target, 4) < peak(target, 4, attention="xla")


@pytest.mark.xdist_group("v5e-1")
@pytest.mark.parametrize("back", [False, True])
def test_a_tpu_product_leaves_nothing_in_its_memory(back):
    """The kernel reads a layer's codes from their stack: neither a dense matrix nor a copy of them; if cut out first, they are copied."""
    layers, out, width, tokens = 4, 28672, 8192, 256  # larger than a TPU's VMEM, which would hide them
    place = SingleDeviceSharding(find_target("v5e-1").devices[0])
    leaf = quant.abstract("nf4", (out, width))
    stack = jax.tree.map(lambda x: jax.ShapeDtypeStruct((layers, *x.shape), x.dtype, sharding=place), leaf)
    x = jax.ShapeDtypeStruct((layers, tokens, out if back else width), jnp.bfloat16, sharding=place)

    def temporaries(cut_out):
        def product(stack, x):
            held, put = nf4_kernel.split_codes(stack)

            def of_one(layer, number, x):
                leaf = put(layer, number)
                leaf = leaf.replace(stack=leaf.stack[number][None], number=jnp.int32(0)) if cut_out else leaf
                return leaf.product(x, back)

            return jax.lax.map(lambda each: of_one(*each), (held, jnp.arange(layers), x))

        return jax.jit(product).lower(stack, x).compile().memory_analysis().temp_size_in_bytes

    codes = out * width // 2
    assert temporaries(False) < 0.2 * codes < 0.8 * codes < temporaries(True)
