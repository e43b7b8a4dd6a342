"""From the config to the rows of a run: read once, tokenised once, kept on disk under the hash of everything that matters."""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.config import Config
from jaxtune.config import Source as SourceConfig
from jaxtune.data import documents as store
from jaxtune.data import files, formats, quality
from jaxtune.data.documents import Documents
from jaxtune.data.encode import Encoder
from jaxtune.data.examples import Example
from jaxtune.data.ledger import Ledger
from jaxtune.data.packing import make_plan
from jaxtune.data.source import Source
from jaxtune.errors import DataError

MAKERS = ("documents", "encode", "files", "formats", "examples", "ledger", "masks", "prepare", "templates", "turns")
LIBRARIES = ("transformers", "tokenizers", "jinja2")
KEYS = ("max_length", "length_policy", "truncation_side", "train_on", "train_on_eos", "add_eos", "system", "quality")


@dataclass(frozen=True)
class Data:
    """What a run trains and is evaluated on, and the books of how it came about.

    Attributes:
        train: batches by step number.
        eval: None where no evaluation rows are named.
        ledger: for `run.json` and the report: rows and tokens read, kept, cut and dropped, by source and reason.
    """

    train: Source
    eval: Source | None
    ledger: dict


def load(config: Config, tokenizer: Any, data_parallel: int = 1) -> Data:
    """Read, tokenise (or find in the cache) and plan the data of `config`.

    Args:
        config: `config.data` says which rows and how; batch sizes and seed come from the config itself.
        tokenizer: a fast Hugging Face tokenizer, with the chat template that chat rows need.
        data_parallel: devices that hold different rows. A micro-batch has `per_device_train_batch_size * data_parallel` rows.

    Raises:
        DataError: a source or row that cannot be used, with its file, number, the reason and what to change.
    """
    data = config.data
    if not data.train:
        raise DataError("no training data is named; set data.train to a file, folder, glob or hub id")
    documents = Documents.join([tokenise(source, config, tokenizer) for source in data.train])
    evaluation = None
    if isinstance(data.eval, float):
        held_out = documents.keys / 2.0**64 < data.eval
        if not held_out.any() or held_out.all():
            raise DataError(f"data.eval {data.eval} of {len(documents)} rows leaves no rows on one side; name a file, or another share")
        documents, evaluation = documents.select(np.flatnonzero(~held_out)), documents.select(np.flatnonzero(held_out))
    elif data.eval:
        evaluation = Documents.join([tokenise(source, config, tokenizer) for source in data.eval])
    seed = config.seed if config.data_seed is None else config.data_seed
    rows = config.per_device_train_batch_size * data_parallel
    train = Source(documents, _plan(documents, config, seed), rows, config.gradient_accumulation_steps, seed, data.shuffle)
    ledger = {"train": documents.info, "eval": [] if evaluation is None else evaluation.info}
    if evaluation is None:
        return Data(train, None, ledger)
    eval_rows = config.per_device_eval_batch_size * data_parallel
    return Data(train, Source(evaluation, _plan(evaluation, config, seed), eval_rows, shuffle=False), ledger)


def _plan(documents: Documents, config: Config, seed: int) -> Any:
    data = config.data
    return make_plan(documents.lengths, documents.trained, documents.part, data.packing, data.max_length, seed)


def tokenise(source: SourceConfig, config: Config, tokenizer: Any) -> Documents:
    """The documents of one source, from the cache if everything they depend on is as it was."""
    paths = files.find(source.path)
    hub = None if paths else files.hub(source.path, source.name, source.split)
    override = _template(config)
    key = hashlib.sha256()
    for part in (
        _tokenizer_bytes(tokenizer),
        json.dumps([tokenizer.chat_template, override]).encode(),
        b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in MAKERS),
        json.dumps([importlib.metadata.version(name) for name in LIBRARIES]).encode(),
        json.dumps([files.content_hash(path) for path in paths] if paths else hub.fingerprint).encode(),
        json.dumps([str(source.path), source.format or config.data.format, source.columns or config.data.columns]).encode(),
        json.dumps([getattr(config.data, name) for name in KEYS]).encode(),
    ):
        key.update(hashlib.sha256(part).digest())
    folder = cache_dir(config) / key.hexdigest()[:32]
    if (folder / "info.json").exists():
        return Documents.load(folder)
    ledger = Ledger(source.path).by(quality.policies(config))
    encoder = Encoder(config, tokenizer, ledger, template=override)

    def examples() -> Iterator[tuple[files.Row, Example]]:
        for row in read(source, config):
            yield row, formats.parse(row, source.format or config.data.format)

    def encoded() -> Iterator[tuple[int, int, list[int], np.ndarray]]:
        for item in encoder.encode(examples()):
            key = content_key(item.row)
            for ids, mask in item.docs:
                ledger.keep(len(ids), int(np.count_nonzero(mask)))
                yield item.row.number, key, ids, mask
        if not ledger.documents:
            raise DataError(f"{source.path}: no row is left of {ledger.rows}; dropped: {ledger.summary()}")

    return store.write(folder, encoded(), ledger.to_dict)


def read(source: SourceConfig, config: Config) -> Iterator[files.Row]:
    """The rows of one source under the names the formats use."""
    paths = files.find(source.path)
    columns = dict(source.columns or config.data.columns)
    if paths is None:
        rows = files.read_hub(source.path, source.name, source.split)
    else:
        rows = (row for path in paths for row in files.read(path))
    for row in rows:
        yield formats.rename(row, columns)


def content_key(row: files.Row) -> int:
    """64 bits of the row's content."""
    text = json.dumps(row.fields, sort_keys=True, ensure_ascii=False, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "big")


def cache_dir(config: Config) -> Path:
    """Where tokenised rows are kept: `data.cache_dir`, or the user's cache folder."""
    if config.data.cache_dir:
        return Path(config.data.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxtune" / "data"


def _tokenizer_bytes(tokenizer: Any) -> bytes:
    """The tokenizer as JSON, less the padding and truncation that calls leave behind in it."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= {"padding": None, "truncation": None, "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()}}
    return json.dumps(state, sort_keys=True).encode()


def _template(config: Config) -> str | None:
    """The Jinja source in `data.chat_template`."""
    if not config.data.chat_template:
        return None
    path = Path(config.data.chat_template).expanduser()
    if not path.is_file():
        raise DataError(f"data.chat_template {config.data.chat_template}: no such file; name a Jinja file")
    return path.read_text()
