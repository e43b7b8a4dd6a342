"""One line of the row table."""

from typing import NamedTuple


class Part(NamedTuple):
    """Where a row lies in a file's tensor of all experts of a layer, `[E, out, in]` (`[E, in, out]` if transposed; biases `[E, out]`).

    `of` rows share its outputs: interleaved if they alternate, otherwise one after the other.
    """

    number: int = 0
    of: int = 1
    alternating: bool = False

    def outputs(self, size: int) -> slice:
        """The tensor's outputs that belong to this row, `size` of them."""
        return slice(self.number, None, self.of) if self.alternating else slice(self.number * size, (self.number + 1) * size)


class Row(NamedTuple):
    """One parameter: its definition (shape, axes, init), its names elsewhere (hf, gguf), and the layers it stacks (their
    numbers in names: `ModelConfig.layer_names`).

    `shape` is `[L, ...]` if the row stacks layers, `[L, E, out, in]` if it stacks the experts of layers. Matrices are `[out, in]` here in
    any case: `transposed` says that the Hugging Face file stores `[in, out]` (GPT-2's Conv1D), `part` that it stores a layer's experts in
    one tensor, and where in it this row lies (convert/together.py). `float32`: kept in float32, in memory and in files, whatever the
    model's dtype.
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
        """Whether it is a linear layer's matrix, quantised and adapted as such: not norms, biases, embeddings, convolutions, routers,
        experts."""
        return bool(self.layers) and len(self.shape) == 3 and "experts" not in self.axes and self.init == "normal"

    @property
    def is_experts(self) -> bool:
        """Whether it stacks matrices of experts, `[L, E, out, in]`."""
        return "experts" in self.axes and len(self.shape) == 4

    @property
    def is_apart(self) -> bool:
        """Whether the file stores a layer's experts, or its heads (norms of StableLM 2), as separate tensors."""
        return "{expert}" in self.hf or "{head}" in self.hf

    @property
    def can_be_packed(self) -> bool:
        """Whether quantisation applies to it: what `linear` or `grouped` multiplies by."""
        return self.is_matrix or self.is_experts

    def hf_names(self) -> list[str]:
        """The Hugging Face tensors that this row stacks, in the order of its leading axes: `[L]` names, or `[L * E]` for experts (or heads)
        stored as separate tensors."""
        parts = range(self.shape[1]) if self.is_apart else (None,)
        return [self.hf.format(layer=layer, expert=part, head=part) for layer in self.layers or (None,) for part in parts]

    def gguf_names(self) -> list[str]:
        """The GGUF tensors that this row stacks, in order, one per layer (a GGUF tensor holds all experts of a layer)."""
        return [self.gguf.format(layer=layer) for layer in self.layers or (None,)]
