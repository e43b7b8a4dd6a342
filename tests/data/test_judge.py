"""Criticism, revision and judgement with a scripted writer: order, refusals, both orders of a pair, and a resumed run."""

import json
import subprocess
import sys

import pytest
import tiny

from jaxtune.data.generate import Writer
from jaxtune.data.judge import fresh, prefer, read_principles, revise, save, verdict
from jaxtune.errors import DataError

PROMPTS = [
    "How do I boil an egg?", "Which river runs through Cairo?", "Tell me a joke about a tailor.", "", "How do I boil an egg?",
    "Write down the first five primes.",
]  # fmt: skip
FRESH = [PROMPTS[n] for n in (0, 1, 2, 5)]


class Script(Writer):
    """Answers by the content of the prompt; counts the calls."""

    def __init__(self, judge=lambda asked: "Reasons.\nVerdict: A", batch=2):
        super().__init__(generate=None, batch=batch)
        object.__setattr__(self, "judge", judge)
        object.__setattr__(self, "calls", [])

    def write(self, prompts, number, **settings):
        self.calls.append((number, settings))
        return [self.one(prompt, number) for prompt in prompts]

    def one(self, asked, number):
        if "Which answer follows" in asked:
            return self.judge(asked)
        if "Name what should be changed" in asked:
            return f"It should be longer ({asked.split('Answer: ')[1].split(chr(10))[0]})."
        if "Write the new answer alone" in asked:
            return "better " + asked.split("Answer: ")[1].split("\n")[0]
        return f"answer {number} to {asked}"


def by_length(asked):
    a, b = (asked.split(f"Answer {side}: ")[1].split("\n")[0] for side in "AB")
    return f"I looked at both.\nVerdict: {'A' if len(a) >= len(b) else 'B'}"


def test_revisions_are_preferred_to_what_they_revise():
    assert fresh(PROMPTS) == FRESH
    rows = list(revise(Script(), FRESH, ["Be long.", "Be kind."], rounds=2))
    assert [row["prompt"][0]["content"] for row in rows] == FRESH
    first = rows[0]
    assert first["rejected"] == [{"role": "assistant", "content": f"answer 0 to {FRESH[0]}"}]
    assert first["chosen"][0]["content"] == f"better better answer 0 to {FRESH[0]}"
    assert first["critique"] == f"It should be longer (better answer 0 to {FRESH[0]})." and {row["principle"] for row in rows} <= {
        "Be long.",
        "Be kind.",
    }
    (plain,) = revise(Script(), PROMPTS[:1], plain=True)
    assert plain["prompt"] == FRESH[0] and plain["rejected"] == f"answer 0 to {FRESH[0]}"


def test_only_a_verdict_that_survives_the_other_order_counts():
    pairs = [("long answer", "short"), ("brief", "the longer one"), ("same", "same"), ("", "x"), ("x", "x"), ("a", "b")]
    rows = list(prefer(Script(by_length), PROMPTS, ["Be long."], pairs, plain=True))
    assert [(row["prompt"], row.get("chosen"), row.get("refused")) for row in rows] == [
        (PROMPTS[0], "long answer", None), (PROMPTS[1], "the longer one", None), (PROMPTS[2], None, "same"), ("", None, "empty"),
        (PROMPTS[4], None, "same"), (PROMPTS[5], None, "undecided"),
    ]  # fmt: skip
    assert rows[1]["rejected"] == "brief" and rows[1]["reasons"] == ["I looked at both.\nVerdict: B", "I looked at both.\nVerdict: A"]
    assert all(row["refused"] == "undecided" for row in prefer(Script(), FRESH)), "a judge that always says A has said nothing"
    assert all(row["refused"] == "no_verdict" for row in prefer(Script(lambda _: "Both are fine."), FRESH))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Verdict: A", "A"), ("... so.\n**Verdict:** B", "B"), ("verdict: Answer b.", "B"), ("Verdict: A? No. Verdict: B", "B"),
        ("Because.\n(A)", "A"), ("B.", "B"), ("A is nice", None), ("Verdict: Apple", None), ("", None),
    ],
)  # fmt: skip
def test_verdicts(text, wanted):
    assert verdict(text) == wanted


def test_a_stopped_run_goes_on_to_what_one_run_writes(tmp_path):
    def make(writer):
        return lambda done: prefer(writer, FRESH, ["Be long.", "Be kind."], None, done)

    def judge(asked):
        return by_length(asked) if "river" in asked or "tailor" in asked else "Verdict: A"

    whole = save(make(Script(judge)), tmp_path / "whole.jsonl")
    assert (whole.rows, whole.refused) == (0, {"undecided": 4})

    def stopped(done):
        for number, row in enumerate(revise(Script(), FRESH, done=done)):
            if number == 3:
                raise KeyboardInterrupt
            yield row

    save(lambda done: revise(Script(), FRESH, done=done), tmp_path / "one.jsonl")
    with pytest.raises(KeyboardInterrupt):
        save(stopped, tmp_path / "two.jsonl")
    with open(tmp_path / "two.jsonl", "a") as file:
        file.write('{"prompt": "cut o')
    writer = Script()
    made = save(lambda done: revise(writer, FRESH, done=done), tmp_path / "two.jsonl")
    assert made.rows == 1 and {number // 10 for number, _ in writer.calls} == {1}, "the first batch is not asked again"
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    assert save(make(Script(judge)), tmp_path / "whole.jsonl").refused == {}, "what was refused is not asked again"
    refused = [json.loads(line) for line in (tmp_path / "whole.refused.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in refused] == FRESH and all(len(row["answers"]) == len(row["reasons"]) == 2 for row in refused)


def test_principles_are_lines(tmp_path):
    (tmp_path / "principles.txt").write_text("# ours\nBe kind.\n\n  Be brief.\n")
    assert read_principles(tmp_path / "principles.txt") == ["Be kind.", "Be brief."]
    (tmp_path / "none.txt").write_text("# nothing\n")
    for name in ("none.txt", "absent.txt"):
        with pytest.raises(DataError, match="principles"):
            read_principles(tmp_path / name)


def test_the_command_with_a_model(tmp_path):
    """A random model gives no verdict: everything is refused, counted, and not asked again."""
    tiny.write_chat_model(tmp_path / "model", tiny.LLAMA | {"num_hidden_layers": 1, "max_position_embeddings": 4096})
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS[:2] * 2))
    command = [sys.executable, "-m", "jaxtune.data", "generate", str(tmp_path / "model"), str(tmp_path / "in.jsonl")]
    command += [str(tmp_path / "out.jsonl"), "--make", "preferences", "--max-new-tokens", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 of 4 rows are like rows before them" in done.stderr
    assert done.stdout == f"0 rows written to {tmp_path}/out.jsonl; left out: 2 no_verdict\n"
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.stdout == f"0 rows written to {tmp_path}/out.jsonl\n"
    assert len((tmp_path / "out.refused.jsonl").read_text().splitlines()) == 2
