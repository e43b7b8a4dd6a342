"""PEFT's adapter folders, both ways: `adapter_config.json` and `adapter_model.safetensors`.

A tensor is named `base_model.model.` + the module's name + the method's suffix (`peft.adapter.Part.file`). Experts are concatenated in one
matrix: `lora_A [E r, in]` expert by expert, `lora_B [out, r E]` rank by rank. Whole parameters have their own names.
"""

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxtune.config import LoraConfig
from jaxtune.convert import value as value_head
from jaxtune.convert.folders import new_folder
from jaxtune.convert.load import Model
from jaxtune.convert.names import is_float
from jaxtune.convert.peft_config import PREFIX, config_json, current_names, naming_config, read_config
from jaxtune.convert.peft_embeddings import check_vocabulary, read_embeddings
from jaxtune.convert.peft_experts import PerExpert, is_per_expert
from jaxtune.convert.peft_packed import check_packed
from jaxtune.convert.tensors import Checkpoint, Plan, Safetensors, read_json, write_file, write_json
from jaxtune.errors import ModelError, check_argument
from jaxtune.model.families import heads
from jaxtune.model.row import Row
from jaxtune.peft import kind_of, prompts
from jaxtune.peft.adapter import Adapter, Constant, Part
from jaxtune.peft.prompts import PromptKind
from jaxtune.peft.sites import (
    HEADS,
    AnyConfig,
    Site,
    Whole,
    adaptable,
    check_parameters,
    is_parameter,
    names,
    rank_and_scale,
    settle,
    targeted,
    whole_rows,
)

log = logging.getLogger("jaxtune")

class Place(NamedTuple):
    """One layer of an adapted row in the file: its number in the stack, PEFT's name for it, the prefix of its tensors' names."""

    number: int
    name: str
    stem: str


def _places(path: str, row: Row, adapted: dict[str, tuple[int, ...]]) -> Iterator[Place]:
    """The layers of a row. PEFT nests the wrappers of one module's parameters: if down is adapted too, up (and gate) is inside."""
    stack, _, kind = path.rpartition("/")
    for number, name in enumerate(names(path, row)):
        stem = name.rpartition(".")[0] if is_parameter(path) else name
        if kind in ("experts_gate_up", "experts_up") and adapted.get(f"{stack}/experts_down", (0,) * (number + 1))[number]:
            stem += ".base_layer"
        yield Place(number, name, PREFIX + stem)


def _turns(row: Row, out: int) -> np.ndarray:
    """For each of transformers' outputs, which of ours (gate before up) it is."""
    halves = np.arange(out).reshape(2, -1)
    return halves.T.reshape(-1) if row.part is not None and row.part.alternating else halves.reshape(-1)


def _flat(leaf: str, value: np.ndarray) -> np.ndarray:
    """Experts' pairs in PEFT's layout."""
    if value.ndim != 3 or leaf not in ("a", "b"):
        return value
    return value.reshape(-1, value.shape[-1]) if leaf == "a" else value.transpose(1, 2, 0).reshape(value.shape[1], -1)


def _as_in_file(value: np.ndarray, leaf: str, part: Part, rank: int) -> np.ndarray:
    """One layer's array without the part beyond its rank, in PEFT's layout."""
    if part.rank is not None:
        value = value[..., :rank, :] if part.rank == -2 else value[..., :rank]
    value = _flat(leaf, value)
    return np.ascontiguousarray(value.T if part.turned else value)


def _unflat(leaf: str, value: np.ndarray, experts: int) -> np.ndarray:
    """The inverse of `_flat`."""
    if leaf == "a":
        return value.reshape(experts, -1, value.shape[-1])
    return value.reshape(value.shape[0], -1, experts).transpose(2, 0, 1)


