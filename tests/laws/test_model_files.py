"""Law 6: Hugging Face in -> Hugging Face out is the same bytes, for every family and the dtypes files are in."""

import jax
import numpy as np
import pytest
import references
import tiny
from safetensors.numpy import load_file

from jaxtune.convert import hf
from jaxtune.convert.load import load
from jaxtune.model.families import from_hf


@pytest.mark.parametrize("case", references.CASES)
def test_in_and_out_is_the_same_bytes(case, tmp_path):
    golden = references.load(case)
    dtype = ("float32", "bfloat16", "float16")[references.CASES.index(case) % 3]
    tensors = {name: np.ascontiguousarray(tensor.astype(tiny.DTYPES[dtype])) for name, tensor in golden.files.items()}
    tiny.write(tmp_path / "in", golden.config, tensors, dtype)
    model = load(tmp_path / "in", dtype="auto")
    hf.save(model.config, model.params, tmp_path / "out", beside=model.beside)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].tobytes() == tensor.tobytes(), name
    again = load(tmp_path / "out", dtype="auto")
    assert again.config == model.config
    exact = references.tree(from_hf(golden.config), golden.tensors)
    whole = load(tmp_path / "in").params if dtype != "bfloat16" else exact  # goldens are float16 numbers
    jax.tree.map(np.testing.assert_array_equal, whole, exact)
