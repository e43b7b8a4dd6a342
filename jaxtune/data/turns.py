"""Lists of messages, in their many variants, in the one form that chat templates take: `{"role", "content", ...}`."""

import json
import math
import re
from dataclasses import replace
from typing import Any

from jaxtune.data.files import Row, kind_of

# ShareGPT and its descendants: every name in use for a speaker.
ROLES = {
    "human": "user", "user": "user", "prompter": "user", "input": "user", "question": "user",
    "gpt": "assistant", "assistant": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "output": "assistant", "answer": "assistant", "bing": "assistant", "bard": "assistant", "claude": "assistant", "ai": "assistant",
    "function_call": "assistant", "function-call": "assistant", "tool_call": "assistant",
    "system": "system", "developer": "developer",
    "observation": "tool", "tool": "tool", "function": "tool", "function_response": "tool", "tool_response": "tool", "ipython": "tool",
}  # fmt: skip
OWN = ("system", "developer", "tool", "function", "ipython")  # roles that templates know by these names
KNOWN = {*ROLES.values(), *OWN}
TEXTS = ("text", "input_text", "output_text")  # types of OpenAI's parts that contain text
CALLS = ("function_call", "function-call", "tool_call")
# a list of messages as text: it begins with a message, whose role is a known one
_TURNS = re.compile(
    r"""\s*\[\s*\{(?=\s*["'](?:role|from|content|value)["']\s*:)(?s:.*?)["'](?:role|from)["']\s*:\s*["']"""
    rf"""(?:{"|".join(ROLES)})["']"""
)


def messages(row: Row, key: str) -> list[dict]:
    """The list in field `key`: messages in OpenAI's form `{"role", "content"}` or ShareGPT's `{"from", "value"}`."""
    value = row.fields.get(key)
    if key not in row.fields:
        raise row.fail(f"the field {key!r} is missing; {fields(row)}")
    if isinstance(value, str) and value.lstrip().startswith("["):  # from a table, which has only strings
        value = _parsed(row, key, value)
    if isinstance(value, dict):
        value = [value]  # LLaMA-Factory's `chosen` and `rejected` are one message
    if not isinstance(value, list) or not value:
        raise row.fail(f"{key!r} must be a list of messages, this is {short(value)}")
    return [_message(row, key, number, message) for number, message in enumerate(value, 1)]


def _parsed(row: Row, key: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise row.fail(f"{key!r} is not valid JSON ({error.msg}); write a list of messages (json.dumps writes it for a table)") from None


def with_messages(row: Row) -> Row:
    """The row with the fields that may be text or messages as messages, if they are such a list as text: a table has only strings."""
    keys = ("prompt", "completion", "chosen", "rejected")
    found = {key: row.fields[key] for key in keys if isinstance(row.fields.get(key), str) and _TURNS.match(row.fields[key])}
    return replace(row, fields=row.fields | {key: _parsed(row, key, text) for key, text in found.items()}) if found else row


def _message(row: Row, key: str, number: int, message: Any) -> dict:
    where = f"message {number} of {key!r}"
    if isinstance(message, dict) and isinstance(message.get("from"), str):
        return _sharegpt(row, where, message)
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise row.fail(f'{where} must be like {{"role": "user", "content": "..."}}, this is {short(message)}')
    content = message.get("content")
    # Arrow sets the fields that a message lacks to None, which templates would take for values.
    message = {name: part for name, part in message.items() if part is not None}
    if (role := message["role"].strip().lower()) not in OWN:  # User, human, model, ...
        message["role"] = ROLES.get(role, message["role"])
    calls = message.pop("tool_calls", None) or []
    if not isinstance(calls, list):
        raise row.fail(f"{where}: 'tool_calls' must be a list of calls, this is {short(calls)}")
    if "function_call" in message:  # OpenAI's field before there were `tool_calls`
        calls = [message.pop("function_call"), *calls]
    if calls:
        message["tool_calls"] = [_call(row, where, call) for call in calls]
        content = "" if content is None else content
    message["content"] = _content(row, f"{where} ({message['role']})", content)
    return message


def _content(row: Row, where: str, content: Any) -> str:
    """The content of a message: a string, or OpenAI's parts, all of them text."""
    if isinstance(content, list) and (odd := [part["type"] for part in content if isinstance(part, dict) and _is_media(part)]):
        raise row.fail(
            f"{where} holds a part of type {odd[0]!r}, which is not trained: only text is; remove the part, or the row"
        )
    if (text := text_of(content)) is None:
        raise row.fail(f"{where}: content must be a string, this is {short(content)}")
    return text


def text_of(content: Any) -> str | None:
    """A string, or OpenAI's parts joined, if all of them are text; None for anything else."""
    if not isinstance(content, list) or not content:
        return content if isinstance(content, str) else None
    texts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str) and not _is_media(part)]
    return "".join(texts) if len(texts) == len(content) else None


