"""How pairs, labelled answers and steps are arranged in rows."""

import json

import numpy as np
import pytest

from jaxtune import data
from jaxtune.errors import ConfigError, DataError

TOP = {"objective": "dpo", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
PAIRS = [
    {"prompt": f"Question {n}: {'why ' * (n % 4)}", "chosen": "yes " * (1 + n % 3), "rejected": "no " * (1 + n % 5), "margin": n / 4}
    for n in range(9)
]
LABELLED = [{"prompt": f"Question {n}: {'why ' * (n % 4)}", "completion": "yes " * (1 + n % 3), "label": n % 3 > 0} for n in range(9)]


def load(config, tokenizers, rows, top=None, **keys):
    return data.load(config(rows, TOP | (top or {}), **keys), tokenizers["llama3"]).train


def whole(batch, row, answer):
    """Token ids and trained mask of an answer with its prompt, read back through segments and parents; and its value."""
    numbers, segments = batch.answers.numbers[0, row], batch.segments[0, row]
    segment = segments[numbers == answer][0]
    own = segments == segment
    parent = 0 if batch.parents is None else batch.parents[0, row][own][0]
    where = np.concatenate([np.flatnonzero((segments == parent) & (parent > 0)), np.flatnonzero(own)])
    assert batch.positions[0, row][where].tolist() == list(range(len(where)))
    if batch.before is not None:
        trained = [n for n in range(1, len(where)) if batch.weights[0, row][where[n]] and numbers[where[n]] == answer]
        assert [batch.before[0, row][where[n]] for n in trained] == [where[n - 1] for n in trained]
    mask = batch.weights[0, row][where] * (numbers[where] == answer)
    return batch.tokens[0, row][where].tolist(), mask.tolist(), float(batch.answers.values[0, row, answer - 1])


def answers(source):
    """Every answer of an epoch, row by row."""
    out = []
    for step in range(source.steps_per_epoch):
        batch = source.batch_at(step)
        for row in range(batch.tokens.shape[1]):
            out += [[whole(batch, row, number) for number in range(1, batch.answers.numbers[0, row].max() + 1)]]
    return [row for row in out if row]


def documents(source):
    return [(source.documents[n][0].tolist(), (source.documents[n][1] > 0).astype(float).tolist()) for n in range(len(source.documents))]


@pytest.mark.parametrize("packing", [True, False, "group"])
@pytest.mark.parametrize("share", [True, False])
def test_pairs_come_back_whole(config, tokenizers, share, packing):
    source = load(config, tokenizers, PAIRS, packing=packing, shared_prompts=share)
    seen = [pair for row in answers(source) for pair in zip(row[::2], row[1::2], strict=True)]
    expected, margins = documents(source), source.documents.values
    pairs = [tuple((*expected[n], margins[n]) for n in (2 * u, 2 * u + 1)) for u in range(len(PAIRS))]
    assert sorted(seen) == sorted(pairs) and sorted(margins[::2]) == sorted(row["margin"] for row in PAIRS)
    total = int(source.documents.lengths.sum())
    assert source.tokens == total - source.saved_tokens and (source.saved_tokens > 60) == share
    assert (source.batch_at(0).parents is not None) == share


def test_a_pair_keeps_to_its_row_and_an_empty_place_is_empty(config, tokenizers):
    source = load(config, tokenizers, PAIRS, packing=True)
    batch = source.batch_at(source.steps_per_epoch - 1)
    counts = batch.answers.numbers[0].max(-1)
    assert (counts % 2 == 0).all() and batch.answers.values.shape[-1] == source.answers[0] >= counts.max()
    empty = counts == 0
    assert not batch.weights[0][empty].any() and not batch.segments[0][empty].any()


def test_shared_segments_see_the_prompt_and_not_each_other(config, tokenizers):
    batch = load(config, tokenizers, PAIRS, packing=False).batch_at(0)
    parents, segments = batch.parents[0, 0], batch.segments[0, 0]
    assert {(int(s), int(p)) for s, p in zip(segments, parents, strict=True)} == {(0, 0), (1, 0), (2, 1), (3, 1)}


def test_orpo_trains_the_prompt_once_with_the_chosen_answer(config, tokenizers):
    for share in (True, False):
        batch = load(config, tokenizers, PAIRS, {"objective": "orpo"}, packing=False, shared_prompts=share, shuffle=False).batch_at(0)
        for row in range(2):
            prompt = batch.weights[0, row] * (batch.answers.numbers[0, row] == 0)
            tokens, mask, _ = whole(batch, row, 1)
            assert prompt.sum() == mask.index(1) - 1  # all of it but the first token
            assert not prompt[batch.segments[0, row] == batch.segments[0, row].max()].any()


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("packing", [True, False])
def test_kto_sets_each_answer_beside_one_to_another_prompt(config, tokenizers, share, packing):
    source = load(config, tokenizers, LABELLED, {"objective": "kto"}, packing=packing, shared_prompts=share)
    expected, own, other = documents(source), [], []
    for row in answers(source):
        own += row[::2]
        other += row[1::2]
    assert sorted((ids, mask) for ids, mask, _ in own) == sorted(expected)
    assert sorted(value for *_, value in own) == sorted(float(row["label"]) for row in LABELLED)
    said = lambda ids, mask: [t for t, m in zip(ids, mask, strict=True) if m]  # noqa: E731
    assert sorted(said(*a[:2]) for a in own) == sorted(said(*a[:2]) for a in other)  # the same answers in both roles
    for (ids, mask, _), (other_ids, other_mask, _) in zip(own, other, strict=True):
        start = mask.index(1)
        assert other_ids[:start] == ids[:start] and other_mask.index(1) == start and (other_ids, 0) not in expected


def test_kto_takes_pairs_as_two_labelled_answers_of_different_units(config, tokenizers):
    source = load(config, tokenizers, PAIRS, {"objective": "kto"}, packing=False)
    labels = [value for row in answers(source) for *_, value in row[::2]]
    assert sum(labels) == 9 and len(labels) == 18
    for row in answers(source):
        prompts = {tuple(ids[: mask.index(1)]) for ids, mask, _ in row[::2]}
        assert len(prompts) == len(row) // 2  # never an answer beside the other one to its own prompt


def test_a_mismatched_answer_is_cut_at_max_length(config, tokenizers):
    rows = [{"prompt": "why " * 20, "completion": "a", "label": True}, {"prompt": "b", "completion": "yes " * 20, "label": False}]
    source = load(config, tokenizers, rows, {"objective": "kto"}, packing=False)
    longest = max(source.documents.lengths)
    source = load(config, tokenizers, rows, {"objective": "kto"}, packing=False, max_length=int(longest))
    assert max(len(ids) for row in answers(source) for ids, *_ in row) == longest


def test_one_answer_alone_has_no_other(config, tokenizers):
    with pytest.raises(DataError, match="KTO needs answers to other prompts"):
        load(config, tokenizers, LABELLED[:1], {"objective": "kto"})
    assert load(config, tokenizers, LABELLED[:1], {"objective": "kto", "loss_type": "apo_zero_unpaired"}).answers == [1]


def test_labels_may_be_numbers_and_others_are_refused_by_row(config, tokenizers, caplog):
    numbers = [row | {"label": int(row["label"])} for row in LABELLED]
    same = [load(config, tokenizers, rows, {"objective": "kto"}).fingerprint for rows in (numbers, LABELLED)]
    assert same[0] == same[1] and not caplog.text
    for label in ("yes", None, 0.3):
        with pytest.raises(DataError, match="line 3: 'label' must be true or false"):
            load(config, tokenizers, [*LABELLED[:2], LABELLED[2] | {"label": label}], {"objective": "kto"})


def test_answers_of_one_kind_alone_are_told(config, tokenizers, caplog):
    load(config, tokenizers, [row | {"label": False} for row in LABELLED], {"objective": "kto"})
    assert "all 9 answers are labelled bad: without good ones the loss cannot tell them apart" in caplog.text


def test_steps_are_numbered_with_their_labels(config, tokenizers):
    rows = [{"prompt": "2+2*2", "completions": ["2*2=4", "2+4=6", "so 7"], "labels": [True, True, False]}] * 2
    batch = load(config, tokenizers, rows, {"objective": "stepwise_reward", "step_separator": "\n\n"}, packing=False).batch_at(0)
    assert batch.answers.values[0].tolist() == [[1, 1, 0]] * 2
    ids, numbers = batch.tokens[0, 0], batch.answers.numbers[0, 0]
    ends = [int(np.flatnonzero(numbers == step)[0]) for step in (1, 2, 3)]
    decode = lambda low, high: tokenizers["llama3"].decode(ids[low:high])  # noqa: E731
    parts = [decode(low + 1, high + 1) for low, high in zip([-1, *ends], ends, strict=False)]
    assert parts == ["<|begin_of_text|>2+2*22*2=4\n\n", "2+4=6\n\n", "so 7\n\n"]
    assert (numbers > 0).sum() == 3 and ((batch.weights[0, 0] > 0) == (numbers > 0)).all()
    with pytest.raises(DataError, match="step 2 of 'completions' is empty"):
        load(config, tokenizers, [rows[0] | {"completions": ["a", " ", "b"]}], {"objective": "stepwise_reward"})


def test_classes_are_values(config, tokenizers):
    rows = [{"text": "good", "label": 2}, {"text": "bad thing", "label": 0}]
    batch = load(config, tokenizers, rows, {"objective": "classification", "num_labels": 3}, packing=False, shuffle=False).batch_at(0)
    assert batch.answers.values[0].tolist() == [[2], [0]]
    eos = tokenizers["llama3"].eos_token_id
    assert eos not in batch.tokens[0][batch.segments[0] > 0] and (batch.answers.numbers == (batch.segments > 0)).all()
    with pytest.raises(DataError, match="must be the number of a class, from 0 to 2; .*write id2label"):
        load(config, tokenizers, [{"text": "x", "label": "fine"}], {"objective": "classification", "num_labels": 3})
    with pytest.raises(ConfigError, match="num_labels is missing"):
        load(config, tokenizers, rows, {"objective": "classification"})


@pytest.mark.parametrize(
    ("top", "label", "value"),
    [
        ({"id2label": ["bad", "good"]}, "good", 1.0),
        ({"label2id": {"good": 1, "bad": 0}}, "bad", 0.0),
        ({"id2label": {0: "no", 1: "yes"}}, True, 1.0),
        ({"num_labels": 3}, "2", 2.0),
        ({"num_labels": 1}, 2.5, 2.5),
        ({"num_labels": 1}, "-1e1", -10.0),
        ({"num_labels": 2, "problem_type": "regression"}, [0.5, 2], [0.5, 2.0]),
        ({"id2label": ["a", "b", "c"], "problem_type": "multi_label_classification"}, ["c", "a"], [1.0, 0.0, 1.0]),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, [2], [0.0, 0.0, 1.0]),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, [0.0, 1.0, 1.0], [0.0, 1.0, 1.0]),
        ({"id2label": ["bad", "good"]}, "fine", "one of bad, good"),
        ({"num_labels": 2}, 2, "from 0 to 1"),
        ({"num_labels": 1}, "high", "the label must be a number"),
        ({"num_labels": 2, "problem_type": "regression"}, [1], "has 1 numbers, but num_labels is 2"),
        ({"num_labels": 2, "problem_type": "multi_label_classification"}, 1, "must be a list"),
    ],
)
def test_labels_of_every_kind(config, tokenizers, top, label, value):
    make = lambda: load(config, tokenizers, [{"text": "some text", "label": label}], {"objective": "classification"} | top)  # noqa: E731
    if isinstance(value, str):
        with pytest.raises(DataError, match=value):
            make()
    else:
        assert make().batch_at(0).answers.values[0, 0, 0].tolist() == value


