"""Value heads (objective ppo), stored beside the adapter or model that a run has trained.

`value_head.safetensors` in its folder: `v_head.summary.weight [1, D]` and `v_head.summary.bias [1]`, with the names of TRL's
`AutoModelForCausalLMWithValueHead` and LLaMA-Factory's file name. PEFT and transformers ignore it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune import parallel
from jaxtune.convert.tensors import Plan, Safetensors, write_file
from jaxtune.errors import ModelError
from jaxtune.model.families import heads

FILE = "value_head.safetensors"


def without(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by path without those of a value head."""
    return {path: leaf for path, leaf in leaves.items() if path not in heads.VALUE}


def write(folder: Path, leaves: Mapping[str, Any]) -> None:
    """Write the file, if there is a value head among the leaves (by path)."""
    tensors = {name: np.asarray(parallel.fetch(leaves[path])) for path, name in heads.VALUE.items() if path in leaves}
    if tensors:
        write_file(folder / FILE, [Plan(name, value.dtype, value.shape) for name, value in tensors.items()], tensors.__getitem__)


def read(folder: Path, width: int) -> dict[str, np.ndarray] | None:
    """The value head of a folder, for states of `width` numbers; None if it has none. ModelError for one of another model."""
    if not (folder / FILE).is_file():
        return None
    source, found = Safetensors(folder / FILE), {}
    for (path, name), shape in zip(heads.VALUE.items(), ((1, width), (1,)), strict=True):
        if name not in source.entries or source.entries[name].shape != shape:
            raise ModelError(f"{folder / FILE} holds no {name} of shape {shape}: it is the value head of another model; take it away")
        found[path] = source.read(name).astype(np.float32)
    return found
