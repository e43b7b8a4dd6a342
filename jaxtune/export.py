"""Export the result of a run in other formats.

    jaxtune export runs/first exported --merge                      a model folder, with the adapter merged into the base
    jaxtune export runs/first exported                              the adapter, for PEFT; the model, after full tuning
    jaxtune export runs/first exported --format gguf --type q4_k_m  for llama.cpp and Ollama
    jaxtune export runs/first exported --format gguf-lora           the adapter alone, for llama.cpp's --lora
    jaxtune export org/name exported --format gguf                  any model, converted
    jaxtune export google/gemma-3-4b-it exported --format text      the language model of a multimodal checkpoint

RUN is a run folder, an adapter folder, or a model (a folder, a .gguf file, a hub id). A merged model is written tensor by tensor and then
verified: its logits are compared with those of base and adapter on real prompts.
"""

import contextlib
import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtune import cli, errors
from jaxtune.config import Config, load_config
from jaxtune.convert import check, heads, hf
from jaxtune.convert.bitsandbytes import Bitsandbytes
from jaxtune.convert.folders import check_new, new_file, new_folder
from jaxtune.convert.gguf_adapter import ADAPTER_TYPES, save_gguf_adapter
from jaxtune.convert.gguf_out import save_gguf
from jaxtune.convert.gguf_types import TYPES
from jaxtune.convert.load import DTYPES, Model, Opened, load, open_model, quantizer, read_model, stored_dtype
from jaxtune.convert.merge import Packed, composed
from jaxtune.convert.modelfile import modelfile
from jaxtune.convert.peft import load_adapter
from jaxtune.convert.quantised import format_of
from jaxtune.convert.retokenised import beside
from jaxtune.convert.tensors import Safetensors, check_finite, read_json
from jaxtune.convert.tokenizer import TEMPLATES
from jaxtune.data.prompts import questions
from jaxtune.data.tokenizer import listed
from jaxtune.errors import ConfigError, JaxtuneError, ModelError
from jaxtune.model.families import nested
from jaxtune.model.families.heads import language_class
from jaxtune.model.spec import abstract
from jaxtune.peft import compose, kind_of
from jaxtune.runfolder import base_of

log = logging.getLogger("jaxtune")

FORMATS = ("hf", "text", "peft", "gguf", "gguf-lora")
# The largest logit difference, and the smallest share of equal next tokens, that rounding the merged weights may cause: for float32 ten
# times, and for bfloat16 twice, what it caused for SmolLM2 with a strong adapter (2.5e-4, 0.33; 5.0 with 99 % equal). A wrong merge causes
# tens and agrees by chance. With coarse GGUF types the loss is the user's choice, and the bounds only make sure that it is the same model
# (SmolLM2 in q4_k_m: 7.9, 82 %; in q2_k: 22, 57 %).
BOUNDS = {"float32": (1e-2, 0.99), "float16": (3.0, 0.97), "bfloat16": (10.0, 0.95)}
BOUNDS |= {"f32": BOUNDS["float32"], "f16": BOUNDS["float16"], "bf16": BOUNDS["bfloat16"]}
BOUNDS |= {name: (40.0, 0.25) if name.startswith(("q2", "q3")) else (20.0, 0.5) for name in TYPES if name not in BOUNDS}


@dataclasses.dataclass(frozen=True)
class Found:
    """What to export: a base with an adapter folder, or a model alone; and the run it came from."""

    base: str
    adapter: Path | None
    config: Config | None

    @property
    def dtype(self) -> str:
        """The dtype that the run computed in."""
        return self.config.dtype if self.config else "float32"

    @property
    def quantization(self) -> str | None:
        """How the run quantised its base."""
        return self.config.quantization if self.config else None


class Target(NamedTuple):
    """What to write: the new folder or file, its format, the type of a GGUF file, and the dtype of any other (None: as stored)."""

    out: Path
    format: str
    type: str
    dtype: str | None


