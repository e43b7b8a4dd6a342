"""Hugging Face checkpoints in and out through the row table: rename and stack, one tensor at a time, never two copies of the model."""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.convert.folders import new_folder
from jaxtune.convert.tensors import Checkpoint, Entry, Plan, write_json, write_tensors
from jaxtune.errors import ModelError
from jaxtune.model.families import ModelConfig
from jaxtune.model.spec import Row, spec
from jaxtune.model.weight import Matrix, dense, is_weight
from jaxtune.tree import flatten, unflatten

# Buffers that old versions of transformers wrote beside the parameters: causal masks and rotary frequencies.
HARMLESS = re.compile(r"(.*\.)?(attn\.(masked_)?bias|attention\.(masked_)?bias|rotary_emb\.inv_freq)")
_PREFIX = re.compile(r"(model|transformer|gpt_neox)\.")  # absent where the model was saved without its head
_EMBEDDINGS = ("model.embed_tokens.weight", "embed_tokens.weight", "transformer.wte.weight", "wte.weight", "gpt_neox.embed_in.weight")

Quantize = Callable[[str, jax.Array], Matrix]


class Cell(NamedTuple):
    """One tensor of a checkpoint: the row it belongs to and its place in that row's stack."""

    path: str
    index: tuple[int, ...]
    name: str
    shape: tuple[int, ...]


def cells(rows: dict[str, Row]) -> Iterator[Cell]:
    """Every tensor of the row table, row by row, under its Hugging Face name."""
    for path, row in rows.items():
        for number, name in enumerate(row.hf_names()):
            index = np.unravel_index(number, row.shape[: row.hf.count("{")]) if "{" in row.hf else ()
            index = tuple(int(i) for i in index)
            yield Cell(path, index, name, row.shape[len(index) :])


# ---- in ----


def load_params(source: Checkpoint, config: ModelConfig, dtype: str = "float32", quantize: Quantize | None = None) -> dict:
    """The parameter tree of a checkpoint.

    source    its tensors under Hugging Face's names; read one at a time
    dtype     of every plain leaf; "auto" keeps what the file has
    quantize  `(path, matrix) -> leaf`, called for every tensor after the cast, layer by layer

    Stacks are allocated once, where they will live, and filled in place: at its peak the host holds one tensor, the device the
    result and one tensor. Raises ModelError for a tensor that is missing, left over, of another shape or not a float.
    """
    table = list(cells(spec(config)))
    names = match_names(source, table)
    rows = spec(config)
    tree: dict[str, Any] = {}
    for cell in table:
        leaf = _leaf(source, names[cell.name], cell, dtype, quantize)
        if not cell.index:
            tree[cell.path] = leaf
            continue
        if cell.path not in tree:
            stack = rows[cell.path].shape[: len(cell.index)]
            tree[cell.path] = jax.tree.map(lambda x, stack=stack: jnp.zeros(stack + x.shape, x.dtype), leaf)
        tree[cell.path] = _put(tree[cell.path], leaf, cell.index)
    return unflatten(tree)


def match_names(source: Checkpoint, table: list[Cell]) -> dict[str, str]:
    """Which of the checkpoint's names stands for each wanted one; all of them are used, and all shapes are right."""
    entries = source.entries
    names = {cell.name: next((name for name in _spellings(cell.name) if name in entries), None) for cell in table}
    where = sorted({str(entry.file) for entry in entries.values()})
    where = where[0] if len(where) == 1 else os.path.commonpath(where) if where else "the checkpoint"
    if missing := [name for name, found in names.items() if found is None]:
        raise ModelError(f"{where}: tensor {missing[0]} is missing{_more(missing)}; config.json describes a model that has it")
    used = set(names.values())
    if extra := sorted(name for name in entries if name not in used and not HARMLESS.fullmatch(name)):
        raise ModelError(f"{where}: tensor {extra[0]} is not part of the model that config.json describes{_more(extra)}")
    for cell in table:
        _check(entries[names[cell.name]], names[cell.name], cell.shape)
    return names  # type: ignore[return-value]


def _spellings(name: str) -> Iterator[str]:
    """The names a tensor may go by, the usual one first."""
    yield name
    if bare := _PREFIX.match(name):
        yield name[bare.end() :]
    yield from {"embed_out.weight": ("lm_head.weight",), "lm_head.weight": ("embed_out.weight",)}.get(name, ())


def _check(entry: Entry, name: str, shape: tuple[int, ...]) -> None:
    if entry.shape != shape:
        raise ModelError(f"{entry.file}: tensor {name} has shape {list(entry.shape)}, but config.json asks for {list(shape)}")
    if not _is_float(entry.dtype):
        raise ModelError(f"{entry.file}: tensor {name} is {entry.dtype}; a weight must be float32, float16 or bfloat16")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more, such as {names[-1]})" if len(names) > 1 else ""


def _leaf(source: Checkpoint, name: str, cell: Cell, dtype: str, quantize: Quantize | None) -> Matrix:
    value = source.read(name)
    if is_weight(value):
        return value
    value = jnp.asarray(value) if dtype == "auto" else jnp.asarray(value).astype(dtype)
    return quantize(cell.path, value) if quantize else value


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack, leaf, index):
    """`stack[index] = leaf` for every array of a leaf, in place."""

    def put(whole, part):
        start = (*index, *(0,) * part.ndim)
        return jax.lax.dynamic_update_slice(whole, part.astype(whole.dtype).reshape((1,) * len(index) + part.shape), start)

    return jax.tree.map(put, stack, leaf)


