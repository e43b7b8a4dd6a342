"""bitsandbytes checkpoints in and out: NF4, FP4 and int8 matrices as quantised leaves, byte for byte, without quantising again.

4 bits: X.weight holds two codes per byte, in the bytes of any dtype; X.weight.absmax, .quant_map, .quant_state.bitsandbytes__nf4 (JSON),
and with double quantisation .nested_absmax, .nested_quant_map (the mean of the scales is only in the JSON)
int8:   X.weight int8 [out, in], X.SCB float32 [out], X.weight_format
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.convert.names import Cell, cells, spellings
from jaxtune.convert.quantised import BITSANDBYTES, settings_of
from jaxtune.convert.tensors import DTYPES, Checkpoint, Entry, Plan
from jaxtune.errors import ModelError
from jaxtune.model.families import ModelConfig, nested
from jaxtune.model.quant import CODES, NESTED_BLOCK, NF4, Int8, dynamic_map, pack, unpack
from jaxtune.model.spec import spec
from jaxtune.model.weight import Matrix
from jaxtune.tree import flatten

STATE = ".quant_state.bitsandbytes__"
_DTYPES = {str(dtype): dtype for dtype in DTYPES.values()}
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


def is_packed(hf: Mapping[str, Any]) -> bool:
    """Whether config.json says that the tensors are bitsandbytes'; ModelError for an unsupported quantisation."""
    settings = settings_of(hf)
    if settings is None or settings["quant_method"] != BITSANDBYTES:
        return False
    keys = settings.get("llm_int8_skip_modules") or []
    try:
        fits = isinstance(keys, list) and all(re.compile(key) for key in keys)
    except (TypeError, re.error):
        fits = False
    if not fits:
        raise ModelError(f"config.json says llm_int8_skip_modules={keys!r}; it has to be a list of names or regular expressions")
    return True


def packed_as(hf: Mapping[str, Any]) -> str | None:
    """The quantisation of the linear layers according to config.json (a key of `quant.QUANTIZERS`); None if they are not quantised."""
    settings = settings_of(hf)
    if settings is None or not is_packed(hf):
        return None
    if settings.get("load_in_8bit"):
        return "int8"
    kind = settings.get("bnb_4bit_quant_type", "fp4")  # transformers' default
    if kind not in CODES:
        raise ModelError(f"config.json says bnb_4bit_quant_type {kind!r}; {' and '.join(CODES)} are what can be read")
    return f"{kind}-dq" if settings.get("bnb_4bit_use_double_quant") else kind


def is_skipped(hf: Mapping[str, Any], module: str) -> bool:
    """Whether config.json says that this linear layer is dense (`llm_int8_skip_modules`), as in transformers: a key is a regular expression
    for the beginning of a module's name, up to the end of one of its parts, or a plain suffix."""
    keys, names = (settings_of(hf) or {}).get("llm_int8_skip_modules") or (), list(nested.spellings(hf, module))
    return any(re.match(rf"(?:{key})(?:(?<=\.)|(?=\.|$))", name) or name.endswith(key) for key in keys for name in names)


def cut(config: ModelConfig, is_packed: Callable[[str], bool]) -> ModelConfig:
    """The config with stacks whose layers are quantised alike, if some layers are dense; `is_packed(tensor)` says which."""
    layers: dict[int, set[str]] = {name: set() for name in config.layer_names}
    for path, row in spec(config).items():
        for layer, name in zip(row.layers, row.hf_names(), strict=False):
            if row.is_matrix and is_packed(name):
                layers[layer].add(path.rpartition("/")[2])
    packed = list(layers.values())
    return dataclasses.replace(config, cuts=tuple(n for n in range(1, config.num_layers) if packed[n] != packed[n - 1]))


