"""Compare rows before training, if `data.quality` drops rows or stops for a problem."""

import contextlib
import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxtune.config import Config
from jaxtune.config import Source as SourceConfig
from jaxtune.data import quality, similar
from jaxtune.data.documents import Documents
from jaxtune.data.quality import Findings, Item
from jaxtune.data.tokenised import cache_dir, examples
from jaxtune.disk import write_text
from jaxtune.errors import ConfigError, DataError

STREAMED = 20_000  # rows


def sources_of(config: Config, side: str) -> tuple[SourceConfig, ...]:
    """The sources of a side's rows."""
    given = None if side == "train" else getattr(config.data, side)
    return config.data.train if given is None or isinstance(given, float) else given


def items(config: Config, parts: Mapping[str, Documents]) -> list[Item]:
    """The rows of all sides, as text; for a stream, the first STREAMED of each source."""
    found = []
    for side, documents in parts.items():
        for number, source in enumerate(sources_of(config, side)):
            rows = documents.rows[documents.part == number]
            kept = set(np.unique(rows)[: STREAMED if config.data.streaming else None].tolist())
            for row, example in examples(source, config):
                if row.index in kept:
                    place = f"{row.file}, {row.unit} {row.number}"
                    found.append(Item(side, number, row.index, place, *quality.texts(example), quality.seam(example)))
                    kept.discard(row.index)
                if not kept:
                    break
    return found


def screened(parts: dict[str, Documents], config: Config, survey: bool = False) -> dict[str, Documents]:
    """The sides without the rows to be dropped, each recorded in its source's ledger.

    The findings are cached: examining 100 000 rows takes half a minute.

    Raises:
        DataError: a row has a problem that stops the run, or a side has no rows left.
        ConfigError: the rows are a stream.
    """
    keep = ("keep", "error") if survey else ("keep",)
    wanted = {name: policy for name, policy in quality.policies(config).items() if name not in quality.ENCODING_TIME and policy not in keep}
    if not wanted:
        return parts
    if config.data.streaming:
        raise ConfigError(
            f"data.quality.{next(iter(wanted))} compares rows with each other, in memory, which data.streaming is there to avoid; "
            "leave one of them out, or clean the files beforehand"
        )
    found = _found(parts, config, wanted)
    out = {}
    for side, documents in parts.items():
        dropped = np.zeros(len(documents), bool)
        info = copy.deepcopy(documents.info)
        for name, numbers in found[side].items():
            for source, row, place in numbers:
                here = (documents.part == source) & (documents.rows == row) & ~dropped
                if here.any():
                    info[source]["dropped"].setdefault(name, []).append(place)
                    info[source]["documents"] -= int(here.sum())
                    info[source]["kept_tokens"] -= int(documents.lengths[here].sum())
                    info[source]["trained_tokens"] -= int(documents.trained[here].sum())
                dropped |= here
        if dropped.all():
            raise DataError(f"no row of the {side} side is left; data.quality drops them all: {', '.join(found[side])}")
        out[side] = documents.select(np.flatnonzero(~dropped))
        object.__setattr__(out[side], "info", info)
    return out


def _found(parts: dict[str, Documents], config: Config, wanted: dict[str, str]) -> dict[str, dict[str, list[list]]]:
    """Side -> problem -> [source, row, place] of the rows to be dropped."""
    digest = hashlib.sha256(json.dumps([sorted(wanted.items()), config.data.split_seed]).encode())
    for module in (quality, similar):
        digest.update(Path(module.__file__ or "").read_bytes())
    for side, documents in parts.items():
        digest.update(side.encode() + np.stack([documents.part, documents.rows]).tobytes() + documents.content.tobytes())
    file = cache_dir(config) / f"{digest.hexdigest()[:32]}.quality.json"
    with contextlib.suppress(FileNotFoundError, ValueError):  # a damaged entry is made again
        return json.loads(file.read_text())
    findings: Findings = quality.examine(items(config, parts))
    found: dict[str, dict[str, list[list]]] = {side: {} for side in parts}
    for name, policy in wanted.items():
        rows = findings.rows.get(name, [])
        if rows and policy == "error":
            item, reason = rows[0]
            others = f" (and {len(rows) - 1} more rows)" if len(rows) > 1 else ""
            raise DataError(f"{item.place}: {reason}{others}; data.quality.{name} is error, set it to drop or keep to go on")
        for item, _ in rows:
            found[item.side].setdefault(name, []).append([item.source, item.row, item.place])
    write_text(file, json.dumps(found))
    return found
