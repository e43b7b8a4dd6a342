"""What a row means: every common format becomes one of a few kinds of examples."""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune import functions
from jaxtune.data import turns
from jaxtune.data.examples import Chat, Classified, Completion, Example, Labelled, Pair, Prompt, Segments, Steps, Text, Tokens
from jaxtune.data.files import Row
from jaxtune.data.turns import fields, messages, short
from jaxtune.errors import DataError


def _text(row: Row) -> Text:
    return Text(_string(row, "text"))


def _prompt_completion(row: Row) -> Completion | Chat:
    return _answer(row, "prompt", "completion")


def _messages(row: Row) -> Chat:
    return _chat(row, _said(row, "messages"))


def _sharegpt(row: Row) -> Chat:
    return _chat(row, _said(row, "conversations"))


def _said(row: Row, key: str) -> list[dict]:
    """The messages in field `key`, after the row's system turn."""
    return _after_system(row, messages(row, key))


def _after_system(row: Row, said: list[dict]) -> list[dict]:
    """Messages after a system turn, if the row has one in a separate column."""
    system = _optional(row, "system")
    if not system or said[0] == (turn := {"role": "system", "content": system}):
        return said
    if said[0]["role"] in ("system", "developer"):
        raise row.fail(f"the row has a column 'system' beside a {said[0]['role']} turn that says something else; keep one of them")
    return [turn, *said]


def _alpaca(row: Row) -> Chat:
    prompt = _alpaca_prompt(row)
    return Chat([*prompt, {"role": "assistant", "content": _string(row, "output")}], start=len(prompt))


def _alpaca_prompt(row: Row) -> list[dict]:
    """System, history and the user's turn: the instruction and, on the next line, the input (LLaMA-Factory's reading)."""
    said = []
    if system := _optional(row, "system"):
        said.append({"role": "system", "content": system})
    history = row.fields.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise row.fail(f'"history" must be a list of [question, answer] pairs of strings, this is {short(history)}; correct it')
        said += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    given, instruction = _optional(row, "input"), _string(row, "instruction")
    return [*said, {"role": "user", "content": f"{instruction}\n{given}" if given else instruction}]


def _preference(row: Row) -> Pair:
    """Explicit (`prompt`), LLaMA-Factory's (`conversations`, or Alpaca's `instruction`), or implicit: the common beginning of both answers.
    """
    prompt, given = None, row.fields.get("prompt")
    whole = [side for side in ("chosen", "rejected") if isinstance(row.fields[side], list)]
    if "conversations" in row.fields:
        prompt = _sharegpt(row).messages
    elif "instruction" in row.fields:
        prompt = _alpaca_prompt(row)
    elif given is None or (len(whole) == 2 and isinstance(given, str) and all(_opens_with(row.fields[side], given) for side in whole)):
        return _implicit(row)  # also UltraFeedback's: the prompt again, as a string, beside two whole conversations
    elif isinstance(given, str) and whole:
        prompt = _after_system(row, [{"role": "user", "content": given}])
    return Pair(_answer(row, "prompt", "chosen", prompt), _answer(row, "prompt", "rejected", prompt), _margin(row))


def _opens_with(side: list, prompt: str) -> bool:
    return bool(side) and isinstance(side[0], dict) and prompt in (side[0].get("content"), side[0].get("value"))


def _implicit(row: Row) -> Pair:
    if isinstance(row.fields.get("chosen"), str):
        chosen, rejected = _string(row, "chosen"), _string(row, "rejected")
        start = next((n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected)))
        if start and chosen[start - 1] == " ":  # the space belongs to the answer's first token
            start -= 1
        _check_system(row, chosen[:start])
        return Pair(Completion(chosen[:start], chosen[start:]), Completion(chosen[:start], rejected[start:]), _margin(row))
    chosen, rejected = _said(row, "chosen"), _said(row, "rejected")
    longest = min(len(chosen), len(rejected)) - 1
    start = next((n for n in range(longest) if chosen[n] != rejected[n]), longest)
    return Pair(_chat(row, chosen, start), _chat(row, rejected, start), _margin(row))


