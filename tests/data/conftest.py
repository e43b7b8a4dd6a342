"""Configs over rows, and tokenizers for three families' templates."""

import json

import pytest
from chat import SPECIAL, make_tokenizer

from jaxtune.config import load_config


@pytest.fixture(scope="session")
def tokenizers():
    """One tokenizer for each family."""
    return {family: make_tokenizer(family) for family in SPECIAL}


@pytest.fixture
def config(tmp_path):
    """Make a config over rows or a file; the cache is the test's own."""

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
