"""Parameter-efficient methods: what is trained, and how it is combined with the frozen tree.

`METHODS` has one row per method. `compose(base, trainable)` is the only way to use a trained part; `merge` turns it into plain arrays.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from jaxtune.config import LoraConfig
from jaxtune.errors import ConfigError, check_argument
from jaxtune.model.weight import dense, is_weight
from jaxtune.peft import adalora, biases, ia3, loha, lokr, lora, lora_init, norms, oft, partial, prompts, vera
from jaxtune.peft.adapter import Adapter, Kind
from jaxtune.peft.combine import Mixed, compose_rows
from jaxtune.tree import flatten, unflatten


class Method(NamedTuple):
    """How the method adapts (None: it trains the parameters themselves), and its default quantisation of the base."""

    kind: Kind | None
    quantization: str | None = None

    def init(self, key: jax.Array, model_config: Any, base: dict, config: Any, tokenizer: Any = None) -> Any:
        """The initial trainable part of a run with this config."""
        if self.kind is None:
            return _init_full(model_config, base, config)
        return self.kind.init(key, model_config, base, getattr(config, self.kind.config.group), tokenizer)

    def around(self, chain: Any, config: Any, total_steps: int) -> Any:
        """The run's optimiser, including what the method does after an update."""
        return chain if self.kind is None else self.kind.around(chain, getattr(config, self.kind.config.group), total_steps)


def param_dtypes(config: Any, model_config: Any) -> str | Callable[[str], str]:
    """The dtypes for reading a run's parameters: `param_dtype` for what full tuning trains, `dtype` for what is frozen."""
    if config.method != "full" or not config.trainable_parameters:
        return config.param_dtype if config.method == "full" else config.dtype
    return partial.dtypes(model_config, config.trainable_parameters, config.param_dtype, config.dtype)


def _init_full(model_config: Any, base: dict, config: Any) -> dict:
    if any(is_weight(leaf) for leaf in flatten(base).values()):
        raise ConfigError(
            f"method full trains the weights themselves, and those of {config.model} are packed; write method: qlora, or give the model "
            "that they were packed from"
        )
    return partial.chosen(model_config, base, config.trainable_parameters, config.param_dtype) if config.trainable_parameters else base


METHODS = {
    "full": Method(None),  # every parameter
    "lora": Method(lora.KIND),  # low-rank pairs beside frozen matrices
    "qlora": Method(lora.KIND, quantization="nf4-dq"),  # LoRA over a 4-bit base
    "ia3": Method(ia3.KIND),  # one factor for each input or output of a matrix
    "loha": Method(loha.KIND),  # the element-wise product of two low-rank matrices
    "lokr": Method(lokr.KIND),  # a Kronecker product
    "vera": Method(vera.KIND),  # two vectors around one random pair shared by all matrices
    "adalora": Method(adalora.KIND),  # singular values, the least important of which are removed
    "oft": Method(oft.KIND),  # inputs rotated block by block
    "boft": Method(oft.BOFT),  # inputs rotated block by block, outputs scaled
    "bitfit": Method(biases.KIND),  # offsets of biases
    "ln_tuning": Method(norms.KIND),  # norms
    "prompt_tuning": Method(prompts.PROMPT),  # embeddings of virtual tokens before each document
    "p_tuning": Method(prompts.ENCODER),  # such embeddings, produced by a small network
    "prefix_tuning": Method(prompts.PREFIX),  # keys and values of virtual tokens in every layer
}
KINDS: dict[type, Kind] = {method.kind.config: method.kind for method in METHODS.values() if method.kind}


def kind_of(config: Any) -> Kind:
    """The method that a config belongs to."""
    return KINDS[type(config)]


def init_adapter(key: jax.Array, model: Any, config: Any) -> Adapter:
    """A fresh adapter for `model` (a `jaxtune.Model`) from a `LoraConfig`, `IA3Config`, ...; it changes nothing until it is trained."""
    if type(config) not in KINDS:
        known = ", ".join(kind.__name__ for kind in KINDS)
        raise ConfigError(f"an adapter is made by one of {known}, and {type(config).__name__} was given")
    if isinstance(config, LoraConfig) and config.init_lora_weights not in (True, "gaussian"):
        what = "moves the base beside the adapter" if lora_init.has_residual_base(config) else "looks at the files or the rows"
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights} {what}, which jt.train does for a run; write True or gaussian here"
        )
    with jax.enable_x64(False):  # otherwise it would be float64 if the caller has enabled x64
        return kind_of(config).init(key, model.config, model.params, config, model.tokenizer)


def compose(base: dict, trainable: Any, key: jax.Array | None = None) -> dict:
    """The parameter tree to compute with: `base` with an adapter's leaves in place, or with those of a fully or partly trained tree.

    O(1): swaps leaves, computes nothing; call it inside jit. `key` enables dropout.
    """
    check_argument("base", base, Mapping, "give a model's parameters: jt.compose(model.params, adapter)")
    if trainable is None:
        return base
    if isinstance(trainable, Adapter):
        return kind_of(trainable.config).compose(base, trainable, key)
    if isinstance(trainable, Mixed):
        return compose_rows(base, trainable)
    return partial.over(base, trainable)


def virtual_tokens(trainable: Any) -> int:
    """How many positions the adapter takes before each text."""
    return getattr(trainable.config, "num_virtual_tokens", 0) if isinstance(trainable, Adapter) else 0


def penalty(trainable: Any) -> jax.Array | None:
    """The method's addition to a step's loss, float32 `[]`; None if there is none."""
    return kind_of(trainable.config).penalty(trainable) if isinstance(trainable, Adapter) else None


def merge(base: dict, trainable: Any = None, dtype: Any = None) -> dict:
    """Plain arrays in `dtype` (by default the embedding's): adapters merged, quantised matrices dequantised."""
    if isinstance(trainable, Adapter) and not kind_of(trainable.config).merges:
        raise ConfigError(
            f"an adapter of method {trainable.config.group} is tokens before a text, no change of a matrix, so there is nothing to merge; "
            "use it as it is"
        )
    check_argument("base", base, Mapping, "give a model's parameters: jt.merge(model.params, adapter)")
    own = flatten(base)
    dtype = dtype or dense(base["embed"]).dtype
    saved = trainable.saved if isinstance(trainable, Adapter) else {}

    def plain(path: str, leaf):
        if is_weight(leaf):
            return dense(leaf, dtype)
        return leaf.astype(own.get(path, own["embed"]).dtype) if path in saved else leaf  # whole modules are trained in float32

    return unflatten({path: plain(path, leaf) for path, leaf in flatten(compose(base, trainable)).items()})
