"""K-quants: llama.cpp's blocks of 256 numbers, in groups whose scales (and minima) are integers of a few bits themselves.

    Q2_K, Q4_K, Q5_K    x = d s q - dmin m      s, m of a group; d, dmin (float16) of a block
    Q3_K, Q6_K          x = d s q               q from -2^(bits-1) on

`gguf.dequantize` reads what `quantize` writes. A group's scale and minimum are searched as in llama.cpp: of some twenty step sizes near the
one that spans the group, the one whose weighted least-squares fit has the smallest error (ggml/src/ggml-quants.c, its reference
quantisation without an importance matrix; docs/decisions.md compares the errors of both).
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

_T = GGMLQuantizationType
BLOCK = 256
_CHUNK = 1024  # blocks at a time, so that the working set stays in a core's cache


def quantize(value: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """The blocks of float32 `[..., in]`, a multiple of 256, as uint8 `[..., bytes per row]`; other types by the gguf package."""
    if kind not in KINDS:
        return gguf.quantize(value, kind)
    blocks = value.reshape(-1, BLOCK)
    out = np.empty((len(blocks), GGML_QUANT_SIZES[kind][1]), np.uint8)

    def make(start: int) -> None:
        out[start : start + _CHUNK] = KINDS[kind](np.asarray(blocks[start : start + _CHUNK], np.float32))

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # numpy releases the interpreter lock while computing
        list(pool.map(make, range(0, len(blocks), _CHUNK)))
    return out.reshape(*value.shape[:-1], -1)


# ---- the search: groups are columns, `x_SG` the S numbers of G groups ----


def _affine(x_SG: np.ndarray, weights_SG: np.ndarray, top: int, first: float, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """`scale_G` and `min_G` (not below 0) for which `scale q - min`, with q from 0 to `top`, is nearest to x.

    For a given q, least squares give both; of several, the best has the largest `scale sum(w q x) - min sum(w x)`, the reduction of `sum(w
    x x)` by the fit. A minimum below 0 is set to 0. Each step's q start from the best minimum so far.
    """
    low, high = np.minimum(x_SG.min(0), 0), x_SG.max(0)
    w, weighted_x = weights_SG.sum(0), weights_SG * x_SG
    wx = weighted_x.sum(0)
    scale, minimum = (high - low) / top, -low
    best = (weighted_x * x_SG).sum(0) - (weights_SG * (x_SG - scale * np.rint(_over(x_SG - low, scale)) - low) ** 2).sum(0)
    for step in range(steps + 1):
        q = np.rint((x_SG + minimum) * _over(np.float32(top + first + 0.1 * step), high + minimum)).clip(0, top)
        wq = weights_SG * q
        sum_q, sum_qq, sum_qx = wq.sum(0), (wq * q).sum(0), (weighted_x * q).sum(0)
        spread = w * sum_qq - sum_q * sum_q
        fits = spread > 1e-6 * w * sum_qq  # otherwise all q are equal and the two cannot be separated
        a = _over(w * sum_qx - wx * sum_q, np.where(fits, spread, 0))
        b = _over(sum_q * sum_qx - sum_qq * wx, np.where(fits, spread, 0))
        a, b = np.where(b < 0, _over(sum_qx, sum_qq), a), np.maximum(b, 0)
        gain = a * sum_qx - b * wx
        better = fits & (gain > best)
        scale, minimum, best = np.where(better, a, scale), np.where(better, b, minimum), np.where(better, gain, best)
    return scale, minimum


def _symmetric(x_SG: np.ndarray, half: int) -> np.ndarray:
    """`scale_G`, of either sign, for which `scale q`, with q from -half to half - 1, is nearest to x, weighted by its size."""
    weights_SG = np.abs(x_SG)
    largest = np.take_along_axis(x_SG, weights_SG.argmax(0)[None], 0)[0]
    weighted_x = weights_SG * x_SG
    scale, best = np.zeros_like(largest), np.zeros_like(largest)
    for step in range(-9, 10):
        q = np.rint(x_SG * _over(np.float32(-(half + 0.1 * step)), largest)).clip(-half, half - 1)
        sum_qx, sum_qq = (weighted_x * q).sum(0), (weights_SG * q * q).sum(0)
        a = _over(sum_qx, sum_qq)
        better = a * sum_qx > best
        scale, best = np.where(better, a, scale), np.where(better, a * sum_qx, best)
    return scale


# ---- blocks ----


def _pack(codes: np.ndarray, bits: int, stride: int = 32) -> np.ndarray:
    """`codes [B, N]` below 2^bits, with those `stride` apart in one byte, lowest first: uint8 `[B, N bits / 8]`."""
    apart = codes.astype(np.uint8).reshape(len(codes), -1, 8 // bits, stride)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(apart << shifts, axis=2).reshape(len(codes), -1)


def _half(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float16, as two bytes and as the value they decode to."""
    half = values.astype(np.float16)[:, None]
    return half.view(np.uint8), half.astype(np.float32)