def _margin(row: Row) -> float:
    """By how much the chosen answer is better (TRL's column of that name); 0 if the row has none."""
    return 0.0 if row.fields.get("margin") in (None, "") else turns.number(row, "'margin'", row.fields["margin"])


def _openai_preference(row: Row) -> Pair:
    inner = row.fields["input"]
    if not isinstance(inner, dict):
        raise row.fail(f"'input' must be like {{\"messages\": [...]}}, this is {short(inner)}")
    row = replace(row, fields={**row.fields, **inner})
    prompt = _said(row, "messages")
    chosen, rejected = (_chat(row, prompt + messages(row, side), len(prompt)) for side in ("preferred_output", "non_preferred_output"))
    return Pair(chosen, rejected)


def _unpaired(row: Row) -> Labelled:
    key = "label" if "label" in row.fields else "kto_tag"
    label = row.fields[key]
    if isinstance(label, str) and _is_bool(label):
        label = label.lower() == "true"
    if not isinstance(label, bool) and label not in (0, 1):
        raise row.fail(f"{key!r} must be true or false, this is {short(label)}")
    if "completion" in row.fields:
        return Labelled(_prompt_completion(row), bool(label))
    chat = _messages(row) if "messages" in row.fields else _sharegpt(row) if "conversations" in row.fields else _alpaca(row)
    return Labelled(replace(chat, start=len(chat.messages) - 1), bool(label))


def _classification(row: Row) -> Classified:
    key = "label" if "label" in row.fields else "labels"
    label = row.fields[key]
    if isinstance(label, dict) or label is None or label == []:
        raise row.fail(f"{key!r} must be a class, a number, or a list of such, this is {short(label)}")
    return Classified(_text(row) if "text" in row.fields else _messages(row), label)


def _stepwise(row: Row) -> Steps:
    steps, labels = row.fields["completions"], row.fields["labels"]
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps) or not steps:
        raise row.fail(f"'completions' must be a list of strings, this is {short(steps)}")
    if empty := [n for n, step in enumerate(steps, 1) if not step.strip()]:
        raise row.fail(f"step {empty[0]} of 'completions' is empty; remove it and its label")
    if not isinstance(labels, list) or len(labels) != len(steps) or not all(label in (0, 1) for label in labels):
        raise row.fail(f"'labels' must hold true or false for each of the {len(steps)} completions, this is {short(labels)}")
    _check_system(row, prompt := _string(row, "prompt"))
    return Steps(prompt, steps, [bool(label) for label in labels])


def _tokenised(row: Row) -> Tokens:
    ids = row.fields["input_ids"]
    if not isinstance(ids, list) or not ids or not all(type(token) is int and token >= 0 for token in ids):
        raise row.fail(f"'input_ids' must be a list of token ids, this is {short(ids)}")
    trained, keys = [True] * len(ids), ("labels", "completion_mask", "assistant_masks", "attention_mask")
    given = {key: row.fields[key] for key in keys if row.fields.get(key) is not None}
    for key, marks in given.items():
        if not isinstance(marks, list) or len(marks) != len(ids):
            raise row.fail(f"{key!r} must be as long as 'input_ids', {len(ids)}")
        known = ([-100, None, token] if key == "labels" else [0, 1] for token in ids)
        if (odd := next((n for n, (mark, values) in enumerate(zip(marks, known, strict=True)) if mark not in values), None)) is not None:
            wanted = f"-100 or the token at its place, {ids[odd]} (not the next one)" if key == "labels" else "0 or 1"
            raise row.fail(f"entry {odd + 1} of {key!r} must be {wanted}, this is {short(marks[odd])}")
    seen = np.flatnonzero(given.pop("attention_mask", trained))  # the rest is padding
    if len(seen) == 0 or len(seen) <= seen[-1] - seen[0]:
        raise row.fail("'attention_mask' has zeros between ones, or nothing else; it may only exclude tokens before and after a text")
    for key, marks in list(given.items())[:1]:
        trained = [mark not in (-100, None) if key == "labels" else bool(mark) for mark in marks]
    return Tokens(ids[seen[0] : seen[-1] + 1], trained[seen[0] : seen[-1] + 1])


