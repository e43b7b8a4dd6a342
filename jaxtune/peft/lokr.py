"""LoKr (LyCORIS, arXiv 2309.14859): a Kronecker product whose factors may have low rank themselves."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.config import LoKrConfig
from jaxtune.errors import ConfigError
from jaxtune.model.spec import Row
from jaxtune.model.weight import Matrix, Weight, dense, linear
from jaxtune.peft.adapter import Adapter, Kind, Part, kaiming, zeros
from jaxtune.peft.sites import names, rank_and_scale


class LoKr(Weight):
    """`W + scale * kron(w1, w2)`; a factor is one matrix, or a product of two."""

    base: Matrix
    scale: jax.Array  # []
    w1: tuple[jax.Array, ...]  # [l, m], or [l, R] and [R, m]; out = l k, in = m n
    w2: tuple[jax.Array, ...]  # [k, n], or [k, R] and [R, n]

    def apply(self, x: jax.Array) -> jax.Array:
        """`W x + scale * w2 X w1^T` with X the input as `[n, m]`: the large matrix is never built."""
        y = linear(self.base, x)
        w1, w2 = (_whole(factor).astype(x.dtype) for factor in (self.w1, self.w2))
        folded = x.reshape(*x.shape[:-1], w1.shape[1], w2.shape[1])
        inner = jnp.einsum("...mn,kn->...mk", folded, w2)
        return y + (jnp.einsum("...mk,lm->...lk", inner, w1) * self.scale.astype(x.dtype)).reshape(y.shape)

    def dense(self, dtype) -> jax.Array:
        """The matrix itself, added in float32."""
        return (dense(self.base, jnp.float32) + self.scale * jnp.kron(_whole(self.w1), _whole(self.w2))).astype(dtype)


def _whole(factor: tuple[jax.Array, ...]) -> jax.Array:
    return factor[0] if len(factor) == 1 else factor[0] @ factor[1]


def factors(size: int, factor: int = -1) -> tuple[int, int]:
    """`(m, n)` with `m n = size` and m <= n: m as close to `factor` as possible, or with -1 as close to the square root (LyCORIS' rule)."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    m = max(d for d in range(1, size + 1) if size % d == 0 and d * d <= size and (d <= limit or d == 1))
    return m, size // m


class LoKrKind(Kind):
    """Starts with the left factor zero."""

    config = LoKrConfig
    peft_type = "LOKR"
    conv1d = False
    ignored = frozenset({"rank_dropout", "module_dropout", "rank_dropout_scale", "use_effective_conv2d", "init_weights"})

    def check(self, config: LoKrConfig, path: str, row: Row) -> None:
        super().check(config, path, row)
        if len({rank_and_scale(name, config)[0] for name in names(path, row)}) > 1:
            raise ConfigError(f"lokr.rank_pattern gives {names(path, row)[0]} other ranks in other layers; give all layers of it one rank")

    def parts(self, config: LoKrConfig, path: str, row: Row, rank: int) -> dict[str, Part]:
        (low, k), (m, n) = (factors(size, config.decompose_factor) for size in row.shape[-2:])
        left = config.decompose_both and rank < max(low, m) / 2
        right = rank < max(k, n) / 2
        return _factor("w1", (low, m), rank, left, zeros) | _factor("w2", (k, n), rank, right, kaiming)

    def leaf(self, adapter: Adapter, base: Matrix, parts: dict[str, jax.Array], scale: jax.Array, key: jax.Array | None) -> Matrix:
        w1, w2 = (tuple(parts[name] for name in parts if name.startswith(factor)) for factor in ("w1", "w2"))
        return LoKr(base, scale, w1, w2)


def _factor(name: str, shape: tuple[int, int], rank: int, split: bool, init) -> dict[str, Part]:
    if not split:
        return {name: Part(shape, (None, None), f"lokr_{name}", init)}
    (tall, wide), first = shape, init
    return {
        f"{name}_a": Part((tall, rank), (None, None), f"lokr_{name}_a", first),
        f"{name}_b": Part((rank, wide), (None, None), f"lokr_{name}_b", kaiming),
    }


KIND: Any = LoKrKind()
