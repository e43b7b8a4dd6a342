"""`ModelConfig`: what `spec` and `forward` need to know about a model; `Family`: how to read one Hugging Face `model_type`."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jax.sharding import Mesh

from jaxtune.errors import ModelError
from jaxtune.model.attention import TILE, Tile
from jaxtune.model.families.factors import Alibi, Growth, Multipliers, Streams
from jaxtune.model.families.kinds import whole_rope
from jaxtune.model.families.patterns import Pattern, patterns_of
from jaxtune.model.families.recurrent import DeltaNet, Mamba, Recurrent, ShortConvolution
from jaxtune.model.layers import ACTIVATIONS
from jaxtune.model.rope import Rope
from jaxtune.model.row import Row

# fields that say how to compute a model, or what accompanies it: configs that differ only in these describe the same model
HOW = ("dtype", "remat", "logits_chunk", "mlp_chunk", "attention", "attention_tile", "quantization_kernel", "mesh", "cuts", "value_head",
       "outer", "together", "file_layers")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Moe:
    """A mixture of experts in the layers `layers`: each token uses the `experts_per_token` most likely of `num_experts`."""

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    layers: tuple[int, ...]
    normalize: bool  # whether the chosen experts' probabilities are normalised to sum to one
    aux_loss_coef: float | None  # config.json's weight of the load-balancing loss; None: transformers has no such loss for this family
    shared_intermediate_size: int = 0  # width of an expert that every token uses besides its own; 0: none
    latent_size: int = 0  # width of a token's projection that experts get as input; 0: the full state
    sigmoid: bool = False  # an expert's score is the sigmoid of its logit, not a softmax over all
    groups: tuple[int, int] = (1, 1)  # number of expert groups, and how many of them a token may use
    judges: int = 1  # a group is judged by the sum of its best experts' scores, so many of them
    scale: float = 1.0  # factor of the chosen experts' weights
    shared_scale: float = 1.0  # and of the shared expert's output
    epsilon: float = 0.0  # added to the sum by which `normalize` divides
    float32: bool = False  # whether the router computes in float32, whatever the model does
    near: float | None = None  # tolerance of near ties: a weight is a softmax over logits not much smaller (model/moe.py); None: over all
    scales_input: bool = False  # an expert's weight multiplies its input, not its output
    clamp: tuple[float, float] | None = None  # (limit, alpha) of GPT-OSS's gate: `(1 + clip(up)) * gate * sigmoid(alpha * gate)`


@dataclasses.dataclass(frozen=True)
class Latent:
    """Keys, values (and queries) of all heads from a low-rank latent per token: multi-head latent attention (arXiv 2405.04434)."""

    kv_rank: int
    q_rank: int  # 0: queries are projected from x directly
    turning: int  # rotated dimensions of a head's query and key; the key's are shared by all heads
    still: int  # and those that are not rotated
    value: int  # dimensions of a head's value


@dataclasses.dataclass(frozen=True)
class Wide:
    """The layers `layers`, whose heads have another size and number of key heads (Gemma 4: those without a window)."""

    kv_heads: int
    head_dim: int
    layers: tuple[int, ...]
    values: bool  # whether values have their own matrix there; otherwise they share the keys'


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything `spec` and `forward` need to know about a model; hashable, so that it can be a static argument of jit."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    hidden_act: str
    max_position_embeddings: int
    tie_word_embeddings: bool  # a file may still have another head: `dataclasses.replace(config, tie_word_embeddings=False)`
    attention_scale: float
    ropes: tuple[Rope, ...]
    layer_ropes: tuple[int, ...]  # index into `ropes` per layer; -1: no rotation (NoPE)
    layer_windows: tuple[int, ...]  # sliding window per layer, including the token itself; 0: full attention; -n: chunks of n positions
    norm: str = "rms"  # a key of layers.NORMS
    qkv_bias: bool = False
    out_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    head_bias: bool = False  # of the vocabulary's head
    position_offset: int = 0  # the row of the first token in the table of learned positions
    bare_norms: tuple[str, ...] = ()  # norms without parameters, and hence without rows; those of queries and keys: after the rotation
    qk_norm: bool = False  # norms of queries and keys, for families with a flag for them
    head_gate: bool = False  # one gate for each head's result, for families with a flag for it
    post_norm: bool = False  # norms after attention and feed-forward, for families with a flag for them
    qk_norm_last: bool = False  # these come after the rotation
    qkv_clip: float = 0.0  # queries, keys and values are clipped to -clip ... clip; 0: not clipped
    query_growth: Growth = Growth()
    alibi: Alibi | None = None
    attention_softcap: float = 0.0  # scores -> cap * tanh(scores / cap); 0: none
    logits_softcap: float = 0.0
    logits_scaling: float = 1.0  # logits are divided by it
    embed_scale: float = 1.0  # the embedding's own scale: part of `embed`
    embedding_multiplier: float = 1.0  # factor of the first layer's input, also of given embeddings
    residual_multiplier: float = 1.0  # factor of what attention and feed-forward add
    multipliers: Multipliers = Multipliers()
    parallel_residual: bool = False  # x + attention(x) + feed_forward(x)
    shared_norm: bool = False  # the feed-forward part uses the attention's norm
    moe: Moe | None = None
    latent: Latent | None = None
    delta: DeltaNet | None = None
    convolution: ShortConvolution | None = None
    mamba: Mamba | None = None
    feed_forward_only: tuple[int, ...] = ()  # layers without a mixer (Nemotron H)
    wide: Wide | None = None
    kv_sharing: int = 0  # number of last layers that use keys and values of the last earlier layer of their kind
    kv_sharing_mlp: int = 1  # and the relative width of their feed-forward part
    streams: Streams | None = None
    laurel: int = 0  # rank of a low-rank layer beside attention; 0: none
    cutoffs: tuple[float | None, ...] = ()  # per layer, in standard deviations: the part of a gate above it counts; None: all of it
    layer_inputs: tuple[int, int] = (0, 0)  # (vocabulary, width) of a per-layer token input beside the residual stream; 0: none
    padding_idx: int | None = None  # the token whose embedding gets no gradient
    initializer_range: float = 0.02
    # a scoring head in place of the vocabulary's (families/heads.py)
    num_labels: int = 0  # number of outputs; 0: a language model
    labels_of: str = "sequence"  # sequence: one per text, at its last token | token: one per token
    score_bias: bool = False
    pad_token_id: int | None = None  # ignored as a text's last token, for a sequence's score
    value_head: bool = False  # a value per token beside the vocabulary head, which objective ppo trains
    outer: str = ""  # the outer `model_type` of a multimodal checkpoint (families/nested.py); "": not multimodal
    together: bool = False  # its files store a layer's experts in one tensor, where the family's store each separately
    file_layers: tuple[int, ...] = ()  # the layers' numbers in its files, if text passes over some there (Mllama); (): 0, 1, 2, ...
    unwritten: int = 0  # rows of the embedding after the vocabulary's, of tokens that no text has (Mllama's image)
    # how to compute the model
    dtype: str = "float32"  # of activations and products
    attention: str = "xla"  # xla | flash | splash: what computes attention in training (model/attention.py)
    attention_tile: Tile = TILE  # of blocks in the first
    remat: str = "none"  # what the backward pass recomputes of each layer: model/stack.py
    logits_chunk: int = 512  # tokens whose logits exist at a time, in training
    mlp_chunk: int | None = None  # tokens in the feed-forward part at a time, if recomputed; None: model/block.py chooses
    quantization_kernel: str = "xla"  # xla | pallas: products with 4-bit matrices (model/nf4_kernel.py)
    cuts: tuple[int, ...] = ()  # layers at which a stack begins, besides changes of the kind of layer (peft/partial.py)
    mesh: Mesh | None = None  # sharding of activations (model/layout.py); None: left to the compiler
    hf_json: str = dataclasses.field(default="", compare=False, repr=False)  # config.json as it was read, for writing it again

    @property
    def layer_names(self) -> tuple[int, ...]:
        """The layers' numbers in names of tensors and modules."""
        return self.file_layers or tuple(range(self.num_layers))

    @property
    def residual_size(self) -> int:
        """The width of the residual stream, of all its parts."""
        return self.hidden_size * (self.streams.count if self.streams else 1)

    @property
    def interleaved(self) -> bool:
        """Whether neighbouring dimensions of a head rotate together."""
        return any(rope.interleaved for rope in self.ropes)

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """The layers in order, as consecutive patterns; a repeating pattern of kinds of layers is compiled once."""
        return patterns_of(tuple(map(self._kind_of, range(self.num_layers))))

    def _kind_of(self, layer: int) -> tuple:
        """What layers of one stack have in common."""
        moe, recurrent = (part is not None and layer in part.layers for part in (self.moe, self.recurrent))
        whole, cuts = self.cutoff(layer) is None, sum(cut <= layer for cut in self.cuts)
        return moe, recurrent, layer in self.feed_forward_only, whole, *self._heads_of(layer), cuts

    def _heads_of(self, layer: int) -> tuple:
        """What distinguishes a layer's keys and values: their shape, and whether they are shared with other layers."""
        source = self.kv_source(layer)
        given = source if source != layer else layer in self.kv_sources and -1 - layer
        return self._is_wide(layer), given

    def cutoff(self, layer: int) -> float | None:
        """The cutoff of a layer's gate."""
        return self.cutoffs[layer] if self.cutoffs else None

    def _is_wide(self, layer: int) -> bool:
        return self.wide is not None and layer in self.wide.layers

    def kv_source(self, layer: int) -> int:
        """The layer whose keys and values this one uses: usually its own."""
        first = self.num_layers - self.kv_sharing
        if layer < first:
            return layer
        kinds = [(self._is_wide(i), self.layer_windows[i] == 0) for i in range(self.num_layers)]
        return max(i for i in range(first) if kinds[i] == kinds[layer])

    @property
    def kv_sources(self) -> frozenset[int]:
        """The layers whose keys and values are used by others."""
        return frozenset(self.kv_source(layer) for layer in range(self.num_layers - self.kv_sharing, self.num_layers))

    @property
    def memories(self) -> tuple[tuple[int, ...], ...]:
        """The layers that store their own keys and values, by the shape of these."""
        own = [layer for layer in self.attending if self.kv_source(layer) == layer]
        groups = [[layer for layer in own if self._is_wide(layer) == wide] for wide in (False, True)]
        return tuple(tuple(group) for group in groups if group)

    def at(self, layer: int) -> "ModelConfig":
        """The config for that layer."""
        if self.wide is None or layer not in self.wide.layers:
            return self
        return dataclasses.replace(self, num_kv_heads=self.wide.kv_heads, head_dim=self.wide.head_dim)

    @property
    def stacks(self) -> tuple[tuple[int, ...], ...]:
        """Layer numbers of each stack: layers with the same rows, scanned together."""
        return tuple(stack for pattern in self.patterns for stack in pattern.stacks)

    @property
    def places(self) -> list[tuple[int, int]]:
        """For each layer, its stack and its number in it."""
        found = {layer: (stack, n) for stack, layers in enumerate(self.stacks) for n, layer in enumerate(layers)}
        return [found[layer] for layer in range(self.num_layers)]

    @property
    def attending(self) -> tuple[int, ...]:
        """The layers with keys and values: all except recurrent-only and feed-forward-only layers."""
        without = {*self.feed_forward_only, *(self.recurrent.layers if self.recurrent and not self.recurrent.parallel_attention else ())}
        return tuple(layer for layer in range(self.num_layers) if layer not in without)

    @property
    def recurrent(self) -> Recurrent | None:
        """The recurrent layers, which have a state instead of keys and values; None: there are none."""
        return self.delta or self.convolution or self.mamba

    @property
    def carries_state(self) -> bool:
        """Whether layers pass on a state of the whole document so far: no text continues another segment or virtual tokens then."""
        return self.recurrent is not None

    @property
    def is_given(self) -> bool:
        """Whether layers have inputs besides the residual stream (model/layer_inputs.py), which virtual tokens lack."""
        return self.layer_inputs[1] > 0 or self.kv_sharing > 0


