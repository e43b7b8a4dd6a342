"""A base and its adapter as one model on disk, without loading either whole."""

from typing import Any

import jax.numpy as jnp

from jaxtune.convert.hf import Quantize
from jaxtune.convert.names import cells, match_names
from jaxtune.convert.tensors import Checkpoint
from jaxtune.model.families import ModelConfig
from jaxtune.model.spec import abstract, spec
from jaxtune.peft import compose


def composed(config: ModelConfig, adapter: Any) -> dict:
    """The tree of base and adapter, the base's arrays left to be read (see `hf.save`)."""
    return compose(abstract(config), adapter)


class Packed:
    """A checkpoint whose matrices are packed as they are read: the base that a QLoRA adapter was trained on."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, dtype: str, quantize: Quantize):
        self.checkpoint, self.dtype, self.quantize = checkpoint, dtype, quantize
        self.entries = checkpoint.entries
        table = list(cells(spec(config)))
        names = match_names(checkpoint, table)
        self._cells = {names[cell.name]: cell for cell in table}

    def read(self, name: str) -> Any:
        """The tensor, packed where the quantiser packs it."""
        value, cell = self.checkpoint.read(name), self._cells[name]
        packed = self.quantize(cell.path, jnp.asarray(value.T if cell.transposed else value).astype(self.dtype))
        return value if hasattr(packed, "dtype") else packed
