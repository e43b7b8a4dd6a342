"""llama.cpp's tensor layout where it differs from Hugging Face's: other names, another order of rows, two tensors instead of one."""

import numpy as np

from jaxtune.model.families import ModelConfig
from jaxtune.model.row import Row

# If llama.cpp rotates neighbouring pairs of dimensions and Hugging Face halves of a head, files have the rows of q and k interleaved.
INTERLEAVED = ("arcee", "granite", "granitemoe", "granitemoehybrid", "granitemoeshared", "internlm3", "llama", "ministral", "ministral3",
               "mistral", "mixtral", "olmo", "smollm3")  # fmt: skip
# one Hugging Face tensor that becomes two
_DIVIDED = {
    "kv_b": ("attn_k_b", "attn_v_b"), "shared_gate_up": ("ffn_gate_shexp", "ffn_up_shexp"), "in_qkvz": ("attn_qkv", "attn_gate"),
    "gate_up": ("ffn_gate", "ffn_up"),
}  # fmt: skip


def _is_divided(config: ModelConfig, name: str) -> bool:
    return name in _DIVIDED and (name != "gate_up" or config.model_type == "granitemoehybrid")


def names(config: ModelConfig, path: str, row: Row, index: tuple[int, ...]) -> tuple[str, ...]:
    """The names of a row's tensors in a GGUF file, at `index` (starting with a layer of its stack, if it has one)."""
    if path == "norm" and config.convolution:
        return ("token_embd_norm.weight",)
    templates = (row.gguf,)
    if _is_divided(config, _name(path)):
        templates = tuple(f"blk.{{layer}}.{name}.weight" for name in _DIVIDED[_name(path)])
    return tuple(template.format(layer=row.layers[index[0]] if index else None) for template in templates)


def number_key(row: Row) -> str | None:
    """The metadata key for a row stored as one number per layer; None if it is a tensor."""
    activation = "blk.{layer}.ffn_act."
    return row.gguf.replace(activation, "xielu.") if row.gguf.startswith(activation) else None


def to_gguf(config: ModelConfig, path: str, row: Row, value: np.ndarray) -> tuple[np.ndarray, ...]:
    """A row's tensor in Hugging Face's layout as the tensors of `names`."""
    name, one = _name(path), value.dtype.type(1)
    if name == "kv_b":
        heads = value.reshape(config.num_heads, -1, value.shape[-1])
        still = _still(config)
        return heads[:, :still].swapaxes(1, 2), heads[:, still:]
    if _is_divided(config, name):
        return tuple(value[rows] for rows in _divided_rows(config, name, len(value)))
    if name == "a_log":
        value = -np.exp(value)
    if (by := _multiplier(config, name)) is not None:
        value = (value * by).astype(value.dtype)
    value = value + one if _is_offset(config, name, row) else value.T if row.transposed else value
    order = _order(config, name, value.shape)
    value = value if order is None else np.take(value, order[1], order[0])
    return (value.reshape(_flat(config, path, row, value.shape)),)


def to_hf(config: ModelConfig, path: str, row: Row, values: tuple[np.ndarray, ...]) -> np.ndarray:
    """The inverse of `to_gguf`, except for omitted axes of size one."""
    name, value = _name(path), values[0]
    if name == "kv_b" and len(values) == 2:
        heads = np.concatenate([value.swapaxes(1, 2), values[1]], axis=1)
        return heads.reshape(-1, heads.shape[-1])
    if len(values) == 2:
        return np.concatenate(values)[np.argsort(np.concatenate(_divided_rows(config, name, sum(map(len, values)))))]
    if (order := _order(config, name, value.shape)) is not None:
        value = np.take(value, np.argsort(order[1]), order[0])
    if name == "a_log":
        return np.log(-value)
    return value - value.dtype.type(1) if _is_offset(config, name, row) else value.T if row.transposed else value


