"""PEFT's LoRA folders, both ways: `adapter_config.json` and `adapter_model.safetensors`.

A tensor is named `base_model.model.` + the module's name + `.lora_A.weight [r, in]`, `.lora_B.weight [out, r]`, `.lora_magnitude_vector
[out]` (DoRA), or for an embedding `.lora_embedding_A [r, vocabulary]`, `.lora_embedding_B [D, r]`.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtune.config import LoraConfig
from jaxtune.convert.folders import new_folder
from jaxtune.convert.load import Model
from jaxtune.convert.tensors import Plan, Safetensors, read_json, write_file, write_json
from jaxtune.errors import ModelError
from jaxtune.model.families import heads
from jaxtune.model.spec import spec
from jaxtune.model.weight import dense
from jaxtune.peft.lora import Adapter, Site, adaptable, module_names, rank_and_scale

PREFIX = "base_model.model."
# our leaf -> PEFT's suffix, and whether PEFT holds it transposed
MATRIX = {"a": ("lora_A.weight", False), "b": ("lora_B.weight", False), "magnitude": ("lora_magnitude_vector", False)}
EMBEDDING = {"b": ("lora_embedding_A", True), "a": ("lora_embedding_B", True)}

TASKS = {heads.SEQUENCE: "SEQ_CLS", heads.TOKEN: "TOKEN_CLS"}
HEADS = {"score", "classifier"}  # what `modules_to_save` may name: PEFT adds both by itself under these tasks

# fields of adapter_config.json that change the result, with the value that asks for nothing; any other value is refused by name
NOT_HERE = {
    "bias": "none", "lora_bias": False, "modules_to_save": None, "layer_replication": None,
    "target_parameters": None, "trainable_token_indices": None, "alora_invocation_tokens": None, "use_qalora": False, "arrow_config": None,
}  # fmt: skip


def _suffixes(path: str) -> dict[str, tuple[str, bool]]:
    return EMBEDDING if path == "embed" else MATRIX


def save_adapter(adapter: Adapter, model: Model, out: str | os.PathLike) -> Path:
    """Write `adapter` as a folder that `peft.PeftModel.from_pretrained` opens on `model`; returns `out`.

    The folder is written beside and renamed. Raises ModelError when `out` is there and not empty.
    """
    tensors: dict[str, np.ndarray] = {}
    rows = adaptable(model.config)
    for site in adapter.sites:
        stacked = bool(rows[site.path].layers)
        for number, name in enumerate(module_names(rows[site.path])):
            if not (rank := site.ranks[number]):
                continue
            for leaf, (suffix, transposed) in _suffixes(site.path).items():
                if leaf not in adapter.params[site.path]:
                    continue
                value = np.asarray(adapter.params[site.path][leaf][number] if stacked else adapter.params[site.path][leaf])
                value = value[:rank] if leaf == "a" else value[:, :rank] if leaf == "b" else value
                tensors[f"{PREFIX}{name}.{suffix}"] = np.ascontiguousarray(value.T if transposed else value)
    tensors |= {PREFIX + spec(model.config)[path].hf: np.asarray(value) for path, value in adapter.saved.items()}
    with new_folder(out) as folder:
        write_json(folder / "adapter_config.json", _config_json(adapter, model))
        plans = [Plan(name, value.dtype, value.shape) for name, value in tensors.items()]
        write_file(folder / "adapter_model.safetensors", plans, tensors.__getitem__)
    return Path(out)


def _config_json(adapter: Adapter, model: Model) -> dict[str, Any]:
    """What PEFT writes; `all-linear` is spelled out, as PEFT does."""
    fields, rows = adapter.config.to_dict(), adaptable(model.config)
    targets = fields["target_modules"]
    if targets == "all-linear":
        targets = sorted({name.rsplit(".", 1)[-1] for site in adapter.sites for name in module_names(rows[site.path])})
    if adapter.saved:
        fields["modules_to_save"] = sorted({spec(model.config)[path].hf.rsplit(".", 1)[0] for path in adapter.saved})
    task = TASKS[model.config.labels_of] if model.config.num_labels else "CAUSAL_LM"
    return fields | {
        "peft_type": "LORA", "task_type": task, "inference_mode": True, "base_model_name_or_path": model.source,
        "target_modules": targets, "fan_in_fan_out": any(rows[site.path].transposed for site in adapter.sites),
    }  # fmt: skip


def load_adapter(path: str | os.PathLike, model: Model) -> Adapter:
    """A PEFT LoRA folder as an adapter for `model`.

    Raises ModelError for another kind of adapter, a field we cannot honour, and tensors that are missing, extra or of the wrong
    shape, naming them.
    """
    path = Path(path).expanduser()
    if not (path / "adapter_config.json").is_file():
        raise ModelError(f"{path} holds no adapter_config.json; give the folder that PEFT (or jaxtune) saved an adapter to")
    config = _read_config(read_json(path / "adapter_config.json"), path)
    checkpoint = Safetensors(path, stem="adapter_model")
    left = dict(checkpoint.entries)
    saved = _saved(checkpoint, model, left)
    params, sites = {}, []
    for name, row in adaptable(model.config).items():
        found = [{leaf: f"{PREFIX}{module}.{suffix}" for leaf, (suffix, _) in _suffixes(name).items()} for module in module_names(row)]
        found = [{leaf: tensor for leaf, tensor in names.items() if tensor in left} for names in found]
        if not any(found):
            continue
        ranks, scales, layers = [], [], []
        for module, names in zip(module_names(row), found, strict=True):
            tensors = {leaf: checkpoint.read(tensor).astype(np.float32) for leaf, tensor in names.items()}
            tensors = {leaf: x.T if _suffixes(name)[leaf][1] else x for leaf, x in tensors.items()}
            rank, scale = rank_and_scale(module, config) if names else (0, 0.0)
            _check(path, module, tensors, row.shape[-2:], rank)
            ranks, scales, layers = [*ranks, rank], [*scales, scale], [*layers, tensors]
            for tensor in names.values():
                left.pop(tensor)
        params[name] = _stack(layers, row.shape[-2:], max(ranks), bool(row.layers))
        sites.append(Site(name, tuple(ranks), tuple(scales)))
    _ignore_copies(path, model, checkpoint, left)
    if not model.config.num_labels and any(name.removeprefix(PREFIX).split(".")[0] in HEADS for name in left):
        raise ModelError(f"{path} has a scoring head, and this is a language model; open the two with jt.load_scorer({str(path)!r})")
    if left:
        first = sorted(left)[0]
        raise ModelError(f"{path}: {len(left)} tensors fit no module of this model, the first {first}; is it for another model?")
    return Adapter(params=params, sites=tuple(sites), config=config, saved=saved)


def _saved(checkpoint: Safetensors, model: Model, left: dict) -> dict[str, jnp.ndarray]:
    """The scoring head beside the adapter, taken out of `left`."""
    found = {}
    for path, row in spec(model.config).items():
        if path in heads.PATHS and left.pop(name := PREFIX + row.hf, None) is not None:
            value = checkpoint.read(name).astype(np.float32)
            if value.shape != row.shape:
                raise ModelError(f"{name} is {value.shape}, but the model's head is {row.shape}; give the model as many labels")
            found[path] = jnp.asarray(value)
    return found


def _ignore_copies(path: Path, model: Model, checkpoint: Safetensors, left: dict) -> None:
    """Take out the whole matrices that PEFT writes beside the adapter of an embedding or head; they must be the model's own."""
    for name, row in adaptable(model.config).items():
        for module in module_names(row) if name in ("embed", "head") else ():
            if left.pop(tensor := f"{PREFIX}{module}.base_layer.weight", None) is None:
                continue
            own = np.asarray(dense(model.params.get(name, model.params["embed"]), jnp.float32))
            saved = checkpoint.read(tensor).astype(np.float32)
            if saved.shape != own.shape or not np.allclose(saved, own, rtol=1e-2, atol=1e-4):
                raise ModelError(f"{path}: {tensor} is not the matrix of this model; the adapter was trained over another, or resized, one")


