"""Every mistake in a data file is one DataError that names the file, the line, the reason and what to do."""

import gzip
import io
import json
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from jaxtune import data
from jaxtune.data.prepare import check_fits
from jaxtune.data.report import report
from jaxtune.errors import ConfigError, DataError

GOOD = {"prompt": "One and two are ", "completion": "three."}
CHAT = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello there"}]}


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def arrow_beyond_its_end():
    """A text that ends behind the file's end."""
    buffer, table = io.BytesIO(), pyarrow.table({"text": ["a" * 77] * 2})
    with pyarrow.ipc.new_stream(buffer, table.schema) as out:
        out.write_table(table)
    ends, beyond = (np.array([0, 77, length], np.int32).tobytes() for length in (154, 2**30))
    assert buffer.getvalue().count(ends) == 1
    return buffer.getvalue().replace(ends, beyond)


def parquet(*columns):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([*map(pyarrow.array, columns)], names=["text"] * len(columns)), buffer)
    return buffer.getvalue()


DEEP = "[" * 100_000
NOT_UTF8 = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")])
FILES = {
    "empty": ("rows.jsonl", "", "rows.jsonl: the file holds no rows"),
    "only blank lines": ("rows.jsonl", "\n\n", "rows.jsonl: the file holds no rows"),
    "empty list": ("rows.json", "[]", "rows.json: the file holds no rows"),
    "header alone": ("rows.csv", "prompt,completion\n", "rows.csv: the file holds no rows"),
    "malformed line": (
        "rows.jsonl",
        json.dumps(GOOD) + '\n{"prompt": "a", completion}\n',
        "rows.jsonl, line 2: not valid JSON, Exp",
    ),
    "list in jsonl": ("rows.jsonl", "[" + json.dumps(GOOD) + ",\n", "line 1: not valid JSON.*rename it to .json"),
    "lines in json": ("rows.json", json.dumps(GOOD) + "\n" + json.dumps(GOOD), "line 2: not valid JSON, Extra data.*name it .jsonl"),
    "a key twice": ("rows.jsonl", '{"text": "a", "text": "b"}\n', "line 1: the row cannot be read: the key 'text' occurs twice"),
    "a key twice in json": ("rows.json", '[{"text": "a", "text": "b"}]', "line 1: not valid JSON, the key 'text' occurs twice"),
    "a parquet column twice": ("rows.parquet", parquet(["a"], ["b"]), "rows.parquet: the header names 'text' twice"),
    "not an object": ("rows.jsonl", '"text"\n', "line 1: a row must be a JSON object.*this is a string"),
    "not a list": ("rows.json", '"text"', "must hold a list of objects, this is a string"),
    "short csv row": ("rows.csv", "prompt,completion\nonly one\n", "rows.csv, line 2: the row has another number of fields"),
    "not utf-8": ("rows.jsonl", b'{"text": "caf\xe9"}\n', r"rows.jsonl, line 1: not UTF-8 \(byte 0xe9 behind '{\"text\": \"caf'\)"),
    "not utf-8 below": ("rows.csv", b"text\n" + 9000 * b"a\n" + b"\xe9\n", "rows.csv, line 9002: not UTF-8"),
    "a cut line": ("rows.jsonl", '{"text":\n', "line 1: not valid JSON, Expecting value at column 10"),
    "a comma too many": ("rows.json", '[{"text": "a"},\n]', "line 2: not valid JSON, a comma too many at column 1"),
    "a comma too many in a line": ("rows.jsonl", '{"text": "a", }\n', "line 1: not valid JSON, a comma too many at column 1[35]"),
    "Python's quotes": ("rows.jsonl", "{'text': 'a'}\n", "line 1: not valid JSON, single quotes instead of double ones at column 2"),
    "no header": ("rows.csv", "hello,you\n" * 3, "'you' are no known format; the first line of such a file names its columns"),
    "broken gzip": ("rows.jsonl.gz", b"not gzip", "the compressed file is damaged"),
    "broken zstd": ("rows.jsonl.zst", b"not zstd", "the compressed file is damaged"),
    "cut zstd": ("rows.txt.zst", zstandard.compress(b"one\ntwo\n" * 2_000)[:-4], "the compressed file is damaged .it ends in the middle"),
    "parquet of broken pages": ("rows.parquet", parquet(["a"])[:20] + b"\xff" * 60 + parquet(["a"])[80:], "not a readable Parquet file"),
    "parquet not utf-8": ("rows.parquet", parquet(NOT_UTF8), "not a readable Parquet file"),
    "a list too deep": ("rows.jsonl", '{"text":' + DEEP, "rows.jsonl, line 1: the row cannot be read: maximum recursion depth"),
    "a list too deep in json": ("rows.json", DEEP, "rows.json, line 1: not valid JSON, maximum recursion depth"),
    "a number too long": ("rows.jsonl", '{"text":"a","id":' + "9" * 5000 + "}", "line 1: the row cannot be read: Exceeds the limit"),
    "broken parquet": ("rows.parquet", b"not parquet", "not a readable Parquet file"),
    "arrow beyond its end": ("rows.arrow", arrow_beyond_its_end(), "not a readable Arrow data set"),
    "broken arrow": ("rows.arrow", b"not arrow", "not a readable Arrow data set"),
    "an empty line before the header": ("rows.csv", "\ntext\na\n", "rows.csv, line 1: an empty line, where the names of the columns"),
    "semicolons": ("rows.csv", "prompt;completion\na;b\n", "header 'prompt;completion' has no ','; columns .* by ';': save it with ','"),
    "a column twice": ("rows.csv", "text,text\na,b\n", "the header names 'text' twice"),
    "gzip by another name": ("rows.jsonl", gzip.compress(b"{}"), "the file is compressed by gzip; let its name end in .gz"),
    "pointer": ("rows.parquet", b"version https://git-lfs.github.com/spec/v1\n", "the file is a Git LFS pointer"),
    "utf-16": ("rows.csv", "text\na\n".encode("utf-16"), "the file is UTF-16; save it as UTF-8"),
    "jsonl as txt": ("rows.txt", json.dumps(GOOD) + "\n", "look like JSON objects.*rename it to .jsonl"),
    "unknown suffix": ("rows.docx", b"x", "cannot tell the format from the name"),
}


