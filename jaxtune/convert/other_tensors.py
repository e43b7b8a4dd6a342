"""The other tensors of a multimodal checkpoint: kept as they are in the file, and written again byte for byte."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.convert.tensors import Entry, Plan, Safetensors, read_entry
from jaxtune.errors import ModelError
from jaxtune.model.families import NESTED, ModelConfig, nested
from jaxtune.model.families.nested import MODULES

STEMS = (MODULES, "language_model.model.", "model.")  # in front of a text model's names; the longer prefix first
HEADS = ("lm_head.", "language_model.lm_head.")
# a processor's files, which go with the tensors
FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.json")
PACKED = (".SCB", ".quant_map")  # suffixes of the tensors that bitsandbytes stores beside a quantised one


class OtherTensors:
    """The tensors and files beside a language model.

    The tensor files are memory-mapped and the small ones read when the model is opened, so a run can write them at its end, whatever has
    become of the folder.
    """

    def __init__(self, folder: Path, entries: dict[str, Entry], stem: str, head: str, turned: frozenset[str]):
        self.folder, self.entries, self.stem, self.head, self.turned = folder, entries, stem, head, turned
        self.files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
        self._maps = {file: np.memmap(file, np.uint8, "r") for file in {entry.file for entry in entries.values()}}

    def read(self, name: str) -> np.ndarray:
        """One tensor as it is in the file; tensors that are dequantised while reading, in the dtype to store them in."""
        entry = self.entries[name]
        if entry.packed:
            return read_entry(name, entry).astype(entry.dtype)
        return self._maps[entry.file][entry.start : entry.start + entry.nbytes].view(entry.dtype).reshape(entry.shape)

    def name(self, name: str) -> str:
        """The file's name for a tensor of the language model."""
        return self.stem + name.removeprefix("model.") if name.startswith("model.") else name.replace("lm_head.", self.head)

    def add(self, plans: list[Plan], make: Callable[[str], np.ndarray]) -> tuple[list[Plan], Callable[[str], np.ndarray]]:
        """The plans and `make` of a language model's tensors under the file's names, together with the other tensors.

        Raises ModelError if those are quantised by bitsandbytes, which config.json can only say of all tensors.
        """
        if packed := [name for name in self.entries if name.endswith(PACKED)]:
            raise ModelError(f"{self.folder}: {packed[0]}: what is beside the language model is packed too; take the model before packing")
        own = {self.name(plan.name): plan.name for plan in plans}
        turned = [plan._replace(shape=_swapped(plan.shape)) if plan.name in self.turned else plan for plan in plans]
        renamed = [plan._replace(name=name) for name, plan in zip(own, turned, strict=True)]
        others = [Plan(name, entry.dtype, entry.shape) for name, entry in self.entries.items()]

        def make_own(name: str) -> np.ndarray:
            return make(name).swapaxes(1, 2) if name in self.turned else make(name)

        return renamed + others, lambda name: make_own(own[name]) if name in own else self.read(name)

    def leave_dense(self, config: ModelConfig, described: dict[str, Any]) -> None:
        """Record in a quantised model's config.json that these tensors are not quantised, and the language model's modules under
        transformers' names."""
        if settings := described.get("quantization_config"):
            own = [nested.module(config, name) for name in settings.get("llm_int8_skip_modules") or ["lm_head"]]
            outer = NESTED[config.outer]
            before = "model." if outer.modules[0].startswith("model.") else ""
            passed = [f"{outer.modules[0]}layers.{layer}" for layer in nested.passed_layers(config)]
            settings["llm_int8_skip_modules"] = own + passed + [f"{before}{name.rstrip('.')}" for name in outer.other_prefixes]

    def write_files(self, folder: Path) -> None:
        """The processor's files."""
        for name, data in self.files.items():
            (folder / name).write_bytes(data)


class Turned:
    """A checkpoint whose tensors `names`, of all experts of a layer, are stored as `[E, in, out]`; here they are `[E, out, in]`."""

    def __init__(self, source: Safetensors, names: frozenset[str]):
        self.source, self.names = source, names
        self.entries = {name: e._replace(shape=_swapped(e.shape)) if name in names else e for name, e in source.entries.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        value = self.source.read(name)
        return value.swapaxes(1, 2) if name in self.names else value

    def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """`read(name)[index]`; of an expert the first two of `index`."""
        if name not in self.names:
            return self.source.read_part(name, index)
        experts, out = index
        return self.source.read_part(name, (experts, slice(None), out)).swapaxes(1, 2)


def set_apart(checkpoint: Safetensors, config: ModelConfig, folder: Path) -> tuple[Safetensors | Turned, OtherTensors | None]:
    """A checkpoint's language model alone, under a text model's names, and the rest: None if there is no rest."""
    if not config.outer:
        return checkpoint, None
    outer, entries = NESTED[config.outer], checkpoint.entries
    others = {name: entry for name, entry in entries.items() if name.removeprefix("model.").startswith(outer.other_prefixes)}
    own = [name for name in entries if name not in others]
    stem = next((stem for stem in (outer.modules[0], *STEMS) if any(name.startswith(stem) for name in own)), outer.stem)
    head = HEADS[1] if stem == STEMS[1] else HEADS[0]
    others |= {name: entries[name] for name in own if nested.is_passed(config, _text_name(name, stem))}
    own = [name for name in own if name not in others]
    checkpoint.entries = {_text_name(name, stem): entries[name] for name in own}
    turned = frozenset(name for name, entry in checkpoint.entries.items() if outer.together and _lies_turned(name, entry, config))
    return Turned(checkpoint, turned) if turned else checkpoint, OtherTensors(folder, others, stem, head, turned)


def _lies_turned(name: str, entry: Entry, config: ModelConfig) -> bool:
    """Whether a tensor of experts is stored as `[E, in, out]`, as on the hub, unlike what transformers 5 writes."""
    assert config.moe is not None
    width, inner = config.hidden_size, config.moe.intermediate_size
    shapes = {"mlp.experts.gate_up_proj": (width, 2 * inner), "mlp.experts.down_proj": (inner, width)}
    return any(name.endswith(end) and entry.shape[1:] == shape for end, shape in shapes.items())


def _swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2])


def _text_name(name: str, stem: str) -> str:
    head = next((head for head in HEADS if name.startswith(head)), None)
    if head:
        return "lm_head." + name.removeprefix(head)
    return "model." + name.removeprefix(stem) if name.startswith(stem) else name
