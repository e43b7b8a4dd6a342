"""Configs over rows, and tokenizers for three families' templates."""

import json

import pytest
from chat import SPECIAL, make_tokenizer

from jaxtune.config import load_config
from jaxtune.data.encode import Encoder
from jaxtune.data.files import Row
from jaxtune.data.formats import parse
from jaxtune.data.ledger import Ledger


@pytest.fixture(scope="session")
def tokenizers():
    """One tokenizer per family."""
    return {family: make_tokenizer(family) for family in SPECIAL}


@pytest.fixture
def config(tmp_path):
    """Make a config over rows or a file; the test has its own cache."""

    def make(train, top=None, **data):
        if isinstance(train, list) and isinstance(train[0], dict) and "path" not in train[0]:
            file = tmp_path / "rows.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in train))
            train = str(file)
        data = {"train": train, "max_length": 128, "cache_dir": str(tmp_path / "cache")} | data
        return load_config({"model": "none", "output_dir": str(tmp_path / "run"), "data": data} | (top or {}))

    return make


@pytest.fixture
def bare():
    """A tokenizer without a chat template."""
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer_with():
    """Make a family's tokenizer with another template."""
    return lambda family, template: make_tokenizer(family, template)


def _encode(tokenizer, row, **data):
    config = load_config({"model": "none", "output_dir": "none", "data": {"train": "none", "max_length": 4096} | data})
    encoder = Encoder(config, tokenizer, Ledger("rows").by({"stop_token_untrained": "error", "double_bos": "error"}))
    row = Row("rows", 1, "row", row)
    (encoded,) = encoder.encode([(row, parse(row, None))])
    ((ids, mask),) = encoded.docs
    return ids, mask


@pytest.fixture(scope="session")
def encode():
    """Token ids and mask of one row: `encode(tokenizer, row, **data)`."""
    return _encode


@pytest.fixture(scope="session")
def underlined():
    """The text of the trained tokens of one row."""

    def underlined(tokenizer, row, **data):
        ids, mask = _encode(tokenizer, row, **data)
        return tokenizer.decode([token for token, trained in zip(ids, mask, strict=True) if trained])

    return underlined
