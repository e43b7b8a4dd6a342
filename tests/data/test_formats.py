"""Every common format, read into its meaning."""

import sys

import pytest

from jaxtune.data.examples import Chat, Completion, Labelled, Pair, Prompt, Segments, Steps, Text, Tokens
from jaxtune.data.files import Row
from jaxtune.data.formats import FORMATS, detect, function_bytes, parse, rename
from jaxtune.errors import ConfigError, DataError

U, A, S = ({"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "yes"), ("system", "be brief")))
NO = {"role": "assistant", "content": "no"}
CALL = {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
HUMAN, GPT = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}

CASES = {
    "text": ({"text": "hi"}, Text("hi")),
    "prompt and completion": ({"prompt": "hi", "completion": "yes"}, Completion("hi", "yes")),
    "prompt and completion, conversational": ({"prompt": [U], "completion": [A]}, Chat([U, A], 1)),
    "prompt of messages, completion a string": ({"prompt": [U], "completion": "yes"}, Chat([U, A], 1)),
    "messages": ({"messages": [S, U, A]}, Chat([S, U, A])),
    "messages as JSON, of a table": ({"messages": '[{"role": "user", "content": "hi"}]'}, Chat([U])),
    "prompt and completion as JSON, of a table": (
        {"prompt": '[{"content": "hi", "role": "user"}]', "completion": '[{"role": "assistant", "content": "yes"}]'}, Chat([U, A], 1),
    ),
    "text that is a JSON list": ({"prompt": "hi", "completion": '[{"from": "Rome"}]'}, Completion("hi", '[{"from": "Rome"}]')),
    "messages under other roles": ({"messages": [{"role": "Human", "content": "hi"}, {"role": "model", "content": "yes"}]}, Chat([U, A])),
    "messages of text parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, A]}, Chat([U, A])),
    "messages behind a system column": ({"messages": [U, A], "system": "be brief"}, Chat([S, U, A])),
    "a system column that says the same": ({"messages": [S, U, A], "system": "be brief"}, Chat([S, U, A])),
    "a prompt of messages behind a system column": ({"prompt": [U], "completion": [A], "system": "be brief"}, Chat([S, U, A], 2)),
    "a system column that the prompt says": ({"prompt": "be brief. hi", "completion": "yes", "system": "be brief"},
                                             Completion("be brief. hi", "yes")),
    "a preference behind a system column": (
        {"prompt": "hi", "chosen": [A], "rejected": [NO], "system": "be brief"}, Pair(Chat([S, U, A], 2), Chat([S, U, NO], 2)),
    ),
    "a call beside text parts": (
        {"messages": [U, A | {"content": [{"type": "text", "text": "yes"}], "tool_calls": [{"name": "f"}]}]}, Chat([U, A | CALL]),
    ),
    "OpenAI's older calls": ({"messages": [U, A | {"function_call": {"name": "f", "arguments": "{}"}}]}, Chat([U, A | CALL])),
    "messages with Arrow's nulls": ({"messages": [U | {"tool_calls": None}, A], "tools": None}, Chat([U, A])),
    "template variables": ({"messages": [U, A], "chat_template_kwargs": {"x": 1}}, Chat([U, A], template_kwargs={"x": 1})),
    "tools as JSON": ({"messages": [U, A], "tools": '[{"name": "f"}]'}, Chat([U, A], tools=[{"name": "f"}])),
    "alpaca": ({"instruction": "hi", "output": "yes"}, Chat([U, A], 1)),
    "alpaca, all of it": (
        {"instruction": "a", "input": "b", "output": "yes", "system": "be brief", "history": [["hi", "no"]]},
        Chat([S, U, NO, {"role": "user", "content": "a\nb"}, A], 4),
    ),
    "sharegpt": ({"conversations": [HUMAN, GPT], "system": "be brief"}, Chat([S, U, A])),
    "sharegpt, other names": ({"conversations": [{"from": "prompter", "value": "hi"}, {"from": "bard", "value": "yes"}]}, Chat([U, A])),
    "conversations of messages": ({"conversations": [U, A]}, Chat([U, A])),
    "explicit preference": ({"prompt": "hi", "chosen": "yes", "rejected": "no"}, Pair(Completion("hi", "yes"), Completion("hi", "no"))),
    "explicit preference, conversational": ({"prompt": [U], "chosen": [A], "rejected": [NO]}, Pair(Chat([U, A], 1), Chat([U, NO], 1))),
    "a margin, of CSV": (
        {"prompt": "hi", "chosen": "yes", "rejected": "no", "margin": "2.5"}, Pair(Completion("hi", "yes"), Completion("hi", "no"), 2.5),
    ),
    "implicit preference": ({"chosen": "hi yes", "rejected": "hi no"}, Pair(Completion("hi", " yes"), Completion("hi", " no"))),
    "implicit preference, conversational": ({"chosen": [U, A], "rejected": [U, NO]}, Pair(Chat([U, A], 1), Chat([U, NO], 1))),
    "the same implicit answer": ({"chosen": [U, A], "rejected": [U, A]}, Pair(Chat([U, A], 1), Chat([U, A], 1))),
    "UltraFeedback": ({"prompt": "hi", "chosen": [U, A], "rejected": [U, NO]}, Pair(Chat([U, A], 1), Chat([U, NO], 1))),
    "prompt a string, answers messages": ({"prompt": "hi", "chosen": [A], "rejected": [NO]}, Pair(Chat([U, A], 1), Chat([U, NO], 1))),
    "LLaMA-Factory, sharegpt preference": (
        {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "no"}}, Pair(Chat([U, A], 1), Chat([U, NO], 1)),
    ),
    "LLaMA-Factory, alpaca preference": ({"instruction": "hi", "chosen": "yes", "rejected": "no"}, Pair(Chat([U, A], 1), Chat([U, NO], 1))),
    "OpenAI preference": (
        {"input": {"messages": [U]}, "preferred_output": [A], "non_preferred_output": [NO]}, Pair(Chat([U, A], 1), Chat([U, NO], 1)),
    ),
    "unpaired": ({"prompt": "hi", "completion": "yes", "label": True}, Labelled(Completion("hi", "yes"), 1)),
    "unpaired, conversational": ({"prompt": [U], "completion": [NO], "label": False}, Labelled(Chat([U, NO], 1), 0)),
    "unpaired, of CSV": ({"prompt": "hi", "completion": "yes", "label": "True"}, Labelled(Completion("hi", "yes"), 1)),
    "LLaMA-Factory, kto": ({"messages": [U, A], "kto_tag": True}, Labelled(Chat([U, A], 1), 1)),
    "a label that is no verdict": ({"prompt": "hi", "completion": "yes", "label": "greeting"}, Completion("hi", "yes")),
    "stepwise": ({"prompt": "hi", "completions": ["a", "b"], "labels": [True, False]}, Steps("hi", ["a", "b"], [True, False])),
    "tokens and labels": ({"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, Tokens([1, 2, 3], [False, True, True])),
    "tokens and completion mask": ({"input_ids": [1, 2], "completion_mask": [0, 1]}, Tokens([1, 2], [False, True])),
    "tokens alone": ({"input_ids": [1, 2]}, Tokens([1, 2], [True, True])),
    "segments": ({"segments": [{"label": True, "text": "a"}, {"text": "b"}]}, Segments([("a", True), ("b", False)])),
    "prompt alone": ({"prompt": "hi"}, Prompt("hi")),
    "prompt alone, conversational": ({"prompt": [U], "tools": [{"name": "f"}]}, Prompt([U], [{"name": "f"}])),
}  # fmt: skip


def row(fields):
    return Row("rows.jsonl", 3, "line", fields)


@pytest.mark.parametrize("case", CASES)
def test_meaning(case):
    fields, expected = CASES[case]
    assert parse(row(fields), None) == expected
    assert parse(row(fields), detect(row(fields))) == expected


def test_every_format_is_covered():
    assert {detect(row(fields)) for fields, _ in CASES.values()} == set(FORMATS) - {"classification"}


WRONG = {
    "a system column beside plain text": ({"prompt": "hi", "completion": "yes", "system": "be brief"}, "column 'system', and its"),
    "a system column beside plain answers": ({"prompt": "hi", "chosen": "yes", "rejected": "no", "system": "be brief"}, "column 'system'"),
    "a system column beside a plain prompt": ({"prompt": "hi", "system": "be brief"}, "column 'system'"),
    "unknown speaker": ({"conversations": [{"from": "Bob", "value": "hi"}]}, "unknown speaker 'Bob'"),
    "call that is not JSON": ({"conversations": [{"from": "function_call", "value": "add"}]}, "not valid JSON"),
    "call without a name": ({"messages": [{"role": "assistant", "tool_calls": [{"arguments": {}}]}]}, "a tool call must be like"),
    "arguments that are not JSON": (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, "arguments of the call of f",
    ),
    "labels of another length": ({"prompt": "a", "completions": ["b"], "labels": [True, True]}, "for each of the 1 completions"),
    "verdict that is none": ({"prompt": "a", "completion": "b", "kto_tag": "maybe"}, "'kto_tag' must be true or false"),
    "steps judged by -1": ({"prompt": "a", "completions": ["b"], "labels": [-1]}, "for each of the 1 completions"),
    "a margin that float32 does not hold": ({"chosen": "a", "rejected": "b", "margin": 1e300}, "'margin' must be a number"),
    "messages in Python's quotes": (
        {"prompt": "[{'role': 'user', 'content': 'a'}]", "completion": "b"}, "'prompt' is not valid JSON .*json.dumps writes it",
    ),
    "a history that is a number": ({"instruction": "a", "output": "b", "history": 3}, '"history" must be a list of'),
    "tool calls that are a number": ({"messages": [U, A | {"tool_calls": 3}]}, "'tool_calls' must be a list of calls"),
    "a tool whose function is text": ({"messages": [U, A], "tools": [{"function": "f"}]}, "a tool must be like"),
    "labels moved by one": ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, "entry 1 of 'labels' must be -100 or the token"),
    "a mask of text": ({"input_ids": [1, 2], "attention_mask": [1, "1"]}, "entry 2 of 'attention_mask' must be 0 or 1, this is the string"),
    "a mask of lists": ({"input_ids": [1, 2], "completion_mask": [[], 1]}, "entry 1 of 'completion_mask' must be 0 or 1"),
    "a segment's label as text": ({"segments": [{"label": "false", "text": "a"}]}, "'segments' must be a list like"),
    "ids that are none": ({"input_ids": ["a"]}, "must be a list of token ids"),
    "segments that are none": ({"segments": ["a"]}, "'segments' must be a list like"),
    "tools that are none": ({"messages": [U, A], "tools": {"a": 1}}, "'tools' must be a list"),
    "input that is none": ({"input": "a", "preferred_output": [A], "non_preferred_output": [A]}, "'input' must be like"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_mistakes(case):
    fields, message = WRONG[case]
    with pytest.raises(DataError, match=f"rows.jsonl, line 3: .*{message}"):
        parse(row(fields), None)


def test_unknown_format():
    with pytest.raises(DataError, match="sharegtp is no format; did you mean sharegpt"):
        parse(row({"text": "a"}), "sharegtp")


def test_columns():
    renamed = rename(row({"q": "hi", "a": "yes", "completion": "not this"}), {"prompt": "q", "completion": "a"})
    assert parse(renamed, None) == Completion("hi", "yes")
    assert renamed.fields == {"prompt": "hi", "completion": "yes"}


def test_a_function_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "my_rows.py").write_text(
        "def to_rows(row):\n    return {'prompt': row['a'] + ':', 'completion': row['b']}\n\ndef bad(row):\n    return 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rows", raising=False)
    assert parse(row({"a": "x", "b": "y"}), "my_rows.to_rows") == Completion("x:", "y")
    assert function_bytes("my_rows.to_rows").startswith(b"def to_rows") and function_bytes("text") == b""
    with pytest.raises(DataError, match="my_rows.bad must return a dict"):
        parse(row({}), "my_rows.bad")
    assert parse(row({"a": "x", "b": "y"}), f"{tmp_path}/my_rows.py:to_rows") == Completion("x:", "y")
    with pytest.raises(ConfigError, match="my_rows has no function none"):
        parse(row({}), "my_rows.none")
    with pytest.raises(ConfigError, match="data.format no_such_module.f cannot be loaded"):
        parse(row({}), "no_such_module.f")
