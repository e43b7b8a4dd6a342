import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtune.data import packing
from jaxtune.data.packing import MAX_SHAPES, best_fit_decreasing, bucket_lengths, exact_fits, make_plan, pack, permutation

LENGTHS = st.lists(st.integers(1, 100), min_size=1, max_size=200)


def packed(lengths, size, seed, packer=best_fit_decreasing):
    docs, counts = packer(np.array(lengths), size, seed)
    return [row.tolist() for row in np.split(docs, np.cumsum(counts)[:-1])]


@given(LENGTHS, st.integers(0, 5), st.sampled_from([best_fit_decreasing, exact_fits, pack]))
def test_every_document_is_packed_once_and_no_row_overflows(lengths, seed, packer):
    rows = packed(lengths, 100, seed, packer)
    assert sorted(doc for row in rows for doc in row) == list(range(len(lengths)))
    assert all(sum(lengths[doc] for doc in row) <= 100 for row in rows)


@given(LENGTHS)
def test_packing_is_best_fit_decreasing(lengths):
    """The same remaining room as with the textbook's quadratic algorithm."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(100 - length)
    rows = packed(lengths, 100, 0)
    assert sorted(100 - sum(lengths[doc] for doc in row) for row in rows) == sorted(rooms)


@given(LENGTHS)
def test_the_better_packing_is_taken(lengths):
    counts = [len(packed(lengths, 100, 0, packer)) for packer in (best_fit_decreasing, exact_fits, pack)]
    assert counts[2] == min(counts)


def test_tables_of_lengths_end_where_the_documents_do(monkeypatch):
    """Not at a row's size, which may be far more than all documents together."""
    sizes = []

    def packer(lengths, size, seed):
        sizes.append(size)
        return np.arange(len(lengths)), np.array([len(lengths)])

    monkeypatch.setattr(packing, "best_fit_decreasing", packer)
    monkeypatch.setattr(packing, "exact_fits", packer)
    packing.pack(np.array([3, 5, 2]), 10**9, 0)
    assert sizes == [10, 10]


def test_rows_of_a_few_documents_are_filled():
    """Typical lengths of chats, four or five per row: best-fit decreasing uses up the short ones too early."""
    lengths = (150 + 80 * np.random.Generator(np.random.Philox(0)).gamma(1.5, size=5000)).astype(int)
    lengths = lengths[lengths <= 1024]
    before, after = (lengths.sum() / 1024 / len(packed(lengths, 1024, 0, packer)) for packer in (best_fit_decreasing, pack))
    assert before < 0.985 and after > 0.99


@given(LENGTHS, st.sampled_from([True, False, "group"]))
def test_capacity_covers_every_row_and_shapes_are_few(lengths, packing):
    lengths = np.array(lengths)
    trained = lengths // 2
    plan = make_plan(lengths, trained, np.zeros_like(lengths), packing, 100, 0)
    assert len(plan.lengths) <= MAX_SHAPES
    for row in range(len(plan)):
        docs = plan.docs[plan.starts[row] : plan.starts[row + 1]]
        assert lengths[docs].sum() <= plan.lengths[plan.group[row]]
        assert trained[docs].sum() <= plan.capacities[plan.group[row]]


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=60))
def test_buckets_pad_least(lengths):
    lengths = np.array(lengths)
    sizes = bucket_lengths(lengths, 2000)

    def slots(sizes):
        return sum(min(s for s in sizes if s >= n) for n in lengths)

    rounded = sorted({min(-(-n // 64) * 64, 2000) for n in lengths.tolist()})
    assert len(sizes) <= MAX_SHAPES and set(sizes) <= set(rounded) and max(sizes) >= lengths.max()
    even = [rounded[i] for i in np.linspace(0, len(rounded) - 1, MAX_SHAPES).astype(int)]
    assert slots(sizes) <= slots(sorted(set(even)))


def test_permutation_is_pinned():
    """A run resumed under another numpy version must see the rows in the same order."""
    assert permutation(8, 0, 0).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]
    assert permutation(8, 0, 1).tolist() != [0, 3, 7, 5, 1, 2, 6, 4]
    assert sorted(permutation(1000, 3)) == list(range(1000))


@pytest.mark.parametrize("packing", [True, False, "group"])
def test_order_without_packing_is_the_order_of_the_file(packing):
    lengths = np.array([5, 90, 7, 60])
    plan = make_plan(lengths, lengths, np.zeros(4, int), packing, 100, 0)
    if packing is True:
        assert len(plan) == 2
    else:
        assert plan.docs.tolist() == [0, 1, 2, 3]


def test_a_row_holds_documents_of_one_source():
    plan = make_plan(np.array([10, 10, 10, 10]), np.ones(4, int), np.array([0, 1, 0, 1]), True, 100, 0)
    assert sorted(sorted(plan.docs[a:b].tolist()) for a, b in zip(plan.starts[:-1], plan.starts[1:], strict=True)) == [[0, 2], [1, 3]]
