"""The keys of each parameter-efficient method: PEFT's config classes, with their names, meanings and defaults.

`target_modules` defaults to every linear layer but the head, where PEFT has a list per model type (IA3 keeps PEFT's list).
"""

import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxtune.config.coerce import Group
from jaxtune.config.lora_init import EvaConfig, LoftQConfig
from jaxtune.errors import ConfigError

Names = str | tuple[str, ...]  # name endings, or a regular expression


@dataclass(frozen=True)
class LoraConfig(Group):
    """PEFT's `LoraConfig`, with its names and meanings; the scale is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora."""

    group: ClassVar[str] = "lora"
    least_rank: ClassVar[int] = 1

    r: int = 16
    lora_alpha: int | float = 32
    lora_dropout: float = 0.0
    target_modules: Names = "all-linear"  # a list of name endings, a regular expression, or all-linear
    exclude_modules: Names | None = None
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()  # the first matching pattern wins
    alpha_pattern: tuple[tuple[str, int | float], ...] = ()
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    init_lora_weights: bool | str = True  # or gaussian, pissa, pissa_niter_16, olora, loftq, eva
    loftq_config: LoftQConfig = LoftQConfig()
    eva_config: EvaConfig = EvaConfig()
    layers_to_transform: int | tuple[int, ...] | None = None
    layers_pattern: Names | None = None
    modules_to_save: tuple[str, ...] | None = None
    target_parameters: tuple[str, ...] | None = None
    trainable_token_indices: tuple[tuple[str, tuple[int, ...]], ...] | tuple[int, ...] | None = None

    ensure_weight_tying: bool = False  # modules_to_save of a tied model: both uses of the matrix are trained as one

    def __post_init__(self):
        super().__post_init__()
        if self.lora_bias and self.use_dora:
            raise ConfigError("lora.lora_bias cannot be used with use_dora; leave one out.")
        start = self.init_lora_weights
        if start not in (True, "gaussian", "pissa", "olora", "loftq", "eva") and not re.fullmatch(r"pissa_niter_\d+", str(start)):
            raise ConfigError(
                f"lora.init_lora_weights={start!r} is not supported; write true, gaussian, pissa, pissa_niter_16, olora, loftq or eva."
            )
        others = ("use_dora", "lora_bias", "modules_to_save", "target_parameters", "trainable_token_indices")
        given = [key for key in others if getattr(self, key)] + (["bias"] if self.bias != "none" else [])
        if given and start not in (True, "gaussian", "eva"):
            raise ConfigError(f"lora.init_lora_weights={start} moves the base, which goes with pairs alone; leave out {given[0]}.")
        for name, config in (("loftq", self.loftq_config), ("eva", self.eva_config)):
            if config != type(config)() and start != name:
                raise ConfigError(f"{config.group} is of another beginning; write lora.init_lora_weights: {name}, or leave it out.")

    @property
    def rank_and_alpha(self) -> tuple[int, float]:
        """The rank and alpha of a module that no pattern matches."""
        return self.r, self.lora_alpha

    def scaling(self, rank: int, alpha: float) -> float:
        """The factor of a pair's product."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True)
class MatrixConfig(Group):
    """Common keys of the methods that adapt matrices; a key that a method's PEFT class lacks is fixed instead of a field."""

    exclude_modules: ClassVar[Any] = None
    layers_to_transform: ClassVar[Any] = None
    layers_pattern: ClassVar[Any] = None
    rank_pattern: ClassVar[Any] = ()
    alpha_pattern: ClassVar[Any] = ()
    bias: ClassVar[Any] = "none"
    lora_bias: ClassVar[bool] = False
    use_dora: ClassVar[bool] = False
    target_parameters: ClassVar[Any] = None
    trainable_token_indices: ClassVar[Any] = None
    ensure_weight_tying: ClassVar[bool] = False
    dropout: ClassVar[float] = 0.0
    least_rank: ClassVar[int] = 1

    target_modules: Names | None = "all-linear"  # a list of name endings, a regular expression, or all-linear
    modules_to_save: tuple[str, ...] | None = None

    @property
    def rank_and_alpha(self) -> tuple[int, float]:
        """The rank and alpha of a module that no pattern matches."""
        return 1, 1.0

    def scaling(self, rank: int, alpha: float) -> float:
        """The factor of the method's part of a product."""
        return 1.0


