"""Law 6: Hugging Face in -> Hugging Face out gives the same bytes, for every family and every dtype of files."""

import dataclasses

import jax
import numpy as np
import pytest
import references
import tiny
from safetensors.numpy import load_file

from jaxtune.convert import hf
from jaxtune.convert.load import load, open_model
from jaxtune.model.families import from_hf
from jaxtune.model.spec import abstract

# transformers 5.24 saves this norm under its neighbour's name; the hub's files, and so ours, keep the layers' own names
RENAMED = {"olmo_hybrid": {"model.layers.1.feedforward_layer_norm.weight": "model.layers.1.post_attention_layernorm.weight"}}


@pytest.mark.parametrize("case", references.CASES)
def test_in_and_out_is_the_same_bytes(case, tmp_path):
    golden = references.load(case)
    dtype = ("float32", "bfloat16", "float16")[references.CASES.index(case) % 3]
    tensors = {name: tensor.astype(tiny.DTYPES[dtype], order="C") for name, tensor in golden.files.items()}
    tiny.write(tmp_path / "in", golden.config, tensors, dtype)
    wanted = {RENAMED.get(case, {}).get(name, name): tensor for name, tensor in tensors.items()}
    model = load(tmp_path / "in", dtype="auto")
    hf.save(model.config, model.params, tmp_path / "out", other_tensors=model.other_tensors)
    tiny.assert_same_bytes(load_file(tmp_path / "out" / "model.safetensors"), wanted)
    assert open_model(tmp_path / "out").config == dataclasses.replace(model.config, dtype="float32")
    if dtype != "bfloat16":  # goldens are float16 numbers
        jax.tree.map(np.testing.assert_array_equal, model.params, references.tree(from_hf(golden.config), golden.tensors))
    if case in references.TEXT:  # tensor by tensor, into several files
        opened = open_model(tmp_path / "in")
        hf.save(opened.config, abstract(opened.config), tmp_path / "streamed", base=opened.checkpoint, max_shard_size="10KB")
        assert len([*(tmp_path / "streamed").glob("*.safetensors")]) > 1
        tiny.assert_same_bytes(tiny.read_all(tmp_path / "streamed"), wanted)
