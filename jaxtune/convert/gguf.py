"""Read GGUF files: llama.cpp's metadata as a config.json, and its tensors under Hugging Face's names and in Hugging Face's layout."""

import re
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from jaxtune.convert import gguf_layout, gguf_rope
from jaxtune.convert.gguf_architectures import MODEL_TYPES, config_of
from jaxtune.convert.gguf_file import GGUFFile, GGUFTensor, Metadata
from jaxtune.convert.names import cells
from jaxtune.errors import ModelError
from jaxtune.model.families import ModelConfig, heads
from jaxtune.model.spec import spec


class GGUFCheckpoint:
    """The tensors of a GGUF file as a `Checkpoint`: Hugging Face's names, shapes and layout."""

    def __init__(self, file: GGUFFile, config: ModelConfig):
        self.file, self.config = file, config
        self.entries: dict[str, Any] = {}
        self._places: dict[str, tuple[str, tuple[str, ...], tuple[int, ...]]] = {}
        self._stack: tuple[str, np.ndarray] = ("", np.zeros(0))
        self.rows = spec(config)
        for cell in cells(self.rows):
            row, expert = self.rows[cell.path], cell.index[1:]
            if (key := gguf_layout.number_key(row)) in file.metadata:
                self.entries[cell.name] = GGUFTensor(file.path, GGMLQuantizationType.F32, cell.shape, 0)
                self._places[cell.name] = (cell.path, (str(key), str(row.layers[cell.index[0]])), ())
                continue
            stored = gguf_layout.names(config, cell.path, row, cell.index)
            if not all(name in file.tensors for name in stored):
                continue
            tensor = file.tensors[stored[0]]
            fits = [file.tensors[name].shape for name in stored] == gguf_layout.shapes(config, cell.path, row)
            shape = tensor.shape[len(expert) :]  # for the resulting error
            self.entries[cell.name] = tensor._replace(shape=cell.shape if fits else shape[::-1] if cell.transposed else shape)
            self._places[cell.name] = (cell.path, stored, expert)
        used = {name for _, names, _ in self._places.values() for name in names} | set(gguf_rope.TENSORS)
        self.entries |= {name: tensor for name, tensor in file.tensors.items() if name not in used and not self._is_ahead(name)}

    def read(self, name: str) -> np.ndarray:
        """One tensor, decoded and converted to Hugging Face's layout."""
        path, stored, expert = self._places[name]
        if gguf_layout.number_key(self.rows[path]):
            layers, numbers = self.config.num_layers, self.file.metadata[stored[0]]
            numbers = numbers if isinstance(numbers, list) else [numbers] * layers
            if len(numbers) != layers or not all(isinstance(number, (int, float)) for number in numbers):
                raise ModelError(f"{self.file.path}: the metadata's {stored[0]} is no number for each of the model's {layers} layers")
            return np.full(self.entries[name].shape, numbers[int(stored[1])], np.float32)
        if expert:  # all of a layer's experts are one tensor, which is decoded once for consecutive reads
            if self._stack[0] != stored[0]:
                self._stack = (stored[0], self.file.read(stored[0]))
            return self._stack[1][expert]
        value = gguf_layout.to_hf(self.config, path, self.rows[path], tuple(self.file.read(name) for name in stored))
        return value.reshape(self.entries[name].shape)

    def _is_ahead(self, name: str) -> bool:
        """Whether it belongs to a layer that predicts tokens after the next one; those are ignored."""
        layer = re.match(r"blk\.(\d+)\.", name)
        return bool(layer and Metadata(self.file).get("nextn_predict_layers") and int(layer[1]) >= self.config.num_layers)


def gguf_config(file: GGUFFile) -> dict:
    """The config.json of this model. ModelError for an architecture with unknown switches."""
    m = Metadata(file)
    if file.metadata.get("general.type") == "adapter":
        raise ModelError(
            f"{file.path} is an adapter, which llama.cpp adds to its base (--lora), and no model; give the base here, and the adapter as "
            "the folder that PEFT (or jaxtune) saved it to"
        )
    if not isinstance(m.architecture, str) or m.architecture not in MODEL_TYPES:
        raise ModelError(f"{file.path}: architecture {m.architecture!r} is not supported; supported are {', '.join(MODEL_TYPES)}")
    norms = {"olmo": (), "lfm2": ("token_embd_norm.weight",), "lfm2moe": ("token_embd_norm.weight",)}  # OLMo's have no weights
    for needed in ("token_embd.weight", *norms.get(m.architecture, ("output_norm.weight",))):
        if needed not in file.tensors:
            raise ModelError(f"{file.path}: tensor {needed} is missing; the file holds a vocabulary or a part of a model")
    try:
        hf = config_of(m)
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:  # of a value's type, or of how many there are
        raise ModelError(f"{file.path}: the metadata holds a value of the wrong kind ({error}). Fetch the file again") from error
    hf["architectures"] = [heads.language_class(hf["model_type"])]
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    return hf | {names[key]: number for key, number in _special_tokens(file).items() if key in names}


def generation_config(file: GGUFFile) -> dict:
    """generation_config.json: the special tokens, including every token that ends a turn."""
    ids = _special_tokens(file)
    ends = list(dict.fromkeys(ids[key] for key in ("eos", "eot", "eom") if key in ids))
    eos = ends if len(ends) > 1 else next(iter(ends), None)
    named = {"bos_token_id": ids.get("bos"), "eos_token_id": eos, "pad_token_id": ids.get("padding")}
    return {key: value for key, value in named.items() if value is not None}


def _special_tokens(file: GGUFFile) -> dict[str, int]:
    """The special tokens that the file names."""
    keys = {name: f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "eot", "eom", "padding")}
    found = {name: file.metadata[key] for name, key in keys.items() if key in file.metadata}
    if wrong := next((name for name, number in found.items() if type(number) is not int), None):
        raise ModelError(f"{file.path}: {keys[wrong]} is {found[wrong]!r}; it has to be a token id. Fetch the file again")
    return found
