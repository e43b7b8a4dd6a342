"""Embeddings and heads that PEFT writes into an adapter's file in addition to what it trained (`save_embedding_layers`).

PEFT does so by itself if the vocabulary was resized or the embedding adapted. The tensor is either a copy of the model's own matrix, or
replaces it when PEFT opens the file.
"""

import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxtune.config import LoraConfig
from jaxtune.convert.load import Model
from jaxtune.convert.peft_config import PREFIX
from jaxtune.convert.tensors import Checkpoint, Entry, Safetensors
from jaxtune.errors import ModelError
from jaxtune.model.families import ModelConfig
from jaxtune.model.weight import dense
from jaxtune.peft.sites import AnyConfig, Whole, adaptable, names

log = logging.getLogger("jaxtune")

_ADAPTED = ".base_layer.weight"  # the matrix under a pair
_UNDER_TOKENS = ".token_adapter.base_layer.weight"  # the matrix, some of whose tokens are trained
_TOKENS = ".token_adapter.trainable_tokens_delta"  # those tokens, as they are after training


def tokens_of(folder: str | os.PathLike, config: ModelConfig) -> int:
    """The size of the vocabulary that an adapter's file was resized to, of which it holds the embedding or head whole; the model's own if
    it was not, or if there is no such file."""
    try:
        entries = Safetensors(Path(folder).expanduser(), stem="adapter_model").entries
    except ModelError:  # reported where the adapter is read
        return config.vocab_size
    whole = (found for tensor, found, _ in _matrices(config, entries) if not tensor.endswith(_ADAPTED) or tensor.endswith(_UNDER_TOKENS))
    return max([config.vocab_size, *(size for size, *_ in whole)])


def check_vocabulary(path: Path, model: Model, checkpoint: Checkpoint) -> None:
    """ModelError for an adapter whose file has an embedding or head of another size than the model's."""
    for tensor, shape, own in _matrices(model.config, checkpoint.entries):
        if shape != own:
            raise ModelError(
                f"{path}: {tensor} is {shape}, but this model's is {own}. If its vocabulary was resized for the adapter, "
                f"give that model: in transformers resize_token_embeddings({shape[0]}), save_pretrained, with the adapter's tokenizer"
            )


def _matrices(config: ModelConfig, entries: Mapping[str, Entry]) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """The embeddings and heads in an adapter's file: name, shape, and the shape of the model's own."""
    rows = adaptable(config)
    for name in sorted({"embed", "head"} & rows.keys()):
        stem = f"{PREFIX}{names(name, rows[name])[0]}"
        for tensor in sorted({f"{stem}{end}" for end in (".weight", _ADAPTED, _UNDER_TOKENS)} & entries.keys()):
            yield tensor, entries[tensor].shape, rows[name].shape


def read_embeddings(
    path: Path, model: Model, checkpoint: Checkpoint, left: set[str], parts: dict, wholes: tuple[Whole, ...], config: AnyConfig
) -> tuple[tuple[Whole, ...], AnyConfig]:
    """The whole parameters, and the config that describes them, with the matrices that replace the model's.

    Their values are added to `parts`; the names of what is read, and of copies, are removed from `left`. Raises ModelError for a matrix
    that is adapted and differs from the model's own.
    """
    rows, found = adaptable(model.config), {}
    tokens = {whole.path: whole.numbers for whole in wholes if whole.path in ("embed", "head") and whole.numbers is not None}
    for name in sorted({"embed", "head"} & rows.keys()):
        module = names(name, rows[name])[0]
        stem = f"{PREFIX}{module}"
        if f"{stem}.base_layer.weight" in left and _is_own(model, checkpoint, f"{stem}.base_layer.weight", name) is False:
            raise ModelError(
                f"{path}: {stem}.base_layer.weight is not the matrix of this model; the adapter was trained over another, or resized, one"
            )
        if f"{stem}.weight" in left and not _is_own(model, checkpoint, f"{stem}.weight", name):
            found[name] = jnp.asarray(checkpoint.read(f"{stem}.weight").astype(np.float32))
            config = _saving(config, module)
        ids = tokens.get(name, tokens.get("embed", ())) if model.config.tie_word_embeddings else tokens.get(name, ())
        if f"{stem}{_UNDER_TOKENS}" in left and ids:
            if _is_own(model, checkpoint, f"{stem}{_UNDER_TOKENS}", name, ids) is False:
                value = checkpoint.read(f"{stem}{_UNDER_TOKENS}").astype(np.float32)
                value[list(ids)] = checkpoint.read(f"{stem}{_TOKENS}")
                found[name] = jnp.asarray(value)
                config = _saving(config, module)
            left -= {f"{stem}{_UNDER_TOKENS}", f"{stem}{_TOKENS}"}
        left -= {f"{stem}{end}" for end in (".weight", ".base_layer.weight", ".modules_to_save.weight", ".original_module.weight")}
    if found:
        log.info("%s holds the model's %s as well, in place of its own", path, " and ".join(found))
    both = len(found) == 2 and np.array_equal(found["embed"], found["head"])
    if both and model.config.tie_word_embeddings and isinstance(config, LoraConfig):
        del found["head"]
        config = dataclasses.replace(config, ensure_weight_tying=True)
    if tokens.keys() & found.keys():  # what replaces the matrix has them
        kept = tuple((names(name, rows[name])[0].rpartition(".")[2], ids) for name, ids in tokens.items() if name not in found)
        config = dataclasses.replace(config, trainable_token_indices=kept or None)  # type: ignore[call-arg]
    parts |= found
    return tuple(whole for whole in wholes if whole.path not in found) + tuple(map(Whole, found)), config


def _saving(config: AnyConfig, module: str) -> AnyConfig:
    """The config of an adapter that also holds this module."""
    return dataclasses.replace(config, modules_to_save=(*(config.modules_to_save or ()), module.rpartition(".")[2]))


def _is_own(model: Model, checkpoint: Checkpoint, tensor: str, name: str, but: tuple[int, ...] = ()) -> bool | None:
    """Whether a tensor of the file equals the model's matrix, up to rounding to a shorter dtype, in all rows `but` these; None if the
    model's has not been read."""
    if not model.params:
        return None  # opened for a conversion: its tensors are read when they are merged
    own = np.asarray(dense(model.params.get(name, model.params["embed"]), jnp.float32))
    close = np.asarray(np.isclose(checkpoint.read(tensor).astype(np.float32), own, rtol=1e-2, atol=1e-4).all(axis=1))
    close[list(but)] = True
    return bool(close.all())