def export(
    run: str | os.PathLike,
    out: str | os.PathLike,
    merge: bool = False,
    format: str | None = None,
    *,
    type: str | None = None,
    dtype: str | None = None,
    bound: float | None = None,
) -> Path:
    """Write the result of a run, or any model, to the new folder `out` (or, for GGUF, to the new file `NAME.gguf`); returns its path.

    merge   merge the adapter into its base. A base that was quantised for training is merged in its dequantised form, in 16 bits
    format  "hf": a folder for transformers and vLLM; "text": such a folder with the language model of a multimodal checkpoint, under its
            own model_type; "peft": the adapter as it is; "gguf": a file for llama.cpp, with a Modelfile for Ollama; "gguf-lora": a LoRA
            adapter for llama.cpp, used with its base. The default is peft for an adapter that is not merged and hf otherwise; hf, text and
            gguf merge an adapter
    type    type of a GGUF file's matrices: f16 by default, or q4_k_m and others (`convert.gguf_types.TYPES`); for adapters f32, f16, bf16
    dtype   dtype of a model folder's tensors: float32, bfloat16 or float16; the base's own by default
    bound   the largest accepted difference of logits; the default depends on the dtype (`BOUNDS`)

    Raises ModelError if the merged model's logits differ from those of base and adapter, and for anything that cannot be read or written.
    """
    check_new(out)
    found = find(run)
    format = format or ("peft" if found.adapter and not merge else "hf")
    type = (type or ("f32" if format == "gguf-lora" else "f16")).lower()
    _check_arguments(found, merge, format, type, dtype)
    if format == "peft":
        return _copy_adapter(found, Path(out))
    opened, head = open_model(found.base), _head(found)
    opened = beside([found.adapter], opened) if found.adapter else opened
    if format.startswith("gguf") and (head or opened.config.num_labels):
        raise ModelError(f"{run} scores texts, and GGUF files are supported for language models only; export it with --format hf")
    if format == "text" and not opened.config.outer:
        raise ModelError(f"{run} is not a multimodal checkpoint; export it with --format hf")
    if format == "text" and opened.config.file_layers:
        raise ModelError(f"a {opened.config.outer} model's layers for text are no model of transformers' alone; export it with --format hf")
    if format == "text" and opened.config.together:
        raise ModelError(f"the files of a {opened.config.outer} model hold experts as a text model's do not; export it with --format hf")
    if format == "gguf-lora":
        return _write_pairs(found, opened, Path(out), type)
    target = Target(Path(out), format, type, dtype)
    if found.adapter is None:
        with _new(target.out, format) as folder:
            _write(opened, abstract(opened.config), opened.checkpoint, folder, target)
        return target.out
    return _merge(found, opened, head, target, bound)


def find(run: str | os.PathLike) -> Found:
    """What a path or name refers to."""
    path = Path(run).expanduser()
    adapter = path if (path / "adapter_config.json").is_file() else path / "adapter"
    if (adapter / "adapter_config.json").is_file():
        folder = next((folder for folder in (path, path.parent) if (folder / "config.yaml").is_file()), None)
        config = load_config(folder / "config.yaml") if folder else None
        base = base_of(folder, config) if folder and config else read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            given = f"has base_model_name_or_path={base!r}" if base else "has no base_model_name_or_path"
            raise ModelError(f"{adapter}/adapter_config.json {given}, so its base is unknown; write the model's folder or hub id")
        return Found(base, adapter, config)
    inside = [file.parent for file in path.glob("*/run.json")]
    if inside and not any((path / name).is_file() for name in ("run.json", "config.json")):
        names = ", ".join(sorted(folder.name for folder in inside)[:10])
        raise ModelError(f"{path} holds several runs; name one of them (there are {names}{', ...' if len(inside) > 10 else ''})")
    if (path / "config.yaml").is_file():
        if not (path / "model" / "config.json").is_file():
            raise ModelError(f"{path} is a run without a result (no adapter/, no model/); let it finish, or continue it with resume=true")
        return Found(str(path / "model"), None, load_config(path / "config.yaml"))
    return Found(os.fspath(run), None, None)


def _check_arguments(found: Found, merge: bool, format: str, type: str, dtype: str | None) -> None:
    if format not in FORMATS:
        raise ConfigError(f"format {format!r} is not known; there are {', '.join(FORMATS)}")
    if format in ("peft", "gguf-lora") and (merge or not found.adapter):
        raise ConfigError(f"format {format} is for an adapter as it is; a merged or whole model is hf, text or gguf")
    if merge and not found.adapter:
        raise ConfigError(
            f"there is no adapter to merge: {found.base} is not a local run or adapter folder; name one, or leave out --merge"
        )
    types = ADAPTER_TYPES if format == "gguf-lora" else TYPES
    if type not in types:
        raise ConfigError(f"type {type!r} is not one that {format} is written in; there are {', '.join(types)}")
    if dtype is not None and dtype not in DTYPES[:3]:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES[:3])}")


