"""Tiny random models as folders on disk, written with the safetensors package."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
from chat import make_tokenizer
from safetensors.numpy import save_file

from jaxtune.convert.tensors import Safetensors
from jaxtune.convert.together import whole_shape
from jaxtune.model.families import from_hf
from jaxtune.model.spec import spec

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "attention_bias": True,
    "tie_word_embeddings": False,
}
# Compilation options: the default code generator (see conftest.py), for programs that are examined.
OF_USERS = {"xla_cpu_use_fusion_emitters": True} if "xla_cpu_use_fusion_emitters" in os.environ.get("XLA_FLAGS", "") else {}
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def hf_tensors(hf=LLAMA, dtype="float32", seed=0):
    """Random tensors under Hugging Face's names: matrices large enough to matter, norms near one."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for row in spec(from_hf(hf)).values():
        shape = row.shape[bool(row.layers) + (row.is_experts or row.is_apart) :]
        shape = shape[::-1] if row.transposed else shape
        shape = shape if row.part is None else whole_shape(row)
        for name in row.hf_names():
            noise = rng.standard_normal(shape).astype(np.float32) * 0.2
            tensors[name] = np.asarray(noise + (row.init == "ones"), DTYPES["float32" if row.float32 else dtype])
    return tensors


def mesh_on(platform, tensor=1):
    """The interface of a mesh, for devices that are not present."""
    return SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]), shape={"tensor": tensor})


def write(folder, hf=LLAMA, tensors=None, dtype="float32"):
    """A model folder; returns its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = hf_tensors(hf, dtype) if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps(hf | {"dtype": dtype}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def write_chat_model(folder, hf=LLAMA, seed=0):
    """A model folder with a small tokenizer and ChatML template, so that a whole run works on it; returns the tokenizer."""
    tokenizer = make_tokenizer("chatml")
    longest = max(256, hf["max_position_embeddings"])
    hf = hf | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": longest}
    write(folder, hf, hf_tensors(hf, seed=seed))
    tokenizer.save_pretrained(folder)
    return tokenizer


def read_all(folder):
    files = Safetensors(folder)
    return {name: files.read(name) for name in files.entries}


def assert_same_bytes(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def write_rows(folder: Path, rows) -> None:
    """`rows.jsonl` in the folder."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