class Family(NamedTuple):
    """One `model_type`.

    config    config.json, defaults filled in -> ModelConfig
    layer     (config, layer number) -> the rows of that layer, `(name, Row)`, names relative to `prefix`, without the stack axis
    defaults  what transformers takes for keys that config.json leaves out; `required` are those it must hold
    refused   key -> the values that change nothing; any other is a switch that is not implemented
    ends      the rows outside the layers -> their Hugging Face names
    pads      whether transformers' embedding has a `padding_idx`, config.json's `pad_token_id`
    ignored   tensors that transformers leaves in the file, a regular expression: layers that predict more than one token
              ahead; `{layers}` is their number, `{sharing}` those that take the keys of others
    lists     keys that may be a list with a value for each layer
    extra_rows  the rows outside the layers that are none of `ends`, `(path, Row)`
    moe       what transformers 5 (so PEFT) calls the router and the experts of a layer, whatever files do
    """

    config: Callable[[dict[str, Any]], ModelConfig]
    layer: Callable[[ModelConfig, int], Iterator[tuple[str, Row]]]
    defaults: dict[str, Any]
    refused: Mapping[str, tuple] = {}
    required: tuple[str, ...] = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    prefix: str = "model.layers.{layer}."
    ends: Mapping[str, str] = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    pads: bool = True
    ignored: str | None = None
    lists: tuple[str, ...] = ()
    extra_rows: Callable[[ModelConfig], Iterator[tuple[str, Row]]] = lambda config: iter(())
    moe: tuple[str, str] = ("mlp.gate", "mlp.experts")


