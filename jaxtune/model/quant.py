"""Quantised matrices: 4-bit NF4 / FP4 (QLoRA, arXiv 2305.14314) and int8 (LLM.int8, arXiv 2208.07339), as in bitsandbytes.

Blocks run over the flattened matrix, as in bitsandbytes, so that its checkpoints load without being quantised again. Everything here is for
one matrix `[out, in]`; stacks of layers have a leading axis on every field.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxtune.errors import ModelError
from jaxtune.model import ragged
from jaxtune.model.weight import Weight

NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_POSITIVE = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)  # in code order, which is not sorted
FP4_CODE = _FP4_POSITIVE + tuple(-v if v else 0.0 for v in _FP4_POSITIVE)
CODES = {"nf4": NF4_CODE, "fp4": FP4_CODE}
NESTED_BLOCK = 256  # bitsandbytes' block size for the absmax of the absmax
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@functools.cache
def dynamic_map() -> np.ndarray:
    """bitsandbytes' signed 8-bit dynamic map, 256 sorted float32 values (embedded, because its own arithmetic depends on the CPU)."""
    positive = np.asarray(_DYNAMIC_POSITIVE, np.float32)
    return np.concatenate([-positive[:-1][::-1], np.zeros(1, np.float32), positive])


class Packed(Weight):
    """A frozen matrix that is dequantised for each product, forward and backward.

    XLA would rather keep the dense matrix: it computes equal things once, ahead of time, and concatenates matrices that multiply the same
    x. So each product has its matrix and its x behind its own barrier (`dense_beside`). The codes stay outside: behind a barrier they would
    be copied out of the stack of layers.
    """

    def apply(self, x: jax.Array) -> jax.Array:
        """`x W^T`; the backward pass dequantises the matrix again."""
        return _packed_matmul(self, x)

    def grouped(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """Each row times its expert's matrix; the backward pass dequantises them again."""
        return _packed_grouped(self, x, sizes)

    def product(self, x: jax.Array, back: bool = False) -> jax.Array:
        """`x W^T`, or with `back` `x W`, in x's dtype."""
        dense_w, x = self.dense_beside(x)
        return jax.lax.dot_general(x, dense_w, (((x.ndim - 1,), (0 if back else 1,)), ((), ())))

    def dense_beside(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The matrix in x's dtype, and x, both behind one barrier."""
        raise NotImplementedError


class NF4(Packed):
    """A 4-bit matrix: `W = code[codes] * absmax`, one absmax for every `block_size` elements of the flattened matrix.

    codes          uint8 `[cols / 2, rows]`, two codes per byte: in each block the first half of its elements in the low nibbles, the second
                   in the high ones. `(rows, cols)` is `(out, in)` if blocks end with the rows, and otherwise `(1, out * in, padded to whole
                   blocks)`.
    absmax         float32 `[cols / block_size, rows]`, or uint8 codes of `dynamic_map` if there is a `nested_absmax`
    nested_absmax  float32 `[ceil(blocks / 256)]` and
    nested_offset  float32 `[]`: double quantisation, `absmax = dynamic_map[absmax] * nested_absmax + nested_offset`, with one nested_absmax
                   per 256 blocks of the flattened matrix

    The content of a block is bitsandbytes'; its layout is not: in this order a TPU's tiles are dequantised in place, and no backend
    interleaves (docs/decisions.md; convert/bitsandbytes.py knows the order in files).
    """

    codes: jax.Array
    absmax: jax.Array
    nested_absmax: jax.Array | None = None
    nested_offset: jax.Array | None = None
    shape: tuple[int, int] = struct.field(pytree_node=False, default=(0, 0))
    block_size: int = struct.field(pytree_node=False, default=64)
    kind: str = struct.field(pytree_node=False, default="nf4")

    def scales(self) -> jax.Array:
        """absmax per block, float32 `[blocks per row, rows]`."""
        if self.nested_absmax is None or self.nested_offset is None:
            return self.absmax
        blocks, rows = self.absmax.shape
        nested = jnp.repeat(self.nested_absmax, NESTED_BLOCK)[: blocks * rows].reshape(rows, blocks).T
        return jnp.asarray(dynamic_map())[self.absmax] * nested + self.nested_offset

    def dense(self, dtype, code: jax.Array | None = None) -> jax.Array:
        """`[out, in]`; products in float32, then cast, as in bitsandbytes. `code`: the 16 values, if they come from elsewhere."""
        code = jnp.asarray(CODES[self.kind], jnp.float32) if code is None else code
        values = _look_up(unpack(self.codes, self.block_size), code, self.kind)
        blocks = values.reshape(-1, self.block_size, values.shape[-1]) * self.scales()[:, None]
        turned = blocks.reshape(values.shape).astype(dtype)
        out, width = self.shape
        return turned.T if turned.shape == (width, out) else turned.reshape(-1)[: out * width].reshape(out, width)

    def dense_beside(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The matrix in x's dtype, and x, both behind one barrier (see `Packed`)."""
        code = jnp.asarray(CODES[self.kind], jnp.float32)
        code, absmax, offset, x = jax.lax.optimization_barrier((code, self.absmax, self.nested_offset, x))
        return self.replace(absmax=absmax, nested_offset=offset).dense(x.dtype, code), x


def pack(nibbles, block_size: int):
    """Codes `[..., rows, cols]` of 0 to 15, two per byte in the order of `NF4.codes`, `[..., cols / 2, rows]`; numpy or jax arrays."""
    *lead, rows, cols = nibbles.shape
    halves = nibbles.reshape(*lead, rows, cols // block_size, 2, block_size // 2)
    return (halves[..., 0, :] | halves[..., 1, :] << 4).reshape(*lead, rows, cols // 2).swapaxes(-1, -2)


def unpack(codes: jax.Array, block_size: int) -> jax.Array:
    """Codes 0 to 15, one per byte, `[..., cols, rows]`, from `NF4.codes`."""
    if not jnp.issubdtype(codes.dtype, jnp.integer):  # when it linearises a product twice, jax 0.10 needs another residual for them
        raise ModelError("no second derivative is taken through a 4-bit matrix; load the model with quantization=None or 'int8'")
    *lead, half, rows = codes.shape
    blocks = codes.reshape(*lead, -1, block_size // 2, rows)
    return jnp.concatenate([blocks & 0xF, blocks >> 4], axis=-2).reshape(*lead, 2 * half, rows)


def _look_up(codes: jax.Array, code: jax.Array, kind: str) -> jax.Array:
    """`code[codes]`. A TPU has no fast gather and selects from the constants; other backends would keep those at the matrix's size."""

    def select(codes, code):
        return _select(codes, CODES[kind])

    return jax.lax.platform_dependent(codes, code, tpu=select, default=lambda codes, code: code[codes])


def _select(codes: jax.Array, values) -> jax.Array:
    """`values[codes]` by a tree of 15 selects."""
    level = [jnp.float32(value) for value in values]
    for bit in range(4):
        odd = codes >> bit & 1 != 0
        level = [jnp.where(odd, high, low) for low, high in zip(level[::2], level[1::2], strict=True)]
    return level[0]


class Int8(Packed):
    """`W = codes * absmax / 127`, one absmax per row (LLM.int8's weights; activations keep their own dtype)."""

    codes: jax.Array  # int8 [out, in]
    absmax: jax.Array  # float32 [out]

    def dense(self, dtype) -> jax.Array:
        """`[out, in]`; multiplied in bitsandbytes' order, which decides the last bit."""
        return (self.codes.astype(jnp.float32) * self.absmax[:, None] * jnp.float32(1 / 127)).astype(dtype)

    def dense_beside(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The matrix in x's dtype, and x, both behind one barrier (see `Packed`)."""
        absmax, x = jax.lax.optimization_barrier((self.absmax, x))
        return self.replace(absmax=absmax).dense(x.dtype), x


@jax.custom_vjp
def _packed_matmul(w, x):
    return w.product(x)


def _packed_matmul_fwd(w, x):
    return _packed_matmul(w, x), w


def _packed_matmul_bwd(w, dy):
    return None, w.product(dy, back=True)


_packed_matmul.defvjp(_packed_matmul_fwd, _packed_matmul_bwd)


@jax.custom_vjp
def _packed_grouped(w, x, sizes):
    return ragged.product(w, x, sizes, lambda w: w.dense(x.dtype))


def _packed_grouped_fwd(w, x, sizes):
    return _packed_grouped(w, x, sizes), (w, sizes)


def _packed_grouped_bwd(residuals, dy):
    (w, sizes), dy = jax.lax.optimization_barrier((residuals, dy))  # otherwise the forward pass's dense experts would be kept for this
    return None, ragged.product(w, dy, sizes, lambda w: w.dense(dy.dtype), back=True), None


_packed_grouped.defvjp(_packed_grouped_fwd, _packed_grouped_bwd)


# ---- packing ----


def quantize(w, kind: str, block_size: int = 64) -> Weight:
    """One dense matrix `[out, in]` quantised as `kind`: "nf4", "nf4-dq", "fp4", "fp4-dq" or "int8" (the keys of `QUANTIZERS`)."""
    return QUANTIZERS[kind](w, block_size)


def abstract(kind: str, shape: tuple[int, int], block_size: int = 64) -> Weight:
    """The leaf that `quantize` makes of a matrix of this shape, as `jax.ShapeDtypeStruct`s."""
    if kind == "int8":
        return Int8(jax.ShapeDtypeStruct(shape, jnp.int8), jax.ShapeDtypeStruct(shape[:1], jnp.float32))
    code, _, nested = kind.partition("-")
    codes, absmax = jax.eval_shape(lambda w: _quantize_blocks(w, block_size, code), jax.ShapeDtypeStruct(shape, jnp.float32))
    leaf = NF4(codes, absmax, shape=tuple(shape), block_size=block_size, kind=code)
    if not nested:
        return leaf
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    outer = jax.ShapeDtypeStruct((-(-absmax.size // NESTED_BLOCK),), jnp.float32)
    return leaf.replace(absmax=jax.ShapeDtypeStruct(absmax.shape, jnp.uint8), nested_absmax=outer, nested_offset=scalar)


@functools.partial(jax.jit, static_argnames=("block_size", "kind"))
def _quantize_blocks(w, block_size: int, kind: str):
    """Codes and absmax in `NF4`'s layout, with the arithmetic of bitsandbytes' CPU kernel, including ties."""
    out, width = w.shape
    flat = w.astype(jnp.float32).reshape(-1)
    pad = -flat.size % block_size
    rows = out if width % block_size == 0 else 1
    blocks = jnp.pad(flat, (0, pad)).reshape(rows, -1, block_size)
    absmax = jnp.abs(blocks).max(-1)
    # bitsandbytes divides by max(absmax, 1e-38). XLA treats that number as 0, and 0 / 0 would give a block of zeros another code than 7
    inverse = jnp.where(absmax > 0, 1.0 / absmax, 0.0)
    scaled = jnp.clip(blocks * inverse[..., None], -1.0, 1.0)
    if pad:  # bitsandbytes divides in the last, partial block and multiplies by the reciprocal elsewhere
        last = absmax[0, -1]
        scaled = scaled.at[0, -1].set(jnp.where(last > 0, jnp.clip(blocks[0, -1] / last, -1.0, 1.0), 0.0))
        absmax = absmax.at[0, -1].set(jnp.where(last > 0, last, jnp.float32(1e-38)))
    order = np.argsort(np.asarray(CODES[kind], np.float32), kind="stable")
    values = np.asarray(CODES[kind], np.float32)[order]
    thresholds = (values[1:] + values[:-1]) / np.float32(2)
    rank = sum((scaled > t).astype(jnp.uint8) for t in thresholds)
    codes = (rank if kind == "nf4" else jnp.asarray(order, jnp.uint8)[rank]).reshape(rows, -1)
    return pack(codes, block_size), absmax.T


def _quantize_4bit(w, block_size: int, kind: str, nested: bool) -> NF4:
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block size {block_size} is not one of {BLOCK_SIZES}")
    codes, absmax = _quantize_blocks(jnp.asarray(w), block_size, kind)
    leaf = NF4(codes, absmax, shape=tuple(w.shape), block_size=block_size, kind=kind)
    return nest(leaf) if nested else leaf


def nest(leaf: NF4) -> NF4:
    """Double quantisation of the scales: the nearest value of the dynamic map to `(absmax - mean) / nested_absmax`."""
    absmax = np.asarray(leaf.absmax).T  # in the matrix's order
    offset = np.float32(absmax.mean(dtype=np.float64))
    centred = (absmax - offset).reshape(-1)
    pad = -centred.size % NESTED_BLOCK
    nested = np.abs(np.pad(centred, (0, pad))).reshape(-1, NESTED_BLOCK).max(-1)
    scale = np.repeat(nested, NESTED_BLOCK)[: centred.size]
    scaled = np.divide(centred, scale, out=np.zeros_like(centred), where=scale > 0)
    table = dynamic_map()
    codes = np.searchsorted((table[1:] + table[:-1]) / 2, scaled).astype(np.uint8)
    absmax = jnp.asarray(codes.reshape(absmax.shape).T)
    return leaf.replace(absmax=absmax, nested_absmax=jnp.asarray(nested), nested_offset=jnp.asarray(offset))


def _quantize_int8(w, block_size: int = 0) -> Int8:
    """LLM.int8's weights: first rounded to float16, then `round(w * (127 / absmax))` per row, as in bitsandbytes."""
    w = np.asarray(w).astype(np.float16).astype(np.float32)
    absmax = np.abs(w).max(-1)
    inverse = np.divide(np.float32(1), absmax, out=np.zeros_like(absmax), where=absmax > 0)
    codes = np.rint(w * (np.float32(127) * inverse)[:, None]).astype(np.int8)
    return Int8(jnp.asarray(codes), jnp.asarray(absmax))


QUANTIZERS = {
    "nf4": functools.partial(_quantize_4bit, kind="nf4", nested=False),
    "nf4-dq": functools.partial(_quantize_4bit, kind="nf4", nested=True),
    "fp4": functools.partial(_quantize_4bit, kind="fp4", nested=False),
    "fp4-dq": functools.partial(_quantize_4bit, kind="fp4", nested=True),
    "int8": _quantize_int8,
}

_DYNAMIC_POSITIVE = (
    5.500000384017767e-07, 3.250000190746505e-06, 7.749999895168003e-06, 2.1249998098937795e-05, 4.374999844003469e-05,
    6.625000241911039e-05, 8.874999912222847e-05, 0.00015625001105945557, 0.0002687500382307917, 0.0003812500217463821,
    0.000493750034365803, 0.0006062500760890543, 0.0007187500596046448, 0.0008312499849125743, 0.0009437500848434865,
    0.001281249918974936, 0.001843750011175871, 0.002406249986961484, 0.002968749962747097, 0.0035312497057020664,
    0.004093749914318323, 0.0046562496572732925, 0.0052187503315508366, 0.005781250074505806, 0.006343749817460775,
    0.006906250026077032, 0.0074687497690320015, 0.008031249977648258, 0.008593750186264515, 0.009156249463558197,
    0.009718749672174454, 0.011406250298023224, 0.014218750409781933, 0.017031250521540642, 0.019843751564621925,
    0.02265625074505806, 0.025468749925494194, 0.028281250968575478, 0.031093750149011612, 0.033906251192092896,
    0.03671875223517418, 0.039531249552965164, 0.04234374687075615, 0.04515625163912773, 0.047968748956918716, 0.05078125,
    0.053593751043081284, 0.05640624836087227, 0.05921875312924385, 0.062031250447034836, 0.06484375149011612, 0.0676562562584877,
    0.07046874612569809, 0.07328125089406967, 0.07609374821186066, 0.07890625298023224, 0.08171875774860382, 0.08453124761581421,
    0.08734375238418579, 0.09015624970197678, 0.09296875447034836, 0.09578125923871994, 0.09859374910593033, 0.10703125596046448,
    0.12109375, 0.13515624403953552, 0.14921875298023224, 0.16328124701976776, 0.17734375596046448, 0.19140625,
    0.20546874403953552, 0.21953125298023224, 0.23359374701976776, 0.24765624105930328, 0.26171875, 0.2757812738418579,
    0.28984373807907104, 0.30390626192092896, 0.3179687261581421, 0.33203125, 0.3460937440395355, 0.36015623807907104,
    0.37421876192092896, 0.3882812261581421, 0.40234375, 0.4164062440395355, 0.43046873807907104, 0.44453126192092896,
    0.4585937261581421, 0.47265625, 0.48671871423721313, 0.500781238079071, 0.5148437023162842, 0.5289062261581421, 0.54296875,
    0.5570312738418579, 0.5710937976837158, 0.585156261920929, 0.5992187261581421, 0.61328125, 0.6273437738418579,
    0.6414062976837158, 0.655468761920929, 0.6695312261581421, 0.68359375, 0.6976562738418579, 0.7117187976837158,
    0.725781261920929, 0.7398437261581421, 0.75390625, 0.7679687738418579, 0.782031238079071, 0.796093761920929,
    0.8101562261581421, 0.82421875, 0.8382812738418579, 0.852343738079071, 0.866406261920929, 0.8804687261581421, 0.89453125,
    0.9085937738418579, 0.922656238079071, 0.936718761920929, 0.9507812261581421, 0.96484375, 0.9789062738418579,
    0.992968738079071, 1.0,
)  # fmt: skip
