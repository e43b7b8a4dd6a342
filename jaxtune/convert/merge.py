"""Write a base and its adapter as one model, without loading either whole."""

from typing import Any

import jax.numpy as jnp

from jaxtune.convert import hf
from jaxtune.convert.hf import Quantize
from jaxtune.convert.names import cells, match_names
from jaxtune.convert.tensors import Checkpoint
from jaxtune.errors import ModelError
from jaxtune.model.families import ModelConfig
from jaxtune.model.spec import abstract, spec
from jaxtune.peft import compose, kind_of
from jaxtune.tree import flatten, unflatten


def composed(config: ModelConfig, adapter: Any, base: Checkpoint) -> dict:
    """The tree of base and adapter, with the base's arrays left to be read (see `hf.save`), except for biases and partly trained stacks.

    Raises ModelError for `lora_bias` if the base has no bias to merge it into.
    """
    leaves = flatten(abstract(config))
    kind = kind_of(adapter.config)
    biases = [f"{path}_bias" for path, pair in adapter.params.items() if "bias" in pair]
    if missing := [path for path in biases if path not in leaves]:
        what = f"the adapter adds to biases (lora_bias, bitfit), but the model has no {missing[0]}"
        raise ModelError(f"{what} to merge it into; export the adapter as it is")
    parts = [whole.path for whole in adapter.wholes if whole.numbers is not None and whole.path not in ("embed", "head")]
    changed = [f"{path}_bias" for path in adapter.params if kind.changes_bias and f"{path}_bias" in leaves]
    for path in dict.fromkeys(biases + parts + changed):
        leaves[path] = hf.read_row(base, config, path)
    return compose(unflatten(leaves), adapter)


class Packed:
    """A checkpoint whose matrices are quantised while reading: the base that a QLoRA adapter was trained on."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, dtype: str, quantize: Quantize):
        self.checkpoint, self.dtype, self.quantize = checkpoint, dtype, quantize
        self.entries = checkpoint.entries
        table = list(cells(spec(config)))
        names = match_names(checkpoint, table)
        self._cells = {names[cell.name]: cell for cell in table}

    def read(self, name: str) -> Any:
        """The tensor, quantised if the quantiser applies to it."""
        value, cell = self.checkpoint.read(name), self._cells[name]
        packed = self.quantize(cell.path, jnp.asarray(value.T if cell.transposed else value).astype(self.dtype))
        return value if hasattr(packed, "dtype") else packed
