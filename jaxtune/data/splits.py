"""Train, evaluation and test rows by the hash of their content: a row keeps its side when others are added."""

import numpy as np

from jaxtune.config import Config
from jaxtune.data.documents import Documents
from jaxtune.errors import DataError

SIDES = ("train", "eval", "test")


def places(keys: np.ndarray, seed: int) -> np.ndarray:
    """Hashes mapped to [0, 1): splitmix64 of key and seed, so another seed gives another split."""
    with np.errstate(over="ignore"):
        z = keys ^ (np.uint64(seed + 1) * np.uint64(0x9E3779B97F4A7C15))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)) / 2.0**53


def sides(documents: Documents, config: Config) -> np.ndarray:
    """For each document the number of its side in `SIDES`.

    With `data.kfold: k` the rows of fold `data.fold` (by default 0) are the evaluation rows. Otherwise the fractions `data.eval` and
    `data.test`, if they are numbers, are cut off [0, 1): a row's side does not depend on other rows. With `data.stratify` the cut is made
    inside each stratum at its own quantile, so each has exactly its share; rows near the cut may then move when others are added.
    """
    data = config.data
    place = places(documents.groups, data.split_seed)
    if data.stratify is not None:
        place = _ranks(place, documents.strata)
    if data.kfold is not None:
        fold = np.minimum((place * data.kfold).astype(int), data.kfold - 1)
        if (empty := np.flatnonzero(np.bincount(fold, minlength=data.kfold) == 0)).size:
            raise DataError(f"data.kfold {data.kfold} leaves fold {empty[0]} without any of the {len(documents)} rows; lower it")
        return np.where(fold == (data.fold or 0), 1, 0)
    shares = [share if isinstance(share, float) else 0.0 for share in (data.eval, data.test)]
    side = np.searchsorted(np.cumsum(shares), place, side="right")
    side = np.array([1, 2, 0])[side]
    for number, share in enumerate(shares, 1):
        if share and not (side == number).any():
            raise DataError(
                f"data.{SIDES[number]} {share:g} of {len(documents)} rows leaves it without rows; name a file, or a larger share"
            )
    if not (side == 0).any():
        raise DataError(f"data.eval and data.test take all {len(documents)} rows; leave some to train on")
    return side


def _ranks(place: np.ndarray, strata: np.ndarray) -> np.ndarray:
    """The rank of each place inside its stratum, mapped to [0, 1). Equal places (one group) have the same rank."""
    ranks = np.empty(len(place))
    for stratum in np.unique(strata):
        here = np.flatnonzero(strata == stratum)
        ordered = np.sort(place[here])
        ranks[here] = (np.searchsorted(ordered, place[here], "left") + 0.5) / len(here)
    return ranks