def architecture(hf: Mapping[str, Any]) -> str:
    """The class of transformers that config.json names first; "" if it names none."""
    names = hf.get("architectures") or [""]
    if not isinstance(names, list | tuple):
        raise ModelError(f"config.json of this {hf['model_type']} model has architectures={names!r}; it needs a list there")
    return str(names[0])


def common(hf: Mapping[str, Any], *, partial: bool = False, interleaved: bool = False, own_act: str = "", **changes) -> ModelConfig:
    """The fields that nearly all families spell alike, with `changes`; `partial`: heads may be rotated partly, `interleaved`: see `Rope`,
    `own_act`: an activation for which this family has rows."""
    heads, layers = hf["num_attention_heads"], hf["num_hidden_layers"]
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
    kv_heads = hf.get("num_key_value_heads") or heads
    if not head_dim:
        raise ModelError(f"num_attention_heads={heads} is more than hidden_size={hf['hidden_size']} has room for")
    if heads % kv_heads:
        raise ModelError(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}")
    fields: dict[str, Any] = dict(
        model_type=hf["model_type"],
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=hf.get("rms_norm_eps"),
        hidden_act=hf.get("hidden_act"),
        max_position_embeddings=hf["max_position_embeddings"],
        tie_word_embeddings=bool(hf["tie_word_embeddings"]),
        attention_scale=head_dim**-0.5,
        layer_ropes=(0,) * layers,
        layer_windows=(0,) * layers,
        initializer_range=hf.get("initializer_range", 0.02),
    ) | changes
    if "ropes" not in fields:
        fields["ropes"] = ((Rope.from_hf if partial else whole_rope)(hf, head_dim, interleaved),)
    if fields["hidden_act"] not in (known := [*filter(None, [own_act]), *ACTIVATIONS]):
        raise ModelError(f"hidden_act {fields['hidden_act']!r} is not supported; supported are {', '.join(known)}")
    return ModelConfig(**fields)
