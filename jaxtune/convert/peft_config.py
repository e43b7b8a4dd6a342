"""adapter_config.json, both ways."""

import contextlib
import dataclasses
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxtune.convert.load import Model
from jaxtune.convert.tensors import Entry, read_entry
from jaxtune.errors import ConfigError, ModelError
from jaxtune.model.families import NESTED, ModelConfig, heads, nested
from jaxtune.model.families.nested import MODULES, OLDER
from jaxtune.peft import KINDS, kind_of
from jaxtune.peft.adapter import Adapter, Kind
from jaxtune.peft.prompts import PromptKind
from jaxtune.peft.sites import AnyConfig, adaptable, ancestors, is_parameter, names, whole_rows

log = logging.getLogger("jaxtune")

PREFIX = "base_model.model."  # prefix of every tensor's name
TASKS = {heads.SEQUENCE: "SEQ_CLS", heads.TOKEN: "TOKEN_CLS"}

# what PEFT writes besides a method's own fields
USUAL = set("peft_type task_type auto_mapping base_model_name_or_path revision inference_mode fan_in_fan_out peft_version".split())
BY_TYPE = {kind.peft_type: kind for kind in KINDS.values()}
# initialisations that change the base too: without that base the pair means something else
OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def config_file(path: Path) -> Path:
    """adapter_config.json of a folder; if it has none, a ModelError that says what to give instead."""
    file, inside = path / "adapter_config.json", path / "adapter"
    if not file.is_file():
        several = sorted(found.parent for found in path.glob(f"*/{file.name}"))  # PEFT saves adapters with names of their own so
        instead = inside if inside in several else " or ".join(map(str, several[:3]))
        instead = instead or "the folder that PEFT (or jaxtune) saved an adapter to"
        raise ModelError(f"{path} holds no {file.name}; give {instead}")
    return file


@contextlib.contextmanager
def naming_config(path: Path) -> Iterator[None]:
    """Add the file's name to errors in an adapter folder's config (missing, or with a field that the model cannot have)."""
    file = config_file(path)
    try:
        yield
    except ConfigError as error:
        raise ModelError(f"{file}: {error}") from None


def config_json(adapter: Adapter, model: Model) -> dict[str, Any]:
    """PEFT's config; `all-linear` is expanded, as in PEFT, and so is a regular expression that PEFT would translate."""
    kind, rows = kind_of(adapter.config), adaptable(model.config)
    fields = kind.fields(adapter, model.config)
    if isinstance(kind, PromptKind):
        return fields | {"peft_type": kind.peft_type, "task_type": "CAUSAL_LM", "inference_mode": True,
                         "base_model_name_or_path": model.source}  # fmt: skip
    targets, ranks = fields["target_modules"], {site.path: site.ranks for site in adapter.sites}
    modules = {path: names(path, rows[path]) for path in ranks if not is_parameter(path)}
    each = [name for path, found in modules.items() for name, rank in zip(found, ranks[path], strict=True) if rank]
    if targets == "all-linear":
        targets = sorted({name.rsplit(".", 1)[-1] for found in modules.values() for name in found})
    elif isinstance(targets, str) and model.config.moe or not (targets or fields.get("target_parameters")):  # or none were recorded
        targets = each
    if model.config.outer:
        targets = targets if "exclude_modules" in fields else each
        fields |= _inside(fields, model.config)
    own = [whole.path for whole in adapter.wholes if whole.path in heads.PATHS and whole.path not in heads.VALUE]
    scorers = {whole_rows(model.config)[path].hf.rsplit(".", 1)[0] for path in own}
    if scorers:
        fields["modules_to_save"] = sorted(scorers.union(fields["modules_to_save"] or ()))
    if any(rows[site.path].transposed for site in adapter.sites):  # not all of PEFT's classes have this field
        fields["fan_in_fan_out"] = True
    task = TASKS[model.config.labels_of] if model.config.num_labels else "CAUSAL_LM"
    return fields | {
        "peft_type": kind.peft_type, "task_type": task, "inference_mode": True, "base_model_name_or_path": model.source,
        "target_modules": targets,
    }  # fmt: skip