def _segments(row: Row) -> Segments:
    parts = row.fields["segments"]
    known = (None, False, True)  # 0 and 1 equal these
    if not isinstance(parts, list) or not all(
        isinstance(p, dict) and isinstance(p.get("text"), str) and p.get("label") in known for p in parts
    ):
        raise row.fail(f'\'segments\' must be a list like [{{"label": true, "text": "..."}}], this is {short(parts)}')
    return Segments([(part["text"], bool(part.get("label"))) for part in parts])


def _prompt(row: Row) -> Prompt:
    if isinstance(row.fields["prompt"], list):
        prompt = _said(row, "prompt")
    else:
        _check_system(row, prompt := _string(row, "prompt"))
    return Prompt(prompt, turns.tools(row), turns.template_kwargs(row))


# name: (fields of such a row, reader), in the order of detection. A field "a|b" means one or the other.
FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Row], Example]]] = {
    "tokenised": (("input_ids",), _tokenised),
    "segments": (("segments",), _segments),
    "openai_preference": (("input", "preferred_output", "non_preferred_output"), _openai_preference),
    "preference": (("chosen", "rejected"), _preference),
    "stepwise": (("prompt", "completions", "labels"), _stepwise),
    "unpaired": (("label|kto_tag", "completion|messages|conversations|instruction"), _unpaired),
    "classification": (("label|labels", "text|messages"), _classification),
    "messages": (("messages",), _messages),
    "sharegpt": (("conversations",), _sharegpt),
    "prompt_completion": (("prompt", "completion"), _prompt_completion),
    "alpaca": (("instruction", "output"), _alpaca),
    "text": (("text",), _text),
    "prompt": (("prompt",), _prompt),
}


# common names for the fields of the formats above, for a hint: theirs -> ours
USUAL = {
    "question": "instruction", "query": "instruction", "problem": "instruction", "user": "instruction", "answer": "output",
    "response": "output", "solution": "output", "assistant": "output", "context": "input", "system_prompt": "system",
    "conversation": "conversations", "dialogue": "messages", "dialog": "messages", "content": "text", "document": "text",
}  # fmt: skip


def detect(row: Row) -> str:
    """The name of the first format whose fields the row has."""
    for name, (needed, _) in FORMATS.items():
        if all(any(key in row.fields for key in keys.split("|")) for keys in needed):
            label = row.fields.get("label")
            if name == "unpaired" and "label" in row.fields and not _is_bool(label):
                continue  # another kind of label, for example a class name
            if name == "classification":
                continue  # text with a label is plain text, except for objective classification, which requests its format by name
            return name
    known = "; ".join(f"{name}: {', '.join(needed)}" for name, (needed, _) in FORMATS.items())
    ours = USUAL | {key: key for needed, _ in FORMATS.values() for keys in needed for key in keys.split("|")}  # whatever their case
    ours |= {"input": "instruction"} if "output" in row.fields else {}
    columns = {name: field for field in row.fields if (name := ours.get(field.strip().lower(), field)) != field}
    example = ", ".join(f"{name}: {field}" for name, field in (columns or {"instruction": "question", "output": "answer"}).items())
    header = "the first line of such a file names its columns; or " if row.file.removesuffix(".gz").endswith((".csv", ".tsv")) else ""
    raise row.fail(
        f"the fields {', '.join(map(repr, row.fields)) or '(none)'} are no known format; "
        f"{header}say what they are with data.columns, for example columns: {{{example}}}. Formats and their fields: {known}"
    )


def is_labelled(row: Row) -> bool:
    """Whether the row is a single answer with a label, whatever that label is: 0 and 1 are accepted too, and `parse` refuses others."""
    needed, _ = FORMATS["unpaired"]
    return "chosen" not in row.fields and all(any(key in row.fields for key in keys.split("|")) for keys in needed)


def _is_bool(label: Any) -> bool:
    """True and false, which are strings in CSV."""
    return isinstance(label, bool) or (isinstance(label, str) and label.lower() in ("true", "false"))


def _is_function(name: str | None) -> bool:
    return name is not None and name not in FORMATS and "." in name