def _over(values: np.ndarray | np.floating, scale: np.ndarray) -> np.ndarray:
    """`values / scale`, 0 where the scale is 0."""
    return np.divide(values, scale, out=np.zeros(np.broadcast_shapes(np.shape(values), scale.shape), np.float32), where=scale != 0)


def _columns(x_BN: np.ndarray, size: int) -> np.ndarray:
    return np.ascontiguousarray(x_BN.reshape(-1, size).T)


def _with_minima(x_BN: np.ndarray, size: int, bits: int, first: float, steps: int, limit: int, weights: Callable) -> tuple:
    """Codes `q_BN`, `s`, `m` `[B, groups]` up to `limit`, and the bytes of d and dmin."""
    columns = _columns(x_BN, size)
    scale, minimum = (found.reshape(len(x_BN), -1) for found in _affine(columns, weights(columns), 2**bits - 1, first, steps))
    found = []
    for values in (scale, minimum):
        largest = values.max(1)
        stored, d = _half(largest / limit)
        codes = np.rint(_over(values, (largest / limit)[:, None].repeat(values.shape[1], 1)))
        found.append((codes.clip(0, limit), stored, d))
    (s, d_bytes, d), (m, dmin_bytes, dmin) = found
    groups = x_BN.reshape(*s.shape, size)
    q = np.rint(_over(groups + (dmin * m)[..., None], np.broadcast_to((d * s)[..., None], groups.shape)))
    return q.clip(0, 2**bits - 1).reshape(x_BN.shape), s.astype(np.uint8), m.astype(np.uint8), d_bytes, dmin_bytes


def _centred(x_BN: np.ndarray, bits: int, limit: int) -> tuple:
    """Codes `q_BN` from 0 on, `s [B, 16]` of -limit to limit - 1, and the bytes of d."""
    half = 2 ** (bits - 1)
    scale = _symmetric(_columns(x_BN, 16), half).reshape(len(x_BN), 16)
    largest = np.take_along_axis(scale, np.abs(scale).argmax(1)[:, None], 1)
    d_bytes, d = _half(-largest[:, 0] / limit)
    s = np.rint(_over(scale, (-largest / limit).repeat(16, 1))).clip(-limit, limit - 1)
    groups = x_BN.reshape(-1, 16, 16)
    q = np.rint(_over(groups, np.broadcast_to((d * s)[..., None], groups.shape))).clip(-half, half - 1)
    return (q + half).astype(np.uint8).reshape(x_BN.shape), s.astype(np.int8), d_bytes


def _by_size(x_SG: np.ndarray) -> np.ndarray:
    """Weights of 4 and 5 bits: the root mean square of the group, and the number's own size."""
    return np.sqrt((x_SG * x_SG).mean(0)) + np.abs(x_SG)


def _six_bits(s: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Eight scales and eight minima of six bits each, in 12 bytes: the upper two bits of the last four are stored in the bytes of the first
    four."""
    upper = [codes[:, :4] | codes[:, 4:] >> 4 << 6 for codes in (s, m)]
    return np.concatenate([*upper, s[:, 4:] & 15 | (m[:, 4:] & 15) << 4], axis=1)


def _q2(x_BN: np.ndarray) -> np.ndarray:
    q, s, m, d, dmin = _with_minima(x_BN, 16, 2, -0.5, 15, 15, np.abs)
    return np.concatenate([s | m << 4, _pack(q, 2), d, dmin], axis=1)


def _q3(x_BN: np.ndarray) -> np.ndarray:
    q, s, d = _centred(x_BN, 3, 32)
    s = (s + 32).astype(np.uint8)
    return np.concatenate([_pack(q >> 2, 1), _pack(q & 3, 2), _pack(s & 15, 4, 8), _pack(s >> 4, 2, 4), d], axis=1)


def _q4(x_BN: np.ndarray) -> np.ndarray:
    q, s, m, d, dmin = _with_minima(x_BN, 32, 4, -1.0, 20, 63, _by_size)
    return np.concatenate([d, dmin, _six_bits(s, m), _pack(q, 4)], axis=1)


def _q5(x_BN: np.ndarray) -> np.ndarray:
    q, s, m, d, dmin = _with_minima(x_BN, 32, 5, -0.5, 15, 63, _by_size)
    q = q.astype(np.uint8)
    return np.concatenate([d, dmin, _six_bits(s, m), _pack(q >> 4, 1), _pack(q & 15, 4)], axis=1)


def _q6(x_BN: np.ndarray) -> np.ndarray:
    q, s, d = _centred(x_BN, 6, 128)
    return np.concatenate([_pack(q & 15, 4, 64), _pack(q >> 4, 2), s.view(np.uint8), d], axis=1)


KINDS = {_T.Q2_K: _q2, _T.Q3_K: _q3, _T.Q4_K: _q4, _T.Q5_K: _q5, _T.Q6_K: _q6}