def _copy_adapter(found: Found, out: Path) -> Path:
    assert found.adapter is not None
    read_json(found.adapter / "adapter_config.json")
    tensors = Safetensors(found.adapter, stem="adapter_model")
    for name in tensors.entries:  # a damaged file must not be passed on
        check_finite(name, tensors.read(name))
    with new_folder(out) as folder:
        # not the checkpoints that HF's Trainer leaves there
        for file in filter(Path.is_file, (*found.adapter.iterdir(), *found.adapter.glob(f"{TEMPLATES}/*"))):
            (folder / file.relative_to(found.adapter)).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / file.relative_to(found.adapter))
    log.info("adapter: %s", out)
    return out


def _write_pairs(found: Found, opened: Opened, out: Path, type: str) -> Path:
    """The adapter alone, as a GGUF file."""
    assert found.adapter is not None
    adapter = load_adapter(found.adapter, Model(opened.config, {}, source=found.base))
    name = out.name.removesuffix(".gguf")
    with _new(out, "gguf") as folder:
        save_gguf_adapter(opened.config, adapter, folder / f"{name}-lora-{type}.gguf", type=type, name=name)
    log.info("run it by llama-cli -m BASE.gguf --lora FILE, with a GGUF file of %s", found.base)
    return out


@contextlib.contextmanager
def _new(out: Path, format: str) -> Iterator[Path]:
    """A folder to write into, renamed to `out` when the block ends. If `out` is named NAME.gguf, only its GGUF file is kept."""
    with new_file(out) if format == "gguf" and out.suffix == ".gguf" else new_folder(out) as folder:
        yield folder
    for file in [out] if out.is_file() else sorted(out.glob("*.gguf")):
        log.info("file: %s", file)


def _head(found: Found) -> heads.Head | None:
    """The adapter's scoring head, which its base may lack."""
    if found.adapter is None:
        return None
    return (heads.head_of(found.config) if found.config else None) or heads.head_of_adapter(found.adapter)


def _with_adapter(found: Found, opened: Opened, head: heads.Head | None, quantization: str | None) -> tuple[Model, Any]:
    """Base and adapter. A dense base has its file's dtype, whatever the run rounded it to: the adapter is merged into those weights."""
    assert found.adapter is not None
    model = read_model(opened, found.dtype if quantization else "auto", quantization)
    model = heads.attach(model, head, jax.random.key(0)) if head else model
    adapter = load_adapter(found.adapter, model)
    if not kind_of(adapter.config).merges:
        raise ModelError(
            f"{found.adapter} holds an adapter of method {adapter.config.group}: tokens before a text, no change of a matrix, so there is "
            "nothing to merge; export it as it is"
        )
    return model, adapter


def _merge(found: Found, opened: Opened, head: heads.Head | None, target: Target, bound: float | None) -> Path:
    """Write the merged model, read it back and compare it with base and adapter, before `target.out` gets its name."""
    prompts = check.prompt_ids(opened.tokenizer, opened.config.vocab_size, _texts(found, opened))
    base, stored = opened.checkpoint, stored_dtype(opened)
    quantization = None if isinstance(base, Bitsandbytes) else found.quantization
    model, adapter = _with_adapter(found, opened, head, quantization)
    expected = check.logits(model.config, compose(model.params, adapter), prompts)
    if not all(np.isfinite(logits).all() for logits in expected):
        raise ModelError(f"{found.base} with the adapter {found.adapter} gives logits that are not numbers (NaN): look at the run's loss")
    if pack := quantizer(opened.config, quantization):
        base = Packed(base, opened.config, found.dtype, pack)
        stored = "bfloat16" if stored == "float32" else stored
    target = target._replace(dtype=target.dtype or stored)
    in_file = format_of(json.loads(opened.config.hf_json))
    packed = {"is stored": in_file and in_file.what, "was trained": found.quantization}
    if packed_as := " and ".join(f"{verb} as {kind}" for verb, kind in packed.items() if kind):
        written = target.type if target.format == "gguf" else target.dtype
        log.info("the base %s; it is merged as what that stands for, in %s", packed_as, written)
    if head:  # the head differs from the checkpoint's, so the tree is written from memory instead of being read again
        opened, base, params = dataclasses.replace(opened, config=model.config), None, compose(model.params, adapter)
    else:
        params = composed(opened.config, adapter, base)
    del model
    with _new(target.out, target.format) as folder:
        file = _write(opened, params, base, folder, target)
        merged = load(file, "auto")
        compared = check.compare(expected, check.logits(merged.config, merged.params, prompts))
        log.info("merged beside base and adapter: %s", compared)
        _check_merge(compared, target, bound)
    return target.out


