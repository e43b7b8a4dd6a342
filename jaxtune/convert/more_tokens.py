"""A model with a larger vocabulary than its files have, for an adapter whose vocabulary was resized (TRL's `chat_template_path: FOLDER`).

Such an adapter's file holds the whole embedding and head, which replace the model's; the model has zeros in their place.
"""

import dataclasses
import json
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxtune.convert.names import spellings
from jaxtune.convert.tensors import Entry, read_entry
from jaxtune.model.families import ModelConfig, nested
from jaxtune.model.spec import spec

PATHS = ("embed", "head")


def with_tokens(config: ModelConfig, params: dict, count: int) -> tuple[ModelConfig, dict]:
    """Config and parameters with zeros for the tokens up to `count`."""
    hf = nested.changed(json.loads(config.hf_json), vocab_size=count)
    whole = {path: jnp.pad(params[path], ((0, count - config.vocab_size), (0, 0))) for path in _rows(config)}
    return dataclasses.replace(config, vocab_size=count, hf_json=json.dumps(hf)), params | whole


def entries_with_tokens(entries: dict[str, Entry], config: ModelConfig) -> dict[str, Entry]:
    """The tensors of a file with zeros for the tokens that `config` has in addition."""
    names = [name for row in _rows(config).values() for name in spellings(row.hf) if name in entries]
    return entries | {name: entries[name]._replace(shape=(config.vocab_size, *entries[name].shape[1:]), packed=_More(name, entries[name],
                      config.vocab_size)) for name in names}  # fmt: skip


class _More(NamedTuple):
    """A tensor with zeros after its last row (the interface of `packed.Packed`)."""

    name: str
    entry: Entry
    count: int

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        value = read_entry(self.name, self.entry)
        return np.concatenate([value, np.zeros((self.count - len(value), *value.shape[1:]), value.dtype)])[index]


def _rows(config: ModelConfig) -> dict[str, Any]:
    rows = spec(config)
    return {path: rows[path] for path in PATHS if path in rows}