def _read_config(saved: dict[str, Any], path: Path) -> LoraConfig:
    if saved.get("peft_type") != "LORA":
        raise ModelError(f"{path} is an adapter of type {saved.get('peft_type')}; LORA is what can be opened")
    for field, nothing in NOT_HERE.items():
        if field == "modules_to_save" and set(saved.get(field) or ()) <= HEADS:
            continue
        if saved.get(field) not in (None, nothing, [], {}):
            raise ModelError(f"{path}/adapter_config.json has {field}={saved[field]!r}, which is not supported")
    ours = {field.name for field in dataclasses.fields(LoraConfig)} & saved.keys() - NOT_HERE.keys()
    kept = {name: saved[name] for name in ours if saved[name] is not None and name != "init_lora_weights"}
    return LoraConfig(**({"r": 8, "lora_alpha": 8} | kept))  # PEFT's defaults, where the file leaves them out


def _check(path: Path, module: str, tensors: dict[str, np.ndarray], shape: tuple[int, int], rank: int) -> None:
    if not tensors:
        return
    out, width = shape
    wanted = {"a": (rank, width), "b": (out, rank), "magnitude": (out,)}
    for leaf in ("a", "b"):
        if leaf not in tensors:
            raise ModelError(f"{path}: the adapter of {module} lacks its {leaf.upper()} matrix")
    for leaf, tensor in tensors.items():
        if tensor.shape != wanted[leaf]:
            raise ModelError(f"{path}: {leaf.upper()} of {module} is {tensor.shape}, but this model and its config ask for {wanted[leaf]}")


def _stack(layers: list[dict[str, np.ndarray]], shape: tuple[int, int], rank: int, stacked: bool) -> dict:
    """Per-layer pairs, padded with zeros to one rank, stacked in front."""
    out, width = shape
    full = {"a": (rank, width), "b": (out, rank), "magnitude": (out,)}
    leaves = {}
    for leaf in ("a", "b", "magnitude"):
        if not any(leaf in tensors for tensors in layers):
            continue
        stack = np.zeros((len(layers), *full[leaf]), np.float32)
        for number, tensors in enumerate(layers):
            if leaf in tensors:
                stack[(number, *(slice(size) for size in tensors[leaf].shape))] = tensors[leaf]
        leaves[leaf] = jnp.asarray(stack if stacked else stack[0])
    return leaves
