"""The leaves of a parameter tree and the only ways to use them.

A matrix `[out, in]` in the tree is a `jax.Array` or a `Weight`: a pytree that stands for a matrix (quantised, or composed of others).
`linear` multiplies by it, `grouped` multiplies by the matrices of experts, `rows` looks rows up (embeddings), `dense` is the matrix itself.
Weights nest.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from jaxtune.model.ragged import ragged


class Weight(struct.PyTreeNode):
    """A matrix `[out, in]` that is not stored as one array.

    Subclasses must not let autodiff keep the result of `dense`: a quantised leaf that keeps a dense copy of every layer for the backward
    pass costs more memory than no quantisation at all (and no numerical test would notice; see tests/laws). The first field is a matrix, so
    that the number of its axes tells a stack of layers from a single one.
    """

    def apply(self, x: jax.Array) -> jax.Array:
        """`x [..., in] -> x W^T [..., out]`, in x's dtype."""
        return matmul(x, self.dense(x.dtype))

    def dense(self, dtype) -> jax.Array:
        """The matrix itself, `[out, in]`."""
        raise NotImplementedError

    def grouped(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """The leaf stands for experts `[E, out, in]`; x `[N, in]` is sorted by expert, `sizes [E]` rows each: `[N, out]`."""
        return ragged(x, jax.vmap(lambda w: w.dense(x.dtype))(self), sizes)

    def rows(self, ids: jax.Array, dtype) -> jax.Array:
        """Rows `ids` of the matrix, `[..., in]`."""
        return self.dense(dtype)[ids]


Matrix = jax.Array | Weight


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x [..., in] -> x W^T [..., out]` for a plain matrix, in x's dtype."""
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (1,)), ((), ())))


def linear(w: Matrix, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """`x [..., in] -> x W^T + bias [..., out]` in x's dtype, for any leaf."""
    y = checkpoint_name(w.apply(x) if isinstance(w, Weight) else matmul(x, w.astype(x.dtype)), "linear")
    return y if bias is None else y + bias.astype(x.dtype)


def alone(stack: Matrix) -> Matrix:
    """The matrix of a stack of one."""
    return jax.tree.map(lambda leaf: leaf[0], stack)


def grouped(w: Matrix, x: jax.Array, sizes: jax.Array) -> jax.Array:
    """Rows sorted by expert, each times its expert's matrix: `[N, in]` and `[E, out, in]` -> `[N, out]`, for any leaf."""
    return checkpoint_name(w.grouped(x, sizes) if isinstance(w, Weight) else ragged(x, w.astype(x.dtype), sizes), "linear")


def dense(w: Matrix, dtype=None) -> jax.Array:
    """The matrix that a leaf stands for, as one array (also for stacked leaves `[L, out, in]`)."""
    if not isinstance(w, Weight):
        return w if dtype is None else w.astype(dtype)
    dtype = dtype or jnp.float32
    stacked = jax.tree.leaves(w)[0].ndim > 2  # every kind of leaf begins with a matrix
    return jax.lax.map(lambda layer: dense(layer, dtype), w) if stacked else w.dense(dtype)


def rows(w: Matrix, ids: jax.Array, dtype) -> jax.Array:
    """Rows `ids` of an embedding matrix, `[..., in]`."""
    return w.rows(ids, dtype) if isinstance(w, Weight) else w[ids].astype(dtype)


def is_weight(leaf) -> bool:
    """For `jax.tree.map(..., is_leaf=is_weight)`: stop at whole matrices."""
    return isinstance(leaf, Weight)
