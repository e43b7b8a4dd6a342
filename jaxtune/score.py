"""Score texts with a reward model or classifier.

    jaxtune score runs/reward --data answers.jsonl

MODEL is a run folder, a `...ForSequenceClassification` or `...ForTokenClassification` folder, or an adapter for one. Prints the rows as
JSON lines with their `score` (a number, or a list if the model has several labels or scores step by step).
"""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxtune import cli, errors
from jaxtune.compilation import in_32_bits
from jaxtune.convert import heads
from jaxtune.convert.retokenised import with_adapter
from jaxtune.data import Batch, files, formats
from jaxtune.data.examples import Chat, Completion, Steps, Text
from jaxtune.data.files import Row
from jaxtune.data.steps import step_tokens
from jaxtune.data.templates import Template
from jaxtune.errors import DataError, ModelError
from jaxtune.generation.prompts import require_tokenizer
from jaxtune.objectives.reward import answer_scores
from jaxtune.peft import compose

MOST_TOKENS, MOST_ROWS = 16384, 64  # of a batch
LEAST_TOKENS = 16  # texts are padded to powers of two, at least this, so that few shapes are compiled


@in_32_bits
def score(
    model: Any, texts: Any, adapter: Any = None, *, step_separator: str = "\n", batch_size: int | None = None
) -> np.ndarray | list[np.ndarray]:
    """Scores of texts, in order: float32 `[n]` from a reward model, `[n, num_labels]` if the model has several labels.

    A model that judges step by step returns a list of float32 `[steps]`: the probability that each step is correct (label 1).

    model    a model with a scoring head (`jt.load`, `jt.load_scorer`), or anything `jt.load_scorer` accepts
    texts    a list of texts, conversations (lists of messages), pairs (prompt, answer) of texts or messages, or rows in any training
             format. They are tokenised as in training: plain answers end with EOS, plain texts do not
    adapter  an adapter for the model, or its folder
    step_separator  as in the model's training

    Raises ModelError for a model without a scoring head, DataError for a text that cannot be used or is too long.
    """
    model = heads.load_scorer(model) if isinstance(model, (str, os.PathLike)) else model
    if not model.config.num_labels:
        raise ModelError("the model is a language model: it has no head to score with; give a reward model (jt.load_scorer opens one)")
    require_tokenizer(model)
    if isinstance(adapter, (str, os.PathLike)):
        model, adapter = with_adapter(adapter, model)
    texts = [texts] if isinstance(texts, (str, Mapping)) else list(texts)
    asked = [_tokens(model, text, Row("texts", number, "text", {}, number), step_separator) for number, text in enumerate(texts, 1)]
    return _scores_of(model, adapter, asked, batch_size)


