"""A 4-bit matrix times activations on a TPU, dequantised tile by tile in VMEM (Pallas, Mosaic): the dense matrix is never in HBM.

Products and rounding are those of `NF4.dense` and a plain product: `code[codes] * absmax` in float32, rounded to x's dtype, summed in
float32. Only the order of the sum differs.
"""

import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

from jaxtune.errors import ConfigError, JaxtuneError
from jaxtune.model.families import ModelConfig
from jaxtune.model.layout import each_part, partition, split
from jaxtune.model.quant import CODES, NF4, Packed, quantize
from jaxtune.model.weight import is_weight

LANES, SUBLANES_8BIT = 128, 32  # of a TPU's registers, which determine the memory layout
TOKENS_BYTES = 4096  # bytes of a column of x that are loaded at a time: 2048 tokens in bfloat16
SIDES, SMALL = (512, 384, 256, 128), 1024  # of a tile; inputs up to SMALL without such a divisor are taken whole
VMEM = 32 * 2**20


class StackedNF4(Packed):
    """A 4-bit matrix whose codes stay in a stack of layers: number `number` (int32 `[]`) of `stack [L, in / 2, out]`.

    A loop over layers would cut the layer's codes out, and a kernel takes whole arrays: each would be copied before it is read. On `mesh`
    the matrix is whole on every device, and each device multiplies its own tokens.
    """

    matrix: NF4  # without its codes
    stack: jax.Array
    number: jax.Array
    mesh: Mesh | None = struct.field(pytree_node=False, default=None)

    def product(self, x: jax.Array, back: bool = False) -> jax.Array:
        """`x W^T`, or with `back` `x W`; by the kernel if the matrix has suitable tiles."""
        matrix = self.matrix
        if tiles(x.size // x.shape[-1], matrix.shape, matrix.block_size, x.dtype, back) is None:
            return super().product(x, back)
        # behind a barrier for the scales, which are computed for each product
        absmax, offset, x = jax.lax.optimization_barrier((matrix.absmax, matrix.nested_offset, x))
        scales = matrix.replace(absmax=absmax, nested_offset=offset).scales()

        def own(x, stack, scales, number):
            flat = x.reshape(-1, x.shape[-1])
            tile = tiles(flat.shape[0], matrix.shape, matrix.block_size, x.dtype, back)
            how = dict(code=CODES[matrix.kind], block_size=matrix.block_size, tile=tile, back=back)
            return product(flat, stack, scales, number, **how).reshape(*x.shape[:-1], -1)

        if self.mesh is not None and self.mesh.size > 1:
            rows = partition(self.mesh, x.shape, ("rows", "tokens", None) if x.ndim == 3 else (None,) * x.ndim)
            own = each_part(own, self.mesh, (rows, *[PartitionSpec()] * 3), rows, frozenset(self.mesh.axis_names))
        return own(x, self.stack, scales, self.number)

    def _cut_out(self) -> NF4:
        return self.matrix.replace(codes=jax.lax.dynamic_index_in_dim(self.stack, self.number, keepdims=False))

    def dense(self, dtype) -> jax.Array:
        """The matrix, `[out, in]`."""
        return self._cut_out().dense(dtype)

    def dense_beside(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The matrix in x's dtype, and x, both behind one barrier (see `Packed`)."""
        return self._cut_out().dense_beside(x)


def choose_kernel(requested: str, platform: str) -> str:
    """`auto`, `xla` or `pallas` as requested -> what that platform uses: `xla` or `pallas`. ConfigError if there is no kernel."""
    if requested == "pallas" and platform != "tpu":
        raise ConfigError(f"quantization_kernel: pallas is for TPUs, and this computes on a {platform}; write auto or xla")
    return ("pallas" if platform == "tpu" else "xla") if requested == "auto" else requested


def verify() -> None:
    """Dequantise a small matrix with the kernel on the local device, both ways, and compare it bit by bit with `NF4.dense`.

    No TPU was available when the kernel was written: it was tested in interpret mode and compiled for TPUs. Takes a second at the start of
    a run.
    """
    w = jax.random.normal(jax.random.key(0), (128, 256))
    leaf = cast(NF4, quantize(w, "nf4-dq"))
    held = StackedNF4(leaf.replace(codes=None), leaf.codes[None], jnp.int32(0))
    dense = jax.jit(lambda leaf: leaf.dense(jnp.bfloat16))(leaf)
    forward, back = (held.product(jnp.eye(side, dtype=jnp.bfloat16), back) for side, back in ((256, False), (128, True)))
    if not bool((forward == dense.T).all() & (back == dense).all()):
        raise JaxtuneError("the 4-bit kernel gives other numbers than it should on this device; write quantization_kernel: xla")


def verify_for(config: ModelConfig, params: dict) -> None:
    """`verify`, for a model that will use the kernel."""
    packed = any(isinstance(leaf, NF4) for leaf in jax.tree.leaves(params, is_leaf=is_weight))
    if packed and config.quantization_kernel == "pallas":
        verify()


def split_codes(layers, mesh: Mesh | None = None):
    """A tree of stacks without the codes of its 4-bit matrices, to be scanned over, and `put(layer, number)`, which makes a
    `StackedNF4` of one layer's part. Experts stay as they are, and codes sharded over a mesh are gathered by the layer before `put`."""
    stacks, cut = [], split(mesh, "fsdp")

    def is_4bit(leaf):
        return isinstance(leaf, NF4)

    def take(leaf):
        if not is_4bit(leaf) or leaf.codes.ndim != 3 or cut:
            return leaf
        stacks.append(leaf.codes)
        return leaf.replace(codes=None)

    def put(layer, number):
        left = iter(stacks)

        def held(leaf):
            if not is_4bit(leaf) or leaf.absmax.ndim != 2:
                return leaf
            if cut:
                return StackedNF4(leaf.replace(codes=None), leaf.codes[None], jnp.int32(0), mesh)
            return StackedNF4(leaf, next(left), number, mesh)

        return jax.tree.map(held, layer, is_leaf=is_4bit)

    return jax.tree.map(take, layers, is_leaf=is_4bit), put


class Tiles(NamedTuple):
    """Sizes of one tile: tokens, inputs and outputs of the matrix."""

    tokens: int
    width: int
    out: int


def tiles(tokens: int, shape: tuple[int, int], block_size: int, dtype, back: bool) -> Tiles | None:
    """The tiles of `x [tokens, in] W^T` (with `back`: of `dy [tokens, out] W`) for a matrix `shape` `(out, in)`, for any number of tokens.

    None if it has none: blocks that do not end with the rows or are no multiple of 64, sides below 128, a summed side without a suitable
    divisor.
    """
    out, width = shape
    if width % block_size or block_size % (2 * SUBLANES_8BIT):
        return None
    outs, widths = SIDES, [side for side in SIDES if side % block_size == 0]
    if back:
        across, along = _dividing(out, outs), _covering(width, widths)
    else:
        across, along = _covering(out, outs), _dividing(width, widths + [width] * (width <= SMALL))
    if across is None or along is None:
        return None
    parts = -(-tokens // (TOKENS_BYTES // jnp.dtype(dtype).itemsize))
    return Tiles(tokens if parts == 1 else -(-tokens // (16 * parts)) * 16, along, across)


def _dividing(size: int, sides) -> int | None:
    return next((side for side in sides if size % side == 0), None)


def _covering(size: int, sides) -> int | None:
    """The tile side with the least cost, counting a partly filled last tile; each tile costs about as much as 32 more columns."""
    return min((side for side in sides if side <= size), key=lambda side: -(-size // side) * (side + 32), default=None)


@functools.partial(jax.jit, static_argnames=("code", "block_size", "tile", "back", "interpret"))
def product(
    x: jax.Array, codes: jax.Array, scales: jax.Array, layer: jax.Array, *,
    code: tuple[float, ...], block_size: int, tile: Tiles, back: bool = False, interpret: bool = False,
) -> jax.Array:
    """`x [M, in] W^T -> [M, out]`, or `x [M, out] W -> [M, in]` with `back`, in x's dtype.

    codes   uint8 `[L, in / 2, out]`, as packed by `NF4`; matrix `layer` (int32 `[]`) is used without copying a slice
    scales  float32 `[in / block_size, out]`, absmax of that matrix
    code    the 16 values
    """
    tokens, (width, out) = x.shape[0], (2 * codes.shape[1], codes.shape[2])
    made, summed = ((width, tile.width), (out, tile.out)) if back else ((out, tile.out), (width, tile.width))
    grid = pl.cdiv(tokens, tile.tokens), pl.cdiv(*made), summed[0] // summed[1]
    at = (lambda made, summed: (made, summed)) if back else (lambda made, summed: (summed, made))
    kernel = functools.partial(_kernel, code=code, block_size=block_size, back=back)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[
                pl.BlockSpec((tile.tokens, summed[1]), lambda m, i, k, layer: (m, k)),
                pl.BlockSpec((None, tile.width // 2, tile.out), lambda m, i, k, layer: (layer[0], *at(i, k))),
                pl.BlockSpec((width // block_size, tile.out), lambda m, i, k, layer: (0, at(i, k)[1])),
            ],
            out_specs=pl.BlockSpec((tile.tokens, made[1]), lambda m, i, k, layer: (m, i)),
            scratch_shapes=[pltpu.VMEM((tile.width, tile.out), x.dtype), pltpu.VMEM((tile.tokens, made[1]), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((tokens, made[0]), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM),
        interpret=interpret,
    )(layer.reshape(1), x, codes, scales)


def _kernel(_, x_ref, codes_ref, scales_ref, y_ref, w_ref, sum_ref, *, code, block_size, back):
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    unpack_tile(codes_ref, scales_ref, w_ref, pl.program_id(1) if back else step, code, block_size)
    summed = (((1,), (1 if back else 0,)), ((), ()))
    sum_ref[...] += jax.lax.dot_general(x_ref[...], w_ref[...], summed, preferred_element_type=jnp.float32)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        y_ref[...] = sum_ref[...].astype(y_ref.dtype)


def unpack_tile(codes_ref, scales_ref, w_ref, tile, code: tuple[float, ...], block_size: int) -> None:
    """Fill `w_ref [width, out]`, the inputs from `tile * width` on, from `codes_ref [width / 2, out]` and the scales of all inputs."""
    half, blocks = block_size // 2, w_ref.shape[0] // block_size
    for block in range(blocks):
        codes = codes_ref[block * half : (block + 1) * half, :].astype(jnp.int32)
        # a partly filled last tile of the backward product reads beyond the scales, and its result there is discarded
        row = jnp.minimum(tile * blocks + block, scales_ref.shape[0] - 1)
        scale = scales_ref[pl.ds(row, 1), :]
        for start, part in ((0, codes & 0xF), (half, codes >> 4)):
            at = block * block_size + start
            w_ref[at : at + half, :] = (_look_up(part, code) * scale).astype(w_ref.dtype)


def _look_up(codes: jax.Array, code: tuple[float, ...]) -> jax.Array:
    """`code[codes]`: one permutation of lanes per register, from a register that holds the 16 values repeatedly."""
    rows, out = codes.shape
    lane = jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 1) % 16
    table = jnp.zeros((rows, LANES), jnp.float32)
    for number, value in enumerate(code):
        table = jnp.where(lane == number, jnp.float32(value), table)
    parts = [jnp.take_along_axis(table, codes[:, at : at + LANES], axis=1) for at in range(0, out, LANES)]
    return jnp.concatenate(parts, axis=1)