def _inside(fields: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Fields that restrict PEFT to the language model: other modules have names with the same suffixes."""
    found, (modules, head) = {}, map(re.escape, NESTED[config.outer].modules)
    if "exclude_modules" in fields:
        passed = "|".join(map(str, nested.passed_layers(config)))
        inside = modules + (rf"(?!layers\.({passed})\.)" if passed else "")
        outside, left_out = rf"(?!{inside}|{head}$).*", fields["exclude_modules"] or ()
        own = left_out if isinstance(left_out, str) else rf"(.*\.)?({'|'.join(map(re.escape, left_out))})"
        found["exclude_modules"] = f"{outside}|{own}" if left_out else outside
    if saved := tuple(fields.get("modules_to_save") or ()):
        every = (row.hf.format(layer=layer) for row in whole_rows(config).values() for layer in row.layers or (None,))
        found["modules_to_save"] = sorted({module for name in every for module in ancestors(name) if module.endswith(saved)})
    return found


def read_config(saved: dict[str, Any], path: Path) -> tuple[Kind, AnyConfig]:
    """The method and its config. ModelError, by name, for an unknown type and for unsupported fields."""
    kind = BY_TYPE.get(str(saved.get("peft_type")))
    if kind is None:
        raise ModelError(
            f"{path} is an adapter of type {saved.get('peft_type')}; {', '.join(BY_TYPE)} are what can be opened. "
            "If it can be merged in PEFT (merge_and_unload, save_pretrained), open the merged model"
        )
    for field, nothing in kind.refused.items():
        if saved.get(field) not in (None, nothing, [], {}):
            raise ModelError(
                f"{path}/adapter_config.json has {field}={saved[field]!r}, which is not supported; if the adapter can be merged in PEFT "
                "(merge_and_unload, save_pretrained), open the merged model"
            )
    if str(saved.get("init_lora_weights")).lower().startswith(OTHER_BASE):  # PEFT takes OLoRA too
        start = saved["init_lora_weights"]
        fix = "save it in PEFT with path_initial_model_for_weight_conversion, which makes an ordinary adapter of it"
        if start == "loftq":
            fix = "save that model in PEFT too, and write init_lora_weights: true here: the adapter is then an ordinary one over it"
        raise ModelError(f"{path} was begun with init_lora_weights={start!r}, which changes the base model; {fix}")
    own = {field.name for field in dataclasses.fields(kind.config)}
    known = own | USUAL | kind.refused.keys() | kind.ignored
    if unknown := sorted(key for key in saved.keys() - known if saved[key] not in (None, False, [], {})):
        what = ", ".join(f"{key}={saved[key]!r}" for key in unknown)
        log.warning("%s/adapter_config.json has %s, which is unknown here and ignored", path, what)
    kept = {name: saved[name] for name in own & saved.keys() - kind.refused.keys() if saved[name] is not None}
    try:
        return kind, kind.config(**kind.read_fields(kept))
    except ConfigError as error:
        raise ModelError(f"{path}/adapter_config.json: {error}") from error


def current_names(path: Path, entries: dict[str, Entry], config: ModelConfig) -> dict[str, Entry]:
    """An adapter's tensors under today's names, without those of modules outside the language model: pairs whose second matrix is zero,
    since training on text never reached them. ModelError if others belong to such modules."""
    entries = _renamed(entries, config)
    foreign = {name for name in entries if _is_outside(name.removeprefix(PREFIX), config)}
    idle = {name for name in foreign if name.endswith(".lora_B.weight") and not read_entry(name, entries[name]).any()}
    idle |= foreign & {name.replace(".lora_B.", ".lora_A.") for name in idle}
    if idle:
        log.info("%s: %d tensors beside the language model are left out; their pairs are zero", path, len(idle))
        entries = {name: entry for name, entry in entries.items() if name not in idle}
    if foreign := sorted(foreign - idle):
        raise ModelError(
            f"{path}: {len(foreign)} tensors change what is beside the language model, the first {foreign[0]}; jaxtune runs and trains the "
            "language model alone. Train the adapter with PEFT's exclude_modules for the rest, or take these tensors out of its file"
        )
    return entries


def _is_outside(name: str, config: ModelConfig) -> bool:
    """Whether a tensor of transformers' class belongs to no module that text passes through."""
    outer = NESTED[config.outer]
    text_name = "model." + name.removeprefix(outer.modules[0]) if name.startswith(outer.modules[0]) else name
    return name.removeprefix("model.").startswith(outer.other_prefixes) or nested.is_passed(config, text_name)


def _renamed(entries: dict[str, Entry], config: ModelConfig) -> dict[str, Entry]:
    if NESTED[config.outer].modules == OLDER:
        return entries
    older = re.compile(rf"(?<=^{re.escape(PREFIX)})language_model\.(?:(model\.)|(?=lm_head\.))")  # before transformers 4.52
    return {older.sub(lambda found: MODULES if found[1] else "", name): entry for name, entry in entries.items()}
