"""Products of rows with the matrices of their experts; the rows are sorted by expert.

XLA has an operation for this, `ragged_dot`, which is used on TPUs. On CPUs and GPUs it computes all experts for all rows (jax 0.10.2): with
128 experts 128 times the work, and on GPUs as many copies of the rows. There, the rows are cut into blocks of one expert each, and a loop
goes through the blocks that exist, several at a time if their matrices are small.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Bytes of matrices that one turn of the loop copies from the stack of experts: what a CPU's cache holds; on a GPU, where each turn costs
# the host a look at the loop's condition, many.
CACHED, MANY = 2**19, 2**25


class _Blocks(NamedTuple):
    """Blocks of b rows, in M turns of g blocks."""

    experts_Mg: jax.Array
    rows_Mgb: jax.Array  # the rows' numbers
    live_Mgb: jax.Array  # False where a block is longer than what is left of its expert's rows
    turns: jax.Array  # how many of the M turns have rows
    place_N: jax.Array  # where in `[M * g * b]` each row is


def _cut(sizes_E: jax.Array, N: int, most_blocks: int) -> _Blocks:
    E = len(sizes_E)
    b = min(256, max(8, 1 << max(0, N // (2 * E) - 1).bit_length()))  # about half of an expert's mean share: a quarter more rows on average
    most = max(1, (N + min(E, N) * (b - 1)) // b)
    g = min(most, max(1, most_blocks))
    ends_E, blocks_E = jnp.cumsum(sizes_E), -(-sizes_E // b)
    starts_E, lasts_E = ends_E - sizes_E, jnp.cumsum(blocks_E)
    firsts_E = lasts_E - blocks_E
    number_M = jnp.arange(-(-most // g) * g)
    experts_M = jnp.minimum(jnp.searchsorted(lasts_E, number_M, side="right", method="compare_all"), E - 1)
    rows_Mb = (starts_E[experts_M] + (number_M - firsts_E[experts_M]) * b)[:, None] + jnp.arange(b)
    live_Mb = rows_Mb < ends_E[experts_M][:, None]
    number_N = jnp.arange(N)
    expert_N = jnp.minimum(jnp.searchsorted(ends_E, number_N, side="right", method="compare_all"), E - 1)
    place_N = firsts_E[expert_N] * b + number_N - starts_E[expert_N]
    rows_Mgb, live_Mgb = (x.reshape(-1, g, b) for x in (jnp.minimum(rows_Mb, N - 1), live_Mb))
    return _Blocks(experts_M.reshape(-1, g), rows_Mgb, live_Mgb, -(-lasts_E[-1] // g), place_N)


def product(w: Any, x_NI: jax.Array, sizes_E: jax.Array, dense: Callable[[Any], jax.Array], back: bool = False) -> jax.Array:
    """Each row times its expert's matrix, `x W^T`, or `x W` with `back`, in x's dtype: `[N, in] -> [N, out]`. Not differentiable.

    w         a pytree whose leaves are stacked over the experts
    dense     makes one expert's matrix `[out, in]`, in x's dtype, from its part of `w`; called where the matrix is used, and not kept
    sizes_E   the number of rows of each expert, in the order of the rows; they sum to N
    """
    w, x_NI = jax.tree.map(jnp.asarray, (w, x_NI))  # numpy arrays cannot be indexed inside the loop
    shape = jax.eval_shape(lambda w: dense(jax.tree.map(lambda leaf: leaf[0], w)), w)
    N, axis = len(x_NI), 0 if back else 1

    def native(w, x_NI, sizes_E):
        contract = jax.lax.RaggedDotDimensionNumbers((((1,), (axis + 1,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0])
        return jax.lax.ragged_dot_general(x_NI, jax.vmap(dense)(w), sizes_E, contract)

    def in_blocks(w, x_NI, sizes_E, at_once):
        cut = _cut(sizes_E, N, at_once // (shape.size * shape.dtype.itemsize))

        def turn(number, y_Mgbo):
            w_gOI = jax.vmap(dense)(jax.tree.map(lambda leaf: leaf[cut.experts_Mg[number]], w))
            y_gbo = jax.lax.dot_general(x_NI[cut.rows_Mgb[number]], w_gOI, (((2,), (axis + 1,)), ((0,), (0,))))
            return jax.lax.dynamic_update_index_in_dim(y_Mgbo, y_gbo, number, 0)

        y_Mgbo = jnp.zeros((*cut.rows_Mgb.shape, shape.shape[1 - axis]), x_NI.dtype)
        y_Mgbo = jax.lax.fori_loop(0, cut.turns, turn, y_Mgbo)
        return y_Mgbo.reshape(-1, y_Mgbo.shape[-1])[cut.place_N]

    return _by_platform(native, in_blocks, w, x_NI, sizes_E)


def outer(dy_NO: jax.Array, x_NI: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """The gradient of the experts' matrices, `dy^T x` over each expert's rows, float32 `[E, out, in]`. Not differentiable."""
    N, shape = len(x_NI), (len(sizes_E), dy_NO.shape[1], x_NI.shape[1])

    def native(dy_NO, x_NI, sizes_E):
        contract = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[])
        return jax.lax.ragged_dot_general(dy_NO, x_NI, sizes_E, contract, preferred_element_type=jnp.float32)

    def in_blocks(dy_NO, x_NI, sizes_E, at_once):
        cut = _cut(sizes_E, N, at_once // (4 * shape[1] * shape[2]))

        def turn(number, w_EOI):
            rows_gb, live_gb = cut.rows_Mgb[number], cut.live_Mgb[number]
            dy_gbO = jnp.where(live_gb[..., None], dy_NO[rows_gb], 0)
            sums_gOI = jax.lax.dot_general(dy_gbO, x_NI[rows_gb], (((1,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)
            return w_EOI.at[cut.experts_Mg[number]].add(sums_gOI)

        return jax.lax.fori_loop(0, cut.turns, turn, jnp.zeros(shape, jnp.float32))

    return _by_platform(native, in_blocks, dy_NO, x_NI, sizes_E)


def _by_platform(native: Callable, in_blocks: Callable, *operands: Any) -> jax.Array:
    cpu, others = (functools.partial(in_blocks, at_once=size) for size in (CACHED, MANY))
    return jax.lax.platform_dependent(*operands, tpu=native, cpu=cpu, default=others)


@jax.custom_vjp
def ragged(x_NI: jax.Array, w_EOI: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Each row times its expert's matrix, `x W^T` `[N, out]`, in x's dtype, which is w's too."""
    return product(w_EOI, x_NI, sizes_E, lambda w: w)


def _ragged_fwd(x_NI, w_EOI, sizes_E):
    return ragged(x_NI, w_EOI, sizes_E), (x_NI, w_EOI, sizes_E)


def _ragged_bwd(residuals, dy_NO):
    x_NI, w_EOI, sizes_E = residuals
    return product(w_EOI, dy_NO, sizes_E, lambda w: w, back=True), outer(dy_NO, x_NI, sizes_E).astype(w_EOI.dtype), None


ragged.defvjp(_ragged_fwd, _ragged_bwd)
