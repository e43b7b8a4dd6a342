"""Which tensor of a checkpoint is which parameter: the possible names of a tensor, and what else a file may contain."""

import logging
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxtune.convert.tensors import Checkpoint, Entry
from jaxtune.errors import ModelError
from jaxtune.model.row import Row

log = logging.getLogger("jaxtune")

# Buffers that old versions of transformers saved with the parameters: causal masks and rotary frequencies.
HARMLESS = re.compile(r"(.*\.)?(attn\.(masked_)?bias|attention\.(masked_)?bias|rotary_emb\.inv_freq)")
_PREFIX = re.compile(r"(model|transformer|gpt_neox|backbone)\.")  # absent if the model was saved without its head
_OTHER = {"embed_out.weight": "lm_head.weight", "lm_head.weight": "embed_out.weight"}
# Mixtral's own names, and those of the stacked layout that transformers 5 writes on request
_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
# OLMo Hybrid's norms on the hub; transformers writes one of them for layers of attention too
_OLMO = {".post_attention_layernorm.": ".feedforward_layer_norm.", ".feedforward_layer_norm.": ".post_attention_layernorm.",
         ".attention_layer_norm.": ".input_layernorm."}  # fmt: skip
_STACKED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")


class Cell(NamedTuple):
    """One tensor of a checkpoint: its row, its place in that row's stack, its shape in the file.

    `whole`: the tensor that it is a part of, if a file stores a layer's experts together (convert/together.py); it is `[out, in]` then.
    """

    path: str
    index: tuple[int, ...]
    name: str
    shape: tuple[int, ...]
    transposed: bool
    whole: str | None = None


def cells(rows: dict[str, Row]) -> Iterator[Cell]:
    """Every tensor of the row table, row by row, under its Hugging Face name."""
    for path, row in rows.items():
        depth = bool(row.layers) + (row.is_experts or row.is_apart)
        if row.part is not None:
            for index in np.ndindex(row.shape[:depth]):
                whole = row.hf.format(layer=row.layers[index[0]])
                name = whole + "".join(f"[{n}]" for n in (row.part.number, *index[1:]))
                yield Cell(path, index, name, row.shape[depth:], False, whole)
            continue
        for number, name in enumerate(row.hf_names()):
            index = tuple(int(i) for i in np.unravel_index(number, row.shape[:depth])) if depth else ()
            shape = row.shape[depth:]
            yield Cell(path, index, name, shape[::-1] if row.transposed else shape, row.transposed)


def match_names(source: Checkpoint, table: list[Cell]) -> dict[str, str]:
    """Which of the checkpoint's names stands for each wanted one.

    Raises ModelError for a tensor that is missing, left over, of another shape or not a float.
    """
    entries = source.entries
    names = {cell.name: next((name for name in spellings(cell.name) if name in entries), None) for cell in table}
    where = sorted({str(entry.file) for entry in entries.values()})
    where = where[0] if len(where) == 1 else os.path.commonpath(where) if where else "the checkpoint"
    if missing := [name for name, found in names.items() if found is None]:
        hint = "config.json describes a model that has it: fetch the file again, or put its own config.json there"
        if prefix := next((name.removesuffix(missing[0]) for name in entries if name.endswith(f".{missing[0]}")), None):
            hint = f"there is {prefix}{missing[0]}: save the model without the wrapper around it, or take {prefix!r} out of all names"
        elif [cell.path for cell in table if cell.name in missing] == ["head"]:
            hint += "; if the embedding is its head, write tie_word_embeddings: true there"
        raise ModelError(f"{where}: tensor {missing[0]} is missing{_more(missing)}; {hint}")
    used = set(names.values())
    if extra := sorted(name for name in entries if name not in used and not HARMLESS.fullmatch(name)):
        hint = "put the config.json of this checkpoint there, or take out what is not the model's"
        raise ModelError(f"{where}: tensor {extra[0]} is not part of the model that config.json describes{_more(extra)}; {hint}")
    found = {name: found for name, found in names.items() if found is not None}
    for cell in table:
        _check(entries[found[cell.name]], found[cell.name], cell.shape)
    return found


def spellings(name: str) -> Iterator[str]:
    """The possible names of a tensor, the usual one first."""
    yield name
    if bare := _PREFIX.match(name):
        yield name[bare.end() :]
    if name.startswith("backbone."):
        yield f"model.{name.removeprefix('backbone.')}"
    if name in _OTHER:
        yield _OTHER[name]
    yield from (name.replace(norm, other) for norm, other in _OLMO.items() if norm in name)
    if ".block_sparse_moe." in name:
        yield re.sub(r"w([123])\.weight$", lambda m: f"{_MIXTRAL[m[0][:2]]}.weight", name.replace(".block_sparse_moe.", ".mlp."))


def unstack_experts(entries: dict[str, Entry]) -> None:
    """Replace the stacked experts of transformers 5 (`gate_up_proj [E, 2I, D]`, `down_proj [E, D, I]`) by one entry per matrix."""
    for name in [name for name in entries if _STACKED.fullmatch(name)]:
        prefix, kind = _STACKED.fullmatch(name).groups()  # type: ignore[union-attr]
        stack = entries.pop(name)
        if stack.packed:
            raise ModelError(f"{stack.file}: tensor {name} is a stack of quantised experts, which is not read; give the original model")
        parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        shape = (stack.shape[1] // len(parts), stack.shape[2])
        matrix = stack._replace(shape=shape)
        for number in range(stack.shape[0] * len(parts)):
            expert, part = divmod(number, len(parts))
            entries[f"{prefix}.{expert}.{parts[part]}.weight"] = matrix._replace(start=stack.start + number * matrix.nbytes)


def leave_out(entries: dict[str, Entry], pattern: str | None) -> None:
    """Remove and log the tensors that transformers ignores too."""
    names = [name for name in entries if pattern and re.fullmatch(pattern, name)]
    for name in names:
        del entries[name]
    if names:
        log.info("%d tensors that this model does not use are ignored, as in transformers: %s ...", len(names), names[0])


def is_float(dtype) -> bool:
    """Whether a weight can have this dtype; an 8-bit float means nothing without scales."""
    return jnp.issubdtype(dtype, jnp.floating) and np.dtype(dtype).itemsize > 1


def _check(entry: Entry, name: str, shape: tuple[int, ...]) -> None:
    if entry.shape != shape:
        raise ModelError(f"{entry.file}: tensor {name} has shape {list(entry.shape)}, but config.json asks for {list(shape)}")
    if not is_float(entry.dtype):
        raise ModelError(f"{entry.file}: tensor {name} is {entry.dtype}; a weight must be float32, float16 or bfloat16")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more, such as {names[-1]})" if len(names) > 1 else ""