class Bitsandbytes:
    """A checkpoint whose quantised tensors are read as `NF4` or `Int8` leaves."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig):
        self.checkpoint = checkpoint
        self.entries: dict[str, Entry] = dict(checkpoint.entries)
        self._states: dict[str, dict[str, Any]] = {}
        self._int8: set[str] = set()
        turned = {cell.name for cell in cells(spec(config)) if cell.transposed}
        for name in list(checkpoint.entries):
            if STATE in name:
                self._add_4bit(name, turned)
            elif name.endswith(".SCB"):
                self._add_int8(name.removesuffix(".SCB") + ".weight", turned)
        if not self._states and not self._int8:
            raise ModelError(
                "config.json says that the tensors are quantised by bitsandbytes, but none of them is; take quantization_config out of it "
                "(quantization: nf4 or int8 packs them while they are read)"
            )

    def is_packed(self, name: str) -> bool:
        """Whether the tensor of this (usual) name is quantised."""
        return any(spelling in self._states or spelling in self._int8 for spelling in spellings(name))

    def _add_4bit(self, state_name: str, turned: set[str]) -> None:
        name = state_name.partition(STATE)[0]
        packed = self.entries.get(name)
        try:
            state = json.loads(self.checkpoint.read(state_name).tobytes())
            shape, dtype = tuple(state["shape"]), _DTYPES[state["dtype"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{self.entries[state_name].file}: {state_name} is not what bitsandbytes writes ({error!r})") from error
        parts = [name + part for part in _PARTS[: 4 if "nested_offset" in state else 2]]
        if missing := [part for part in [name, *parts] if part not in self.entries]:
            raise ModelError(f"{self.entries[state_name].file}: tensor {missing[0]} is missing; {name} is packed and needs it")
        assert packed is not None
        if len(shape) != 2 or packed.nbytes != -(-math.prod(shape) // 2):
            raise ModelError(f"{packed.file}: tensor {name} has {packed.nbytes} bytes of codes, which do not make a matrix {list(shape)}")
        self._states[name] = state
        self.entries[name] = packed._replace(dtype=dtype, shape=shape[::-1] if name in turned else shape)
        for part in [state_name, *parts]:
            del self.entries[part]

    def _add_int8(self, name: str, turned: set[str]) -> None:
        packed = self.entries.get(name)
        if packed is None or packed.dtype != np.int8:
            raise ModelError(f"{self.entries[name.removesuffix('.weight') + '.SCB'].file}: tensor {name} is not int8, though it has a SCB")
        self._int8.add(name)
        self.entries[name] = packed._replace(dtype=np.dtype(np.float16), shape=packed.shape[::-1] if name in turned else packed.shape)
        for part in (".SCB", ".weight_format"):
            self.entries.pop(name.removesuffix(".weight") + part, None)

    def read(self, name: str) -> Matrix | np.ndarray:
        """One tensor: a quantised leaf, or an array."""
        if name in self._int8:
            scales = self.checkpoint.read(name.removesuffix(".weight") + ".SCB")
            return Int8(jnp.asarray(self.checkpoint.read(name)), jnp.asarray(scales.astype(np.float32).reshape(-1)))
        if name in self._states:
            return self._read_4bit(name, self._states[name])
        return self.checkpoint.read(name)

    def _read_4bit(self, name: str, state: dict[str, Any]) -> NF4:
        kind, size, (out, width) = state["quant_type"], state["blocksize"], state["shape"]
        file = self.entries[name].file
        table = self.checkpoint.read(name + ".quant_map").reshape(-1)
        if kind not in CODES or not np.array_equal(table, np.asarray(CODES[kind], np.float32)):
            raise ModelError(f"{file}: tensor {name} is packed as {kind!r} with a table of its own; nf4 and fp4 are what can be read")
        rows = out if width % size == 0 else 1
        blocks = -(-out * width // size)
        codes = self.checkpoint.read(name).reshape(-1).view(np.uint8)
        codes = np.pad(codes, (0, blocks * size // 2 - codes.size)).reshape(rows, -1)
        codes = pack(np.stack([codes >> 4, codes & 0xF], axis=-1).reshape(rows, -1), size)  # in a file the high nibble is the earlier one
        absmax = self.checkpoint.read(name + ".absmax").reshape(-1)
        if absmax.size != blocks:
            raise ModelError(f"{file}: tensor {name}.absmax has {absmax.size} scales; {blocks} blocks of {size} need one each")
        absmax = absmax.reshape(rows, -1).T
        static: dict[str, Any] = dict(shape=(out, width), block_size=size, kind=kind)
        if "nested_offset" not in state:
            return NF4(jnp.asarray(codes), jnp.asarray(absmax.astype(np.float32)), **static)
        nested, own = (self.checkpoint.read(name + part).reshape(-1) for part in _PARTS[2:])
        offset = np.float32(state["nested_offset"])
        if state.get("nested_blocksize") != NESTED_BLOCK or not np.array_equal(own, dynamic_map()):
            # Another table or block size: the scales are read dequantised, which loses only their compression.
            nested = np.repeat(nested, state["nested_blocksize"])[:blocks].reshape(rows, -1).T
            absmax = own[absmax] * nested + offset
            return NF4(jnp.asarray(codes), jnp.asarray(absmax.astype(np.float32)), **static)
        return NF4(jnp.asarray(codes), jnp.asarray(absmax), jnp.asarray(nested), jnp.asarray(offset), **static)


# ---- out ----


Make = Callable[[str], np.ndarray]


def packed_tensors_out(config: ModelConfig, params: dict, plans: list[Plan], make: Make) -> tuple[list[Plan], Make, dict[str, Any]]:
    """The plans and `make` of dense tensors, with quantised leaves as bitsandbytes writes them; and config.json's entry for them."""
    leaves = flatten(params)
    rows = spec(config)  # transformers keeps experts in one array each, which bitsandbytes does not quantise: they are written dense
    packed = {c.name: c for c in cells(rows) if isinstance(leaves[c.path], NF4 | Int8) and not rows[c.path].is_experts}
    if not packed:
        raise ModelError("no matrix of this model is quantised, so bitsandbytes has nothing to write; load it with a quantization")
    result, makers = [], {}
    for plan in plans:
        if plan.name in packed:
            cell = packed[plan.name]
            for part, (dtype, shape, maker) in _parts(leaves[cell.path], cell, config.dtype).items():
                result.append(Plan(part, np.dtype(dtype), shape))
                makers[part] = maker
        else:
            result.append(plan)
            makers[plan.name] = lambda name=plan.name: make(name)
    described = quantization_config(leaves[next(iter(packed.values())).path], config.dtype)
    if dense := [name.removesuffix(".weight") for row in rows.values() if row.is_matrix for name in row.hf_names() if name not in packed]:
        described["llm_int8_skip_modules"] = [*dense, "lm_head"]  # which transformers leaves dense by itself only if there is no list
    return result, lambda name: makers[name](), described


