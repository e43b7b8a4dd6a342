"""Files that store all experts of a layer in one tensor, read and written matrix by matrix (`Row.part`).

gate_up_proj [E, in, 2 out]   gate and up interleaved (GPT-OSS)
input_linear [E, 2 out, in]   gate, then up (Granite's)
"""

from collections.abc import Callable

import numpy as np

from jaxtune.convert.names import Cell, cells, spellings
from jaxtune.convert.tensors import Plan
from jaxtune.model.families import ModelConfig
from jaxtune.model.row import Row
from jaxtune.model.spec import spec


class Apart:
    """A checkpoint whose experts' tensors are read matrix by matrix, under the names of `cells`, as `[out, in]`.

    `source` has `entries`, `read` and `read_part` (`Safetensors`, or a wrapper around it).
    """

    def __init__(self, source, config: ModelConfig):
        self.source, self.entries = source, dict(source.entries)
        self._places: dict[str, tuple[str, tuple]] = {}
        rows, used = spec(config), set()
        for cell in cells(rows):
            stored = cell.whole and next((name for name in spellings(cell.whole) if name in source.entries), None)
            if not stored:
                continue
            row, entry = rows[cell.path], source.entries[stored]
            used.add(stored)
            if entry.shape != whole_shape(row):  # which `match_names` determines for the file's name
                self.entries[cell.name] = entry
                continue
            self.entries[cell.name] = entry._replace(shape=cell.shape)
            self._places[cell.name] = stored, _index(row, cell)
        for name in used:
            del self.entries[name]

    def read(self, name: str) -> np.ndarray:
        """One tensor, or one matrix of a tensor of experts."""
        if name not in self._places:
            return self.source.read(name)
        stored, index = self._places[name]
        value = self.source.read_part(stored, index)
        return value[0].T if len(index) == 3 else value.reshape(self.entries[name].shape)


def whole_shape(row: Row) -> tuple[int, ...]:
    """The shape of the file's tensor that the row is a part of."""
    assert row.part is not None
    experts, out, *width = row.shape[1:]
    shape = (experts, out * row.part.of, *width)
    return (experts, *shape[:0:-1]) if row.transposed else shape


def _index(row: Row, cell: Cell) -> tuple[slice, ...]:
    """The place of a matrix (or a layer's biases) in the file's tensor."""
    assert row.part is not None
    outputs, number = row.part.outputs(row.shape[2]), cell.index[1:]
    expert = slice(number[0], number[0] + 1) if number else slice(None)
    return (expert, slice(None), outputs) if row.transposed else (expert, outputs)


def plans_of_files(
    rows: dict[str, Row], plans: list[Plan], make: Callable[[str], np.ndarray]
) -> tuple[list[Plan], Callable[[str], np.ndarray]]:
    """The plans of the file's tensors, and `make` for them: the parts of one are made one after the other."""
    parts: dict[str, list[Cell]] = {}
    for cell in cells(rows):
        if cell.whole:
            parts.setdefault(cell.whole, []).append(cell)
    dtypes = {plan.name: plan.dtype for plan in plans}
    wholes = {name: Plan(name, dtypes[own[0].name], whole_shape(rows[own[0].path])) for name, own in parts.items()}

    def make_whole(name: str) -> np.ndarray:
        if name not in wholes:
            return make(name)
        value = np.empty(wholes[name].shape, wholes[name].dtype)
        for cell in parts[name]:
            row, own = rows[cell.path], make(cell.name)
            value[_index(row, cell)] = own.T if row.transposed else own
        return value

    inside = {cell.name for own in parts.values() for cell in own}
    return [plan for plan in plans if plan.name not in inside] + list(wholes.values()), make_whole
