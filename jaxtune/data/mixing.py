"""How many rows of each source an epoch has, and which."""

from dataclasses import dataclass

import numpy as np

from jaxtune.config import Config
from jaxtune.data.packing import permutation
from jaxtune.errors import ConfigError


@dataclass(frozen=True)
class Mixture:
    """Rows of several sources, drawn in fixed numbers.

    Epoch e takes the next `quota[s]` rows of source s from an endless sequence of permutations of its rows: no row of a source comes again
    before all the others have come, within an epoch and over epochs. Which rows epoch e has is a pure function of e.

    Attributes:
        rows: row numbers of each source.
        quota: rows an epoch takes of each source.
    """

    rows: list[np.ndarray]
    quota: list[int]

    def epoch(self, epoch: int, seed: int, shuffle: bool) -> np.ndarray:
        """The row numbers of an epoch; unshuffled, the sources are interleaved evenly and each is in its own order."""
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
    """The mixture that `config` asks for of rows whose source numbers are `source`; None where every row comes once an epoch.

    Sources are `data.train` in order and then `data.replay`. Shares of the training sources are proportional to their `weight`,
    or, with `data.temperature` T, to rows ** (1 / T). The epoch is as long as `data.mix_stop` says: `all`, until every source has been seen
    through once (the small ones repeat), or `first`, until one of them has been. `data.replay` then adds its `weight` as a share of
    all rows, drawn from general data so that the model does not forget it.
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