@pytest.mark.parametrize("case", FILES)
def test_files(case, config, tokenizers, tmp_path):
    name, content, message = FILES[case]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        data.load(config(str(tmp_path / name)), tokenizers["chatml"])
    assert not [p for p in (tmp_path / "cache").glob("*")], "nothing half-written"


TWO_BOS = "{{ '<|im_start|><|im_start|>' }}{% for message in messages %}{{ message.content }}{% endfor %}"
CALL = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": {}}]}]}
TOOLS = [{"type": "function", "function": {"name": "weather"}}]
ROWS = {
    "missing field": ({"prompt": "a"}, {}, "line 2: the row has a prompt without an answer; objective sft needs"),
    "wrong type": ({"prompt": "a", "completion": 3}, {}, "line 2: 'completion' must be a string, this is the number 3"),
    "null": ({"prompt": "a", "completion": None}, {}, "line 2: 'completion' must be a string, this is null"),
    "no format": ({"q": "a", "a": "b"}, {}, "line 2: the fields 'q', 'a' are no known format.*data.columns"),
    "other cases": ({"Prompt": "a", "Answer": "b"}, {}, r"example columns: \{prompt: Prompt, output: Answer\}"),
    "question and answer": ({"question": "a", "answer": "b"}, {}, r"example columns: \{instruction: question, output: answer\}"),
    "messages not JSON": ({"messages": "[{"}, {}, "line 2: 'messages' is not valid JSON"),
    "half a character": ({"text": "a\ud83d"}, {}, r"line 2: the text holds '\\ud83d', half a surrogate pair"),
    "tools that the template drops": (CALL | {"tools": TOOLS}, {}, "line 2: the chat template drops the tool 'weather'"),
    "call that the template drops": (CALL, {}, "line 2: the chat template drops the call of the tool 'weather'"),
    "call dropped, its name there by chance": (
        {"messages": [{"role": "user", "content": "the weather?"}, CALL["messages"][1]]}, {}, "drops the call of the tool 'weather'",
    ),
    "a mark that is none": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": "x"}]}, {},
        "line 2: 'weight' of message 2 is 'x'; write true",
    ),
    "tools dropped, all trained": (CALL | {"tools": TOOLS}, {"train_on": "all"}, "line 2: the chat template drops the tool 'weather'"),
    "messages not a list": ({"messages": "hello"}, {}, "line 2: 'messages' must be a list of messages, this is the string"),
    "no messages": ({"messages": []}, {}, "line 2: 'messages' must be a list of messages"),
    "no role": ({"messages": [{"content": "a"}]}, {}, "line 2: message 1 of 'messages' must be like"),
    "content not a string": (chat(("user", "a"), ("assistant", 3)), {}, r"line 2: message 2 .*\(assistant\): content must be a string"),
    "image": (chat(("user", [{"type": "text", "text": "a"}, {"type": "image", "text": None}])), {}, "part of type 'image'.*only text is"),
    "an image with empty text": (chat(("user", [{"type": "image", "text": ""}])), {}, "part of type 'image'.*only text is"),
    "a role that is none": (chat(("user", "a"), ("asistant", "b"), ("assistant", "c")), {}, "message 2 has the role 'asistant', not"),
    "two system turns": (
        chat(("system", "a"), ("user", "a"), ("assistant", "b")) | {"system": "b"}, {}, "'system' beside a system turn that says some",
    ),
    "settings that are none": (chat(("user", "a")) | {"chat_template_kwargs": "x"}, {}, "'chat_template_kwargs' must be an object like"),
    "thought that the template drops": (
        {"messages": [*CHAT["messages"][:-1], CHAT["messages"][-1] | {"reasoning_content": "hm"}]}, {},
        "drops the 'reasoning_content' of the last message",
    ),
    "padding between": ({"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}, {}, "line 2: 'attention_mask' has zeros between ones"),
    "no answer": (chat(("user", "a")), {}, "line 2: no message of the row is trained on: it has no answer"),
    "all marked": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False}]}, {},
        "line 2: .*every answer is marked train: false",
    ),
    "no trained token": ({"prompt": "a", "completion": ""}, {"add_eos": False}, "line 2: no token of the row is trained on"),
    "too long": ({"prompt": "a", "completion": "b " * 200}, {}, r"line 2: the row has \d+ tokens \(1 of them prompt\), max_length is 128"),
    "prompt too long": ({"prompt": "a " * 200, "completion": "b"}, {}, r"line 2: the row has \d+ tokens \(its prompt alone has 201\)"),
    "answer cut away": (
        {"prompt": "a " * 200, "completion": "b"}, {"length_policy": "truncate"},
        "line 2: cut to max_length 128 .truncation_side: right., nothing that is trained is left.*; use truncation_side: prompt",
    ),
    "two bos": (chat(("user", "a"), ("assistant", "b")), {"chat_template": TWO_BOS}, "'<|im_start|>' twice; remove it from the text"),
    "tools not json": ({"messages": CHAT["messages"], "tools": "["}, {}, "line 2: 'tools' is not valid JSON"),
    "history": ({"instruction": "a", "output": "b", "history": ["a"]}, {}, 'line 2: "history" must be a list of'),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS)
