"""Which documents share a row.

A plan is a list of rows, each a list of document numbers. Packed rows are filled by best-fit decreasing, or by documents that fit each
other if that takes fewer rows. A plan needs few shapes, because each one is a compilation.
"""

from array import array
from dataclasses import dataclass, replace

import numpy as np

from jaxtune.errors import DataError

CAPACITY_STEP = 64
MAX_SHAPES = 6


def permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of range(n), a pure function of `key`.

    Sorts raw Philox bits: numpy guarantees the bits of a bit generator across versions, but not what `Generator.permutation` makes of them,
    and a resumed run must see the rows that the stopped one would have seen.
    """
    seed = np.random.SeedSequence([int(k) for k in key])
    return np.argsort(np.random.Philox(seed).random_raw(n), kind="stable")


@dataclass(frozen=True)
class Plan:
    """Rows of documents.

    Attributes:
        docs: int64 [n], document numbers, row after row.
        starts: int64 [R + 1], row r holds `docs[starts[r]:starts[r + 1]]`.
        group: int64 [R], the shape that a row belongs to.
        lengths: tokens per row T, one for each group, increasing.
        capacities: most trained tokens of a row of this group or a smaller one, rounded up.
    """

    docs: np.ndarray
    starts: np.ndarray
    group: np.ndarray
    lengths: tuple[int, ...]
    capacities: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.group)

    def slots(self) -> int:
        """Token slots of all rows together."""
        return int(np.asarray(self.lengths)[self.group].sum()) if len(self) else 0


def best_fit_decreasing(lengths: np.ndarray, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack documents into rows of `size` tokens: longest first, each into the fullest row that still has room.

    Documents of equal length are taken in an order drawn from `seed`. Rows are indexed by their remaining room, and the non-empty rooms are
    the bits of one integer, so the search for the fullest fitting row is a single shift: 100 000 documents take well under a second.

    Returns:
        int64 [n], the documents row after row, and how many each row has.
    """
    shuffled = permutation(len(lengths), seed)
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    row_of = array("q")  # 8 bytes per document, where Python's own lists take a hundred
    with_room: list[array] = [array("q") for _ in range(size + 1)]
    rooms = rows = 0
    for length in memoryview(np.ascontiguousarray(lengths[order], np.int64)):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            row, room, rows = rows, size, rows + 1
        row_of.append(row)
        left = room - length
        if left:
            with_room[left].append(row)
            rooms |= 1 << left
    by_row = np.frombuffer(row_of, np.int64) if row_of else np.zeros(0, np.int64)
    return order[np.argsort(by_row, kind="stable")], np.bincount(by_row, minlength=rows)


