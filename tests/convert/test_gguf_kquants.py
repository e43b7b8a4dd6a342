"""K-quants: the gguf package reads the blocks, and they are as accurate as llama.cpp's own."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from jaxtune.convert.gguf_kquants import KINDS, quantize

# the error of llama.cpp's `ggml_quantize_chunk` on `drawn()`, without an importance matrix (llama-cpp-python 0.3.36): its root mean square
# relative to that of the numbers
REFERENCE = {"Q2_K": 0.33249, "Q3_K": 0.17701, "Q4_K": 0.08254, "Q5_K": 0.04221, "Q6_K": 0.02144}


def drawn():
    return np.random.default_rng(0).standard_t(5, (64, 512)).astype(np.float32)


def loss(value, kind):
    packed = quantize(value, kind)
    assert packed.dtype == np.uint8 and packed.shape == gguf.quants.quant_shape_to_byte_shape(value.shape, kind)
    return np.sqrt(((gguf.dequantize(packed, kind) - value) ** 2).mean() / (value**2).mean())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_errors_beside_llama_cpps(kind):
    assert loss(drawn(), kind) < REFERENCE[kind.name] * 1.0003
    assert loss(drawn().reshape(4, 2, 8, 512), kind) == loss(drawn(), kind)  # experts


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_numbers_that_have_a_code_keep_it(kind):
    """Zeros, a single number, and previously quantised values: nothing to divide by, or nothing to lose."""
    zeros = np.zeros((2, 256), np.float32)
    np.testing.assert_array_equal(gguf.dequantize(quantize(zeros, kind), kind), zeros)
    for value in (zeros + 0.3, zeros - 0.3, np.eye(2, 256, dtype=np.float32)):
        assert loss(value, kind) < (0.35 if kind is GGMLQuantizationType.Q2_K else 1e-3)
    once = gguf.dequantize(quantize(drawn(), kind), kind)
    assert loss(once, kind) < REFERENCE[kind.name] / 5
