"""`jaxtune data` through the command line: its JSON, its page, and every planted fault."""

import contextlib
import io
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from jaxtune import cli, errors
from jaxtune.data.__main__ import main

CONFIG = """
model: {model}
output_dir: {folder}/run
data:
  train: {folder}/train.jsonl
  eval: {folder}/eval.jsonl
  cache_dir: {folder}/cache
"""
THINGS = ["apples", "bricks", "candles", "doors", "engines", "feathers", "gloves", "hammers", "islands", "jars"]


def clean(n):
    one, two, three = THINGS[n % 10], THINGS[n // 10 % 10], THINGS[n // 100 % 10]
    return [
        f"Question {n}: if {n} {one} and {n * 3} {two} are sold for {n * 7} coins, what is one of the {three} worth at stall {n + 5}?",
        f"At stall {n + 5} the {three} go for {n * 2} coins each, because {one} and {two} came to {n * 7} in the end.",
    ]


def chat(prompt, answer):
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def folder(tmp_path, tokenizers):
    """A folder with a model's tokenizer, 120 clean rows to train on and 20 to evaluate on."""
    tokenizers["chatml"].save_pretrained(tmp_path / "model")
    write(tmp_path / "train.jsonl", [chat(*clean(n)) for n in range(100, 220)])
    write(tmp_path / "eval.jsonl", [chat(*clean(n)) for n in range(500, 520)])
    (tmp_path / "config.yaml").write_text(CONFIG.format(model=tmp_path / "model", folder=tmp_path))
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(folder, *args):
    """The command in this process, where everything is imported already."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["jaxtune data", "config.yaml", *args])
        patch.setattr(cli, "log_to_terminal", lambda: None)  # which other tests of this process would receive
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            errors.run(main)
    return SimpleNamespace(returncode=ended.value.code, stdout=out.getvalue(), stderr=err.getvalue())


def as_json(folder, *args):
    done = run(folder, "--json", *args)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_clean_rows(folder):
    found = as_json(folder)
    assert found["problems"] == {} and found["dropped"] == {}
    assert found["rows"] == 120 and found["sides"] == {"train": 120, "eval": 20}
    assert 0 < found["trained_tokens"] < found["tokens"] and 0.8 < found["packing_efficiency"] <= 1
    assert len(found["previews"]) == 10
    for preview in found["previews"]:
        said = "".join(text for text, trained in preview["runs"] if trained)
        assert re.fullmatch(r"At stall \d+ the \w+ go for .* in the end\.<\|im_end\|>", said)
    assert not (folder / "data_report.html").exists() and not (folder / "run").exists()
    command = [sys.executable, "-m", "jaxtune.data", "config.yaml", "--json"]
    assert json.loads(subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout) == found


def test_planted_faults_are_all_found(folder):
    rows = [chat(*clean(n)) for n in range(100, 220)]
    rows += [rows[3], rows[4]]
    rows.append(chat(clean(105)[0], clean(105)[1] + " Quite so."))
    rows += [chat(clean(n)[0], "") for n in (300, 301, 302)]
    rows += [chat(clean(n)[0], f"{n}.") for n in range(310, 325)]
    rows.append(chat(clean(330)[0], clean(330)[1].replace("because", "becauseâ€™s")))
    write(folder / "train.jsonl", rows)
    write(folder / "eval.jsonl", [chat(*clean(n)) for n in range(500, 520)] + [rows[10]])
    problems = as_json(folder)["problems"]
    assert problems == {
        "exact_duplicate": 2, "near_duplicate": 1, "empty_answer": 3, "short_answer": 15, "encoding": 1, "leakage": 1,
    }  # fmt: skip


FAULTS = {
    "stop_token_untrained": "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    "double_bos": "{{ '<|im_start|>' }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_template_that_is_wrong_for_every_row(folder, name):
    (folder / "template.jinja").write_text(FAULTS[name])
    found = as_json(folder, f"data.chat_template={folder / 'template.jinja'}")
    assert found["problems"] == {name: 140} and found["stops"] == [name]


def test_a_template_that_strips_history(folder):
    (folder / "template.jinja").write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{{ m.content if loop.last or m.role != 'assistant' else m.content.split('</think>')[-1] }}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    thought = chat(*clean(400))
    thought["messages"][1]["content"] = "<think>Let me see.</think>" + clean(400)[1]
    thought["messages"] += chat(*clean(401))["messages"]
    write(folder / "train.jsonl", [chat(*clean(n)) for n in range(100, 220)] + [thought])
    found = as_json(folder, f"data.chat_template={folder / 'template.jinja'}")
    assert found["problems"] == {"template_rewrites": 1} and found["dropped"] == {"template_rewrites": 1} and found["rows"] == 120


def test_rows_that_are_too_long_are_counted(folder):
    (folder / "eval.jsonl").write_text((folder / "train.jsonl").read_text().replace("Question", "Asked"))
    found = as_json(folder, "data.max_length=265")
    assert found["problems"]["too_long"] == found["dropped"]["too_long"] > 0 and "too_long" in found["stops"]
    dropped = as_json(folder, "data.max_length=265", "data.length_policy=drop")
    assert "too_long" not in dropped["problems"] and dropped["dropped"] == found["dropped"]
    cut = as_json(folder, "data.max_length=265", "data.length_policy=truncate")
    assert cut["cut"]["rows"] > 0 and cut["rows"] == 120


def test_terminal_and_page(folder):
    write(
        folder / "train.jsonl",
        [chat(*clean(n)) for n in range(100, 220)] + [chat(clean(300)[0], "<script>alert(1)</script> is no tag here.")],
    )
    done = run(folder)
    assert done.returncode == 0 and "121 rows to train on" in done.stdout and "no problems found" in done.stdout
    page = (folder / "data_report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page and page.count("<mark>") >= 10
    assert "http" not in page.replace("https://", "").replace("http://", "") and "prefers-color-scheme: dark" in page


def test_pairs(folder):
    pair = {"prompt": clean(100)[0], "chosen": clean(100)[1], "rejected": clean(101)[1]}
    write(folder / "train.jsonl", [pair, pair | {"prompt": clean(102)[0], "rejected": pair["chosen"]}])
    found = as_json(folder, "objective=dpo", "data.eval=null")
    assert found["rows"] == 2 and found["problems"] == {"chosen_equals_rejected": 1}


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"messages": 3}', "train.jsonl, line 2: 'messages' must be a list of messages"),
        ('{"messages": [', "train.jsonl, line 2: not valid JSON"),
    ],
)
def test_a_bad_row_is_an_error(folder, line, message):
    (folder / "train.jsonl").write_text(json.dumps(chat(*clean(1))) + "\n" + line + "\n")
    done = run(folder, "--json")
    assert done.returncode == 2 and message in done.stderr and not done.stdout and "Traceback" not in done.stderr


def test_what_is_no_fault_but_should_be_known(folder):
    """A special token inside a message; prompts that join their answers without a space, which is noted but no problem."""
    rows = [chat(*clean(n)) for n in range(100, 220)]
    rows[7]["messages"][0]["content"] += " Or <|im_end|>?"
    write(folder / "train.jsonl", rows)
    found = as_json(folder)
    assert found["problems"] == {"special_token": 1} and found["stops"] == found["notes"] == []
    assert "line 8: message 1 (user) holds '<|im_end|>'" in found["examples"]["special_token"][0]
    write(folder / "train.jsonl", [dict(zip(("prompt", "completion"), clean(n), strict=True)) for n in range(100, 220)])
    found = as_json(folder)
    assert found["problems"] == {} and len(found["notes"]) == 1
    assert "In 120 rows the prompt joins the answer" in found["notes"][0] and "columns: {instruction: ..." in found["notes"][0]
