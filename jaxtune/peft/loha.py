"""LoHa (FedPara, arXiv 2108.06098; LyCORIS, 2309.14859): the element-wise product of two low-rank matrices."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.config import LoHaConfig
from jaxtune.model.spec import Row
from jaxtune.model.weight import Matrix, Weight, dense, linear, matmul
from jaxtune.peft.adapter import Adapter, Kind, Part, kaiming, zeros


class LoHa(Weight):
    """`W + scale * (w1_a w1_b) * (w2_a w2_b)`."""

    base: Matrix
    w1_a: jax.Array  # [out, R]
    w1_b: jax.Array  # [R, in]
    w2_a: jax.Array  # [out, R]
    w2_b: jax.Array  # [R, in]
    scale: jax.Array  # []

    def _delta(self) -> jax.Array:
        one, two = (a.astype(jnp.float32) @ b.astype(jnp.float32) for a, b in ((self.w1_a, self.w1_b), (self.w2_a, self.w2_b)))
        return self.scale * one * two

    def apply(self, x: jax.Array) -> jax.Array:
        """The second product builds a matrix as large as W, which the backward pass builds again: it does not factor."""

        def second(x, w1_a, w1_b, w2_a, w2_b):
            return matmul(x, self.replace(w1_a=w1_a, w1_b=w1_b, w2_a=w2_a, w2_b=w2_b)._delta().astype(x.dtype))

        y = linear(self.base, x)
        return y + jax.checkpoint(second, prevent_cse=True)(x, self.w1_a, self.w1_b, self.w2_a, self.w2_b)

    def dense(self, dtype) -> jax.Array:
        """The matrix itself, added in float32."""
        return (dense(self.base, jnp.float32) + self._delta()).astype(dtype)


class LoHaKind(Kind):
    """Starts with `w2_b` zero."""

    config = LoHaConfig
    peft_type = "LOHA"
    conv1d = False
    ignored = frozenset({"rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights"})

    def parts(self, config: LoHaConfig, path: str, row: Row, rank: int) -> dict[str, Part]:
        out, width = row.shape[-2:]
        tall, wide = ((out, rank), ("out", None)), ((rank, width), (None, "in"))
        return {
            "w1_a": Part(*tall, "hada_w1_a", kaiming, -1), "w1_b": Part(*wide, "hada_w1_b", kaiming, -2),
            "w2_a": Part(*tall, "hada_w2_a", kaiming, -1), "w2_b": Part(*wide, "hada_w2_b", zeros, -2),
        }  # fmt: skip

    def leaf(self, adapter: Adapter, base: Matrix, parts: dict[str, jax.Array], scale: jax.Array, key: jax.Array | None) -> Matrix:
        return LoHa(base, **parts, scale=scale)


KIND: Any = LoHaKind()