def made(row: Row, name: str | None) -> Row:
    """The row as the function `name` makes it; unchanged if the format is no function."""
    if name is None or not _is_function(name):
        return row
    fields = _function(name)(dict(row.fields))
    if not isinstance(fields, dict):
        raise row.fail(f"data.format {name} must return a dict in one of jaxtune's formats, it returned {short(fields)}")
    return replace(row, fields=fields)


def parse(row: Row, name: str | None) -> Example:
    """The example that a row stands for: by the format `name`, by a user's function (functions.py), or by the row's own fields.

    A function takes the row as a dict and returns a dict in one of the formats here.
    """
    if _is_function(name):
        return parse(made(row, name), None)
    row = turns.with_messages(row)
    if name is None:
        return FORMATS[detect(row)][1](row)
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, 1, 0.5)
        raise DataError(
            f"data.format: {name} is no format; " + (f"did you mean {near[0]}?" if near else "")
            + f" There are {', '.join(FORMATS)}, and your own functions: my_module.my_function, path/file.py:function"
        )  # fmt: skip
    for keys in FORMATS[name][0]:
        if not any(key in row.fields for key in keys.split("|")):
            raise row.fail(f"the field {keys.replace('|', ' or ')!r} is missing; {fields(row)}")
    return FORMATS[name][1](row)


@lru_cache
def _function(name: str) -> Callable[[dict], Any]:
    return functions.find({}, name, "data.format")[1]


def function_bytes(name: str | None) -> bytes:
    """The source of the module that defines the function `name`; empty for built-in formats. Part of the cache key: other code, other rows.
    """
    if name is None or not _is_function(name):
        return b""
    return Path(inspect.getfile(_function(name))).read_bytes()


def rename(row: Row, columns: dict[str, str]) -> Row:
    """The row with the field names of the formats; `columns` maps a format's name to the file's."""
    if not columns:
        return row
    for ours, theirs in columns.items():
        if theirs not in row.fields:
            raise row.fail(f"no field {theirs!r}, which data.columns names for {ours!r}; {fields(row)}")
    taken = set(columns.values()) | set(columns)
    kept = {key: value for key, value in row.fields.items() if key not in taken}
    return replace(row, fields=kept | {ours: row.fields[theirs] for ours, theirs in columns.items()})


def _answer(row: Row, prompt_key: str, key: str, prompt: list[dict] | None = None) -> Completion | Chat:
    """A prompt and its continuation, both strings or both messages; `prompt`, if given, is already parsed."""
    if prompt is None and isinstance(row.fields.get(prompt_key), list):
        prompt = _said(row, prompt_key)
    if prompt is None:
        _check_system(row, given := _string(row, prompt_key))
        return Completion(given, _string(row, key))
    if isinstance(row.fields.get(key), str):
        return _chat(row, [*prompt, {"role": "assistant", "content": row.fields[key]}], len(prompt))
    return _chat(row, prompt + messages(row, key), len(prompt))


def _chat(row: Row, said: list[dict], start: int = 0) -> Chat:
    return Chat(said, start, turns.tools(row), turns.template_kwargs(row))


def _check_system(row: Row, prompt: str) -> None:
    """A plain prompt has no turns, so a system turn in a separate column would be lost, unless the prompt already contains it."""
    system = row.fields.get("system")
    if isinstance(system, str) and system.strip() and system.strip() not in prompt:
        raise row.fail(
            "the row has a column 'system', and its prompt is plain text, which is trained as it stands, without turns; call the prompt "
            "instruction and the completion output (data.columns) to have the chat template write all three, write the prompt as "
            "messages, or put the system text into it"
        )


def _string(row: Row, key: str) -> str:
    if key not in row.fields:
        raise row.fail(f"the field {key!r} is missing; {fields(row)}")
    value = row.fields[key]
    if not isinstance(value, str):
        raise row.fail(f"{key!r} must be a string, this is {short(value)}; write it as one, or remove the row")
    return value


def _optional(row: Row, key: str) -> str:
    return _string(row, key) if row.fields.get(key) is not None else ""
