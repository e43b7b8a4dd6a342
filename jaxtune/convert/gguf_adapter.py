"""LoRA adapters as GGUF files (`llama-cli -m BASE.gguf --lora FILE`): `.lora_a [r, in]` and `.lora_b [out, r]` after a matrix's name."""

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from jaxtune.config import LoraConfig
from jaxtune.convert import gguf_layout
from jaxtune.convert.gguf_architectures import architecture_of
from jaxtune.convert.gguf_out import Tensor, write
from jaxtune.convert.gguf_types import TYPES
from jaxtune.disk import replacing
from jaxtune.errors import ModelError
from jaxtune.model.families import ModelConfig
from jaxtune.model.spec import abstract, spec
from jaxtune.peft import compose
from jaxtune.peft.adapter import Adapter
from jaxtune.peft.lora import LoRA
from jaxtune.tree import flatten

ADAPTER_TYPES = ("f32", "f16", "bf16")
_MERGE = "merge it into its base instead: --format gguf"


def save_gguf_adapter(config: ModelConfig, adapter: Adapter, out: str | os.PathLike, *, type: str = "f32", name: str | None = None) -> Path:
    """Write a LoRA adapter as one `.gguf` file for llama.cpp, which applies it to the base's own file; returns `out`.

    llama.cpp's scale is `alpha / r`, with one alpha for all pairs and the r of each; any other scale of a pair (rsLoRA, `alpha_pattern`) is
    multiplied into its `lora_b`. Rows are ordered as in the base's file (`gguf_layout`).

    type   of the pairs: f32, f16 or bf16

    The file is written under a temporary name and renamed. Raises ModelError for what the format cannot express (DoRA, other methods, whole
    parameters), for a family without GGUF support, and if `out` exists.
    """
    out = Path(out).expanduser().absolute()
    if type not in ADAPTER_TYPES:
        raise ModelError(f"{type!r} is not a type of an adapter in GGUF; there are {', '.join(ADAPTER_TYPES)}")
    if out.exists():
        raise ModelError(f"{out} exists; nothing is overwritten. Give another name, or remove it")
    architecture = architecture_of(config)
    _check(config, adapter)
    rows, alpha, tensors = spec(config), 0.0, []
    for path, number, leaf in _pairs(config, adapter):
        a, b, scale = (np.asarray(array[number], np.float32) for array in (leaf.a, leaf.b, leaf.scale))
        own = float(scale.reshape(-1)[0]) * a.shape[-2]
        alpha = alpha or own
        b = b if own == alpha else b * np.float32(own / alpha)
        row = rows[path]
        for stem, pair in zip(gguf_layout.names(config, path, row, number), gguf_layout.pairs(config, path, row, a, b), strict=True):
            for part, value in zip(("lora_a", "lora_b"), pair, strict=True):
                tensors.append(Tensor(f"{stem}.{part}", value.shape, TYPES[type].matrix, functools.partial(np.asarray, value)))
    writer = GGUFWriter(None, architecture.name)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    writer.add_name(name or out.stem)
    writer.add_file_type(TYPES[type].file)
    with replacing(out) as scratch:
        write(writer, scratch, tensors)
    return out


def _pairs(config: ModelConfig, adapter: Adapter) -> Iterator[tuple[str, tuple[int, ...], LoRA]]:
    """The row, the index of a layer in its stack (or ()), and the composed leaf, if the pair adapts that layer."""
    for path, leaf in flatten(compose(abstract(config), adapter)).items():
        if isinstance(leaf, LoRA):
            for number in np.ndindex(leaf.scale.shape[:1]):
                if np.asarray(leaf.scale[number]).any():
                    yield path, number, leaf


def _check(config: ModelConfig, adapter: Adapter) -> None:
    """ModelError for what llama.cpp cannot express."""
    c = adapter.config
    if not isinstance(c, LoraConfig):
        raise ModelError(f"GGUF knows adapters of LoRA alone, and this one is of method {c.group}; {_MERGE}")
    for key in ("use_dora", "lora_bias"):
        if getattr(c, key):
            raise ModelError(f"GGUF holds no adapters with {key}, only pairs of matrices; {_MERGE}")
    if c.init_lora_weights == "loftq":
        raise ModelError(f"this adapter makes up for what its base lost when LoftQ packed it, and no GGUF file is packed so; {_MERGE}")
    if adapter.wholes:
        names = ", ".join(dict.fromkeys(whole.path.rpartition("/")[2] for whole in adapter.wholes))
        raise ModelError(
            f"GGUF holds the pairs of an adapter alone, and this one has trained {names} whole (modules_to_save, bias, "
            f"trainable_token_indices); {_MERGE}"
        )
    paths = [site.path for site in adapter.sites]
    if config.tie_word_embeddings and (tied := [path for path in paths if path in ("embed", "head")]):
        raise ModelError(f"llama.cpp has one matrix for this model's embedding and head; this adapter is on its {tied[0]} alone; {_MERGE}")
    unread = ("q", "q_a", "q_b", "kv_a", "kv_b", "head") if config.latent else ("latent_in", "latent_out", "projection")
    if passed := [path for path in paths if path.rpartition("/")[2] in unread]:
        raise ModelError(
            f"llama.cpp adds no pairs to latent attention's projections (nor to the head of such a model), nor to those of latent experts "
            f"and layer inputs; this adapter has {passed[0]}; {_MERGE}"
        )