def test_rows(case, config, tokenizers, tmp_path):
    row, keys, message = ROWS[case]
    if "chat_template" in keys:
        (tmp_path / "template.jinja").write_text(keys["chat_template"])
        keys = {"chat_template": str(tmp_path / "template.jinja"), "quality": {"stop_token_untrained": "keep"}}
    with pytest.raises(DataError, match=f"rows.jsonl, .*{message}" if "line 2" not in message else f"rows.jsonl, {message}"):
        data.load(config([GOOD, row], **keys), tokenizers["chatml"])
    assert not list((tmp_path / "cache").glob("*"))


def test_text_beside_images(config, tokenizers):
    rows = [CHAT, CHAT | {"images": []}, CHAT | {"images": ["a.png"]}]
    with pytest.raises(DataError, match="line 3: the row has images, which are not trained: only text is"):
        data.load(config(rows), tokenizers["chatml"])
    kept = [len(data.load(config(rows, quality={"media": policy}), tokenizers["chatml"]).train.documents) for policy in ("drop", "keep")]
    assert kept == [2, 3]


def test_format_named_for_rows_without_its_fields(config, tokenizers):
    with pytest.raises(DataError, match="line 1: the field 'completion' is missing; the row has 'text'|the field 'prompt' is missing"):
        data.load(config([{"text": "a"}], format="prompt_completion"), tokenizers["chatml"])