@in_32_bits
def _scores_of(
    model: Any, adapter: Any, asked: list[tuple[list[int], list[slice]]], batch_size: int | None
) -> np.ndarray | list[np.ndarray]:
    """What `score` returns, of token ids and the places to score."""
    found: list[Any] = [None] * len(asked)
    params, config = compose(model.params, adapter), dataclasses.replace(model.config, remat="none")
    order = sorted(range(len(asked)), key=lambda number: -len(asked[number][0]))  # longest first, so that what does not fit fails at once
    while order:
        size = _bucket(len(asked[order[0]][0]), LEAST_TOKENS)
        rows = batch_size or max(1, min(MOST_ROWS, MOST_TOKENS // size))
        taken, order = order[:rows], order[rows:]
        out = np.asarray(_scores(config, params, _batch([asked[number] for number in taken], min(_bucket(len(taken)), rows), size)))
        for row, number in enumerate(taken):
            found[number] = out[row, : len(asked[number][1])]
    if config.labels_of == "token":
        return [_right(scores) if config.num_labels == 2 else scores for scores in found]
    together = np.stack([scores[0] for scores in found]) if found else np.zeros((0, config.num_labels), np.float32)
    return together[:, 0] if config.num_labels == 1 else together


@functools.partial(jax.jit, static_argnums=0)
def _scores(config: Any, params: dict, batch: Batch) -> jax.Array:
    return answer_scores(config, params, batch)[0]


def _right(scores_SL: np.ndarray) -> np.ndarray:
    """`p(1) = sigmoid(s_1 - s_0)` for each step."""
    return 1 / (1 + np.exp(scores_SL[:, 0] - scores_SL[:, 1]))


def _bucket(n: int, least: int = 1) -> int:
    return max(least, 1 << (n - 1).bit_length())


def _batch(rows: list[tuple[list[int], list[slice]]], count: int, size: int) -> Batch:
    """Texts padded on the right, and the positions to score; empty rows at the end."""
    batch = Batch.empty((count, size), answers=_bucket(max(len(places) for _, places in rows)))
    assert batch.answers is not None
    batch.positions[:] = np.arange(size)
    for row, (ids, places) in enumerate(rows):
        batch.tokens[row, : len(ids)], batch.segments[row, : len(ids)] = ids, 1
        for number, place in enumerate(places, 1):
            batch.answers.numbers[row, place] = number
    return batch


# ---- what may be scored ----


def _tokens(model: Any, text: Any, row: Row, separator: str) -> tuple[list[int], list[slice]]:
    """Token ids, and which positions are scored: the end, or each step's last token. `row` says where the text is from."""
    example, tokenizer = _example(text, row), model.tokenizer
    stepwise = isinstance(example, Steps)
    if stepwise != (model.config.labels_of == "token"):
        judged = "step by step, so each text has to be a prompt with its steps" if not stepwise else "whole texts, not step by step"
        raise row.fail(f'the model judges {judged}: {{"prompt": ..., "completions": [...]}}')
    if stepwise:
        ids, ends = step_tokens(tokenizer, example.prompt, example.steps, separator)
        places = [slice(end, end + 1) for end in ends]
    elif isinstance(example, Chat):
        ids = tokenizer(Template(tokenizer).render(row, example), add_special_tokens=False)["input_ids"]
        places = [slice(0, len(ids))]
    else:
        plain = isinstance(example, Text)
        ids = tokenizer(example.text if plain else example.prompt + example.completion)["input_ids"]
        if not plain and tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids = [*ids, tokenizer.eos_token_id]
        places = [slice(0, len(ids))]
    if not ids:
        raise row.fail("it is empty")
    if max(ids) >= (size := model.config.vocab_size):
        raise row.fail(f"the tokenizer makes token {max(ids)} of it, but the model's embedding has {size} rows; it is another model's")
    if len(ids) > (most := model.config.max_position_embeddings):
        raise row.fail(f"it has {len(ids)} tokens, but the model's max_position_embeddings is {most}; shorten it")
    return ids, places


def _example(text: Any, row: Row) -> Text | Chat | Completion | Steps:
    """A text as an example: see `score`."""
    if isinstance(text, str):
        return Text(text)
    if isinstance(text, Mapping):
        fields = dict(text)
        if "completions" in fields and "labels" not in fields:
            fields["labels"] = [False] * len(fields["completions"])
    elif isinstance(text, tuple) and len(text) == 2:
        fields = {"prompt": text[0], "completion": text[1]}
    elif isinstance(text, Sequence) and text and isinstance(text[0], Mapping):
        fields = {"messages": list(text)}
    else:
        raise row.fail(f"it is {type(text).__name__}; a text is a string, a list of messages, a pair (prompt, answer) or a row of fields")
    example = formats.parse(dataclasses.replace(row, fields=fields), None)
    example = getattr(example, "example", example)  # without its own label
    if not isinstance(example, Text | Chat | Completion | Steps):
        known = "text, messages, prompt and completion, or prompt and completions"
        hint = "; of pairs one answer at a time: --columns completion=chosen" if "chosen" in fields else ""
        raise row.fail(f"the row has {', '.join(fields)}, which is not one text; give rows with {known}{hint}")
    return example


# ---- the command ----


def main() -> None:
    """`python -m jaxtune.score`."""
    parser = cli.parser("score", __doc__)
    parser.add_argument("model", metavar="MODEL", help="a run's folder, a reward model or classifier, or an adapter for one")
    parser.add_argument("--data", required=True, metavar="FILE", help="rows to score: a file, folder, glob or hub id")
    cli.add_columns(parser)
    parser.add_argument("--step-separator", default="\n", help="of a model that judges step by step (default: %(default)r)")
    parser.add_argument("--batch-size", type=int, help="rows at a time")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16; auto is the file's own")
    parser.add_argument("--quantization", help="nf4, nf4-dq or int8, of an adapter's base")
    arguments = cli.parse(parser)
    rows = [formats.rename(row, arguments.columns) for row in files.rows(arguments.data)]
    if not rows:
        raise DataError(f"{arguments.data} holds no rows")
    model = heads.load_scorer(arguments.model, arguments.dtype, arguments.quantization)
    require_tokenizer(model)
    asked = [_tokens(model, row.fields, row, arguments.step_separator) for row in rows]
    for row, value in zip(rows, _scores_of(model, None, asked, arguments.batch_size), strict=True):
        print(json.dumps(row.fields | {"score": np.asarray(value).tolist()}, ensure_ascii=False))


cli.callable_module(__name__, score)

if __name__ == "__main__":
    errors.run(main)
