"""Methods that leave every matrix unchanged and put virtual tokens before each document: prompt tuning (arXiv 2104.08691), p-tuning
(2103.10385), whose tokens a small network produces, and prefix tuning (2101.00190), which provides their keys and values in every layer.

model/virtual_tokens.py applies them in the model. They depend on no document, so a packed row holds them once.
"""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.config import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from jaxtune.errors import ConfigError
from jaxtune.model.families import ModelConfig
from jaxtune.model.rope import BY_LENGTH
from jaxtune.model.weight import rows
from jaxtune.peft.adapter import Adapter, Kind

NETWORKS = {"MLP": jax.nn.relu}  # p-tuning's name for the layer between its layers
PATH = "prompt"  # where the arrays are in `Adapter.params`


class PromptKind(Kind):
    """A method of virtual tokens: `params["prompt"]` holds `embeddings`, or the network that produces them."""

    merges: ClassVar[bool] = False
    ignored = frozenset(
        "task_type num_transformer_submodules tokenizer_name_or_path tokenizer_kwargs init_weights modules_to_save encoder_dropout "
        "encoder_num_layers token_dim num_attention_heads num_layers".split()
    )

    def init(self, key: jax.Array, model_config: ModelConfig, params: dict, config: Any, tokenizer: Any = None) -> Adapter:
        self._check(model_config, config)
        return Adapter({PATH: self.arrays(key, model_config, params, config, tokenizer)}, (), config)

    def _check(self, model_config: ModelConfig, config: Any) -> None:
        if model_config.num_labels or model_config.value_head:
            head = "value" if model_config.value_head else "scoring"
            raise ConfigError(f"method {config.group} trains no {head} head; write method: lora, which does")
        if model_config.carries_state:
            raise ConfigError(
                f"method {config.group} puts virtual tokens before every document of a row, but layers of this {model_config.model_type} "
                "model carry a state from token to token and begin each document with none; write method: lora"
            )
        if model_config.is_given or model_config.wide:
            raise ConfigError(
                f"method {config.group} puts virtual tokens before every document, and layers of this {model_config.model_type} model have "
                "heads of several sizes, or are given what tokens of the vocabulary have; write method: lora"
            )
        if self.peft_type != "PREFIX_TUNING" and any(rope.kind in BY_LENGTH for rope in model_config.ropes):
            raise ConfigError(
                f"method {config.group}: this model turns positions by a text's length, so that virtual tokens differ from text to text; "
                "write method: prefix_tuning, or lora"
            )

    def arrays(self, key: jax.Array, model_config: ModelConfig, params: dict, config: Any, tokenizer: Any) -> dict[str, jax.Array]:
        """The initial trainable arrays."""
        raise NotImplementedError

    def compose(self, base: dict, adapter: Adapter, key: jax.Array | None = None) -> dict:
        return base | {"virtual": {self.leaf_name: self.embeddings(adapter)}}

    leaf_name: ClassVar[str] = "embeddings"  # in `params["virtual"]`

    def embeddings(self, adapter: Adapter) -> jax.Array:
        """float32 `[P, D]`; for a prefix the keys and values of all layers `[P, 2 L K h]`."""
        return adapter.params[PATH]["embeddings"]

    def width(self, model_config: ModelConfig) -> int:
        """Numbers per virtual token in the file."""
        return model_config.hidden_size

    # ---- PEFT's files ----

    def fields(self, adapter: Adapter, model_config: ModelConfig) -> dict[str, Any]:
        fields = {name: value for name, value in adapter.config.to_dict().items() if not name.startswith("prompt_tuning_init")}
        return fields | {
            "token_dim": model_config.hidden_size, "num_transformer_submodules": 1, "num_attention_heads": model_config.num_heads,
            "num_layers": model_config.num_layers,
        }  # fmt: skip

    def read_fields(self, saved: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in saved.items() if name not in ("prompt_tuning_init", "prompt_tuning_init_text")}

    def more_tensors(self, adapter: Adapter) -> dict[str, np.ndarray]:
        return {"prompt_embeddings": np.asarray(self.embeddings(adapter), np.float32)}


def _normal(key: jax.Array, *shape: int) -> jax.Array:
    return jax.random.normal(key, shape)