def test_columns_that_are_not_there(config, tokenizers):
    with pytest.raises(
        DataError, match="line 1: no field 'question', which data.columns names for 'prompt'; the row has 'prompt', 'completion'"
    ):
        data.load(config([GOOD], columns={"prompt": "question"}), tokenizers["chatml"])


@pytest.mark.parametrize("path", ["missing.jsonl", "/nowhere/rows.json", "./rows", "no/such/file"])
def test_missing_file(path, config, tokenizers):
    with pytest.raises(DataError, match="no such file"):
        data.load(config(path), tokenizers["chatml"])


def test_a_name_that_is_neither_file_nor_data_set(config, tokenizers):
    with pytest.raises(DataError, match="nobody/nothing: neither a local file nor an accessible data set"):
        data.load(config("nobody/nothing"), tokenizers["chatml"])


def test_empty_glob_and_folder(config, tokenizers, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="no file matches"):
        data.load(config(str(tmp_path / "*.jsonl")), tokenizers["chatml"])
    with pytest.raises(DataError, match="the folder holds none of"):
        data.load(config(str(tmp_path / "folder")), tokenizers["chatml"])


def test_no_chat_template(config, tokenizers, bare):
    with pytest.raises(DataError, match="no chat template.*data.chat_template"):
        data.load(config([CHAT]), bare)
    assert len(data.load(config([GOOD]), bare).train.documents) == 1
    bare.chat_template = {"rag": "{{ messages }}", "tool_use": "{{ messages }}"}
    with pytest.raises(DataError, match="templates rag, tool_use and none of them is the default; save one .* set data.chat_template"):
        data.load(config([CHAT]), bare)


@pytest.mark.parametrize("name, message", [("nowhere.jinja", "no such file"), ("/", "a folder; name the Jinja file in it")])
def test_a_chat_template_that_is_not_there(config, tokenizers, name, message):
    with pytest.raises(DataError, match=f"data.chat_template {name}: {message}"):
        data.load(config([CHAT], chat_template=name), tokenizers["chatml"])


def test_template_that_refuses_a_row(config, tokenizers, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}")
    row = chat(("system", "be brief"), ("user", "a"), ("assistant", "b"))
    with pytest.raises(DataError, match="line 1: the chat template refuses the messages: System role not supported. Write .* data.chat_t"):
        data.load(config([row], chat_template=str(template)), tokenizers["chatml"])


def test_no_eos_token(config, bare):
    bare.eos_token = None
    with pytest.raises(DataError, match="no EOS token.*data.add_eos: false"):
        data.load(config([GOOD]), bare)


def test_all_rows_dropped(config, tokenizers):
    rows = [{"text": "word " * 300}] * 3
    with pytest.raises(DataError, match="no row is left of 3; dropped: 3 too long"):
        data.load(config(rows, length_policy="drop"), tokenizers["chatml"])