def pairs(config: ModelConfig, path: str, row: Row, a: np.ndarray, b: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """A LoRA pair, `b a` of shape `[out, in]`, as the pairs of the tensors of `names`; an embedding's is looked up by its tokens."""
    if (by := _multiplier(config, _name(path))) is not None:
        b = b * by
    if path == "embed":
        return ((b, a.T),)
    if _is_divided(config, _name(path)):
        return tuple((a, b[rows]) for rows in _divided_rows(config, _name(path), len(b)))
    if (order := _order(config, _name(path), (b.shape[-2], a.shape[-1]))) is not None:
        a, b = (a, np.take(b, order[1], 0)) if order[0] == 0 else (np.take(a, order[1], -1), b)
    return ((a, b),)


def shapes(config: ModelConfig, path: str, row: Row) -> list[tuple[int, ...]]:
    """The shapes of the tensors of `names`."""
    shape = row.shape[1:] if row.layers else row.shape
    if _name(path) == "kv_b":
        H, still, rank = config.num_heads, _still(config), shape[1]
        return [(H, rank, still), (H, shape[0] // H - still, rank)]
    if _is_divided(config, _name(path)):
        return [(len(rows), shape[1]) for rows in _divided_rows(config, _name(path), shape[0])]
    return [_flat(config, path, row, shape)]


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _still(config: ModelConfig) -> int:
    assert config.latent is not None
    return config.latent.still


def _flat(config: ModelConfig, path: str, row: Row, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Axes of size one are omitted: a matrix of one row becomes a vector. Mamba-2's decay and skip are columns, and its norm has a row per
    group."""
    if config.mamba and _name(path) in ("a_log", "skip"):
        return (*shape, 1)
    if config.mamba and _name(path) == "state_norm":
        return config.mamba.groups, shape[0] // config.mamba.groups
    return shape if row.is_experts or row.is_apart else tuple(size for size in shape if size != 1) or (1,)


def _divided_rows(config: ModelConfig, name: str, count: int) -> list[np.ndarray]:
    """The rows in each of the two tensors that a tensor becomes: halves; for `in_qkvz`, which is ordered by key head, queries, keys and
    values, and the gates."""
    if name != "in_qkvz":
        return np.split(np.arange(count), 2)
    assert config.delta is not None
    d = config.delta
    value = d.value_heads // d.key_heads * d.value_dim
    parts = np.split(np.arange(count).reshape(d.key_heads, -1), [d.key_dim, 2 * d.key_dim, 2 * d.key_dim + value], axis=1)
    return [np.concatenate([part.ravel() for part in parts[:3]]), parts[3].ravel()]


def _multiplier(config: ModelConfig, name: str) -> np.ndarray | None:
    """What a matrix of Falcon H1 is multiplied by in llama.cpp's files, row by row; None: nothing."""
    if config.model_type != "falcon_h1" or config.mamba is None:
        return None
    by, m = config.multipliers, config.mamba
    of_group = m.groups * m.state_dim
    numbers = {
        "q": by.attention_in, "k": by.attention_in * by.key, "v": by.attention_in, "o": by.attention_out, "gate": by.gate, "down": by.down,
        "out": by.mamba_out, "embed": config.embedding_multiplier, "head": 1 / config.logits_scaling,
        "in_gudt": by.mamba_in * np.repeat(by.mamba, [m.width, m.width, of_group, of_group, m.heads])[:, None],
    }  # fmt: skip
    return np.asarray(numbers[name], np.float32) if name in numbers else None


def _is_offset(config: ModelConfig, name: str, row: Row) -> bool:
    """Whether the row is the w of a norm with `1 + w`; llama.cpp's files store the sum."""
    return config.norm.endswith("_offset") and name.endswith("norm") and row.init == "zeros"


def _order(config: ModelConfig, name: str, shape: tuple[int, ...]) -> tuple[int, np.ndarray] | None:
    """The order of llama.cpp's rows (or columns): the axis, and where along Hugging Face's each comes from; None: the same order."""
    part, rows = name.removesuffix("_bias"), np.arange(shape[0])
    if part in ("q", "k") and config.model_type in INTERLEAVED:
        heads = config.num_heads if part == "q" else config.num_kv_heads
        return 0, rows.reshape(heads, 2, -1).swapaxes(1, 2).ravel()
    if part == "qkv_by_head":
        by_head = rows.reshape(config.num_kv_heads, config.num_heads // config.num_kv_heads + 2, -1)
        return 0, np.concatenate([by_head[:, :-2].ravel(), by_head[:, -2].ravel(), by_head[:, -1].ravel()])
    return _linear_order(config, name, shape) if config.delta and config.model_type != "qwen3_next" else None


def _linear_order(config: ModelConfig, name: str, shape: tuple[int, ...]) -> tuple[int, np.ndarray] | None:
    """Linear attention: llama.cpp interleaves value heads over the key heads; Hugging Face's files keep them beside theirs."""
    assert config.delta is not None
    d, axis = config.delta, -1 if name == "out" else 0
    sizes = dict.fromkeys(("in_z", "in_qkv", "conv", "out"), d.value_dim) | dict.fromkeys(("in_a", "in_b", "a_log", "dt_bias"), 1)
    if name not in sizes:
        return None
    first = shape[axis] - d.value_heads * sizes[name]  # rows of queries and keys, which precede those of values
    values = np.arange(first, shape[axis]).reshape(d.key_heads, d.value_heads // d.key_heads, -1).swapaxes(0, 1).ravel()
    return axis, np.concatenate([np.arange(first), values])