def _linears(key: jax.Array, *sizes: int) -> dict[str, jax.Array]:
    """Layers of a network with torch's initialisation: weights and biases uniform in +-1 / sqrt(inputs)."""
    found = {}
    for number, (width, out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        for name, shape in ((f"weight{number}", (out, width)), (f"bias{number}", (out,))):
            key, own = jax.random.split(key)
            found[name] = jax.random.uniform(own, shape, minval=-1.0, maxval=1.0) / math.sqrt(width)
    return found


def _through(arrays: dict[str, jax.Array], act: Any) -> jax.Array:
    """The network applied to its own tokens."""
    x, last = arrays["tokens"], max(int(name.removeprefix("weight")) for name in arrays if name.startswith("weight"))
    for number in range(last + 1):
        x = x @ arrays[f"weight{number}"].T + arrays[f"bias{number}"]
        x = act(x) if number < last else x
    return x


class PromptTuningKind(PromptKind):
    """Embeddings of virtual tokens: random, of random tokens, or of a text."""

    config = PromptTuningConfig
    peft_type = "PROMPT_TUNING"

    def arrays(self, key: jax.Array, model_config: ModelConfig, params: dict, config: Any, tokenizer: Any) -> dict[str, jax.Array]:
        P, D = config.num_virtual_tokens, model_config.hidden_size
        if config.prompt_tuning_init == "RANDOM":
            return {"embeddings": _normal(key, P, D)}
        if config.prompt_tuning_init == "TEXT" and tokenizer is None:
            raise ConfigError("prompt_tuning.prompt_tuning_init TEXT needs the model's tokenizer, and it has none; write SAMPLE_VOCAB")
        ids = jax.random.randint(key, (P,), 0, model_config.vocab_size)
        if config.prompt_tuning_init == "TEXT":
            ids = jnp.asarray(np.resize(tokenizer(config.prompt_tuning_init_text)["input_ids"], P))
        return {"embeddings": rows(params["embed"], ids, jnp.float32) * model_config.embed_scale}


class PromptEncoderKind(PromptKind):
    """Embeddings that a network of three layers produces from its own tokens; the network is not saved."""

    config = PromptEncoderConfig
    peft_type = "P_TUNING"

    def arrays(self, key: jax.Array, model_config: ModelConfig, params: dict, config: Any, tokenizer: Any) -> dict[str, jax.Array]:
        D = model_config.hidden_size
        hidden, (first, second) = config.encoder_hidden_size or D, jax.random.split(key)
        return {"tokens": _normal(first, config.num_virtual_tokens, D)} | _linears(second, D, hidden, hidden, D)

    def embeddings(self, adapter: Adapter) -> jax.Array:
        arrays = adapter.params[PATH]
        act = NETWORKS[adapter.config.encoder_reparameterization_type]
        return arrays["embeddings"] if "embeddings" in arrays else _through(arrays, act)


class PrefixTuningKind(PromptKind):
    """Keys and values of virtual tokens in every layer; with `prefix_projection` a network of two layers produces them."""

    config = PrefixTuningConfig
    peft_type = "PREFIX_TUNING"
    leaf_name = "prefix"

    def width(self, model_config: ModelConfig) -> int:
        return 2 * model_config.num_layers * model_config.num_kv_heads * model_config.head_dim

    def arrays(self, key: jax.Array, model_config: ModelConfig, params: dict, config: Any, tokenizer: Any) -> dict[str, jax.Array]:
        P, width = config.num_virtual_tokens, self.width(model_config)
        if not config.prefix_projection:
            return {"embeddings": jnp.zeros((P, width)) if config.init_weights == "zero" else _normal(key, P, width)}
        D, (first, second) = width // (2 * model_config.num_layers), jax.random.split(key)
        return {"tokens": _normal(first, P, D)} | _linears(second, D, config.encoder_hidden_size or D, width)

    def embeddings(self, adapter: Adapter) -> jax.Array:
        arrays = adapter.params[PATH]
        return arrays["embeddings"] if "embeddings" in arrays else _through(arrays, jnp.tanh)

    def fields(self, adapter: Adapter, model_config: ModelConfig) -> dict[str, Any]:
        heads = model_config.num_kv_heads
        return super().fields(adapter, model_config) | {"token_dim": heads * model_config.head_dim, "num_attention_heads": heads}


PROMPT, ENCODER, PREFIX = PromptTuningKind(), PromptEncoderKind(), PrefixTuningKind()
