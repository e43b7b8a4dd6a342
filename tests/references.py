"""Tiny models with known logits (tests/goldens, written by tools/make_goldens.py), and ways to lay out their documents in a batch."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxtune.convert.names import spellings
from jaxtune.model.families import nested
from jaxtune.model.spec import spec
from jaxtune.tree import unflatten

GOLDENS = Path(__file__).parent / "goldens"
# names beside a language model, and within it
BESIDE = re.compile(r"(model\.)?(vision_tower|vision_model|multi_modal_projector|connector|visual|embed_vision|vision_embedder)\.")
PREFIX = re.compile(r"(model\.language_model|model\.text_model|language_model\.model|model)\.|(language_model\.)(?=lm_head)")
CASES = sorted(path.stem for path in GOLDENS.glob("*.npz"))
# their text families have separate cases
NESTED = {"cohere2_vision", "gemma3_nested", "gemma4_nested", "gemma4_unified", "glm4v", "llama4_nested", "llava", "mistral3", "mllama",
          "qwen2_5_vl", "qwen2_vl", "qwen3_5_moe_nested", "qwen3_5_nested", "qwen3_vl",
          "qwen3_vl_moe", "smolvlm"}  # fmt: skip
# multimodal types without a case of their own -> the case of their language model
ALIKE = {"apertus1p5": "apertus1p5", "aya_vision": "cohere2_vision", "exaone4_5": "exaone4", "gemma3n": "gemma3n",
         "glm46v": "glm4v", "glm4v_moe": "glm4_moe", "granite4_vision": "granite",
         "idefics3": "smolvlm", "internvl": "llava", "lfm2_vl": "lfm2", "lfm3_vl": "lfm3", "llava_next": "llava",
         "llava_onevision": "llava"}  # fmt: skip
TEXT = [case for case in CASES if case not in NESTED]


class Golden(NamedTuple):
    """A golden file: both spellings of config.json, the language model's tensors by Hugging Face name, documents, logits by layout.

    `files` are all tensors under the file's names: those of a multimodal checkpoint have a prefix, and there are others.
    """

    config: dict
    hub: dict
    tensors: dict[str, np.ndarray]
    files: dict[str, np.ndarray]
    documents: list[np.ndarray]
    logits: dict[str, list[np.ndarray]]


def load(case: str) -> Golden:
    arrays = dict(np.load(GOLDENS / f"{case}.npz"))
    files = {name.removeprefix("tensor/"): a.astype(np.float32) for name, a in arrays.items() if name.startswith("tensor/")}
    count = sum(name.startswith("tokens/") for name in arrays)
    logits = {kind: [arrays[f"{kind}/{i}"] for i in range(count)] for kind in ("alone", "right", "left")}
    config, hub = json.loads(str(arrays["config"])), json.loads(str(arrays["hub"]))
    return Golden(config, hub, language_model(config, files), files, [arrays[f"tokens/{i}"] for i in range(count)], logits)


def alike(outer: str) -> dict:
    """config.json of a type in `ALIKE`."""
    text = load(ALIKE[outer]).hub
    text = text.get("text_config", text)
    return {"model_type": outer, "text_config": text | {"model_type": next(iter(nested.NESTED[outer].texts))}, "vision_config": {}}


def language_model(config: dict, files: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a file's language model, named as in a file with nothing else."""
    if "vision_config" not in config:
        return files
    named = {PREFIX.sub(lambda found: "" if found[2] else "model.", name): a for name, a in files.items() if not BESIDE.match(name)}
    passed = tuple(f"model.layers.{layer}." for layer in config["text_config"].get("cross_attention_layers", ()))
    return {name: a for name, a in named.items() if not name.startswith(passed)}


def tree(config, tensors: dict[str, np.ndarray]) -> dict:
    """The parameter tree from Hugging Face's tensors, through the row table; every tensor is used once."""
    left, flat = dict(tensors), {}
    for path, row in spec(config).items():
        names = [called(name, tensors) for name in row.hf_names()]
        parts = [of_file(row, tensors[name]) for name in names]
        for name in names:
            left.pop(name, None)
        flat[path] = jnp.asarray(np.stack(parts).reshape(row.shape))
    assert not left, f"not in the row table: {sorted(left)}"
    return unflatten(flat)


def called(name: str, tensors: dict[str, np.ndarray]) -> str:
    """A tensor's name among those of a file."""
    return next(found for found in spellings(name) if found in tensors)


def of_file(row, tensor: np.ndarray) -> np.ndarray:
    """A file's tensor in its row's form: transposed, or for experts in one tensor the row's own outputs."""
    tensor = tensor.swapaxes(-1, -2) if row.transposed else tensor
    return tensor if row.part is None else tensor[:, row.part.outputs(row.shape[2])]


class Layout(NamedTuple):
    """A batch: int32 `[B, T]` each, and the place of each document in it, (row, slice)."""

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    places: list[tuple[int, slice]]

    def documents_of(self, batch) -> list[np.ndarray]:
        return [np.asarray(batch)[row, place] for row, place in self.places]


def layout(documents: list[np.ndarray], kind: str, alike: bool = False) -> Layout:
    """"alone": the first document; "right", "left": one row each, padded; "packed": one row, padded at its end.

    `alike`: the same shape for all kinds, with more padding.
    """
    documents = documents[:1] if kind == "alone" else documents
    lengths = [len(document) for document in documents]
    width = sum(lengths) + 2 if kind == "packed" else max(lengths) + (kind != "alone")
    rows = 1 if kind == "packed" and not alike else len(documents)
    width = sum(lengths) + 2 if alike else width
    starts = np.cumsum([0, *lengths]) if kind == "packed" else [width - n if kind == "left" else 0 for n in lengths]
    places = [(0 if kind == "packed" else i, slice(int(starts[i]), int(starts[i]) + n)) for i, n in enumerate(lengths)]
    tokens, positions, segments = np.zeros((3, rows, width), np.int32)
    for i, (document, (row, place)) in enumerate(zip(documents, places, strict=True)):
        tokens[row, place], positions[row, place], segments[row, place] = document, np.arange(len(document)), i + 1
    return Layout(tokens, positions, segments, places)
