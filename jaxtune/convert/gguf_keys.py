"""Descriptions of llama.cpp's architectures, and the settings in their metadata: each a key of the file and a key of config.json."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtune.convert.gguf_file import Metadata
from jaxtune.model.families import ModelConfig

NEEDED = object()


class Key(NamedTuple):
    """One setting: `{architecture}.{gguf}` is `of(config)` when writing (None: not written), and `hf` of config.json when reading.

    `missing` is the meaning of a file without the key; NEEDED: the key is required.
    """

    gguf: str
    hf: str
    of: Callable[[ModelConfig], Any]
    missing: Any = NEEDED


class Architecture(NamedTuple):
    """How llama.cpp treats a `model_type`, according to trials and to its loaders and graphs (src/models).

    name         general.architecture
    keys         in addition to the common ones
    hf           config.json entries of every such model
    read         further config.json entries, from a file's metadata
    check        raises ModelError for anything else that llama.cpp does not support
    eps          config.json's name of the norms' epsilon
    renamed      config.json's own names of the common keys
    activation   the activation it computes, whatever the file says
    biases       which of "out" and "mlp" biases its loader supports
    head         True: the vocabulary head must be a separate matrix, False: it must be the embedding
    shares       head_dim must be hidden_size / num_attention_heads
    period       every period-th layer is full, the others have a window; 0: no windows; None: its keys say which
    limited      it ignores windows, so texts may only be as long as the window
    frequencies  the rope_types whose own frequencies it reads
    truncate     whether YaRN's limits are rounded
    leading      the first layers may lack experts
    every        experts may be in every n-th layer only
    dense        it may lack experts, although its keys count them
    normalize    whether the chosen experts' weights are normalised to sum to one; None: its keys say
    scaled       its keys, or its check, contain the attention scale; otherwise that is head_dim ** -0.5
    """

    name: str
    keys: tuple[Key, ...] = ()
    hf: dict[str, Any] = {}
    read: Callable[[Metadata], dict[str, Any]] = lambda m: {}
    check: Callable[[ModelConfig], None] = lambda c: None
    eps: str = "rms_norm_eps"
    renamed: dict[str, str] = {}
    activation: str = "silu"
    biases: tuple[str, ...] = ()
    head: bool | None = None
    shares: bool = False
    period: int | None = 0
    limited: bool = False
    frequencies: tuple[str, ...] = ()
    truncate: bool = True
    leading: bool = False
    every: bool = False
    dense: bool = False
    normalize: bool | None = None
    scaled: bool = False


# ---- keys ----


def moe(name: str) -> Callable[[ModelConfig], Any]:
    """A field of the mixture of experts; None if there is none."""
    return lambda c: getattr(c.moe, name) if c.moe else None


def experts(number: str, chosen: str = "num_experts_per_tok", inner: str | None = "moe_intermediate_size") -> tuple[Key, ...]:
    """How many experts exist and are chosen, and their width, under config.json's names."""
    keys = (Key("expert_count", number, moe("num_experts")), Key("expert_used_count", chosen, moe("experts_per_token")))
    return (*keys, Key("expert_feed_forward_length", inner, moe("intermediate_size"))) if inner else keys


def window(missing: Any = NEEDED) -> Key:
    """The window length; not written if there are no windows."""
    return Key("attention.sliding_window", "sliding_window", lambda c: max(c.layer_windows, default=0) or None, missing)


COMMON = (
    Key("context_length", "max_position_embeddings", lambda c: c.max_position_embeddings),
    Key("embedding_length", "hidden_size", lambda c: c.hidden_size),
    Key("feed_forward_length", "intermediate_size", lambda c: c.intermediate_size),
    Key("block_count", "num_hidden_layers", lambda c: c.num_layers),
    Key("attention.head_count", "num_attention_heads", lambda c: c.num_heads),
    Key("attention.head_count_kv", "num_key_value_heads", lambda c: c.num_kv_heads, None),
    Key("attention.key_length", "head_dim", lambda c: c.head_dim, None),
)
# read by `gguf_readers.layer_types`
PATTERN = Key("attention.sliding_window_pattern", "", lambda c: [bool(size) for size in c.layer_windows] if any(c.layer_windows) else None)
MULTIPLIERS = (
    Key("attention.scale", "attention_multiplier", lambda c: c.attention_scale),
    Key("embedding_scale", "embedding_multiplier", lambda c: c.embedding_multiplier, 1.0),
    Key("residual_scale", "residual_multiplier", lambda c: c.residual_multiplier, 1.0),
    Key("logit_scale", "logits_scaling", lambda c: c.logits_scaling, 1.0),
)
INNER = Key("expert_feed_forward_length", "", moe("intermediate_size"))  # where it is the same as feed_forward_length
SHARED = Key("expert_shared_feed_forward_length", "shared_expert_intermediate_size", moe("shared_intermediate_size"))
LEADING = Key("leading_dense_block_count", "first_k_dense_replace", lambda c: c.moe.layers[0] if c.moe else None, 0)
LOGIT_SCALE = Key("logit_scale", "logit_scale", lambda c: 1 / c.logits_scaling)


def state(conv_kernel: str, state_size: str, group_count: str, time_step_rank: str, inner_size: str = "") -> tuple[Key, ...]:
    """The sizes of Mamba-2; the names are config.json's."""
    return (
        Key("ssm.conv_kernel", conv_kernel, lambda c: c.mamba and c.mamba.kernel),
        Key("ssm.state_size", state_size, lambda c: c.mamba and c.mamba.state_dim),
        Key("ssm.group_count", group_count, lambda c: c.mamba and c.mamba.groups),
        Key("ssm.time_step_rank", time_step_rank, lambda c: c.mamba and c.mamba.heads),
        Key("ssm.inner_size", inner_size, lambda c: c.mamba and c.mamba.width),
    )


def _groups(c: ModelConfig) -> tuple[int | None, int | None]:
    """The number of expert groups, and how many a token uses; not written if all are used."""
    return c.moe.groups if c.moe and c.moe.groups[0] > c.moe.groups[1] else (None, None)


ROUTING = (
    Key("expert_weights_scale", "routed_scaling_factor", moe("scale"), 1.0),
    Key("expert_weights_norm", "norm_topk_prob", moe("normalize"), False),
    Key("expert_gating_func", "", lambda c: 2 if c.moe and c.moe.sigmoid else 1),
    Key("expert_group_count", "n_group", lambda c: _groups(c)[0], 1),
    Key("expert_group_used_count", "topk_group", lambda c: _groups(c)[1], 1),
)


def _kv_heads(c: ModelConfig) -> list[int] | None:
    """Per layer, 0 without attention; None if all layers have it."""
    if len(c.attending) == c.num_layers:
        return None
    return [c.num_kv_heads if layer in c.attending else 0 for layer in range(c.num_layers)]


RECURRENT = Key("attention.head_count_kv", "num_key_value_heads", lambda c: _kv_heads(c) or c.num_kv_heads)
