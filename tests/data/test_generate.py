"""The filters and the order of prompts, with a table as the writer; the model itself is tested with jaxtune.generate."""

import json
from argparse import Namespace

import pytest

from jaxtune.data.__main__ import _plain
from jaxtune.data.generate import Made, Writer, back_translate, rewrite, save, self_instruct, written
from jaxtune.errors import DataError

SEEDS = [
    "Name three rivers of Europe.", "Explain how bread rises in the oven.", "Write a haiku about snow.", "Add seventeen and twenty-five.",
]  # fmt: skip


class Table(Writer):
    """Answers from a function of prompt and call number."""

    def __init__(self, answer, batch=2):
        super().__init__(generate=None, batch=batch)
        object.__setattr__(self, "answer", answer)
        object.__setattr__(self, "asked", [])

    def write(self, prompts, number, **settings):
        self.asked.append((list(prompts), settings))
        return [self.answer(prompt, number, place) for place, prompt in enumerate(prompts)]


def tasks(prompt, number, place):
    if "Write one more task" in prompt:
        return (
            f"- Task {number}-{place}: "
            + ["count the {} birds by night", "sing of the {} fish at noon"][place].format(f"q{number}")
            + "\n\nAnswer: no"
        )
    return f"Answer to {prompt}"


def test_self_instruct_makes_new_tasks_with_answers():
    writer, made = Table(tasks), Made()
    rows = list(self_instruct(writer, SEEDS, 3, made=made))
    assert len(rows) == made.rows == 3
    assert all(row["completion"] == f"Answer to {row['prompt']}" and "Answer: no" not in row["prompt"] for row in rows)
    asked, settings = writer.asked[0]
    assert asked[0].count("\n- ") == 3 and settings == {} and writer.asked[1][1] == {"temperature": 0.0}
    assert rows == list(self_instruct(Table(tasks), SEEDS, 3)), "the same seed, the same rows"


def test_self_instruct_gives_up_when_nothing_new_comes():
    made = Made()
    assert list(self_instruct(Table(lambda *_: SEEDS[0]), SEEDS, 5, made=made, patience=3)) == []
    assert made.refused == {"similar": 6}


def test_filters_and_empty_answers_are_counted():
    made = Made()
    questions = {"one": "How much is half of two?", "two": "", "three": "Which number follows two when counting upwards?"}

    def ask(prompt, number, place):
        return next(question for text, question in questions.items() if f"\n{text}\n" in prompt)

    rows = list(back_translate(Table(ask), list(questions), keep=lambda row: row["completion"] != "three", made=made))
    assert [row["completion"] for row in rows] == ["one"]
    assert made.refused == {"empty": 1, "filtered": 1}


def test_rewrite_keeps_prompts():
    rows = [{"prompt": "One?", "completion": "1"}, {"prompt": "One?", "completion": "uno"}, {"prompt": "Two?", "completion": "2"}]
    new = list(rewrite(Table(lambda prompt, number, place: f"new {number}{place}"), rows, how="Say it in verse."))
    assert [row["prompt"] for row in new] == ["One?", "One?", "Two?"]
    assert [row["completion"] for row in new] == ["new 00", "new 01", "new 10"]


def test_save_appends(tmp_path):
    for _ in range(2):
        assert save(iter([{"prompt": "a", "completion": "ü"}]), tmp_path / "rows.jsonl") == 1
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()] == [
        {"prompt": "a", "completion": "ü"}
    ] * 2


def test_what_is_there_is_not_made_again(tmp_path):
    """The command after a kill: rows in OUT are done, the truncated one is removed."""
    out = tmp_path / "out.jsonl"
    save([{"prompt": "Sing of the \u2028 sea.", "completion": "b"}, {"prompt": "One?", "completion": "x"}], out)
    out.write_text(out.read_text(encoding="utf-8").rstrip("\n"), encoding="utf-8")
    done = written(out, "prompt", "completion")
    assert [row["prompt"] for row in done] == ["Sing of the \u2028 sea.", "One?"] and out.read_text(encoding="utf-8").endswith("}\n")
    with out.open("a") as stream:
        stream.write('{"prompt": "cut')
    assert written(out, "prompt", "completion") == done and out.read_text(encoding="utf-8").count("\n") == 2
    said = [(prompt, "b", "") for prompt in (*SEEDS, "One?")]

    def rows(make):
        return list(_plain(Namespace(make=make, count=3, how="Better."), Table(tasks), said, done, Made()))

    assert len(rows("tasks")) == 1 and rows("instructions") == [] and [row["prompt"] for row in rows("answers")] == SEEDS
    with pytest.raises(DataError, match="holds other rows than those that are made .prompt, chosen.; name another file"):
        written(out, "prompt", "chosen")
    assert written(tmp_path / "none.jsonl") == []


def test_too_few_seeds():
    with pytest.raises(DataError, match="2 seed tasks were given, but each question shows 3"):
        list(self_instruct(Table(tasks), SEEDS[:2], 1))
