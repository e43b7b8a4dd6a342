"""jaxtune data convert IN OUT --to FORMAT [--from FORMAT] [--columns OURS=THEIRS ...]

Writes the rows of IN (a file, folder, glob or hub id) in another format, to a .jsonl, .json, .csv or .parquet file. A row that cannot be
expressed in the new format is an error; it is never dropped.
"""

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TypeVar

from jaxtune.data import files, formats
from jaxtune.data.examples import Chat, Completion, Example, Labelled, Pair, Prompt, Text
from jaxtune.data.files import Row
from jaxtune.disk import replacing
from jaxtune.errors import ConfigError, DataError

SHAREGPT = {"user": "human", "assistant": "gpt", "tool": "observation"}


Kind = TypeVar("Kind", bound=Example)


class NoForm(Exception):
    """The example cannot be expressed in this format; says why."""


def convert(source: str, target: str | os.PathLike, to: str, form: str | None = None, columns: dict[str, str] | None = None) -> int:
    """Write the rows of `source` to the file `target` in the format `to`; returns their number.

    Raises:
        DataError: a row cannot be read, or cannot be expressed in the new format; nothing is written then.
        ConfigError: an unknown format or file type, or the file exists.
    """
    if to not in WRITERS:
        raise ConfigError(f"--to {to} cannot be written; there are {', '.join(WRITERS)}")
    target = Path(target)
    kind = target.suffix.lower()
    if kind not in (".jsonl", ".json", ".csv", ".parquet"):
        raise ConfigError(f"{target}: rows are written to .jsonl, .json, .csv or .parquet files")
    if target.exists():
        raise ConfigError(f"{target} exists, and nothing is overwritten; name another file, or remove it")
    made = list(_rows(files.rows(source), to, form, columns or {}))
    _write(made, target, kind)
    return len(made)


def _rows(rows: Iterable[Row], to: str, form: str | None, columns: dict[str, str]) -> Iterator[dict]:
    for row in rows:
        row = formats.rename(row, columns)
        example = formats.parse(row, form)
        try:
            yield from WRITERS[to](example)
        except NoForm as reason:
            raise row.fail(f"has no form in format {to}: {reason}") from None


def _text(example: Example) -> list[dict]:
    if isinstance(example, Completion):
        return [{"text": example.prompt + example.completion}]
    return [{"text": _only(example, Text).text}]


def _prompt_completion(example: Example) -> list[dict]:
    if isinstance(example, Completion):
        return [{"prompt": example.prompt, "completion": example.completion}]
    chat = _only(example, Chat)
    start = chat.start or len(chat.messages) - 1
    return [{"prompt": chat.messages[:start], "completion": chat.messages[start:]} | _extras(chat)]


def _messages(example: Example) -> list[dict]:
    chat = _as_chat(example)
    return [{"messages": chat.messages} | _extras(chat)]


def _openai(example: Example) -> list[dict]:
    """OpenAI's fine-tuning rows: arguments of tool calls are JSON strings, and `weight` says which answers are trained."""
    chat = _as_chat(example)
    return [{"messages": [_openai_message(message) for message in chat.messages]} | _extras(chat)]


def _openai_message(message: dict) -> dict:
    out = {key: value for key, value in message.items() if key not in ("train", "training", "tool_calls")}
    if "tool_calls" in message:
        out["tool_calls"] = [
            call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
            for call in message["tool_calls"]
        ]
    flag = message.get("train", message.get("training"))
    return out if flag is None or message["role"] != "assistant" else out | {"weight": int(flag)}


def _sharegpt(example: Example) -> list[dict]:
    chat = _as_chat(example)
    said, system = list(chat.messages), {}
    if said[0]["role"] == "system":
        system = {"system": said.pop(0)["content"]}
    tools = {"tools": json.dumps(chat.tools, ensure_ascii=False)} if chat.tools else {}
    return [{"conversations": [_said(message) for message in said]} | system | tools]


def _said(message: dict) -> dict:
    if message.get("tool_calls"):
        if message.get("content"):
            raise NoForm("a message has text and a tool call, ShareGPT's have one or the other")
        calls = [call["function"] for call in message["tool_calls"]]
        return {"from": "function_call", "value": json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)}
    rest = {key: value for key, value in message.items() if key in ("train", "training", "weight")}
    return {"from": SHAREGPT.get(message["role"], message["role"]), "value": message["content"]} | rest


