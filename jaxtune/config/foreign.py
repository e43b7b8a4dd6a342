"""Values of other tools that need more than a table to convert.

Each function takes the value of one key and returns ours, or `DEFAULT` if it requests the default.

Raises:
    ConfigError: a value without a counterpart here; says what to write instead.
"""

import ast
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from jaxtune.errors import ConfigError

log = logging.getLogger("jaxtune")

DEFAULT = object()  # the value requests the default


def warmup_ratio(value: Any) -> Any:
    """HF's share of all steps, which `warmup_steps` below 1 is here."""
    if not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ConfigError(
            f"warmup_ratio is {value!r}, but has to be a share of all steps, from 0 to below 1; write warmup_steps for their number."
        )
    return value


def resume(value: Any) -> Any:
    """HF's `resume_from_checkpoint`, unless it names a checkpoint."""
    if isinstance(value, str) and value not in ("last", "latest", "auto"):
        raise ConfigError(
            f"resume_from_checkpoint is {value!r}, but a run resumes from its own newest checkpoint; write its output_dir and resume: true."
        )
    return bool(value)


def target(value: Any) -> Any:
    """LLaMA-Factory's `all` and comma-separated names."""
    if value == "all":
        return "all-linear"
    return names(value)


def sampling(value: Any) -> Any:
    """HF's `train_sampling_strategy` as `data.packing`."""
    if value == "sequential":
        raise ConfigError("train_sampling_strategy is sequential, rows in their own order; write data.shuffle: false, or leave it out.")
    return {"group_by_length": "group", "random": DEFAULT}.get(value, value)


def names(value: Any) -> Any:
    """`a,b` as a list, unless there is a file of that name."""
    return [name.strip() for name in value.split(",")] if isinstance(value, str) and "," in value and not os.path.exists(value) else value


def assistant_only(value: Any) -> Any:
    """TRL's `assistant_only_loss`: true leaves out a prompt's answers, as our `completion` does; false trains whole conversations there."""
    if value is False:
        log.warning("note: assistant_only_loss=false: conversations train every answer here, all of it in TRL; data.train_on: all does so")
        return DEFAULT
    return "completion" if value is True else value


def optim_args(value: Any) -> Any:
    """HF's `"momentum=0.9,nesterov=True"`; a table is passed on."""
    if not isinstance(value, str):
        return value
    try:
        return {name.strip(): ast.literal_eval(text.strip()) for name, text in (pair.split("=", 1) for pair in value.split(","))}
    except (ValueError, SyntaxError):
        raise ConfigError(f"optim_args is {value!r}; write optim_args: {{NAME: NUMBER}}.") from None


def label_names(value: Any) -> Any:
    """HF's `{0: negative, 1: positive}` as names in order."""
    if not isinstance(value, dict):
        return value
    known = {str(number): name for number, name in value.items()}
    if sorted(known) != sorted(str(number) for number in range(len(known))):
        raise ConfigError(f"id2label is {value!r}, but has to number the classes 0, 1, 2, ...; write id2label: [negative, positive].")
    return [known[str(number)] for number in range(len(known))]


def label_numbers(value: Any) -> Any:
    """HF's `{negative: 0, positive: 1}`, inverted."""
    return {number: name for name, number in value.items()} if isinstance(value, dict) else value


def pref_loss(value: Any) -> Any:
    """LLaMA-Factory's `pref_loss`, two of which are separate objectives."""
    if value in ("orpo", "simpo"):
        raise ConfigError(f"pref_loss {value} is an objective of its own; write objective: {value}, and leave stage and pref_loss out.")
    return value


def report_to(value: Any) -> Any:
    """Where metrics go, without the services that jaxtune does not send to."""
    if value in ("none", "all", None):
        return ["tensorboard"] if value == "all" else []
    given = value if isinstance(value, (list, tuple)) else [value]
    if elsewhere := [name for name in given if name in ("wandb", "mlflow", "trackio", "swanlab", "comet_ml", "neptune", "clearml")]:
        raise ConfigError(
            f"report_to is {value!r}, but nothing is sent to {' and '.join(elsewhere)}; write report_to: tensorboard, whose files such "
            "services can read. metrics.jsonl is always written."
        )
    return [name for name in given if name != "none"]


def special_tokens(value: Any) -> Any:
    """The EOS token of Axolotl's table; padding needs no token here."""
    said = {name: token for name, token in value.items() if token} if isinstance(value, Mapping) else {"": value}
    if others := sorted(said.keys() - {"eos_token", "pad_token"}):
        raise ConfigError(
            f"special_tokens holds {', '.join(others) or repr(value)}, but the tokenizer's own special tokens are used, except for "
            "eos_token; leave the others out, or change them in the model's tokenizer_config.json"
        )
    return said.get("eos_token", DEFAULT)