def exact_fits(lengths: np.ndarray, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack documents into rows of `size` tokens by looking for exact fits; arguments and result as for `best_fit_decreasing`.

    The longest document opens a row. One that fills the room, or the two nearest in length that fill it together, close it; if there are
    none, the longest that fits is added. The existing lengths, and their distances from `size`, are the bits of two integers: those of
    `there & mirrored >> (size - room)` are the lengths that have a partner.
    """
    shuffled = permutation(len(lengths), seed)
    order = shuffled[np.argsort(lengths[shuffled], kind="stable")]
    left = np.bincount(lengths, minlength=size + 1).tolist()
    ends = np.cumsum(left).tolist()  # remaining documents of length n: order[ends[n] - left[n] : ends[n]]
    there = sum(1 << n for n, count in enumerate(left) if count)
    mirrored = sum(1 << (size - n) for n, count in enumerate(left) if count)
    taken, counts = array("q"), array("q")
    while there:
        counts.append(0)
        room, chosen = size, [there.bit_length() - 1]
        while chosen:
            for length in chosen:
                taken.append(ends[length] - left[length])
                left[length] -= 1
                if not left[length]:
                    there &= ~(1 << length)
                    mirrored &= ~(1 << (size - length))
                counts[-1] += 1
                room -= length
            chosen = _fill(there, mirrored >> (size - room), room, left)
    return order[np.frombuffer(taken, np.int64)] if taken else order, np.array(counts, np.int64)


def _fill(there: int, partners: int, room: int, left: list[int]) -> list[int]:
    """Lengths to put into the room next: one or two that fill it, or else the longest that fits; none if none does."""
    if there >> room & 1:
        return [room]
    pairs = there & partners
    if room % 2 == 0 and left[room // 2] == 1:
        pairs &= ~(1 << room // 2)
    if upper := pairs >> (room + 1) // 2:
        longer = (upper & -upper).bit_length() - 1 + (room + 1) // 2
        return [longer, room - longer]
    fitting = there & ((1 << room) - 1)
    return [fitting.bit_length() - 1] if fitting else []


def pack(lengths: np.ndarray, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The packing above with fewer rows."""
    size = min(size, max(1, int(lengths.sum())))  # they keep a table of all lengths up to `size`
    return min((packer(lengths, size, seed) for packer in (best_fit_decreasing, exact_fits)), key=lambda packed: len(packed[1]))


def round_up(n: int, step: int = CAPACITY_STEP) -> int:
    """The next multiple of `step`."""
    return -(-n // step) * step


def make_plan(lengths: np.ndarray, trained: np.ndarray, source: np.ndarray, packing: bool | str, max_length: int, seed: int) -> Plan:
    """Arrange documents in rows.

    Args: lengths: tokens of each document, none above `max_length`. trained: trained tokens of each document. source: source number of each
    document; a row holds documents of one source only, so that a mixture can be drawn row by row. packing: False, one document per row, in
    the given order, padded to the longest; True, full rows of `max_length`; "group", one document per row, padded to one of at most 6
    lengths. max_length: tokens of a packed row. seed: for the packing.
    """
    if len(lengths) and lengths.max() > max_length:
        raise DataError(f"a document of {lengths.max()} tokens does not fit a row of {max_length}")
    if packing is True:
        packed = []
        for number in np.unique(source):
            docs = np.flatnonzero(source == number)
            order, counts = pack(lengths[docs], max_length, seed)
            packed.append((docs[order], counts))
        docs = np.concatenate([np.zeros(0, np.int64), *(docs for docs, _ in packed)])
        starts = np.cumsum(np.concatenate([[0], *(counts for _, counts in packed)]))
    else:
        docs, starts = np.arange(len(lengths)), np.arange(len(lengths) + 1)
    row_trained = np.add.reduceat(trained[docs], starts[:-1]) if len(docs) else np.zeros(0, np.int64)
    if packing is True:
        sizes = [max_length]
    elif packing == "group":
        sizes = bucket_lengths(lengths, max_length)
    else:
        sizes = [min(round_up(int(lengths.max(initial=1))), max_length)]
    group = np.searchsorted(sizes, lengths) if packing == "group" else np.zeros(len(starts) - 1, np.int64)
    capacities = [min(round_up(int(row_trained[group <= g].max(initial=1))), size) for g, size in enumerate(sizes)]
    return Plan(docs, starts, group, tuple(sizes), tuple(capacities))


def widened(plan: Plan, others: list[Plan]) -> Plan:
    """The plan with shapes that also fit the other plans with the same number of groups: one compilation for all."""
    alike = [plan, *(other for other in others if len(other.lengths) == len(plan.lengths))]
    lengths, capacities = (
        tuple(max(sizes) for sizes in zip(*(getattr(p, name) for p in alike), strict=True)) for name in ("lengths", "capacities")
    )
    return replace(plan, lengths=lengths, capacities=capacities)


def bucket_lengths(lengths: np.ndarray, max_length: int) -> list[int]:
    """At most 6 row lengths, multiples of 64, that need the least padding.

    Exact, by dynamic programming over the rounded lengths that occur: after k rounds `cost[j]` is the least number of slots for all
    documents up to the j-th length in at most k + 1 buckets.
    """
    rounded = np.minimum(-(-lengths // CAPACITY_STEP) * CAPACITY_STEP, max_length)
    sizes, counts = np.unique(rounded, return_counts=True)
    if len(sizes) <= MAX_SHAPES:
        return [int(s) for s in sizes]
    before = np.concatenate([[0], np.cumsum(counts)])
    n = len(sizes)
    cost = before[1:] * sizes
    choice = []
    for _ in range(MAX_SHAPES - 1):
        # split[j, i - 1]: the last bucket holds the lengths i..j
        split = cost[None, :-1] + (before[1:, None] - before[None, 1:-1]) * sizes[:, None]
        split = np.where(np.arange(1, n)[None, :] <= np.arange(n)[:, None], split, np.iinfo(np.int64).max)
        best = split.argmin(axis=1)
        choice.append(np.where(split.min(axis=1) < cost, best + 1, 0))
        cost = np.minimum(split.min(axis=1), cost)
    cuts, j = [], n - 1
    for best in reversed(choice):
        cuts.append(int(sizes[j]))
        if best[j] == 0:
            break
        j = int(best[j]) - 1
    else:
        cuts.append(int(sizes[j]))
    return sorted(set(cuts))