def test_eval_share_that_takes_nothing(config, tokenizers):
    with pytest.raises(DataError, match="data.eval 0.001 of 1 rows leaves it without rows"):
        data.load(config([GOOD], eval=0.001), tokenizers["chatml"])


def test_unknown_problem_name(config, tokenizers):
    with pytest.raises(ConfigError, match="data.quality.double_boss: keep names no problem.*did you mean double_bos"):
        data.load(config([GOOD], quality={"double_boss": "keep"}), tokenizers["chatml"])


@pytest.mark.parametrize("name", ["tokens.bin", "groups.bin", "lengths.bin", "info.json", "sums.json"])
@pytest.mark.parametrize("damage", [lambda content: None, lambda content: content[:-8], lambda content: b"x" + content[1:]])
def test_a_damaged_cache_is_made_again(name, damage, config, tokenizers, tmp_path, caplog):
    made = config([GOOD, CHAT])
    source = data.load(made, tokenizers["chatml"]).train
    fingerprint, tokens = source.fingerprint, source.batch_at(0).tokens.copy()  # what is mapped changes with the file
    (file,) = tmp_path.glob(f"cache/*/{name}")
    content = damage(file.read_bytes())
    file.unlink() if content is None else file.write_bytes(content)
    again = data.load(made, tokenizers["chatml"]).train
    assert again.fingerprint == fingerprint and np.array_equal(again.batch_at(0).tokens, tokens)
    assert "is damaged, so the rows are tokenised again" in caplog.text


def test_an_empty_path(config, tokenizers):
    with pytest.raises(DataError, match="the path of the data is empty"):
        data.load(config(""), tokenizers["chatml"])


def test_a_cache_folder_that_is_a_file(config, tokenizers, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="data.cache_dir .*file is a file"):
        data.load(config([GOOD], cache_dir=str(tmp_path / "file")), tokenizers["chatml"])


def test_a_model_without_a_tokenizer(config):
    with pytest.raises(DataError, match="the model has no tokenizer"):
        data.load(config([GOOD]), None)


def test_a_token_that_the_model_has_not(config, tokenizers):
    """In used rows: the first one here is held out for evaluation."""
    rows, tokenizer = [{"text": "zebra"}, {"text": "a"}, {"text": "the zebra"}], tokenizers["chatml"]
    largest = [max(tokenizer(row["text"])["input_ids"]) for row in rows]
    source = data.load(config(rows), tokenizer).train
    source.check_vocabulary(max(largest) + 1)
    source.units.documents = source.documents.select(np.arange(1, 3))
    with pytest.raises(DataError, match=f"row 3: the tokenizer makes token {largest[2]} .*embedding has {largest[2]} rows"):
        source.check_vocabulary(largest[2])
    assert "Training will stop at" in report(config(rows), tokenizer, vocabulary=largest[2]).notes[0]


def test_a_row_longer_than_a_table_of_positions(config, tokenizers, caplog):
    """Beyond it the last position would be used repeatedly; rotary positions beyond the context only cause one warning."""
    source = data.load(config([{"text": "a " * 20}]), tokenizers["chatml"]).train
    most = source.units.longest
    for ropes, positions in (((), most), (("any",), most), (("any",), most - 1)):
        assert not caplog.messages
        check_fits([source, None], tokenizers["chatml"], SimpleNamespace(vocab_size=10**6, ropes=ropes, max_position_embeddings=positions))
    assert len(caplog.messages) == 1 and f"{most} tokens, and this model's max_position_embeddings is {most - 1}" in caplog.text
    with pytest.raises(DataError, match=f"the longest row has {most} tokens, and this model's table of positions ends at {most - 1}"):
        check_fits([source], tokenizers["chatml"], SimpleNamespace(vocab_size=10**6, ropes=(), max_position_embeddings=most - 1))
