"""Tokenise a source once and cache it on disk under the hash of everything its tokens depend on."""

import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.config import Config
from jaxtune.config import Source as SourceConfig
from jaxtune.config.policy import POLICY
from jaxtune.data import documents as store
from jaxtune.data import files, formats, quality
from jaxtune.data.documents import Documents, Entry
from jaxtune.data.encode import Encoder
from jaxtune.data.examples import Example
from jaxtune.data.ledger import Ledger
from jaxtune.data.tokenizer import run_tokenizer
from jaxtune.disk import cache_folder
from jaxtune.errors import DataError

log = logging.getLogger("jaxtune")
SILENCE = 10.0  # seconds
MAKERS = (
    "documents", "encode", "examples", "files", "formats", "jsonfile", "labels", "ledger", "masks", "quality", "slices", "sniff",
    "steps", "templates", "textfile", "tokenised", "tokenizer", "turns",
)  # fmt: skip
LIBRARIES = ("transformers", "tokenizers", "jinja2")
KEYS = (
    "max_length", "length_policy", "truncation_side", "train_on", "train_on_eos", "add_eos", "system", "quality", "split_by", "stratify",
)  # fmt: skip
OBJECTIVE_FORMS = {"classification": "classification"} | dict.fromkeys(POLICY, "prompt")  # rows of these may be mistaken for others
OBJECTIVE_KEYS = ("objective", "step_separator", "max_completion_length", "num_labels", "id2label", "problem_type")


def tokenise(source: SourceConfig, config: Config, tokenizer: Any, kinds: tuple[type, ...], survey: bool = False) -> Documents:
    """The documents of one source, from the cache if nothing they depend on has changed.

    A survey continues where a row would stop a run: the row is left out and recorded. Without such a row, a survey and a run make the same
    documents.
    """
    if tokenizer is None:
        raise DataError("the model has no tokenizer, so rows cannot be tokenised; give a model folder that holds tokenizer.json")
    tokenizer = run_tokenizer(config, tokenizer)
    cache, key = cache_dir(config), _key(source, config, tokenizer)
    for name in (key, f"{key}-survey") if survey else (key,):
        if (cache / name).is_dir():
            try:
                return Documents.load(cache / name)
            except DataError as error:
                log.warning("data: %s, so the rows are tokenised again", error)
                shutil.rmtree(cache / name)
    ledger = Ledger(source.path).by(quality.policies(config), survey)
    encoder = Encoder(config, tokenizer, ledger, kinds)

    def entries() -> Iterator[Entry]:
        said = time.monotonic()
        for item in encoder.encode(examples(source, config)):
            if time.monotonic() > said + SILENCE:
                log.info("data: tokenised %s rows of %s, cached in %s", f"{ledger.rows:,}", source.path, cache)
                said = time.monotonic()
            content, group, stratum = content_key(item.row.fields), *split_keys(item.row, config)
            for ids, mask in item.docs:
                ledger.keep(len(ids), int(np.count_nonzero(mask)))
                yield Entry(ids, mask, item.row.index, content, group, stratum, item.value)
        if not ledger.documents:
            why = next((f"; {first[0]}" for first in ledger.examples.values()), "")
            raise DataError(f"{source.path}: no row is left of {ledger.rows}; dropped: {ledger.summary()}{why}")

    return store.write(cache, lambda: f"{key}-survey" if ledger.suppressed else key, entries(), ledger.to_dict)


def examples(source: SourceConfig, config: Config) -> Iterator[tuple[files.Row, Example]]:
    """The rows of one source under the field names of the formats, and their examples."""
    columns, form = dict(source.columns or config.data.columns), form_of(source, config)
    rows = files.rows(source.path, source.name, source.split, config.data.streaming)
    for row in islice(rows, source.limit) if config.data.streaming else rows:  # a stream is not read beyond its limit
        row = formats.rename(row, columns)
        labelled = form is None and config.objective == "kto" and formats.is_labelled(row)
        yield row, formats.parse(row, "unpaired" if labelled else form)


def form_of(source: SourceConfig, config: Config) -> str | None:
    """The format of a source, unless it is to be detected."""
    return source.format or config.data.format or OBJECTIVE_FORMS.get(config.objective)


def split_keys(row: files.Row, config: Config) -> tuple[int, int]:
    """64-bit hashes of what a split keeps together and of its stratum: by default the whole row, and nothing."""
    found = []
    for key, name, otherwise in (("split_by", config.data.split_by, row.fields), ("stratify", config.data.stratify, None)):
        if name is not None and name not in row.fields:
            raise row.fail(f"no field {name!r}, which data.{key} names; the row has {', '.join(map(repr, row.fields))}")
        found.append(content_key(otherwise if name is None else row.fields[name]))
    return found[0], found[1]


def content_key(value: Any) -> int:
    """64-bit hash of a value's content."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "big")


def cache_dir(config: Config) -> Path:
    """The folder for tokenised rows: `data.cache_dir`, or the user's cache folder."""
    folder = Path(config.data.cache_dir).expanduser() if config.data.cache_dir else cache_folder() / "data"
    if os.path.lexists(folder) and not folder.is_dir():
        raise DataError(f"data.cache_dir {folder} is a file; name a folder")
    return folder


def _key(source: SourceConfig, config: Config, tokenizer: Any) -> str:
    """Hash of tokenizer, template, code, libraries, rows and settings."""
    paths, form = files.find(source.path, source.split), form_of(source, config)
    key = hashlib.sha256()
    for part in (
        _tokenizer_bytes(tokenizer),
        json.dumps(tokenizer.chat_template).encode(),
        b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in MAKERS),
        json.dumps([importlib.metadata.version(name) for name in LIBRARIES]).encode(),
        json.dumps(
            [files.content_hash(p) for p in paths]
            if paths
            else files.hub_version(source.path, source.name, source.split, config.data.streaming)
        ).encode(),
        json.dumps([source.path, source.split, form, source.columns or config.data.columns]).encode(),
        json.dumps([getattr(config, name) for name in OBJECTIVE_KEYS]).encode(),
        json.dumps(source.limit if config.data.streaming else None).encode(),
        formats.function_bytes(form),
        json.dumps([getattr(config.data, name) for name in KEYS]).encode(),
    ):
        key.update(hashlib.sha256(part).digest())
    return key.hexdigest()[:32]


def _tokenizer_bytes(tokenizer: Any) -> bytes:
    """The tokenizer as JSON, without the padding and truncation that calls leave in it."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= {"padding": None, "truncation": None, "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()}}
    return json.dumps(state, sort_keys=True).encode()