def save_adapter(adapter: Adapter, model: Model, out: str | os.PathLike) -> Path:
    """Write `adapter` as a folder that `peft.PeftModel.from_pretrained` opens on `model`; returns `out`.

    The folder is written under a temporary name and renamed. Raises ModelError if `out` exists and is not empty.
    """
    check_argument("adapter", adapter, Adapter, "write jt.save_adapter(adapter, model, out)")
    check_argument("model", model, Model, "write jt.save_adapter(adapter, model, out)")
    kind, tensors = kind_of(adapter.config), {}
    adapter = kind.settled(adapter)
    rows, adapted = adaptable(model.config), {site.path: site.ranks for site in adapter.sites}
    for site in adapter.sites:
        row, values = rows[site.path], adapter.params[site.path]
        for place in _places(site.path, row, adapted):
            if not (rank := site.ranks[place.number]):
                continue
            for leaf, part in kind.parts(adapter.config, site.path, row, max(site.ranks)).items():
                if leaf in values:
                    value = np.asarray(values[leaf][place.number] if row.layers else values[leaf])
                    value = value[:, _turns(row, value.shape[1])] if leaf == "b" and site.path.endswith("experts_gate_up") else value
                    tensors[f"{place.stem}.{part.file}"] = _as_in_file(value, leaf, part, rank)
    for whole in adapter.wholes:
        if whole.path in heads.VALUE:
            continue  # in a separate file
        row, value = whole_rows(model.config)[whole.path], np.asarray(adapter.saved[whole.path])
        for number, name in _whole_names(whole, row, model, adapter.config, adapted):
            one = value if number is None else value[number]
            tensors[name] = np.ascontiguousarray(one.T if row.transposed else one)
    tensors |= kind.more_tensors(adapter)
    with new_folder(out) as folder:
        write_json(folder / "adapter_config.json", config_json(adapter, model))
        plans = [Plan(name, value.dtype, value.shape) for name, value in tensors.items()]
        write_file(folder / "adapter_model.safetensors", plans, tensors.__getitem__)
        value_head.write(folder, adapter.saved)
    return Path(out)


def _whole_names(
    whole: Whole, row: Row, model: Model, config: AnyConfig, adapted: dict[str, tuple[int, ...]]
) -> Iterator[tuple[int | None, str]]:
    """The tensors of a whole parameter: its place in `saved` (None: all of it) and its name."""
    if not row.layers:
        name = row.hf.removesuffix(".weight")
        if whole.numbers is not None:
            yield None, PREFIX + name + ".token_adapter.trainable_tokens_delta"
        else:
            module, _, kind = row.hf.rpartition(".")
            yield None, PREFIX + (kind_of(config).whole_name(whole.path, module, kind) if kind in ("weight", "bias") else row.hf)
        if whole.path == "embed" and whole.numbers is None and config.ensure_weight_tying and model.config.tie_word_embeddings:
            yield None, PREFIX + whole_rows(model.config)["head"].hf
        return
    ranks = adapted.get(whole.path.removesuffix("_bias"), (0,) * len(row.layers))
    for place, number in enumerate(whole.numbers or range(len(row.layers))):
        name = row.hf.format(layer=row.layers[number])
        module, _, kind = name.rpartition(".")
        inner = ".base_layer" if kind == "bias" and ranks[number] else ""
        yield place, PREFIX + kind_of(config).whole_name(whole.path, module + inner, kind)


def load_adapter(path: str | os.PathLike, model: Model) -> Adapter:
    """A PEFT folder as an adapter for `model`.

    Raises ModelError for another kind of adapter, an unsupported field, and tensors that are missing, extra or of the wrong shape, naming
    them.
    """
    check_argument("path", path, (str, os.PathLike), "write jt.load_adapter(folder, model)")
    check_argument("model", model, Model, "write jt.load_adapter(folder, model)")
    path = Path(path).expanduser()
    with naming_config(path):
        return _load(path, model)


def _load(path: Path, model: Model) -> Adapter:
    kind, config = read_config(read_json(path / "adapter_config.json"), path)
    checkpoint: Checkpoint = Safetensors(path, stem="adapter_model")
    if model.config.model_type == "gpt_neox":  # transformers 4 called its head embed_out
        config = settle(model.config, config)
        checkpoint.entries = {name.replace(".embed_out.", ".lm_head."): entry for name, entry in checkpoint.entries.items()}
    if model.config.outer:
        checkpoint.entries = current_names(path, checkpoint.entries, model.config)
    apart = model.config.moe is not None and is_per_expert(checkpoint)
    if apart:
        assert model.config.moe is not None
        checkpoint, config = PerExpert(checkpoint, model.config.moe.num_experts), settle(model.config, config)
    if isinstance(kind, PromptKind):
        return _read_prompt(path, checkpoint, model, kind, config)
    left = set(checkpoint.entries)
    if wrong := [name for name, entry in checkpoint.entries.items() if not is_float(entry.dtype)]:
        dtype = checkpoint.entries[wrong[0]].dtype
        raise ModelError(f"{path}: tensor {wrong[0]} is {dtype}; an adapter's must be float32, float16 or bfloat16")
    config = kind.settle(model.config, config) if not isinstance(config, LoraConfig) else config
    check_vocabulary(path, model, checkpoint)
    params, sites = _read_pairs(path, checkpoint, left, model, config)
    check_packed(path, model, config, sites)
    shared = _read_shared(path, checkpoint, left, model, config, sites)
    if not model.config.num_labels and any(name.removeprefix(PREFIX).split(".")[0] in HEADS for name in left):
        raise ModelError(f"{path} has a scoring head, and this is a language model; open the two with jt.load_scorer({str(path)!r})")
    wholes, adapted = kind.wholes(model.config, config, sites), {site.path: site.ranks for site in sites}
    own = {path: PREFIX + row.hf for path, row in whole_rows(model.config).items() if path in heads.PATHS}
    wholes = tuple(whole for whole in wholes if own.get(whole.path, "") in left or whole.path not in own)  # the head may be the base's
    parts = {whole.path: _read_whole(path, checkpoint, left, whole, model, config, adapted) for whole in wholes}
    wholes, config = read_embeddings(path, model, checkpoint, left, parts, wholes, config)
    left -= _copies(left, checkpoint) if config.bias == "all" else set()
    if not left and not apart and kind.stands:
        _check_complete(path, model, config, sites)
    if left:
        check_parameters(model.config, config)
        raise ModelError(f"{path}: {len(left)} tensors fit no module of this model, the first {min(left)}; is it for another model?")
    return Adapter(params=params, sites=sites, config=config, saved=parts, wholes=wholes, shared=shared)