@dataclass(frozen=True)
class IA3Config(MatrixConfig):
    """(IA)3: PEFT's `IA3Config`. None: PEFT's modules for the model type, which are keys, values and the input of a layer's last matrix."""

    group: ClassVar[str] = "ia3"

    target_modules: Names | None = None
    feedforward_modules: Names | None = None  # scaled at the input; the others at the output
    exclude_modules: Names | None = None


@dataclass(frozen=True)
class _Ranked(MatrixConfig):
    r: int = 8
    alpha: int | float = 8
    exclude_modules: Names | None = None
    layers_to_transform: int | tuple[int, ...] | None = None
    layers_pattern: Names | None = None
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, int | float], ...] = ()

    @property
    def rank_and_alpha(self) -> tuple[int, float]:
        return self.r, self.alpha

    def scaling(self, rank: int, alpha: float) -> float:
        return alpha / rank


@dataclass(frozen=True)
class LoHaConfig(_Ranked):
    """PEFT's `LoHaConfig`."""

    group: ClassVar[str] = "loha"


@dataclass(frozen=True)
class LoKrConfig(_Ranked):
    """PEFT's `LoKrConfig`."""

    group: ClassVar[str] = "lokr"

    decompose_both: bool = False  # also factor the left factor with rank r
    decompose_factor: int = -1  # one side of the left factor, rounded to a divisor; -1: near the square root


@dataclass(frozen=True)
class VeraConfig(MatrixConfig):
    """PEFT's `VeraConfig`."""

    group: ClassVar[str] = "vera"

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    bias: Literal["none", "all", "vera_only"] = "none"
    layers_to_transform: int | tuple[int, ...] | None = None
    layers_pattern: Names | None = None

    @property
    def rank_and_alpha(self) -> tuple[int, float]:
        return self.r, 1.0

    @property
    def dropout(self) -> float:  # type: ignore[override]
        return self.vera_dropout


@dataclass(frozen=True)
class AdaLoraConfig(MatrixConfig):
    """PEFT's `AdaLoraConfig`; `total_step` None means all steps of the run."""

    group: ClassVar[str] = "adalora"
    least_rank: ClassVar[int] = 0  # a matrix to which the allocation has left no rank

    target_r: int = 8
    init_r: int = 12
    lora_alpha: int | float = 8
    lora_dropout: float = 0.0
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1  # noqa: N815
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    exclude_modules: Names | None = None
    layers_to_transform: int | tuple[int, ...] | None = None
    layers_pattern: Names | None = None
    rank_pattern: tuple[tuple[str, int], ...] = ()  # an adapter whose ranks are final

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.target_r <= self.init_r:
            raise ConfigError(f"adalora.target_r is {self.target_r}, but has to be from 1 to adalora.init_r, {self.init_r}.")
        if not (0 < self.beta1 < 1 and 0 < self.beta2 < 1):
            raise ConfigError(f"adalora.beta1 and beta2 are {self.beta1} and {self.beta2}, but have to be between 0 and 1.")
        if min(self.tinit, self.tfinal, self.orth_reg_weight) < 0 or self.deltaT < 1:
            raise ConfigError("adalora.tinit, tfinal and orth_reg_weight have to be at least 0, and deltaT at least 1.")

    @property
    def rank_and_alpha(self) -> tuple[int, float]:
        return self.init_r, self.lora_alpha

    def scaling(self, rank: int, alpha: float) -> float:
        return (alpha if alpha > 0 else self.init_r) / (self.init_r + 1e-5)

    @property
    def dropout(self) -> float:  # type: ignore[override]
        return self.lora_dropout


