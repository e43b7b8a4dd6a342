import numpy as np
import pytest

from jaxtune import data
from jaxtune.errors import ConfigError, DataError

ROWS = [{"prompt": f"Question {n}: ", "completion": "yes " * (1 + n % 7)} for n in range(37)]
TOP = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 4}


def leaves(batch):
    return [batch.tokens, batch.weights, batch.positions, batch.segments]


def documents_of(batch):
    """(tokens, trained) of each document of a batch, in order."""
    out = []
    for tokens, weights, positions, segments in zip(*(leaf.reshape(-1, leaf.shape[-1]) for leaf in leaves(batch)), strict=True):
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            assert positions[here].tolist() == list(range(here.sum()))
            assert weights[here][0] == 0
            out.append((tuple(tokens[here].tolist()), tuple(weights[here].tolist())))
    return out


@pytest.fixture(params=[True, False, "group"])
def source(request, config, tokenizers):
    return data.load(config(ROWS, TOP, packing=request.param), tokenizers["llama3"]).train


def test_an_epoch_holds_every_row_once(source):
    seen = [doc for step in range(source.steps_per_epoch) for doc in documents_of(source.batch_at(step))]
    everything = [tuple(source.documents[d][0].tolist()) for d in range(len(source.documents))]
    assert sorted(tokens for tokens, _ in seen) == sorted(everything)
    assert sum(len(tokens) for tokens, _ in seen) == source.tokens
    assert sum(sum(weights) for _, weights in seen) == source.trained_tokens


def test_hosts_together_see_the_bytes_of_one(source):
    for step in (0, 3, 1_000_000):
        whole = source.batch_at(step)
        for processes in (2, 4):
            parts = [source.batch_at(step, p, processes) for p in range(processes)]
            for leaf, *pieces in zip(leaves(whole), *map(leaves, parts), strict=True):
                assert (np.concatenate(pieces, axis=1) == leaf).all()


def test_epochs_differ_and_steps_repeat(source):
    n = source.steps_per_epoch
    assert all((a == b).all() for a, b in zip(leaves(source.batch_at(n)), leaves(source.batch_at(n)), strict=True))
    first, second = ([documents_of(source.batch_at(e * n + s)) for s in range(n)] for e in (0, 1))
    assert first != second and sorted(sum(first, [])) == sorted(sum(second, []))


def test_accumulation_does_not_change_the_rows(config, tokenizers):
    one, two = (
        data.load(config(ROWS, {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}), tokenizers["llama3"]).train
        for rows, steps in ((8, 1), (1, 8))
    )
    assert one.steps_per_epoch == two.steps_per_epoch and one.fingerprint == two.fingerprint
    assert all((a.reshape(b.shape) == b).all() for a, b in zip(leaves(one.batch_at(0)), leaves(two.batch_at(0)), strict=True))


def test_file_order_without_shuffle_and_packing(config, tokenizers):
    tokenizer = tokenizers["chatml"]
    source = data.load(config(ROWS, TOP, packing=False, shuffle=False), tokenizer).train
    seen = [tokens for step in range(source.steps_per_epoch) for tokens, _ in documents_of(source.batch_at(step))]
    assert [tokenizer.decode(tokens) for tokens in seen] == [row["prompt"] + row["completion"] + "<|im_end|>" for row in ROWS]


def test_eval_batches_hold_each_row_once_and_do_not_touch_training(config, tokenizers):
    loaded = data.load(config(ROWS, TOP, eval=0.3), tokenizers["llama3"])
    eval_rows = [doc for batch in loaded.eval.batches() for doc in documents_of(batch)]
    train_rows = [doc for step in range(loaded.train.steps_per_epoch) for doc in documents_of(loaded.train.batch_at(step))]
    assert len(eval_rows) + len(train_rows) == len(ROWS) and not set(eval_rows) & set(train_rows)
    assert all(batch.tokens.shape[:2] == (1, 4) for batch in loaded.eval.batches())


def test_rows_must_divide_over_processes(source):
    with pytest.raises(DataError, match="4 rows of a micro-batch do not divide by 3 processes"):
        source.batch_at(0, 0, 3)


def test_more_steps_than_are_possible(config, tokenizers):
    made = config(ROWS, {"num_train_epochs": 10**9})
    with pytest.raises(ConfigError, match="the run would have [0-9]+ steps, but at most 10000000"):
        data.total_steps(made, data.load(made, tokenizers["chatml"]).train)