def _copies(names: set[str], checkpoint: Checkpoint) -> set[str]:
    """Biases that PEFT writes again under the names of its wrapper around a module of `modules_to_save`, with `bias: all`."""
    wrappers = (r"\.modules_to_save\.[^.]+(?=\.)", r"\.modules_to_save(?=\.)", r"\.original_module(?=\.)")
    return {name for name in names for wrapper in wrappers if (own := re.sub(wrapper, "", name)) != name and own in checkpoint.entries}


def _read_prompt(path: Path, checkpoint: Checkpoint, model: Model, kind: PromptKind, config: Any) -> Adapter:
    """The only tensor of a virtual-token method."""
    name, wanted = "prompt_embeddings", (config.num_virtual_tokens, kind.width(model.config))
    if set(checkpoint.entries) != {name}:
        raise ModelError(f"{path}: adapter_model.safetensors holds {', '.join(sorted(checkpoint.entries)[:3])}, and has to hold {name}")
    value = checkpoint.read(name).astype(np.float32)
    if value.shape != wanted:
        raise ModelError(f"{path}: {name} is {value.shape}, but this model and its config ask for {wanted}")
    return Adapter({prompts.PATH: {"embeddings": jnp.asarray(value)}}, (), config)


def _check_complete(path: Path, model: Model, config: LoraConfig, sites: tuple[Site, ...]) -> None:
    """The file must have exactly the pairs that its config names: PEFT ignores what only one of the two has, with a warning."""
    rows = adaptable(model.config)
    found = {name for site in sites for name, rank in zip(names(site.path, rows[site.path]), site.ranks, strict=True) if rank}
    config = kind_of(config).settle(model.config, config)
    wanted = {name for name in targeted(model.config, config) if rank_and_scale(name, config)[0]}
    if not wanted and not config.target_modules:
        wanted = found  # no targets are recorded: the file determines them
    if missing := sorted(wanted - found):
        raise ModelError(f"{path}: {len(missing)} modules that adapter_config.json names have no tensors, the first {missing[0]}")
    if extra := sorted(found - wanted):
        check_parameters(model.config, config)
        raise ModelError(f"{path}: the adapter of {extra[0]} is one of {len(extra)} that adapter_config.json does not name")
    if not found and not config.modules_to_save and not config.trainable_token_indices and not model.config.num_labels:
        raise ModelError(f"{path}: adapter_model.safetensors holds no tensors, so there is nothing to add to the model")


def _read_pairs(path: Path, checkpoint: Checkpoint, left: set, model: Model, config: AnyConfig) -> tuple[dict, tuple[Site, ...]]:
    """The pairs in the file; the names of their tensors are removed from `left`."""
    params, sites = {}, []
    if not kind_of(config).stands:  # a matrix in the file is then one that is trained whole
        return params, ()
    rows = adaptable(model.config)
    named = targeted(model.config, config)  # PEFT's "all-linear" also lists parameters that the model does not have
    experts = {
        path: tuple(rank_and_scale(name, config)[0] if name in named else 0 for name in names(path, row))
        for path, row in rows.items()
        if is_parameter(path) and not named.isdisjoint(names(path, row))
    }
    kind, stems = kind_of(config), {name.rsplit(".", dots)[0] for name in left for dots in (1, 2)}
    for name, row in rows.items():
        places = list(_places(name, row, experts))
        there = [place.stem in stems for place in places]
        if not any(there) or is_parameter(name) and name not in experts:
            continue
        count = row.shape[1] if row.is_experts else None
        sizes = [rank_and_scale(place.name, config) if own else (0, 0.0) for place, own in zip(places, there, strict=True)]
        kind.check(config, name, row)
        full, layers = kind.parts(config, name, row, max(rank for rank, _ in sizes)), []
        for number, (place, (rank, _)) in enumerate(zip(places, sizes, strict=True)):
            parts = kind.parts(config, name, row, rank) if there[number] else {}
            tensors = {leaf: f"{place.stem}.{part.file}" for leaf, part in parts.items()}
            tensors = {leaf: tensor for leaf, tensor in tensors.items() if tensor in left}
            if not tensors:  # a tensor with this prefix belongs to another row
                layers.append({})
                sizes[number] = 0, 0.0
                continue
            values = {leaf: checkpoint.read(tensor).astype(np.float32) for leaf, tensor in tensors.items()}
            values = {leaf: x.T if parts[leaf].turned else x for leaf, x in values.items()}
            _check(path, place, values, parts)
            values = {leaf: _unflat(leaf, x, count) for leaf, x in values.items()} if count else values
            if name.endswith("experts_gate_up"):
                values["b"] = values["b"][:, np.argsort(_turns(row, values["b"].shape[1]))]
            layers.append(values)
            left -= set(tensors.values())
        if any(layers):
            params[name] = _stack(layers, row, full, count)
            sites.append(Site(name, tuple(rank for rank, _ in sizes), tuple(scale for _, scale in sizes)))
    return params, tuple(sites)