def _alpaca(example: Example) -> list[dict]:
    chat = _as_chat(example)
    said, system = list(chat.messages), {}
    if said[0]["role"] == "system":
        system = {"system": said.pop(0)["content"]}
    if chat.tools or [m["role"] for m in said] != ["user", "assistant"] * (len(said) // 2) or any(m.get("tool_calls") for m in said):
        raise NoForm("Alpaca's turns go user, assistant, user, assistant, without tools")
    contents = [message["content"] for message in said]
    history = [list(pair) for pair in zip(contents[:-2:2], contents[1:-2:2], strict=True)]
    return [{"instruction": contents[-2], "input": "", "output": contents[-1]} | system | ({"history": history} if history else {})]


def _preference(example: Example) -> list[dict]:
    pair = _only(example, Pair)
    margin = {"margin": pair.margin} if pair.margin else {}
    if isinstance(pair.chosen, Completion):
        prompt, chosen, rejected = pair.chosen.prompt, pair.chosen.completion, _only(pair.rejected, Completion).completion
        return [{"prompt": prompt, "chosen": chosen, "rejected": rejected} | margin]
    chosen, rejected = _only(pair.chosen, Chat), _only(pair.rejected, Chat)
    sides = {"chosen": chosen.messages[chosen.start :], "rejected": rejected.messages[rejected.start :]}
    return [{"prompt": chosen.messages[: chosen.start]} | sides | _extras(chosen) | margin]


def _openai_preference(example: Example) -> list[dict]:
    pair = _only(example, Pair)
    chosen, rejected = _as_chat(pair.chosen), _as_chat(pair.rejected)
    prompt = [_openai_message(message) for message in chosen.messages[: chosen.start]]
    sides = [[_openai_message(message) for message in chat.messages[chat.start :]] for chat in (chosen, rejected)]
    return [{"input": {"messages": prompt} | _extras(chosen), "preferred_output": sides[0], "non_preferred_output": sides[1]}]


def _unpaired(example: Example) -> list[dict]:
    """A pair becomes two rows."""
    both = [Labelled(example.chosen, 1), Labelled(example.rejected, 0)] if isinstance(example, Pair) else [_only(example, Labelled)]
    return [_prompt_completion(one.example)[0] | {"label": bool(one.label)} for one in both]


def _prompt(example: Example) -> list[dict]:
    if isinstance(example, Pair):
        example = example.chosen
    if isinstance(example, Prompt):
        return [{"prompt": example.prompt} | _extras(example)]
    return [{key: value for key, value in _prompt_completion(example)[0].items() if key != "completion"}]


WRITERS: dict[str, Callable[[Example], list[dict]]] = {
    "text": _text, "prompt_completion": _prompt_completion, "messages": _messages, "openai": _openai, "sharegpt": _sharegpt,
    "alpaca": _alpaca, "preference": _preference, "openai_preference": _openai_preference, "unpaired": _unpaired, "prompt": _prompt,
}  # fmt: skip


def _only(example: Example, kind: type[Kind]) -> Kind:
    if not isinstance(example, kind):
        raise NoForm(f"it is of kind {type(example).__name__}, and {kind.__name__} is needed")
    return example


def _as_chat(example: Example) -> Chat:
    """A plain-text prompt and completion become a question and its answer."""
    if isinstance(example, Completion):
        said = [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.completion}]
        return Chat(said, start=1)
    return _only(example, Chat)


def _extras(example: Chat | Prompt) -> dict:
    kwargs = {"chat_template_kwargs": example.template_kwargs} if example.template_kwargs else {}
    return ({"tools": example.tools} if example.tools else {}) | kwargs


def _write(rows: list[dict], target: Path, kind: str) -> None:
    with replacing(target) as scratch:
        if kind == ".parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), scratch)
            return
        with scratch.open("w", encoding="utf-8", newline="") as stream:
            if kind == ".jsonl":
                stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            elif kind == ".json":
                json.dump(rows, stream, ensure_ascii=False, indent=1)
            elif kind == ".csv":
                _csv(rows, stream)


def _csv(rows: list[dict], stream: IO[str]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    for row in rows:
        if any(isinstance(value, list | dict) for value in row.values()):
            raise DataError("a CSV file cannot hold lists, and these rows have some; write .jsonl, .json or .parquet")
    writer = csv.DictWriter(stream, names, restval="")
    writer.writeheader()
    writer.writerows(rows)