@dataclass(frozen=True)
class BeftConfig(MatrixConfig):
    """Bias tuning (BitFit), like PEFT's `BeftConfig` an offset to biases; by default for every linear layer that has one."""

    group: ClassVar[str] = "bitfit"


@dataclass(frozen=True)
class LNTuningConfig(MatrixConfig):
    """PEFT's `LNTuningConfig`; None: every norm of the model."""

    group: ClassVar[str] = "ln_tuning"

    target_modules: Names | None = None
    exclude_modules: Names | None = None


@dataclass(frozen=True)
class PromptConfig(Group):
    """Common keys of the virtual-token methods."""

    num_virtual_tokens: int = 20

    def __post_init__(self):
        super().__post_init__()
        if self.num_virtual_tokens < 1:
            raise ConfigError(f"{self.group}.num_virtual_tokens is {self.num_virtual_tokens}, but has to be at least 1.")


@dataclass(frozen=True)
class PromptTuningConfig(PromptConfig):
    """PEFT's `PromptTuningConfig`; a text is tokenised by the model's own tokenizer."""

    group: ClassVar[str] = "prompt_tuning"

    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = "RANDOM"
    prompt_tuning_init_text: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if (self.prompt_tuning_init == "TEXT") != bool(self.prompt_tuning_init_text):
            raise ConfigError("prompt_tuning.prompt_tuning_init_text is there for prompt_tuning_init: TEXT, and for it alone; write both.")


@dataclass(frozen=True)
class PromptEncoderConfig(PromptConfig):
    """PEFT's `PromptEncoderConfig` (p-tuning), with an MLP as its network."""

    group: ClassVar[str] = "p_tuning"

    encoder_reparameterization_type: Literal["MLP"] = "MLP"  # an LSTM is not supported
    encoder_hidden_size: int | None = None  # the model's


@dataclass(frozen=True)
class PrefixTuningConfig(PromptConfig):
    """PEFT's `PrefixTuningConfig`."""

    group: ClassVar[str] = "prefix_tuning"

    prefix_projection: bool = False
    encoder_hidden_size: int | None = None  # keys and values of a layer
    init_weights: Literal["zero"] | None = None


@dataclass(frozen=True)
class OFTConfig(MatrixConfig):
    """PEFT's `OFTConfig`: set `oft_block_size`, or r, the number of blocks."""

    group: ClassVar[str] = "oft"

    r: int = 0
    oft_block_size: int = 32
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5
    bias: Literal["none", "all", "oft_only"] = "none"
    exclude_modules: Names | None = None
    layers_to_transform: int | tuple[int, ...] | None = None
    layers_pattern: Names | None = None

    def __post_init__(self):
        super().__post_init__()
        if (self.r > 0) == (self.oft_block_size > 0) or min(self.r, self.oft_block_size) < 0:
            raise ConfigError(f"oft.r is {self.r} and oft_block_size {self.oft_block_size}; one of them has to be above 0, the other 0.")
        if self.num_cayley_neumann_terms < 1:
            raise ConfigError("oft.num_cayley_neumann_terms has to be at least 1; write use_cayley_neumann: false for the inverse itself.")


@dataclass(frozen=True)
class BOFTConfig(MatrixConfig):
    """PEFT's `BOFTConfig` with one butterfly factor, as in PEFT without its CUDA kernel."""

    group: ClassVar[str] = "boft"

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    bias: Literal["none", "all", "boft_only"] = "none"
    exclude_modules: Names | None = None
    layers_to_transform: int | tuple[int, ...] | None = None
    layers_pattern: Names | None = None

    def __post_init__(self):
        super().__post_init__()
        if (self.boft_block_size > 0) == (self.boft_block_num > 0) or min(self.boft_block_size, self.boft_block_num) < 0:
            raise ConfigError("boft.boft_block_size and boft_block_num: one has to be above 0, the other 0.")
        if self.boft_n_butterfly_factor != 1:
            raise ConfigError(
                f"boft.boft_n_butterfly_factor is {self.boft_n_butterfly_factor}, but one factor is what PEFT opens without its CUDA "
                "kernel; write 1."
            )
