import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtune.data.convert import WRITERS, convert
from jaxtune.data.examples import Chat, Completion, Pair
from jaxtune.data.files import Row
from jaxtune.data.formats import parse
from jaxtune.errors import ConfigError, DataError

SAID = st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=20)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add"}}]


@st.composite
def chats(draw, tools=True):
    said = [{"role": "system", "content": draw(SAID)}] if draw(st.booleans()) else []
    called = tools and draw(st.booleans())
    for _ in range(draw(st.integers(1, 3))):
        said.append({"role": "user", "content": draw(SAID)})
        if called:
            said += [{"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": draw(SAID)}]
        said.append({"role": "assistant", "content": draw(SAID)})
    return Chat(said, tools=TOOLS if called else None)


def back(example, form, read=None):
    """Written in a format and read again, through JSON."""
    (row,) = WRITERS[form](example)
    return parse(Row("rows", 1, "row", json.loads(json.dumps(row))), read)


@given(chats())
def test_chats_keep_their_messages_and_tools(chat):
    for form in ("messages", "openai", "sharegpt", "prompt_completion"):
        again = back(chat, form)
        assert (again.messages, again.tools) == (chat.messages, chat.tools), form


@given(chats(tools=False))
def test_alpaca_keeps_turns(chat):
    assert back(chat, "alpaca").messages == chat.messages


@given(SAID, SAID)
def test_plain_rows(prompt, completion):
    example = Completion(prompt, completion)
    assert back(example, "prompt_completion") == example
    assert back(example, "text").text == prompt + completion
    assert [m["content"] for m in back(example, "messages").messages] == [prompt, completion]


@given(chats(tools=False), SAID, st.booleans())
def test_pairs(chat, other, plain):
    start = len(chat.messages) - 1
    rejected = Chat([*chat.messages[:-1], {"role": "assistant", "content": other}], start)
    pair = Pair(Chat(chat.messages, start), rejected)
    if plain:
        pair = Pair(Completion("ask: ", chat.messages[-1]["content"]), Completion("ask: ", other))
    assert back(pair, "preference") == pair
    if not plain:
        assert back(pair, "openai_preference") == pair
    rows = WRITERS["unpaired"](pair)
    assert [parse(Row("rows", 1, "row", row), None).label for row in rows] == [1, 0]


def test_openai_weights():
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False}]
    (row,) = WRITERS["openai"](Chat(said))
    assert row["messages"][1] == {"role": "assistant", "content": "b", "weight": 0}


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_files_of_every_kind(tmp_path, kind):
    (tmp_path / "in.jsonl").write_text('{"q": "One?", "a": "Ünö, \\"zwei\\"\\n"}\n{"q": "Two?", "a": "2"}\n')
    assert (
        convert(str(tmp_path / "in.jsonl"), tmp_path / f"out.{kind}", "prompt_completion", columns={"prompt": "q", "completion": "a"}) == 2
    )
    assert convert(str(tmp_path / f"out.{kind}"), tmp_path / "again.jsonl", "prompt_completion") == 2
    assert json.loads((tmp_path / "again.jsonl").read_text().splitlines()[0]) == {"prompt": "One?", "completion": 'Ünö, "zwei"\n'}


def test_command(tmp_path):
    (tmp_path / "in.json").write_text(json.dumps([{"instruction": "Add", "input": "1 2", "output": "3"}]))
    command = [sys.executable, "-m", "jaxtune.data", "convert", "in.json", "out.jsonl", "--to"]
    done = subprocess.run([*command, "openai"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "1 rows written to out.jsonl" in done.stdout
    said = json.loads((tmp_path / "out.jsonl").read_text())["messages"]
    assert said == [{"role": "user", "content": "Add\n1 2"}, {"role": "assistant", "content": "3"}]
    command[5] = "other.jsonl"
    done = subprocess.run([*command, "preference"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "in.json, row 1: has no form in format preference" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.json", "out.jsonl"]


def test_mistakes(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    source = str(tmp_path / "in.jsonl")
    with pytest.raises(ConfigError, match="--to sharegtp cannot be written"):
        convert(source, tmp_path / "out.jsonl", "sharegtp")
    with pytest.raises(ConfigError, match="rows are written to"):
        convert(source, tmp_path / "out.txt", "messages")
    with pytest.raises(DataError, match="a CSV file cannot hold lists"):
        convert(source, tmp_path / "out.csv", "messages")
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_nothing_is_overwritten(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(ConfigError, match="rows.jsonl exists, and nothing is overwritten"):
        convert(str(file), file, "messages")
    assert file.read_text() == '{"prompt": "a", "completion": "b"}\n'
