"""Best-of-n: models and functions choose the best answer, in Python and on the command line."""

import json
import subprocess
import sys

import jax
import pytest
import tiny

import jaxtune as jt
from jaxtune.convert import heads
from jaxtune.errors import ConfigError

PROMPTS = ["one two", [{"role": "user", "content": "the quick brown"}]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("best")
    tiny.write_chat_model(folder / "lm", tiny.LLAMA | {"num_hidden_layers": 1})
    model = heads.attach(jt.load(folder / "lm"), heads.Head(("reward",)), jax.random.key(0))
    jt.save(model.config, model.params, folder / "reward", tokenizer=model.tokenizer)
    (folder / "judge.py").write_text("def length(prompts, completions, **_):\n    return [len(text) for text in completions]\n")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return jt.load(folder / "lm")


def test_the_best_by_a_function(model):
    asked = []

    def judge(prompts, completions):
        asked.append((prompts, completions))
        return [len(text) for text in completions]

    found = jt.best_of_n(model, PROMPTS, 4, judge, max_new_tokens=6, seed=1)
    drawn = jt.generate(model, PROMPTS, max_new_tokens=6, seed=1, temperature=1.0, num_return_sequences=4)
    assert asked == [([[{"role": "user", "content": "one two"}]] * 4 + [PROMPTS[1]] * 4, drawn)]
    for number, best in enumerate(found):
        texts = drawn[4 * number : 4 * number + 4]
        assert best.prompt == PROMPTS[number] and best.scores == [float(len(text)) for text in texts] and len(set(texts)) > 1
        assert best.text == best.answer.text == max(texts, key=len) and best.score == max(best.scores)
    assert jt.best_of_n(model, "one", 1, judge, max_new_tokens=3)[0].scores == [
        len(jt.generate(model, "one", max_new_tokens=3, temperature=1.0)[0])
    ]


def test_the_best_by_a_reward_model(model, folder):
    (by_folder,), (by_model,) = (
        jt.best_of_n(model, "one two", 4, reward, max_new_tokens=5) for reward in (folder / "reward", jt.load(folder / "reward"))
    )
    scores = jt.score(folder / "reward", [([{"role": "user", "content": "one two"}], answer.text) for answer in by_folder.answers])
    assert (
        by_folder == by_model and by_folder.scores == pytest.approx(scores.tolist(), abs=1e-5) and by_folder.score == max(by_folder.scores)
    )


@pytest.mark.parametrize(
    ("n", "prompts", "reward", "said"),
    [
        (0, "one", len, "best of 0"),
        (2, [[1, 2]], len, "token ids has no text"),
        (2, "one", lambda prompts, completions: [1.0], "one finite number for each of the 2 answers"),
        (2, "one", lambda prompts, completions: [1.0, float("nan")], "one finite number for each of the 2 answers"),
        (2, "one", "no.such.module", "cannot be loaded"),
    ],
)
def test_what_cannot_be_chosen_from(model, n, prompts, reward, said):
    with pytest.raises(ConfigError, match=said):
        jt.best_of_n(model, prompts, n, reward, max_new_tokens=2)


def test_the_command(folder):
    command = [sys.executable, "-m", "jaxtune.generate", str(folder / "lm"), "--prompt", "one two", "--max-new-tokens", "5", "--json"]
    done = subprocess.run([*command, "--best-of", "3", "--reward", f"{folder}/judge.py:length"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["completions"]
    assert row["score"] == max(row["scores"]) == len(row["text"]) and len(row["scores"]) == 3 and "best of 3: mean score" in done.stderr
    refused = subprocess.run([*command, "--best-of", "3"], capture_output=True, text=True)
    assert refused.returncode == 2 and "give both, or neither" in refused.stderr