def settle_tie(source: Checkpoint, hf: dict) -> dict:
    """The config.json dict, with `tie_word_embeddings` off where the checkpoint holds a head that is not the embedding.

    transformers does the same, silently: such a file was made by a tool that trained or merged one use of a tied matrix alone.
    """
    head = next((name for name in ("lm_head.weight", "embed_out.weight") if name in source.entries), None)
    table = next((name for name in _EMBEDDINGS if name in source.entries), None)
    if head is None or table is None or not hf.get("tie_word_embeddings", False):
        return hf
    if np.array_equal(source.read(head).view(np.uint8), source.read(table).view(np.uint8)):
        del source.entries[head]
        return hf
    return hf | {"tie_word_embeddings": False}


# ---- out ----


def save(
    config: ModelConfig,
    params: dict,
    out: str | os.PathLike,
    *,
    tokenizer=None,
    generation_config: dict | None = None,
    dtype: str | None = None,
    base: Checkpoint | None = None,
    max_shard_size: str | int = "5GB",
) -> Path:
    """Write a model folder that transformers opens: config.json, sharded safetensors, generation config, tokenizer and chat template.

    params  the tree; packed and adapted leaves are written as the dense matrix they stand for, one layer at a time. A leaf that is a
            `jax.ShapeDtypeStruct` is read from `base`, tensor by tensor, so a model is merged and converted without being loaded.
    dtype   of the tensors; by default each leaf's own, and `config.dtype` for packed ones

    The folder is written beside `out` and renamed. Raises ModelError when `out` is there and not empty. Returns `out`.
    """
    config, plans, make = tensors_out(config, params, dtype, base)
    with new_folder(out) as folder:
        write_json(folder / "config.json", config_json(config, plans))
        if generation_config:
            write_json(folder / "generation_config.json", generation_config)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_tensors(folder, plans, make, max_shard_size)
    return Path(out)


def tensors_out(config: ModelConfig, params: dict, dtype: str | None = None, base: Checkpoint | None = None):
    """What `params` is as Hugging Face tensors: the config (untied where the tree has a head of its own), the plans, and `make(name)`."""
    leaves = flatten(params)
    stored = match_names(base, list(cells(spec(config)))) if base else {}  # what each tensor is called in `base`
    if config.tie_word_embeddings and "head" in leaves:
        tied, config = spec(config)["embed"].hf, untied(config)
        stored |= {spec(config)["head"].hf: stored[tied]} if base else {}
    rows = spec(config)
    if rows.keys() != leaves.keys():
        raise ValueError(f"the tree is not the config's: {sorted(rows.keys() ^ leaves.keys())}")
    table = {cell.name: cell for cell in cells(rows)}

    def dtype_of(cell: Cell) -> np.dtype:
        first = jax.tree.leaves(leaves[cell.path])[0]
        own = base.entries[stored[cell.name]].dtype if base and _is_abstract(first) else first.dtype
        return np.dtype(dtype or (own if _is_float(own) else config.dtype))

    def make(name: str) -> np.ndarray:
        cell, wanted = table[name], dtype_of(table[name])
        leaf = leaves[cell.path]
        if base and _is_abstract(leaf):
            value = base.read(stored[name])
            return np.asarray(dense(value, wanted)) if is_weight(value) else value.astype(wanted, copy=False)
        read = (lambda: jax.tree.map(jnp.asarray, base.read(stored[name]))) if base else None
        return np.asarray(dense(_cell(leaf, cell.index, read), wanted))

    return config, [Plan(cell.name, dtype_of(cell), cell.shape) for cell in table.values()], make


def _cell(leaf: Matrix, index: tuple[int, ...], read: Callable[[], Matrix] | None = None) -> Matrix:
    """One matrix of a stacked leaf; what is abstract in it is read."""
    return jax.tree.map(lambda x: read() if read and _is_abstract(x) else x[index], leaf)


def _is_abstract(x) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)


def _is_float(dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and np.dtype(dtype).itemsize > 1  # 8-bit floats need scales to mean anything


def untied(config: ModelConfig) -> ModelConfig:
    """The same model with an output head of its own."""
    hf = json.loads(config.hf_json or "{}") | {"tie_word_embeddings": False}
    return dataclasses.replace(config, tie_word_embeddings=False, hf_json=json.dumps(hf))


def config_json(config: ModelConfig, plans: list[Plan]) -> dict:
    """config.json of tensors as they are written: the one that was read, with what has changed since."""
    if not config.hf_json:
        raise ValueError("this ModelConfig was not made by families.from_hf, so there is no config.json to write")
    hf = json.loads(config.hf_json)
    sizes: dict[str, int] = {}
    for plan in plans:
        sizes[str(plan.dtype)] = sizes.get(str(plan.dtype), 0) + plan.nbytes
    hf["torch_dtype" if "torch_dtype" in hf else "dtype"] = max(sizes, key=lambda name: sizes[name])
    hf["vocab_size"] = config.vocab_size
    # The tensors are dense now, and the Python files of a remote-code model are not copied (nor ever run).
    return {key: value for key, value in hf.items() if key not in ("quantization_config", "auto_map")}
