"""What a row means: every file format becomes one of a few examples."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxtune.data.files import Row


@dataclass(frozen=True)
class Text:
    """Plain text; everything is trained. `{"text": str}`"""

    text: str


@dataclass(frozen=True)
class Completion:
    """Plain text after plain text; the completion is trained. `{"prompt": str, "completion": str}`"""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """Turns for the tokenizer's chat template.

    Attributes:
        messages: `{"role", "content", ...}`, as the template wants them.
        start: messages before this one are the prompt.
        tools: JSON schemas for the template, or None.
        template_kwargs: further variables of the template.
    """

    messages: list[dict]
    start: int = 0
    tools: list | None = None
    template_kwargs: dict = field(default_factory=dict)


Example = Text | Completion | Chat


def text(row: Row) -> Text:
    """`{"text": str}`"""
    return Text(_string(row, "text"))


def prompt_completion(row: Row) -> Completion | Chat:
    """`{"prompt": str, "completion": str}`, or both a list of messages."""
    if isinstance(row.fields.get("prompt"), list):
        prompt, completion = _messages(row, "prompt"), _messages(row, "completion")
        return _chat(row, prompt + completion, start=len(prompt))
    return Completion(_string(row, "prompt"), _string(row, "completion"))


def messages(row: Row) -> Chat:
    """`{"messages": [{"role", "content"}, ...]}`, with `tools` and `chat_template_kwargs` where there are any."""
    return _chat(row, _messages(row, "messages"))


def alpaca(row: Row) -> Chat:
    """`{"instruction", "input", "output", "system", "history": [[question, answer], ...]}`; the last three may be missing.

    The user's turn is the instruction and, on the next line, the input; the answer `output` is the completion, and
    `history` is earlier turns of the prompt.
    """
    turns = []
    if system := _optional(row, "system"):
        turns.append({"role": "system", "content": system})
    for pair in row.fields.get("history") or []:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise row.fail('"history" must be a list of [question, answer] pairs of strings')
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    given = _optional(row, "input")
    instruction = _string(row, "instruction")
    turns.append({"role": "user", "content": f"{instruction}\n{given}" if given else instruction})
    return Chat([*turns, {"role": "assistant", "content": _string(row, "output")}], start=len(turns))


# In the order of detection: the first whose fields are all there.
FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Row], Example]]] = {
    "messages": (("messages",), messages),
    "prompt_completion": (("prompt", "completion"), prompt_completion),
    "alpaca": (("instruction", "output"), alpaca),
    "text": (("text",), text),
}


def detect(row: Row) -> str:
    """The name of the format whose fields the row has."""
    for name, (needed, _) in FORMATS.items():
        if all(key in row.fields for key in needed):
            return name
    known = "; ".join(f"{name}: {', '.join(needed)}" for name, (needed, _) in FORMATS.items())
    raise row.fail(
        f"the fields {', '.join(map(repr, row.fields)) or '(none)'} are no known format ({known}); "
        "rename them with data.columns, for example columns: {prompt: question, completion: answer}"
    )


def rename(row: Row, columns: dict[str, str]) -> Row:
    """The row under the names the formats use; `columns` maps a format's name to the file's."""
    if not columns:
        return row
    for ours, theirs in columns.items():
        if theirs not in row.fields:
            raise row.fail(f"no field {theirs!r}, which data.columns names for {ours!r}; {_fields(row)}")
    taken = set(columns.values()) | set(columns)
    fields = {key: value for key, value in row.fields.items() if key not in taken}
    fields |= {ours: row.fields[theirs] for ours, theirs in columns.items()}
    return Row(row.file, row.number, row.unit, fields)


def _fields(row: Row) -> str:
    return f"the row has {', '.join(map(repr, row.fields)) or 'none'}"


def _string(row: Row, key: str) -> str:
    if key not in row.fields:
        raise row.fail(f"the field {key!r} is missing; {_fields(row)}")
    value = row.fields[key]
    if not isinstance(value, str):
        raise row.fail(f"{key!r} must be a string, this is {_short(value)}")
    return value


def _optional(row: Row, key: str) -> str:
    return _string(row, key) if row.fields.get(key) is not None else ""


def _messages(row: Row, key: str) -> list[dict]:
    value = row.fields.get(key)
    if key not in row.fields:
        raise row.fail(f"the field {key!r} is missing; {_fields(row)}")
    if not isinstance(value, list) or not value:
        raise row.fail(f"{key!r} must be a list of messages, this is {_short(value)}")
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise row.fail(f'message {number} of {key!r} must be like {{"role": "user", "content": "..."}}, this is {_short(message)}')
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise row.fail(f"message {number} of {key!r} ({message['role']}): content must be a string, this is {_short(content)}")
    # Arrow fills the fields a message lacks with None, which templates take for given.
    return [{k: v for k, v in message.items() if v is not None} for message in value]


def _chat(row: Row, turns: list[dict], start: int = 0) -> Chat:
    tools = row.fields.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise row.fail(f"'tools' is not valid JSON ({error.msg}); write a list of JSON schemas") from None
    return Chat(turns, start, tools or None, row.fields.get("chat_template_kwargs") or {})


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def parse(row: Row, name: str | None) -> Example:
    """The example a row stands for, by the format `name`, or by its fields."""
    return FORMATS[name or detect(row)][1](row)
