"""Find nearly identical texts."""

import re
import zlib
from typing import TYPE_CHECKING, cast

import numpy as np

if TYPE_CHECKING:
    from datasketch import MinHash

PERMUTATIONS = 64


class Similar:
    """Texts as sets of word triples: MinHash finds candidates (datasketch), the sets themselves decide.

    A text of fewer than three words is one element. Sets are stored as sorted hashes, four bytes per element.
    """

    def __init__(self, threshold: float):
        from datasketch import MinHash, MinHashLSH  # imports parts of scipy, 0.7 s: only when texts are compared

        self.threshold = threshold
        self._sets: list[np.ndarray] = []
        self._index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
        self._blank = MinHash(num_perm=PERMUTATIONS, hashfunc=int)

    def sign(self, text: str) -> "tuple[np.ndarray, MinHash]":
        """A text's set and its MinHash."""
        words = re.findall(r"\w+", text.lower())
        triples = {zlib.crc32(" ".join(words[n : n + 3]).encode()) for n in range(max(len(words) - 2, 1))}
        elements = np.sort(np.fromiter(triples, np.uint32, len(triples)))
        minhash = self._blank.copy()
        minhash.update_batch(elements.tolist())
        return elements, minhash

    def add(self, signed: "tuple[np.ndarray, MinHash]") -> None:
        """Store a text under the next number."""
        self._index.insert(len(self._sets), signed[1])
        self._sets.append(signed[0])

    def find(self, signed: "tuple[np.ndarray, MinHash]") -> tuple[int, float] | None:
        """The most similar stored text and its Jaccard similarity, if that reaches the threshold."""
        best = None
        for number in sorted(cast(list[int], self._index.query(signed[1]))):
            common = len(np.intersect1d(signed[0], self._sets[number], assume_unique=True))
            likeness = common / (len(signed[0]) + len(self._sets[number]) - common)
            if likeness >= self.threshold and (best is None or likeness > best[1]):
                best = number, likeness
        return best
