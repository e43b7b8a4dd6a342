"""The type of each tensor in a GGUF file: llama.cpp's mixtures, by the part of the model and the layer."""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from jaxtune.convert import gguf_layout
from jaxtune.model.families import ModelConfig
from jaxtune.model.row import Row
from jaxtune.model.spec import spec

_T, _F = GGMLQuantizationType, LlamaFileType
# number of a layer and number of layers -> the type there; None: as for any matrix
Rule = Callable[[int, int], GGMLQuantizationType | None]


class Mixture(NamedTuple):
    """A type that users can choose.

    matrix  the type of matrices
    head    of the vocabulary head, or of the embedding if tied
    table   of an embedding beside a separate head
    file    llama.cpp's number for such a file
    value, down, out  other types of attention's values, of the feed-forward part's last matrix, of attention's last one
    grouped, eight    other types of values shared by four or more heads; of attention's last matrix in models with eight experts
    """

    matrix: GGMLQuantizationType
    head: GGMLQuantizationType
    table: GGMLQuantizationType
    file: LlamaFileType
    value: Rule = lambda i, n: None
    down: Rule = lambda i, n: None
    out: GGMLQuantizationType | None = None
    grouped: GGMLQuantizationType | None = None
    eight: GGMLQuantizationType | None = None


def _plain(kind: GGMLQuantizationType, table: GGMLQuantizationType, file: LlamaFileType) -> Mixture:
    return Mixture(kind, table, table, file)


def _k(kind: GGMLQuantizationType, file: LlamaFileType, **others) -> Mixture:
    return Mixture(kind, _T.Q6_K, kind, file, **others)


def _more(i: int, n: int) -> GGMLQuantizationType | None:
    """The first and the last eighth of the layers, and a third of those between."""
    return _T.Q6_K if i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2 else None


TYPES = {
    "f32": _plain(_T.F32, _T.F32, _F.ALL_F32),
    "f16": _plain(_T.F16, _T.F16, _F.MOSTLY_F16),
    "bf16": _plain(_T.BF16, _T.BF16, _F.MOSTLY_BF16),
    "q8_0": _plain(_T.Q8_0, _T.Q8_0, _F.MOSTLY_Q8_0),
    "q6_k": _k(_T.Q6_K, _F.MOSTLY_Q6_K),
    "q5_k_m": _k(_T.Q5_K, _F.MOSTLY_Q5_K_M, value=_more, down=_more),
    "q5_k_s": _k(_T.Q5_K, _F.MOSTLY_Q5_K_S),
    "q5_0": _plain(_T.Q5_0, _T.Q8_0, _F.MOSTLY_Q5_0),
    "q5_1": _plain(_T.Q5_1, _T.Q8_0, _F.MOSTLY_Q5_1),
    "q4_k_m": _k(_T.Q4_K, _F.MOSTLY_Q4_K_M, value=_more, down=_more, eight=_T.Q5_K),
    "q4_k_s": _k(
        _T.Q4_K, _F.MOSTLY_Q4_K_S, eight=_T.Q5_K,
        value=lambda i, n: _T.Q5_K if i < 4 else None, down=lambda i, n: _T.Q5_K if i < n // 8 else None,
    ),
    "q4_0": _plain(_T.Q4_0, _T.Q8_0, _F.MOSTLY_Q4_0),
    "q4_1": _plain(_T.Q4_1, _T.Q8_0, _F.MOSTLY_Q4_1),
    "q3_k_l": _k(_T.Q3_K, _F.MOSTLY_Q3_K_L, value=lambda i, n: _T.Q5_K, down=lambda i, n: _T.Q5_K, out=_T.Q5_K),
    "q3_k_m": _k(
        _T.Q3_K, _F.MOSTLY_Q3_K_M, out=_T.Q4_K, eight=_T.Q5_K,
        value=lambda i, n: _T.Q5_K if i < 2 else _T.Q4_K, down=lambda i, n: _T.Q5_K if i < n // 16 else _T.Q4_K,
    ),
    "q3_k_s": _k(_T.Q3_K, _F.MOSTLY_Q3_K_S, eight=_T.Q5_K),
    "q2_k": _k(
        _T.Q2_K, _F.MOSTLY_Q2_K, value=lambda i, n: _T.Q3_K, down=lambda i, n: _T.Q3_K, out=_T.Q3_K, grouped=_T.Q4_K, eight=_T.Q5_K
    ),
}  # fmt: skip
# for rows that are not a multiple of 256
_SMALLER = {_T.Q2_K: _T.Q4_0, _T.Q3_K: _T.Q4_0, _T.Q4_K: _T.Q5_0, _T.Q5_K: _T.Q5_1, _T.Q6_K: _T.Q8_0}
_FLOAT32 = ("position_embd", "blk.{layer}.ffn_gate_inp", "blk.{layer}.ssm_conv1d", "blk.{layer}.shortconv.conv")
_VALUES = re.compile(r"attn_(v|qkv|kv_b)\.weight")


class Types:
    """`kind(name, shape, row)` is the type of a tensor in a file of `TYPES[type]`."""

    def __init__(self, config: ModelConfig, architecture: str, type: str):
        self.config, self.architecture, self.mixture = config, architecture, TYPES[type]
        rows = [(path, row, index) for path, row in spec(config).items() for index in np.ndindex(len(row.layers))]
        found = (_layer(name) for place in rows for name in gguf_layout.names(config, *place) if _VALUES.search(name))
        self.values = {layer: number for number, layer in enumerate(sorted(found))}

    def kind(self, name: str, shape: tuple[int, ...], row: Row) -> GGMLQuantizationType:
        """float32 for small tensors and what is not a matrix; otherwise the mixture's type, or one that fits the row length."""
        if len(shape) == 1 or row.init != "normal" or row.gguf.startswith(_FLOAT32):
            return _T.F32
        kind = self._mixed(name, row)
        for _ in range(2):
            if shape[-1] % GGML_QUANT_SIZES[kind][0]:
                kind = _SMALLER.get(kind, _T.F16)
        return kind

    def _mixed(self, name: str, row: Row) -> GGMLQuantizationType:
        c, m, layers = self.config, self.mixture, self.config.num_layers
        eight = c.moe is not None and c.moe.num_experts == 8 and m.table in _SMALLER
        if "vocab" in row.axes:
            return m.table if name == "token_embd.weight" and not c.tie_word_embeddings else m.head
        if eight and (_VALUES.search(name) or "attn_k.weight" in name):
            return _T.Q8_0
        if _VALUES.search(name):
            found = m.value(self.values[_layer(name)], len(self.values)) or m.matrix
            found = m.grouped if m.grouped and c.num_heads >= 4 * c.num_kv_heads else found
            return _T.Q5_K if self._is_70b and found in (_T.Q3_K, _T.Q4_K) else found
        if "ffn_down" in name:
            return m.down(_layer(name), layers) or m.matrix
        if "attn_output.weight" in name:
            return (m.eight if eight else m.out) or m.matrix
        return m.matrix

    @property
    def _is_70b(self) -> bool:
        """Llama's and Qwen 2's largest models, whose values are an eighth of their queries, and get more bits."""
        c = self.config
        return self.architecture in ("llama", "qwen2") and c.num_layers == 80 and c.num_heads != c.num_kv_heads


def _layer(name: str) -> int:
    return int(name.split(".")[1])