def _read_shared(
    path: Path, checkpoint: Checkpoint, left: set, model: Model, config: AnyConfig, sites: tuple[Site, ...]
) -> tuple[Constant, ...]:
    """What all matrices share: from the file, or computed again if the config says so."""
    kind, found = kind_of(config), []
    if not sites or not (made := kind.constants(model.config, config, sites)):
        return ()
    for constant, name in zip(made, kind.shared_files, strict=True):
        if name not in left:
            if getattr(config, "save_projection", False):
                raise ModelError(f"{path}: tensor {name} is missing; adapter_config.json says that there is one")
            found.append(constant)
            continue
        left.discard(name)
        value = checkpoint.read(name).astype(np.float32)
        if value.ndim != 2 or any(size < least for size, least in zip(value.shape, constant.value.shape, strict=True)):
            raise ModelError(f"{path}: {name} is {value.shape}, but this model and its config ask for {constant.value.shape}")
        found.append(Constant(value))
    return tuple(found)


def _read_whole(path: Path, checkpoint: Checkpoint, left: set, whole: Whole, model: Model, config: AnyConfig, adapted: dict):
    """A whole parameter; the names are removed from `left`."""
    row = whole_rows(model.config)[whole.path]
    shape = row.shape[bool(row.layers) :] if row.layers or whole.numbers is None else (len(whole.numbers), *row.shape[1:])
    values = []
    for _, name in _whole_names(whole, row, model, config, adapted):
        if name not in checkpoint.entries:
            raise ModelError(f"{path}: tensor {name} is missing; adapter_config.json says that it is trained")
        value = checkpoint.read(name).astype(np.float32)
        value = value.T if row.transposed else value
        if value.shape != shape:
            raise ModelError(f"{path}: {name} is {value.shape}, but this model and its config ask for {shape}")
        left.discard(name)
        values.append(value)
    if not row.layers and any(not np.array_equal(value, values[0]) for value in values):
        raise ModelError(f"{path}: ensure_weight_tying is set, but the embedding and the head that were saved differ")
    return jnp.asarray(np.stack(values) if row.layers else values[0])


def _check(path: Path, place: Place, values: dict[str, np.ndarray], parts: dict[str, Part]) -> None:
    """All arrays of a matrix exist, with the shapes that model and config require."""
    for leaf, part in parts.items():
        if leaf in values:
            continue
        if leaf in ("a", "b"):
            raise ModelError(f"{path}: the adapter of {place.name} lacks its {leaf.upper()} matrix")
        raise ModelError(f"{path}: tensor {place.stem}.{part.file} is missing; adapter_config.json says that there is one")
    for leaf, value in values.items():
        if value.shape != parts[leaf].shape:
            wanted = parts[leaf].shape
            raise ModelError(f"{path}: {leaf.upper()} of {place.name} is {value.shape}, but this model and its config ask for {wanted}")


def _stack(layers: list[dict[str, np.ndarray]], row: Row, full: dict[str, Part], experts: int | None) -> dict:
    """Per-layer arrays, zero-padded to the shapes of one rank and stacked."""
    lead, leaves = row.shape[:-2] if row.layers else (1,), {}
    for leaf, part in full.items():
        own = list(part.shape)
        if experts and part.rank is not None:  # each has its part of the joint rank
            own[part.rank] //= experts
        stack = np.zeros((*lead, *own), np.float32)
        for number, values in enumerate(layers):
            if leaf in values:
                stack[(number, *(slice(size) for size in values[leaf].shape))] = values[leaf]
        leaves[leaf] = jnp.asarray(stack if row.layers else stack[0])
    return leaves
