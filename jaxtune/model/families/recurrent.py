"""Layers that pass a state from token to token instead of keys and values, as described in config.json: the `layers`, how many tokens
(`kernel`) of how many channels (`channels`) their convolution sees, and the shape of their `state`, if any."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DeltaNet:
    """Linear attention (model/delta.py): heads of keys and queries, each shared by some value heads."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    layers: tuple[int, ...]
    most_written: float = 1.0  # the largest beta; above 1 a value written twice changes sign
    norm_eps: float | None = None  # of the result's norm; None: the model's
    parallel_attention = False

    @property
    def channels(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def state(self) -> tuple[int, int, int]:
        """The state's shape."""
        return self.value_heads, self.key_dim, self.value_dim


@dataclasses.dataclass(frozen=True)
class ShortConvolution:
    """A gated convolution and nothing else (model/convolution.py)."""

    channels: int
    kernel: int
    layers: tuple[int, ...]
    state = None
    parallel_attention = False


@dataclasses.dataclass(frozen=True)
class Mamba:
    """Mamba-2 (model/mamba.py): heads of inputs, and groups of heads that share what writes to the state and what reads it."""

    heads: int
    head_dim: int
    groups: int
    state_dim: int
    kernel: int
    conv_bias: bool
    layers: tuple[int, ...]
    act: str  # of the convolution's output
    norm: str = "after"  # of the result: after its gate | before | "": none
    out_bias: bool = False
    least_step: float = 0.0  # minimum of the time steps
    parallel_attention: bool = False  # attention runs in parallel in these layers

    @property
    def width(self) -> int:
        """Dimensions of all heads."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """Channels of the convolution."""
        return self.width + 2 * self.groups * self.state_dim

    @property
    def state(self) -> tuple[int, int, int]:
        """The state's shape."""
        return self.heads, self.state_dim, self.head_dim


Recurrent = DeltaNet | ShortConvolution | Mamba