def test_last_steps_and_long_answers(config, tokenizers):
    rows = [{"prompt": "2+2*2", "completions": ["2*2=4", "2+4=6", "so 7"], "labels": [True, True, False]}]
    top = {"objective": "stepwise_reward"}
    last = load(config, tokenizers, rows, top | {"train_on_last_step_only": True})
    assert last.batch_at(0).answers.values[0, 0].tolist() == [0.0] and last.trained_tokens == 1
    whole = config(rows, TOP | top | {"train_on_last_step_only": True}, eval=str(config(rows, TOP | top).data.train[0].path))
    assert data.load(whole, tokenizers["llama3"]).eval.answers == [3]  # for evaluation every step counts
    cut = data.load(config(rows, TOP | top | {"max_completion_length": 8}), tokenizers["llama3"])
    batch = cut.train.batch_at(0)
    assert batch.answers.values[0, 0].tolist() == [1.0] and list(cut.ledger["train"][0]["cut"].values()) == [9]
    with pytest.raises(DataError, match="no step ends within max_completion_length 2"):
        load(config, tokenizers, rows, top | {"max_completion_length": 2})


CHAT = {"prompt": [{"role": "user", "content": "hello"}]}


def turn(role, text):
    return {"role": role, "content": text}


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": "a b", "chosen": " yes", "rejected": " yes"}, "chosen_equals_rejected"),
        ({"prompt": "a b", "chosen": " yes", "rejected": ""}, "empty_answer"),
        (CHAT | {"chosen": [turn("assistant", "yes")], "rejected": [turn("assistant", "")]}, "empty_answer"),
        ({"chosen": "yes", "rejected": "no"}, "no_prompt"),
    ],
)
def test_odd_pairs_are_counted(config, tokenizers, row, name):
    loaded = data.load(config([row, *PAIRS[:2]], TOP), tokenizers["llama3"])
    assert loaded.ledger["train"][0]["problems"] == {name: [1]}
    assert len(loaded.train.documents) == 6
    with pytest.raises(DataError, match="row 1|line 1"):
        load(config, tokenizers, [row, *PAIRS[:2]], quality={name: "error"})


