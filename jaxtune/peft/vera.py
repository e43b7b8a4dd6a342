"""VeRA (arXiv 2310.11454): one frozen random pair for all matrices, and two trained vectors for each."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxtune.config import VeraConfig
from jaxtune.model.families import ModelConfig
from jaxtune.model.spec import Row
from jaxtune.model.weight import Matrix, Weight, dense, linear
from jaxtune.peft.adapter import Adapter, Constant, Kind, Part, dropped, zeros
from jaxtune.peft.sites import Site, adaptable


class VeRA(Weight):
    """`W + diag(lambda_b) B diag(lambda_d) A`, with slices as large as W of the shared `A [R, largest in]` and `B [largest out, R]`."""

    base: Matrix
    lambda_b: jax.Array  # [out]
    lambda_d: jax.Array  # [R]
    key: jax.Array | None = None
    shared: tuple[Constant, ...] = struct.field(pytree_node=False, default=())
    rate: float = struct.field(pytree_node=False, default=0.0)

    def _pair(self, dtype, width: int) -> tuple[jax.Array, jax.Array]:
        a, b = (jnp.asarray(constant.value) for constant in self.shared)
        return a[:, :width].astype(dtype), b[: self.lambda_b.shape[0]].astype(dtype)

    def apply(self, x: jax.Array) -> jax.Array:
        """`W x + lambda_b * B (lambda_d * (A x))`."""
        own = dropped(x, self.key, self.rate)
        a, b = self._pair(x.dtype, x.shape[-1])
        inner = linear(a, x if own is None else own) * self.lambda_d.astype(x.dtype)
        return linear(self.base, x) + linear(b, inner) * self.lambda_b.astype(x.dtype)

    def dense(self, dtype) -> jax.Array:
        """The matrix itself, added in float32."""
        base = dense(self.base, jnp.float32)
        a, b = self._pair(jnp.float32, base.shape[1])
        return (base + (self.lambda_b[:, None] * b) @ (self.lambda_d[:, None] * a)).astype(dtype)


def projections(key: int, rank: int, out: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """`A [rank, width]` and `B [out, rank]`: the numbers that torch's `Tensor.uniform_` draws on a CPU, seeded with `key` (Mersenne
    Twister, the low 24 bits of each word), within PEFT's bound `sqrt(6 / last dimension)`. Equal numbers allow opening files without them.
    """
    words = np.random.RandomState(key % 2**32)

    def draw(shape: tuple[int, int]) -> np.ndarray:
        bound = np.float32(math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1])))
        bits = words.randint(0, 2**32, shape, dtype=np.uint32) & np.uint32(2**24 - 1)
        return (bits * 2.0**-24 * np.float64(bound + bound) - bound).astype(np.float32)

    return draw((rank, width)), draw((out, rank))


class VeRAKind(Kind):
    """Starts with `lambda_b` zero and `lambda_d` as configured."""

    config = VeraConfig
    peft_type = "VERA"
    ignored = frozenset({"init_weights"})
    shared_files = ("base_model.vera_A", "base_model.vera_B")

    def more_tensors(self, adapter: Adapter) -> dict[str, np.ndarray]:
        if not adapter.config.save_projection:
            return {}
        return {name: constant.value for name, constant in zip(self.shared_files, adapter.shared, strict=True)}

    def parts(self, config: VeraConfig, path: str, row: Row, rank: int) -> dict[str, Part]:
        def first(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return jnp.full(shape, config.d_initial, jnp.float32)

        return {"lambda_b": Part((row.shape[-2],), ("out",), "vera_lambda_b", zeros),
                "lambda_d": Part((rank,), (None,), "vera_lambda_d", first)}  # fmt: skip

    def leaf(self, adapter: Adapter, base: Matrix, parts: dict[str, jax.Array], scale: jax.Array, key: jax.Array | None) -> Matrix:
        return VeRA(base, **parts, key=key, shared=adapter.shared, rate=adapter.config.dropout)

    def constants(self, model_config: ModelConfig, config: VeraConfig, sites: tuple[Site, ...]) -> tuple[Constant, ...]:
        table = adaptable(model_config)
        out, width = (max(table[site.path].shape[axis] for site in sites) for axis in (-2, -1))
        return tuple(Constant(value) for value in projections(config.projection_prng_key, config.r, out, width))


KIND: Any = VeRAKind()