def column_map(value: Any) -> Any:
    """torchtune's table; like ours, it has our names first."""
    ours = {"input": "prompt", "output": "completion"}
    return {ours.get(name, name): column for name, column in value.items()} if isinstance(value, Mapping) else value


_TYPES = {
    "alpaca": "alpaca", "alpaca_chat": "alpaca", "completion": "text", "pretrain": "text", "chat_template": "messages",
    "sharegpt": "sharegpt", "input_output": "segments", "stepwise_supervised": "stepwise",
    "chat_template.default": "preference", "chat_template.argilla_chat": "preference",
}  # fmt: skip
# keys of Axolotl's data sets that request the usual behaviour, and what to write for their other values
_DONE = {
    "ds_type": (None, ""), "roles": (None, ""), "message_property_mappings": (None, ""), "trust_remote_code": (None, ""),
    "roles_to_train": (({"assistant"}, {"gpt"}, {"assistant", "gpt"}), "data.train_on"),
    "train_on_eos": (("turn", "all", True), "data.train_on_eos"),
    "train_on_eot": (("turn", "all", True), "data.train_on_eos"),
}  # fmt: skip


def datasets(value: Any) -> Any:
    """Axolotl's and TRL's list of {path, type, ...} as sources: `type` is our `format`, `field_...` are columns."""
    value = names(value)
    entries = list(value) if isinstance(value, (list, tuple)) else [value]
    return [source for entry in entries for source in (_sources(dict(entry)) if isinstance(entry, Mapping) else [entry])]


def _sources(entry: dict) -> list[dict]:
    kind, columns = entry.pop("type", None), entry.pop("columns", None) or {}
    columns = dict(columns if isinstance(columns, Mapping) else {name: name for name in columns})  # TRL's list of columns to keep
    form = _form(kind, columns)
    prompt = {"messages": "messages", "sharegpt": "conversations", "preference": "prompt"}.get(form or "", "messages")
    fields = {"field": "text", "field_messages": prompt, "field_chosen": "chosen", "field_rejected": "rejected", "field_tools": "tools"}
    columns |= {ours: entry.pop(theirs) for theirs, ours in fields.items() if theirs in entry}
    for name, (done, instead) in _DONE.items():
        given = entry.pop(name, None)
        given = set(given) if isinstance(given, list) else given
        if given is not None and done is not None and given not in done:
            raise ConfigError(f"{name} of a data set is {given!r}; write {instead}, which is of all of them.")
    files = entry.pop("data_files", None)
    files = [files] if isinstance(files, str) else files or [entry.get("path")]
    extra = ({"format": form} if form else {}) | ({"columns": columns} if columns else {})
    return [{key: item for key, item in entry.items() if key != "path" and item is not None} | {"path": path} | extra for path in files]


def _form(kind: Any, columns: dict[str, str]) -> str | None:
    """Axolotl's `type` as our format; the columns that it names are added to `columns`."""
    if kind in (None, ""):  # these rows are already tokenised, whatever fields they have
        return None
    if isinstance(kind, Mapping):
        fields = ("instruction", "input", "output", "system")
        columns |= {name: kind[f"field_{name}"] for name in fields if kind.get(f"field_{name}")}
        wording = [kind.get("no_input_format") or "{instruction}"]
        wording += [kind.get("format") or "{instruction}\n{input}"] if kind.get("field_input") else []
        if wording[0] == "{instruction}" and wording[-1] in ("{instruction}", "{instruction}\n{input}") and not kind.get("system_prompt"):
            return "alpaca"
    elif isinstance(kind, str) and kind in _TYPES:
        return _TYPES[kind]
    raise ConfigError(
        f"the type of a data set is {kind!r}, but only {', '.join(_TYPES)} are understood; write data.train: {{path: FILE, format: FORMAT, "
        "columns: {OURS: THEIRS}}; a format may be a function of yours, module.function (docs/data.md)."
    )


_COMPONENTS = {
    "model": "write model: a folder or hub id, method: full, lora or qlora, and lora: {r: 16, lora_alpha: 32}",
    "dataset": "write data.train: a file or hub id (docs/data.md has the formats), and data.packing",
    "optimizer": "write optim: adamw, learning_rate and weight_decay",
    "lr_scheduler": "write lr_scheduler_type: cosine and warmup_steps",
    "loss": "leave it out; objective: sft is the default, and has its own",
    "tokenizer": "leave it out, the model's own is used; its max_seq_len is data.max_length",
}


def component(group: str) -> ConfigError:
    """What to write here for a torchtune group that names a `_component_`."""
    instead = _COMPONENTS.get(group, "leave it out; checkpoints, logs and metrics are written into output_dir anyway")
    return ConfigError(f"{group} is a torchtune group (_component_), which is flat keys here: {instead}.")


Translation = dict[Any, Any] | Callable[[Any], Any]
