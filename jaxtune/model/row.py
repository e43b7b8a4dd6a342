"""One line of the row table."""

from typing import NamedTuple


class Part(NamedTuple):
    """Where a row lies in a file's tensor of all experts of a layer, `[E, out, in]` (`[E, in, out]` if transposed; biases `[E, out]`).

    `of` rows share its outputs: in turn where they alternate, else one after the other.
    """

    number: int = 0
    of: int = 1
    alternating: bool = False

    def outputs(self, size: int) -> slice:
        """The tensor's outputs that are this row's, `size` of them."""
        return slice(self.number, None, self.of) if self.alternating else slice(self.number * size, (self.number + 1) * size)


class Row(NamedTuple):
    """One parameter: what it is (shape, axes, init), what others call it (hf, gguf), and which layers it stacks.

    `shape` is `[L, ...]` where the row stacks layers, `[L, E, out, in]` where it stacks the experts of layers. Matrices are `[out, in]`
    here whatever the file does: `transposed` says that the Hugging Face file holds `[in, out]` (GPT-2's Conv1D), `part` that it holds a
    layer's experts in one tensor, and where this row lies in it (convert/together.py). `float32`: kept so, in memory and in files, whatever
    the model's dtype.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str  # normal | zeros | ones
    hf: str
    gguf: str
    layers: tuple[int, ...] = ()
    transposed: bool = False
    part: Part | None = None
    float32: bool = False

    @property
    def is_matrix(self) -> bool:
        """Whether it is a linear layer's, quantised and adapted as such: not norms, biases, embeddings, convolutions, routers, experts."""
        return bool(self.layers) and len(self.shape) == 3 and "experts" not in self.axes and self.init == "normal"

    @property
    def is_experts(self) -> bool:
        """Whether it stacks matrices of experts, `[L, E, out, in]`."""
        return "experts" in self.axes and len(self.shape) == 4

    @property
    def can_be_packed(self) -> bool:
        """Whether quantisation packs it: what `linear` or `grouped` multiplies by."""
        return self.is_matrix or self.is_experts

    def hf_names(self) -> list[str]:
        """The Hugging Face tensors this row is stacked from, in the order of its leading axes: `[L]` names, or `[L * E]` of
        experts that are a tensor each."""
        experts = range(self.shape[1]) if self.is_experts and self.part is None else (None,)
        return [self.hf.format(layer=layer, expert=expert) for layer in self.layers or (None,) for expert in experts]

    def gguf_names(self) -> list[str]:
        """The GGUF tensors this row is stacked from, in order, one a layer (a GGUF tensor holds all experts of a layer)."""
        return [self.gguf.format(layer=layer) for layer in self.layers or (None,)]