def quantization_config(leaf: Matrix, dtype: str) -> dict[str, Any]:
    """The entry that transformers needs in config.json to open the file."""
    if isinstance(leaf, Int8):
        return {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False, "llm_int8_threshold": 6.0}
    assert isinstance(leaf, NF4)
    return {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": leaf.kind,
        "bnb_4bit_use_double_quant": leaf.nested_absmax is not None, "bnb_4bit_compute_dtype": dtype, "bnb_4bit_quant_storage": "uint8",
    }  # fmt: skip


Part = tuple[Any, tuple[int, ...], Callable[[], np.ndarray]]


def _pairs(codes: jax.Array) -> np.ndarray:
    """Codes `[cols, rows]` as a file packs them: two per byte, the high nibble first."""
    flat = np.asarray(codes).T.reshape(-1)
    return flat[::2] << 4 | flat[1::2]


def _parts(leaf: Matrix, cell: Cell, dtype: str) -> dict[str, Part]:
    """The tensors for one quantised matrix: dtype, shape, and how to make it."""

    def part(array: jax.Array, shape: tuple[int, ...], order: Callable = lambda field: field) -> Part:
        """One field of the leaf in the file's order, without its padding."""
        return array.dtype, shape, lambda: np.asarray(order(array[cell.index])).reshape(-1)[: math.prod(shape)].reshape(shape)

    def constant(array: np.ndarray) -> Part:
        return array.dtype, array.shape, lambda: array

    if isinstance(leaf, Int8):
        stem = cell.name.removesuffix(".weight")
        shape = leaf.codes.shape[-2:]
        scales = part(leaf.absmax, shape[:1])
        return {cell.name: part(leaf.codes, shape), f"{stem}.SCB": scales, f"{stem}.weight_format": constant(np.zeros((), np.uint8))}
    assert isinstance(leaf, NF4)
    name, (out, width), blocks = cell.name, leaf.shape, -(-math.prod(leaf.shape) // leaf.block_size)
    state = {"quant_type": leaf.kind, "blocksize": leaf.block_size, "dtype": dtype, "shape": [out, width]}
    parts = {
        name: part(leaf.codes, (-(-out * width // 2), 1), lambda codes: _pairs(unpack(codes, leaf.block_size))),
        f"{name}.absmax": part(leaf.absmax, (blocks,), lambda absmax: absmax.T),
        f"{name}.quant_map": constant(np.asarray(CODES[leaf.kind], np.float32)),
    }
    if leaf.nested_absmax is not None and leaf.nested_offset is not None:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": float(leaf.nested_offset[cell.index])}
        parts[f"{name}.nested_absmax"] = part(leaf.nested_absmax, leaf.nested_absmax.shape[-1:])
        parts[f"{name}.nested_quant_map"] = constant(dynamic_map())
    return parts | {f"{name}{STATE}{leaf.kind}": constant(np.frombuffer(json.dumps(state).encode(), np.uint8))}