def _is_media(part: dict) -> bool:
    return isinstance(part.get("type"), str) and part["type"] not in TEXTS


def _sharegpt(row: Row, where: str, message: dict) -> dict:
    name, value = message["from"], message.get("value")
    role = ROLES.get(name.strip().lower())
    if role is None:
        raise row.fail(f"{where}: unknown speaker {name[:40]!r}; known are {', '.join(ROLES)}")
    if not isinstance(value, str):
        raise row.fail(f"{where} ({name}): value must be a string, this is {short(value)}")
    rest = {key: part for key, part in message.items() if key not in ("from", "value") and part is not None}
    if name.strip().lower() in CALLS:
        try:
            calls = json.loads(value)
        except json.JSONDecodeError as error:
            raise row.fail(f"{where} ({name}): not valid JSON, {error.msg}; a call is like {{'name': ..., 'arguments': ...}}") from None
        calls = calls if isinstance(calls, list) else [calls]
        return {"role": role, "content": "", "tool_calls": [_call(row, where, call) for call in calls]} | rest
    return {"role": role, "content": value} | rest


def _call(row: Row, where: str, call: Any) -> dict:
    """`{"type": "function", "function": {"name", "arguments": dict}}`: templates write arguments as JSON, so a JSON string is parsed."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise row.fail(f'{where}: a tool call must be like {{"name": "...", "arguments": {{...}}}}, this is {short(call)}')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError as error:
            raise row.fail(f"{where}: the arguments of the call of {function['name']} are not valid JSON, {error.msg}") from None
    identity = {"id": call["id"]} if call.get("id") else {}
    return {"type": "function", **identity, "function": {"name": function["name"], "arguments": arguments}}


def tools(row: Row) -> list | None:
    """The `tools` column: a list of JSON schemas, possibly as a JSON string."""
    value = _json_column(row, "tools", "", "a list of JSON schemas")
    if value and not isinstance(value, list):
        raise row.fail(f"'tools' must be a list of JSON schemas, this is {short(value)}")
    for tool in value or []:
        if not isinstance(tool, dict) or not isinstance(tool.get("function", {}), dict):
            raise row.fail(f'a tool must be like {{"type": "function", "function": {{"name": "...", ...}}}}, this is {short(tool)}')
    return value or None


def template_kwargs(row: Row) -> dict:
    """The `chat_template_kwargs` column: an object, possibly as a JSON string."""
    value = _json_column(row, "chat_template_kwargs", "{", "an object of names and values")
    if value and not isinstance(value, dict):
        raise row.fail(f"'chat_template_kwargs' must be an object like {{\"enable_thinking\": false}}, this is {short(value)}")
    return {name: part for name, part in (value or {}).items() if part is not None}  # None filled in by Arrow


def _json_column(row: Row, name: str, begin: str, wanted: str) -> Any:
    """A column's value; if it is text that begins like JSON, the parsed value."""
    value = row.fields.get(name)
    if not isinstance(value, str) or not value.strip() or not value.strip().startswith(begin):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise row.fail(f"'{name}' is not valid JSON ({error.msg}); write {wanted}") from None


def number(row: Row, what: str, value: Any) -> float:
    """A number that float32 holds, possibly as a string; otherwise the row's error, which calls it `what`."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not abs(found) <= 3.4e38:
        raise row.fail(f"{what} must be a number, this is {short(value)}")
    return found


def fields(row: Row) -> str:
    """The row's fields, in words."""
    return f"the row has {', '.join(map(repr, row.fields)) or 'none'}"


def short(value: Any) -> str:
    """A value for an error message."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return "null" if value is None else f"the {kind_of(value)} {text if len(text) <= 60 else text[:57] + '...'}"
