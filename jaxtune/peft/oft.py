"""OFT (arXiv 2306.07280, 2506.19847) and BOFT (2311.06243): inputs are rotated, block by block, before a frozen matrix."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxtune.config import BOFTConfig, OFTConfig
from jaxtune.errors import ConfigError
from jaxtune.model.spec import Row
from jaxtune.model.weight import Matrix, Weight, dense, linear
from jaxtune.peft.adapter import Adapter, Kind, Part, ones, zeros


class Turned(Weight):
    """`diag(s) W R^T` with R block-diagonal and orthogonal; each block is the Cayley transform of a skew matrix.

    `weight [blocks, b (b - 1) / 2]` holds the upper triangles (OFT; one block may be shared by all), or `[1, blocks, b, b]` whole matrices,
    of which the skew part counts (BOFT). `terms`: terms of a Neumann series that replaces the inverse (0: the inverse itself).
    """

    base: Matrix
    weight: jax.Array
    s: jax.Array | None = None  # [out, 1]
    terms: int = struct.field(pytree_node=False, default=0)

    def _blocks(self, width: int) -> jax.Array:
        """`[blocks, b, b]`, float32; computed again in the backward pass, because each intermediate step is as large."""
        blocks = jax.checkpoint(_rotations, static_argnums=1)(self.weight, self.terms)
        return jnp.broadcast_to(blocks, (width // blocks.shape[-1], *blocks.shape[1:]))

    def apply(self, x: jax.Array) -> jax.Array:
        """`s * W (R^T x)`."""
        blocks = self._blocks(x.shape[-1]).astype(x.dtype)
        folded = x.reshape(*x.shape[:-1], *blocks.shape[:2])
        y = linear(self.base, jnp.einsum("...rk,rkc->...rc", folded, blocks).reshape(x.shape))
        return y if self.s is None else y * self.s[:, 0].astype(x.dtype)

    def dense(self, dtype) -> jax.Array:
        """The matrix itself, in float32."""
        base = dense(self.base, jnp.float32)
        blocks = self._blocks(base.shape[1])
        turned = jnp.einsum("orc,rkc->ork", base.reshape(-1, *blocks.shape[:2]), blocks).reshape(base.shape)
        return (turned if self.s is None else turned * self.s).astype(dtype)


def _rotations(weight: jax.Array, terms: int) -> jax.Array:
    if weight.ndim == 4:
        return _cayley((weight[0] - weight[0].mT) / 2, terms)
    size = round((1 + math.sqrt(1 + 8 * weight.shape[-1])) / 2)
    upper = jnp.zeros((weight.shape[0], size, size)).at[:, *np.triu_indices(size, 1)].set(weight)
    return _cayley(upper - upper.mT, terms)


def _cayley(skew: jax.Array, terms: int) -> jax.Array:
    """`(I - Q) (I + Q)^-1`; or with `terms` PEFT's series, which has the opposite sign: `I + 2 Q + 2 Q^2 + ... + Q^(terms - 1)`."""
    eye = jnp.eye(skew.shape[-1])
    if not terms:
        return jnp.linalg.solve((eye + skew).mT, (eye - skew).mT).mT
    out, power = jnp.broadcast_to(eye, skew.shape), skew
    if terms > 1:
        out = out + 2 * skew
    if terms > 2:
        power = skew @ skew
        out = out + 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            out = out + 2 * power
        out = out + power @ skew
    return out


class OFTKind(Kind):
    """Starts with R = I."""

    config = OFTConfig
    peft_type = "OFT"
    conv1d = False
    refused = {"coft": False}
    ignored = frozenset({"module_dropout", "init_weights", "eps"})

    def parts(self, config: OFTConfig, path: str, row: Row, rank: int) -> dict[str, Part]:
        width = row.shape[-1]
        size = _nearest(width, config.oft_block_size) if config.oft_block_size else width // _nearest(width, config.r)
        blocks = 1 if config.block_share else width // size
        return {"weight": Part((blocks, size * (size - 1) // 2), (None, None), "oft_R.weight", zeros)}

    def leaf(self, adapter: Adapter, base: Matrix, parts: dict[str, jax.Array], scale: jax.Array, key: jax.Array | None) -> Matrix:
        terms = adapter.config.num_cayley_neumann_terms if adapter.config.use_cayley_neumann else 0
        return Turned(base, parts["weight"], terms=terms)


def _nearest(width: int, wanted: int) -> int:
    """The nearest divisor of `width`, the smaller of two (PEFT's rule)."""
    if wanted >= width:
        return width
    return min((d for d in range(1, width + 1) if width % d == 0), key=lambda d: (abs(d - wanted), d))


class BOFTKind(Kind):
    """Starts with R = I and s = 1."""

    config = BOFTConfig
    peft_type = "BOFT"
    conv1d = False
    neutral = {"s": 1.0}
    ignored = frozenset({"boft_dropout", "init_weights"})

    def check(self, config: BOFTConfig, path: str, row: Row) -> None:
        super().check(config, path, row)
        key = "boft_block_size" if config.boft_block_size else "boft_block_num"
        if row.shape[-1] % getattr(config, key):
            raise ConfigError(f"boft.{key} is {getattr(config, key)}, which does not divide the {row.shape[-1]} inputs of {path}")

    def parts(self, config: BOFTConfig, path: str, row: Row, rank: int) -> dict[str, Part]:
        out, width = row.shape[-2:]
        size = config.boft_block_size or width // config.boft_block_num
        return {"weight": Part((1, width // size, size, size), (None,) * 4, "boft_R", zeros),
                "s": Part((out, 1), ("out", None), "boft_s", ones)}  # fmt: skip

    def leaf(self, adapter: Adapter, base: Matrix, parts: dict[str, jax.Array], scale: jax.Array, key: jax.Array | None) -> Matrix:
        return Turned(base, **parts)


KIND: Any = OFTKind()
BOFT: Any = BOFTKind()