def test_answers_to_different_prompts_are_refused(config, tokenizers):
    row = {"chosen": [turn("user", "hello"), turn("assistant", "a")], "rejected": [turn("user", "bye"), turn("assistant", "b")]}
    with pytest.raises(DataError, match="line 1.*answers can be compared only if they are to the same prompt"):
        load(config, tokenizers, [row])
    assert len(load(config, tokenizers, [row, PAIRS[0]], quality={"prompts_differ": "drop"}).documents) == 2


def test_pairs_that_are_too_long_are_refused_cut_or_dropped(config, tokenizers):
    long = {"prompt": "why " * 60, "chosen": "yes", "rejected": "no"}
    with pytest.raises(DataError, match="max_length is 32"):
        load(config, tokenizers, [long], max_length=32)
    with pytest.raises(DataError, match="nothing that is trained is left"):
        load(config, tokenizers, [long], max_length=32, length_policy="truncate")
    loaded = data.load(config([long, *PAIRS], TOP, max_length=64, length_policy="drop"), tokenizers["llama3"])
    assert loaded.ledger["train"][0]["dropped"] == {"too_long": [1]}
    kept = load(config, tokenizers, [long], max_length=32, length_policy="truncate", truncation_side="left")
    assert all(mask[-1] for row in answers(kept) for _, mask, _ in row)


def test_a_margin_has_to_be_a_number(config, tokenizers):
    with pytest.raises(DataError, match="'margin' must be a number"):
        load(config, tokenizers, [PAIRS[0] | {"margin": "big"}])


@pytest.mark.parametrize("train_on", ["all", "assistant"])
def test_comparisons_are_of_answers(config, tokenizers, train_on):
    with pytest.raises(ConfigError, match="compares answers to one prompt"):
        load(config, tokenizers, PAIRS, train_on=train_on)


def test_each_answer_visits_every_answer_once_in_the_order_of_the_rows(config, tokenizers):
    for packing in (True, "group", False):
        source = load(config, tokenizers, PAIRS, packing=packing)
        margins = source.each_answer(lambda batch: batch.answers.values[0])
        assert json.dumps(margins.tolist()) == json.dumps(source.documents.values.tolist())
        source.ref_logps = margins * 2 + 1
        for step in range(source.steps_per_epoch):
            batch = source.batch_at(step)
            there = np.arange(1, batch.answers.values.shape[-1] + 1) <= batch.answers.numbers.max(-1, keepdims=True)
            assert (batch.answers.ref_logps == np.where(there, batch.answers.values * 2 + 1, 0)).all()
