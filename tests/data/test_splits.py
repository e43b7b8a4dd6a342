import numpy as np
import pytest

from jaxtune import data
from jaxtune.data.prepare import divide, held_out
from jaxtune.data.splits import places
from jaxtune.errors import ConfigError, DataError

ROWS = [
    {"prompt": f"Question {n}: ", "completion": "yes", "who": f"user {n % 10}", "kind": "rare" if n % 10 == 0 else "common"}
    for n in range(200)
]


def rows_of(documents):
    return set(documents.rows.tolist())


def test_shares_are_taken_and_sides_are_disjoint(config, tokenizers):
    parts = divide(config(ROWS, eval=0.2, test=0.1), tokenizers["chatml"])
    sides = [rows_of(parts[name]) for name in ("train", "eval", "test")]
    assert set.union(*sides) == set(range(1, 201)) and sum(map(len, sides)) == 200
    assert 25 <= len(sides[1]) <= 55 and 8 <= len(sides[2]) <= 35


def test_a_row_stays_on_its_side_when_rows_are_added(config, tokenizers):
    before = divide(config(ROWS[:100], eval=0.2), tokenizers["chatml"])
    after = divide(config(ROWS[100:] + ROWS[:100], eval=0.2), tokenizers["chatml"])
    for name in ("train", "eval"):
        assert set(before[name].content.tolist()) <= set(after[name].content.tolist())


def test_another_split_seed_is_another_split(config, tokenizers):
    one, two = (rows_of(divide(config(ROWS, eval=0.2, split_seed=seed), tokenizers["chatml"])["eval"]) for seed in (0, 1))
    assert one != two


def test_a_group_is_never_divided(config, tokenizers):
    parts = divide(config(ROWS, eval=0.3, split_by="who"), tokenizers["chatml"])
    groups = [{(row - 1) % 10 for row in rows_of(parts[name])} for name in ("train", "eval")]
    assert not groups[0] & groups[1] and all(groups)


def test_strata_have_their_share_exactly(config, tokenizers):
    held = rows_of(divide(config(ROWS, eval=0.1, stratify="kind"), tokenizers["chatml"])["eval"])
    assert sum((row - 1) % 10 == 0 for row in held) == 2 and len(held) == 20


def test_folds_partition_the_rows(config, tokenizers):
    folds = [rows_of(divide(config(ROWS, kfold=5, fold=fold), tokenizers["chatml"])["eval"]) for fold in range(5)]
    assert set.union(*folds) == set(range(1, 201)) and sum(map(len, folds)) == 200
    assert all(20 <= len(fold) <= 60 for fold in folds)


def test_held_out_rows_are_those_that_load_evaluates_on(config, tokenizers):
    settings = config(ROWS, eval=0.2)
    loaded = data.load(settings, tokenizers["chatml"])
    assert {row.index for row, _ in held_out(settings, tokenizers["chatml"])} == rows_of(loaded.eval.documents)


def test_places_are_uniform_and_pinned():
    spread = places(np.arange(10_000, dtype=np.uint64), 0)
    assert np.abs(np.histogram(spread, 10, (0, 1))[0] - 1000).max() < 150
    assert places(np.array([1, 2], np.uint64), 0).round(6).tolist() == [0.893943, 0.59119]


def test_mistakes(config, tokenizers):
    with pytest.raises(DataError, match="line 1: no field 'nobody', which data.split_by names"):
        data.load(config(ROWS, eval=0.2, split_by="nobody"), tokenizers["chatml"])
    with pytest.raises(ConfigError, match="data.fold is 5, but folds count from 0"):
        config(ROWS, kfold=5, fold=5)
    with pytest.raises(ConfigError, match="leave out data.eval"):
        config(ROWS, kfold=5, eval=0.1)
    with pytest.raises(DataError, match="take all 200 rows"):
        data.load(config(ROWS, eval=0.999999, split_seed=3), tokenizers["chatml"])
