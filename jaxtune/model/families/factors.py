"""Factors of a layer's parts, as given in config.json."""

from typing import NamedTuple


class Growth(NamedTuple):
    """A query at position p is multiplied by `1 + rate ln(1 + floor((p + ahead) / length))`, an attention temperature (arXiv 2501.19399).
    """

    rate: float = 0.0
    length: int = 1
    ahead: int = 0
    still: bool = False  # only in layers without rotation


class Multipliers(NamedTuple):
    """Factors of the inputs and outputs of a layer's parts (Falcon H1; arXiv 2203.03466)."""

    attention_in: float = 1.0
    attention_out: float = 1.0
    key: float = 1.0
    mamba_in: float = 1.0
    mamba: tuple[float, ...] = (1.0,) * 5  # of gate, input, writing, reading, time step
    mamba_out: float = 1.0
    gate: float = 1.0
    down: float = 1.0