def _check_merge(compared: check.Comparison, target: Target, bound: float | None) -> None:
    largest, least = BOUNDS[target.type if target.format == "gguf" else str(target.dtype)]
    largest = largest if bound is None else bound
    if not (compared.difference <= largest and compared.agreement >= least):
        raise ModelError(
            f"the merged model is not the base with its adapter: {compared}; at most {largest:g} and at least {least:.0%} are let "
            "pass, so nothing was written. Take a finer dtype or type, or a larger --bound, or export the adapter as it is"
        )


def _texts(found: Found, opened: Opened) -> list[str]:
    """Prompts and answers from the run's own evaluation rows, or the built-in prompts if these are not available."""
    if found.config and opened.tokenizer:
        try:
            return [question.text + question.answer for question in questions(found.config, opened.tokenizer, limit=8)]
        except JaxtuneError as error:
            log.info("the run's own rows are unavailable (%s); the built-in prompts are used", str(error).splitlines()[0])
    return list(check.PROMPTS)


def _write(opened: Opened, params: Any, base: Any, folder: Path, target: Target) -> Path:
    """Write the model into `folder`; returns what `load` opens."""
    if target.format in ("hf", "text"):
        config, other_tensors = opened.config, opened.other_tensors
        if target.format == "text":
            config, other_tensors = nested.alone(config, language_class(config.model_type)), None
        extra = dict(tokenizer=opened.tokenizer, generation_config=opened.generation_config, other_tensors=other_tensors)
        hf.write_model(folder, config, params, dtype=target.dtype, base=base, **extra)
        return folder
    name = target.out.name.removesuffix(".gguf")
    settings = dict(type=target.type, tokenizer=opened.tokenizer, generation_config=opened.generation_config, base=base, name=name)
    file = save_gguf(opened.config, params, folder / f"{name}-{target.type}.gguf", **settings)
    if opened.tokenizer is not None:
        text = modelfile(file.name, opened.tokenizer, _stop_texts(opened), opened.config.max_position_embeddings)
        (folder / "Modelfile").write_text(text, "utf-8")
    else:
        log.warning("the model has no tokenizer, so this GGUF file has none either, and llama.cpp cannot open it")
    return file


def _stop_texts(opened: Opened) -> list[str]:
    ends = opened.generation_config.get("eos_token_id", opened.tokenizer.eos_token_id)
    known = (number for number in listed(ends) if number is not None and 0 <= number < opened.config.vocab_size)
    texts = map(opened.tokenizer.convert_ids_to_tokens, known)
    return [text for text in texts if text is not None]  # for an id that the tokenizer lacks


def main() -> None:
    """`python -m jaxtune.export`."""
    parser = cli.parser("export", __doc__)
    parser.add_argument("run", metavar="RUN", help="a run folder, an adapter folder, or a model")
    parser.add_argument("out", metavar="OUT", help="a new folder; of GGUF also a new file, NAME.gguf")
    parser.add_argument("--merge", action="store_true", help="merge the adapter into its base")
    parser.add_argument("--format", choices=FORMATS, help="default: peft for an adapter that is not merged, hf otherwise")
    parser.add_argument("--type", help=f"of a GGUF file's matrices: {', '.join(TYPES)}; default: f16, of an adapter f32")
    of = "of a model folder's tensors; default: the base's own; bfloat16 after QLoRA over float32"
    parser.add_argument("--dtype", choices=DTYPES[:3], help=of)
    parser.add_argument("--bound", type=float, help="largest difference of logits that a merge may make")
    given = vars(cli.parse(parser))
    cli.log_to_terminal()
    print(export(given.pop("run"), given.pop("out"), **given))


cli.callable_module(__name__, export)

if __name__ == "__main__":
    errors.run(main)
