"""Evaluation: base and tuned on the same rows, its numbers recomputed from the logits, its JSON, its files, its errors."""

import io
import json
import math

import jax
import numpy as np
import pytest
import tiny
from rich.console import Console

import jaxtune as jt
from jaxtune import evaluate as module
from jaxtune.errors import ConfigError, DataError

WORDS = "one two three hello there fox dog quick brown lazy".split()
TURNS = [(("system", "be"), ("user", f"say {word}"), ("assistant", f" {word}")) for word in WORDS]
ROWS = [{"messages": [{"role": role, "content": content} for role, content in turns]} for turns in TURNS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, an adapter with an effect, a whole tuned model, and rows."""
    folder = tmp_path_factory.mktemp("evaluate")
    tiny.write_chat_model(folder / "model")
    tiny.write_chat_model(folder / "tuned", seed=5)
    tiny.write_rows(folder, ROWS)
    model = jt.load(folder / "model")
    adapter = jt.init_adapter(jax.random.key(0), model, jt.LoraConfig(r=4))
    adapter = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape) * 0.1, adapter)
    jt.save_adapter(adapter, model, folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def report(folder):
    rows, adapter = folder / "rows.jsonl", folder / "adapter"
    return jt.evaluate(folder / "model", rows, adapter, metric=["exact_match", "f1"], max_new_tokens=4, max_length=64)


def token_numbers(model, params):
    """Loss and accuracy of the answers' tokens, from one forward pass over unpacked rows."""
    render, nll, right, count = model.tokenizer.apply_chat_template, 0.0, 0, 0
    prompts = [render(row["messages"][:2], add_generation_prompt=True, return_dict=False) for row in ROWS]
    texts = [render(row["messages"], tokenize=False).removesuffix("\n") for row in ROWS]
    whole = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    padded = np.stack([np.pad(ids, (0, max(map(len, whole)) - len(ids))) for ids in whole])
    logp = np.asarray(jax.nn.log_softmax(jt.forward(model.config, params, padded)))
    for row, (prompt, ids) in enumerate(zip(prompts, whole, strict=True)):
        for place in range(len(prompt), len(ids)):
            nll -= float(logp[row, place - 1, ids[place]])
            right += int(logp[row, place - 1].argmax()) == ids[place]
            count += 1
    return nll / count, right / count


def test_token_metrics_are_those_of_the_answers(folder, report):
    model = jt.load(folder / "model")
    for params, ours in ((model.params, report.base), (jt.compose(model.params, jt.load_adapter(folder / "adapter", model)), report.tuned)):
        loss, accuracy = token_numbers(model, params)
        assert ours["loss"] == pytest.approx(loss, rel=1e-4)
        assert ours["perplexity"] == pytest.approx(math.exp(loss), rel=1e-3)
        assert ours["mean_token_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert report.base["loss"] != report.tuned["loss"]


def test_both_sides_have_the_same_keys_and_answers_are_generates(folder, report):
    assert list(report.base) == list(report.tuned) == ["loss", "perplexity", "mean_token_accuracy", "exact_match", "f1"]
    model = jt.load(folder / "model")
    prompts = [row["messages"][:2] for row in ROWS]
    adapter = jt.load_adapter(folder / "adapter", model)
    for side, answers in (
        ("base", jt.generate(model, prompts, max_new_tokens=4)),
        ("tuned", jt.generate(model, prompts, adapter=adapter, max_new_tokens=4)),
    ):
        assert [sample[side] for sample in report.samples] == answers[:3]
    assert [sample["reference"] for sample in report.samples] == [" one", " two", " three"]
    assert report.rows == len(ROWS)


def test_scores_intervals_and_the_change_belong_to_each_other(folder):
    """A metric of our own with known scores: base answers get 0.25, tuned ones 0.75."""
    calls = []

    def rise(predictions, references, rows):
        assert references == [row["messages"][2]["content"] for row in rows]
        calls.append(len(predictions))
        return [0.25 if len(calls) == 1 else 0.75] * len(predictions)

    report = jt.evaluate(folder / "model", folder / "rows.jsonl", tuned=folder / "tuned", metric=rise, max_new_tokens=2, max_length=64)
    assert (report.base["rise"], report.tuned["rise"]) == (0.25, 0.75)
    assert report.interval == {"base": {"rise": (0.25, 0.25)}, "tuned": {"rise": (0.75, 0.75)}, "change": {"rise": (0.5, 0.5)}}


def test_an_interval_holds_its_mean(report):
    for side, table in report.interval.items():
        value = report.tuned["f1"] - report.base["f1"] if side == "change" else getattr(report, side)["f1"]
        low, high = table["f1"]
        assert low <= value <= high


def test_a_tuned_model_is_another_model_and_no_second_side_is_none(folder):
    alone = jt.evaluate(folder / "tuned", folder / "rows.jsonl", metric=(), max_length=64)
    beside = jt.evaluate(folder / "model", folder / "rows.jsonl", tuned=folder / "tuned", metric=(), max_length=64)
    assert alone.tuned is None and alone.rows == 0
    assert beside.tuned == alone.base != beside.base


def test_limit_shortens_the_answers_alone(folder, report):
    short = jt.evaluate(folder / "model", folder / "rows.jsonl", limit=2, max_new_tokens=2, max_length=64)
    assert short.rows == len(short.samples) == 2
    assert short.base["loss"] == pytest.approx(report.base["loss"], rel=1e-6)


def run(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["jaxtune evaluate", *map(str, arguments), "--max-length", "64"])
    module.main()
    return capsys.readouterr().out


def test_json_is_one_object_and_nothing_else(folder, tmp_path, monkeypatch, capsys):
    arguments = [folder / "model", "--data", folder / "rows.jsonl", "--adapter", folder / "adapter", "--max-new-tokens", 4]
    out = run([*arguments, "--predictions", tmp_path / "answers.jsonl", "--json"], monkeypatch, capsys)
    found = json.loads(out)
    assert out.count("\n") == 1 and {"base", "tuned"} <= found.keys()
    assert found["base"].keys() == found["tuned"].keys() >= {"perplexity", "mean_token_accuracy", "exact_match"}
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["model"] for line in lines] == ["base"] * len(ROWS) + ["tuned"] * len(ROWS)
    assert [line["line"] for line in lines[: len(ROWS)]] == list(range(1, len(ROWS) + 1))
    assert np.mean([line["exact_match"] for line in lines[len(ROWS) :]]) == found["tuned"]["exact_match"]
    assert lines[0]["prompt"] == "say one" and lines[0]["reference"] == " one"


def test_the_table_shows_both_sides_the_change_and_samples(folder, monkeypatch, capsys):
    arguments = [folder / "model", "--data", folder / "rows.jsonl", "--adapter", folder / "adapter", "--max-new-tokens", 4]
    out = run(arguments, monkeypatch, capsys)
    for word in ("base", "tuned", "change", "perplexity", "exact_match", "10 answered rows", "say one", "say three", "reference"):
        assert word in out
    assert "say hello" not in out


def test_a_narrow_terminal_shows_every_number():
    scores = {"perplexity": 3.4, "exact_match": 0.5}
    interval = {side: {"exact_match": (0.1, 0.9)} for side in ("base", "tuned", "change")}
    out = io.StringIO()
    module.Report(3, scores, {"perplexity": 2.4, "exact_match": 0.75}, interval, []).show(Console(file=out, width=20))
    assert all(number in out.getvalue() for number in ("3.4", "2.4", "+25.0 %", "+10.0 % to +90.0 %"))


def test_metric_none_measures_text_alone(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.jsonl").write_text('{"body": "The quick brown fox"}\n{"body": "hello there"}\n')
    arguments = [folder / "model", "--data", tmp_path / "text.jsonl", "--json", "--columns", "text=body"]
    found = json.loads(run([*arguments, "--metric", "none"], monkeypatch, capsys))
    assert found["tuned"] is None and found["base"].keys() == {"loss", "perplexity", "mean_token_accuracy"}
    with pytest.raises(DataError, match="nothing can be asked"):
        run(arguments, monkeypatch, capsys)


def test_pairs_are_told_by_likelihood_and_by_its_change(folder, tmp_path, monkeypatch, capsys):
    """Against one forward pass over each answer by itself. The first pair's answers are equal, which is a tie."""
    pairs = [{"prompt": "say", "chosen": f" {word}", "rejected": f" {WORDS[n // 2]}"} for n, word in enumerate(WORDS[:4])]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    arguments = [folder / "model", "--data", tmp_path / "pairs.jsonl", *"--objective dpo --metric none --max-length 32 --json".split()]
    found = json.loads(run([*arguments, "--tuned", folder / "tuned"], monkeypatch, capsys))

    def logps(name):
        model = jt.load(folder / name)
        prompt, out = len(model.tokenizer("say")["input_ids"]), {}
        for word in WORDS[:4]:
            ids = [*model.tokenizer(f"say {word}")["input_ids"], model.tokenizer.eos_token_id]
            logp = np.asarray(jax.nn.log_softmax(jt.forward(model.config, model.params, np.asarray([ids + [0] * (16 - len(ids))]))))
            out[f" {word}"] = sum(float(logp[0, place - 1, ids[place]]) for place in range(prompt, len(ids)))
        return out

    def told(of):
        return np.mean([(1 + np.sign(round(of[row["chosen"]] - of[row["rejected"]], 3))) / 2 for row in pairs])

    before, after = logps("model"), logps("tuned")
    assert (found["base"]["chosen_likelier"], found["tuned"]["chosen_likelier"]) == (told(before), told(after))
    change = {word: after[word] - before[word] for word in before}
    assert found["base"]["rewards/accuracies"] == 0.5 and found["tuned"]["rewards/accuracies"] == told(change) != 0.5
    assert found["interval"]["tuned"].keys() == {"chosen_likelier", "rewards/accuracies"}


def test_mistakes_say_what_to_do(folder, tmp_path):
    model, rows = folder / "model", folder / "rows.jsonl"
    with pytest.raises(ConfigError, match="adapter and tuned are both given"):
        jt.evaluate(model, rows, folder / "adapter", tuned=folder / "tuned")
    with pytest.raises(ConfigError, match="metric exact is not known; write one of exact_match"):
        jt.evaluate("no/such/model", rows, metric="exact")
    (tmp_path / "old.jsonl").write_text("kept")
    with pytest.raises(ConfigError, match="the file exists and is not overwritten"):
        jt.evaluate("no/such/model", rows, predictions=tmp_path / "old.jsonl")
    assert (tmp_path / "old.jsonl").read_text() == "kept"

    def broken(predictions, references, rows):
        raise ValueError("no")

    with pytest.raises(ConfigError, match="broken"):
        jt.evaluate(model, rows, metric=broken, max_new_tokens=4, predictions=tmp_path / "new.jsonl", max_length=64)
    assert [path.name for path in tmp_path.iterdir()] == ["old.jsonl"]
    with pytest.raises(DataError, match="no such file"):
        jt.evaluate(model, tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="data.no_such_key is not a key"):
        jt.evaluate(model, rows, no_such_key=1)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_ends_with_base_beside_tuned(folder, tmp_path, capsys, method):
    rows = str(folder / "rows.jsonl")
    config = {
        "model": str(folder / "model"), "method": method, "output_dir": str(tmp_path / "run"), "max_steps": 8, "learning_rate": 1e-2,
        "data": {"train": rows, "test": rows, "max_length": 64}, "per_device_train_batch_size": 1, "compilation_cache": False,
        "evaluate": {"metric": ["exact_match"], "max_new_tokens": 4},
    }  # fmt: skip
    result = jt.train(config)
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["tuned"]["loss"] < found["base"]["loss"] and "change" in capsys.readouterr().out
    again = {"adapter": result.folder / "adapter"} if method == "lora" else {"tuned": result.folder / "model"}
    fresh = jt.evaluate(folder / "model", rows, **again, max_new_tokens=4, max_length=64)
    assert fresh.base == pytest.approx(found["base"], rel=1e-4) and fresh.tuned == pytest.approx(found["tuned"], rel=1e-4)
    assert len((tmp_path / "run" / "predictions.jsonl").read_text().splitlines()) == 2 * len(ROWS)
