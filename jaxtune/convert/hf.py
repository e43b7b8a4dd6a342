"""Hugging Face checkpoints in and out through the row table: rename and stack, one tensor at a time, never two copies of the model."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import background, parallel
from jaxtune.convert import value
from jaxtune.convert.bitsandbytes import packed_tensors_out
from jaxtune.convert.folders import new_folder
from jaxtune.convert.names import Cell, cells, is_float, match_names, spellings
from jaxtune.convert.other_tensors import OtherTensors
from jaxtune.convert.quantised import KEYS
from jaxtune.convert.shards import Shards
from jaxtune.convert.tensors import Checkpoint, Plan, in_shards, write_json, write_tensors
from jaxtune.convert.together import plans_of_files
from jaxtune.convert.tokenizer import save_tokenizer
from jaxtune.errors import ModelError, check_argument
from jaxtune.model.families import ModelConfig, from_hf, nested
from jaxtune.model.spec import spec
from jaxtune.model.weight import Matrix, dense, is_weight
from jaxtune.tree import flatten, unflatten

Quantize = Callable[[str, jax.Array], Matrix]


# ---- in ----


def load_params(
    source: Checkpoint,
    config: ModelConfig,
    dtype: str | Callable[[str], str] = "float32",
    quantize: Quantize | None = None,
    shards: Shards | None = None,
) -> dict:
    """The parameter tree of a checkpoint.

    source    its tensors under Hugging Face's names; read one at a time
    dtype     of every unquantised leaf, or a function of its path; "auto" is the dtype of its entry
    quantize  `(path, matrix) -> leaf`, called for every tensor after the cast, layer by layer
    shards    reads (and quantises) instead, onto a mesh, if the tree is sharded over several devices

    Stacks are allocated once, where they will live, and filled in place: at its peak the host holds one tensor, and the device the result
    and one tensor. Raises ModelError for a tensor that is missing, left over, of another shape or not a float.
    """
    table = list(cells(spec(config)))
    names = match_names(source, table)
    rows = spec(config)
    tree: dict[str, Any] = {}
    for cell in table:
        background.check_cancelled()
        name, row = names[cell.name], rows[cell.path]
        own = dtype if isinstance(dtype, str) else dtype(cell.path)
        own = str(jax.dtypes.canonicalize_dtype(source.entries[name].dtype)) if own == "auto" else "float32" if row.float32 else own
        leaf = shards.leaf(name, cell, row, own) if shards else _leaf(source, name, cell, own, quantize)
        if not cell.index:
            tree[cell.path] = leaf
            continue
        if cell.path not in tree:
            stack = row.shape[: len(cell.index)]
            shapes = jax.tree.map(lambda x, stack=stack: jax.ShapeDtypeStruct(stack + x.shape, x.dtype), leaf)
            where = shards.shardings(cell.path, row, shapes) if shards else jax.tree.map(lambda _: None, shapes)
            tree[cell.path] = jax.tree.map(lambda x, s: jnp.zeros(x.shape, x.dtype, device=s), shapes, where)
        # Waited for: calls are dispatched ahead of the work, and every queued matrix would be in memory.
        tree[cell.path] = jax.block_until_ready(put(tree[cell.path], leaf, cell.index, shards))
    return unflatten(tree)


def read_row(source: Checkpoint, config: ModelConfig, path: str) -> jax.Array:
    """One row of the table, in the dtypes of the file; for small rows."""
    row = spec(config)[path]
    table = list(cells(spec(config)))
    stored = match_names(source, table)
    return jnp.stack([jnp.asarray(_matrix(source.read(stored[c.name]), c)) for c in table if c.path == path]).reshape(row.shape)


def _leaf(source: Checkpoint, name: str, cell: Cell, dtype: str, quantize: Quantize | None) -> Matrix:
    value = source.read(name)
    if is_weight(value):
        return value
    value = _matrix(value, cell).astype(dtype)
    return quantize(cell.path, value) if quantize else value


def _matrix(value: Any, cell: Cell) -> Matrix:
    """A matrix in the tree's orientation, `[out, in]`, whatever the file's is."""
    return value if is_weight(value) else jnp.asarray(value.T if cell.transposed else value)


def put(stack, leaf, index, shards: Shards | None):
    """`stack[index] = leaf` for every array of a leaf, in place; without a mesh, it is not committed to a device."""
    where = tuple(x.sharding for x in jax.tree.leaves(stack)) if shards else None
    return _putter(where, jax.tree.structure(stack))(stack, leaf, index)


@functools.lru_cache(maxsize=64)
def _putter(where: tuple | None, structure: Any):
    def put(whole, part, index):
        start = (*index, *(0,) * part.ndim)
        return jax.lax.dynamic_update_slice(whole, part.astype(whole.dtype).reshape((1,) * len(index) + part.shape), start)

    def every(stack, leaf, index):
        return jax.tree.map(lambda whole, part: put(whole, part, index), stack, leaf)

    return jax.jit(every, donate_argnums=0, out_shardings=None if where is None else jax.tree.unflatten(structure, where))


def settle_tie(source: Checkpoint, config: ModelConfig) -> ModelConfig:
    """The config, untied if the checkpoint has a head that differs from the embedding, whatever config.json says.

    transformers does the same, silently: such a file comes from a tool that trained or merged only one use of a tied matrix.
    """
    if not config.tie_word_embeddings or config.num_labels:
        return config
    rows = spec(untied(config))
    head, table = (next((name for name in spellings(rows[path].hf) if name in source.entries), None) for path in ("head", "embed"))
    if head is not None and table is None:  # safetensors' save_model keeps one of two names, the head's
        source.entries[rows["embed"].hf] = source.entries.pop(head)
    if head is None or table is None:
        return config
    if not np.array_equal(source.read(head), source.read(table)):
        return untied(config)
    del source.entries[head]
    return config


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
    other_tensors: OtherTensors | None = None,
    keep_packed: bool = False,
    max_shard_size: str | int = "5GB",
) -> Path:
    """Write a model folder that transformers opens: config.json, sharded safetensors, generation config, tokenizer and chat template.

    params  the tree; quantised and adapted leaves are written as the dense matrix they stand for, one layer at a time. A leaf that is a
            `jax.ShapeDtypeStruct` is read from `base`, tensor by tensor, so a model is merged and converted without being loaded.
    dtype   of the tensors; by default each leaf's own, and `config.dtype` for quantised ones
    other_tensors  for the language model of a multimodal checkpoint: its other tensors (`Model.other_tensors`)
    keep_packed  write quantised leaves as bitsandbytes does instead, byte for byte, and all others in one dtype

    The folder is written under a temporary name and renamed. Raises ModelError if `out` exists and is not empty. Returns `out`.
    """
    check_argument("config", config, ModelConfig, "write jt.save(model.config, model.params, out, tokenizer=model.tokenizer)")
    with new_folder(out) as folder:
        write_model(
            folder, config, params, tokenizer=tokenizer, generation_config=generation_config, dtype=dtype, base=base,
            other_tensors=other_tensors, keep_packed=keep_packed, max_shard_size=max_shard_size,
        )  # fmt: skip
    return Path(out)


def take_part(config: ModelConfig, params: dict, other_tensors: OtherTensors | None = None) -> None:
    """What a process that writes nothing does while another one saves: it provides its parts of each tensor, in the same order."""
    _, plans, make = tensors_out(config, params)
    plans, make = other_tensors.add(plans, make) if other_tensors else (plans, make)
    for shard in in_shards(plans):
        for plan in shard:
            make(plan.name)


def write_model(
    folder: Path,
    config: ModelConfig,
    params: dict,
    *,
    tokenizer=None,
    generation_config: dict | None = None,
    dtype: str | None = None,
    base: Checkpoint | None = None,
    other_tensors: OtherTensors | None = None,
    keep_packed: bool = False,
    max_shard_size: str | int = "5GB",
) -> None:
    """The files of `save`, written into an existing folder."""
    if keep_packed:  # transformers casts no tensor of a quantised model: a norm in another dtype than the head would end its first step
        dtype = dtype or config.dtype
        config = dataclasses.replace(config, dtype=dtype)
    config, plans, make = tensors_out(config, params, dtype, base)
    described = config_json(config, plans)
    if keep_packed:
        plans, make, described["quantization_config"] = packed_tensors_out(config, params, plans, make)
    if config.outer:
        if other_tensors is None:
            raise ModelError(f"this is the language model of a {config.outer} checkpoint; write other_tensors=model.other_tensors")
        plans, make = other_tensors.add(plans, make)
        other_tensors.leave_dense(config, described)
        other_tensors.write_files(folder)
    write_json(folder / "config.json", described)
    if generation_config:
        write_json(folder / "generation_config.json", generation_config)
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)
    write_tensors(folder, plans, make, max_shard_size)
    value.write(folder, params)


def tensors_out(config: ModelConfig, params: dict, dtype: str | None = None, base: Checkpoint | None = None):
    """`params` as Hugging Face tensors: the config (untied if the tree has its own head), the plans, and `make(name)`."""
    leaves, config = value.without(flatten(params)), dataclasses.replace(config, value_head=False)
    stored = match_names(base, list(cells(spec(config)))) if base else {}  # the names of the tensors in `base`
    if config.tie_word_embeddings and "head" in leaves:
        tied, config = spec(config)["embed"].hf, untied(config)
        stored |= {spec(config)["head"].hf: stored[tied]} if base else {}
    rows = spec(config)
    if rows.keys() != leaves.keys():
        odd = ", ".join(sorted(rows.keys() ^ leaves.keys()))
        raise ModelError(f"the tree is not the model that config.json describes; only one of them has {odd}")
    table = {cell.name: cell for cell in cells(rows)}

    def dtype_of(cell: Cell) -> np.dtype:
        first = jax.tree.leaves(leaves[cell.path])[0]
        own = base.entries[stored[cell.name]].dtype if base and _is_abstract(first) else first.dtype
        given = None if rows[cell.path].float32 else dtype
        return np.dtype(given or (own if is_float(own) else config.dtype))

    @np.errstate(over="ignore")  # numbers beyond the range of `dtype` are refused when they are written
    def make(name: str) -> np.ndarray:
        cell, wanted = table[name], dtype_of(table[name])
        leaf = leaves[cell.path]
        if base and _is_abstract(leaf):
            leaf = base.read(stored[name])
            if not is_weight(leaf):
                return leaf.astype(wanted, copy=False)
        else:
            read = (lambda: _matrix(base.read(stored[name]), cell)) if base else None
            leaf = _cell(leaf, cell.index, read)
        value = parallel.fetch(dense(leaf, wanted))
        return value.T if cell.transposed else value

    return config, *plans_of_files(rows, [Plan(cell.name, dtype_of(cell), cell.shape) for cell in table.values()], make)


def _cell(leaf: Matrix, index: tuple[int, ...], read: Callable[[], Matrix] | None = None) -> Matrix:
    """One matrix of a stacked leaf; abstract ones are read."""
    return jax.tree.map(lambda x: read() if read and _is_abstract(x) else _at(x, index), leaf)


def _at(x: jax.Array | np.ndarray, index: tuple[int, ...]) -> jax.Array | np.ndarray:
    """`x[index]`, where JAX's own indexing would compile a program for every index: a view in a CPU's memory, one program elsewhere."""
    if isinstance(x, np.ndarray):
        return x[index]
    if x.is_fully_addressable and {device.platform for device in x.devices()} == {"cpu"} and len(x.devices()) == 1:
        return np.asarray(x)[index]
    return _sliced(x, index)


@jax.jit
def _sliced(x: jax.Array, index: tuple) -> jax.Array:
    return x[index]


def _is_abstract(x) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)


def untied(config: ModelConfig) -> ModelConfig:
    """The same model with its own output head."""
    hf = nested.changed(json.loads(config.hf_json or "{}"), tie_word_embeddings=False) | {"tie_word_embeddings": False}
    hf |= {"tie_embedding": False} if "tie_embedding" in hf else {}  # LFM2's name for it, which takes precedence
    return dataclasses.replace(config, tie_word_embeddings=False, hf_json=json.dumps(hf))


def config_json(config: ModelConfig, plans: list[Plan]) -> dict:
    """config.json for tensors as they are written: the one that was read, with later changes."""
    if not config.hf_json:
        raise ValueError("this ModelConfig was not made by families.from_hf, so there is no config.json to write")
    if any(rope.kind == "divisors" for rope in config.ropes):
        raise ModelError("this GGUF file holds rotary frequencies of its own making, which config.json cannot say; export it as gguf")
    hf = json.loads(config.hf_json)
    sizes: dict[str, int] = {}
    for plan in plans:
        sizes[str(plan.dtype)] = sizes.get(str(plan.dtype), 0) + plan.nbytes
    most = max(sizes, key=lambda name: sizes[name])
    inside = {key: most for key in ("dtype", "torch_dtype") if key in (hf.get("text_config") or {})}
    hf = (nested.changed(hf, **inside) if inside else hf) | {"torch_dtype" if "torch_dtype" in hf else "dtype": most}
    if from_hf(hf).vocab_size != config.vocab_size:
        hf = nested.changed(hf, vocab_size=config.vocab_size)
    # The tensors are dense now, and the Python files of a remote-code model are not copied (nor ever run).
    if isinstance(hf.get("text_config"), dict):
        hf["text_config"] = {key: value for key, value in hf["text_config"].items() if key not in KEYS}
    return {key: value for key, value in hf.items() if key not in (*KEYS, "auto_map")}
