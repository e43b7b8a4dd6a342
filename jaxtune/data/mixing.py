"""Which rows of each source an epoch contains, and how many."""

from dataclasses import dataclass

import numpy as np

from jaxtune.config import Config
from jaxtune.data.packing import permutation
from jaxtune.errors import ConfigError


@dataclass(frozen=True)
class Mixture:
    """Rows of several sources, drawn in fixed numbers.

    Epoch e takes the next `quota[s]` rows of source s from an endless sequence of permutations of its rows: within an epoch and across
    epochs, no row of a source is repeated before all others have been used. The rows of epoch e are a pure function of e.

    Attributes:
        rows: row numbers of each source.
        quota: rows of each source per epoch.
    """

    rows: list[np.ndarray]
    quota: list[int]

    def epoch(self, epoch: int, seed: int, shuffle: bool) -> np.ndarray:
        """The row numbers of an epoch; unshuffled, the sources are interleaved evenly, each in its own order."""
        drawn, places = [], []
        for source, (rows, quota) in enumerate(zip(self.rows, self.quota, strict=True)):
            cycle, index = np.divmod(np.arange(epoch * quota, (epoch + 1) * quota), len(rows))
            order = np.empty(quota, np.int64)
            for number in np.unique(cycle):
                here = cycle == number
                order[here] = permutation(len(rows), seed, 2, source, number)[index[here]] if shuffle else index[here]
            drawn.append(rows[order])
            places.append((np.arange(quota) + 0.5) / max(quota, 1))
        together, place = np.concatenate(drawn), np.concatenate(places)
        return together[permutation(len(together), seed, epoch) if shuffle else np.argsort(place, kind="stable")]


def mixture(source: np.ndarray, config: Config) -> Mixture | None:
    """The mixture that `config` specifies for rows whose source numbers are `source`; None if every row is used once per epoch.

    Sources are `data.train` in order, then `data.replay`. Shares of the training sources are proportional to their `weight` or, with
    `data.temperature` T, to rows ** (1 / T). `data.mix_stop` sets the length of the epoch: `all`, until every source has been used up once
    (small ones repeat), or `first`, until one of them has been. `data.replay` then adds its `weight` as a share of all rows, from general
    data, to prevent forgetting.
    """
    data = config.data
    count = len(data.train)
    rows = [np.flatnonzero(source == number) for number in range(count + (data.replay is not None))]
    sizes = np.array([len(r) for r in rows[:count]], float)
    weighted = any(s.weight is not None for s in data.train)
    if weighted and data.temperature is not None:
        raise ConfigError("data.temperature sets the shares of the sources from their sizes; leave out their weights, or the temperature")
    if not weighted and data.temperature is None and data.replay is None:
        return None
    quota = sizes
    if weighted or data.temperature is not None:
        shares = (
            sizes ** (1 / data.temperature) if data.temperature else np.array([1.0 if s.weight is None else s.weight for s in data.train])
        )
        needed = sizes / shares
        quota = shares * (needed.min() if data.mix_stop == "first" else needed.max())
    quotas = [max(int(round(q)), 1) for q in quota]
    if data.replay is not None:
        share = 0.1 if data.replay.weight is None else data.replay.weight
        if not 0 < share < 1:
            raise ConfigError(f"data.replay.weight is {share:g}, but it is the share of general rows among all rows, above 0 and below 1")
        quotas.append(max(int(round(share / (1 - share) * sum(quotas))), 1))
    return Mixture(rows, quotas)
