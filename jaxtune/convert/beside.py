"""What a checkpoint of several modalities holds beside its language model: kept as it lies in the file, and written again byte for byte."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.convert.tensors import Entry, Plan, Safetensors
from jaxtune.errors import ModelError
from jaxtune.model.families import NESTED, ModelConfig, nested
from jaxtune.model.families.nested import MODULES

STEMS = (MODULES, "language_model.model.", "model.")  # before a text model's names, the longer first
HEADS = ("lm_head.", "language_model.lm_head.")
# a processor's files, which go with the tensors
FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.json")
PACKED = (".SCB", ".quant_map")  # how the name of a tensor ends that bitsandbytes has put beside a packed one


class Beside:
    """The tensors and files beside a language model.

    The files of tensors are mapped into memory, and the small ones read, when the model is opened: what was there when a run began can be
    written at its end, whatever has become of the folder.
    """

    def __init__(self, folder: Path, entries: dict[str, Entry], stem: str, head: str):
        self.folder, self.entries, self.stem, self.head = folder, entries, stem, head
        self.files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
        self._maps = {file: np.memmap(file, np.uint8, "r") for file in {entry.file for entry in entries.values()}}

    def read(self, name: str) -> np.ndarray:
        """One tensor, as it lies in the file."""
        entry = self.entries[name]
        return self._maps[entry.file][entry.start : entry.start + entry.nbytes].view(entry.dtype).reshape(entry.shape)

    def name(self, name: str) -> str:
        """What the file calls a tensor of the language model."""
        return self.stem + name.removeprefix("model.") if name.startswith("model.") else name.replace("lm_head.", self.head)

    def add(self, plans: list[Plan], make: Callable[[str], np.ndarray]) -> tuple[list[Plan], Callable[[str], np.ndarray]]:
        """The plans and `make` of a language model's tensors under the file's names, with what is beside them.

        Raises ModelError where bitsandbytes has packed that, which config.json can say of all tensors only.
        """
        if packed := [name for name in self.entries if name.endswith(PACKED)]:
            raise ModelError(f"{self.folder}: {packed[0]}: what is beside the language model is packed too; take the model before packing")
        own = {self.name(plan.name): plan.name for plan in plans}
        renamed = [plan._replace(name=name) for name, plan in zip(own, plans, strict=True)]
        others = [Plan(name, entry.dtype, entry.shape) for name, entry in self.entries.items()]
        return renamed + others, lambda name: make(own[name]) if name in own else self.read(name)

    def leave_dense(self, config: ModelConfig, described: dict[str, Any]) -> None:
        """Say in a packed model's config.json that this is not packed, and the language model's modules under transformers' names."""
        if settings := described.get("quantization_config"):
            own = [nested.module(config, name) for name in settings.get("llm_int8_skip_modules") or ["lm_head"]]
            settings["llm_int8_skip_modules"] = own + [f"model.{name.rstrip('.')}" for name in NESTED[config.outer].beside]

    def write_files(self, folder: Path) -> None:
        """The processor's files."""
        for name, data in self.files.items():
            (folder / name).write_bytes(data)


def set_apart(checkpoint: Safetensors, config: ModelConfig, folder: Path) -> Beside | None:
    """Leave a checkpoint its language model alone, under a text model's names; returns the rest. None for what is no more than that."""
    if not config.outer:
        return None
    outer, entries = NESTED[config.outer], checkpoint.entries
    others = {name: entry for name, entry in entries.items() if name.removeprefix("model.").startswith(outer.beside)}
    own = [name for name in entries if name not in others]
    stem = next((stem for stem in STEMS if any(name.startswith(stem) for name in own)), outer.stem)
    head = HEADS[1] if stem == STEMS[1] else HEADS[0]
    checkpoint.entries = {_text_name(name, stem): entries[name] for name in own}
    return Beside(folder, others, stem, head)


def _text_name(name: str, stem: str) -> str:
    head = next((head for head in HEADS if name.startswith(head)), None)
    if head:
        return "lm_head." + name.removeprefix(head)
    return "model." + name.removeprefix(stem) if name.startswith(stem) else name
