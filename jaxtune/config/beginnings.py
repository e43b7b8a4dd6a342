"""The keys of two ways in which LoRA may begin (`lora.init_lora_weights`): PEFT's classes, their names and meanings."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtune.config.coerce import Group
from jaxtune.errors import ConfigError


@dataclass(frozen=True)
class LoftQConfig(Group):
    """PEFT's `LoftQConfig`: how the base is packed, and how often packing and what makes up for it are computed in turn."""

    group: ClassVar[str] = "lora.loftq_config"

    loftq_bits: Literal[4, 8] = 4  # of `quantization`: nf4 and nf4-dq, or int8
    loftq_iter: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.loftq_iter < 1:
            raise ConfigError(f"lora.loftq_config.loftq_iter is {self.loftq_iter}, but has to be at least 1.")


@dataclass(frozen=True)
class EvaConfig(Group):
    """PEFT's `EvaConfig`: how the inputs of matrices are looked at, and how ranks follow from them."""

    group: ClassVar[str] = "lora.eva_config"

    rho: float = 2.0  # a layer's rank is at most r * rho; 1: every layer has rank r
    tau: float = 0.99  # components have converged where their cosine similarity from batch to batch is this
    use_label_mask: bool = True  # tokens that are trained alone
    whiten: bool = False
    adjust_scaling_factors: bool = True  # alpha in proportion to the rank, so that gradients are of one scale

    def __post_init__(self):
        super().__post_init__()
        if self.rho < 1 or not 0 <= self.tau <= 1:
            raise ConfigError(f"lora.eva_config has rho {self.rho:g} and tau {self.tau:g}; rho has to be at least 1, tau from 0 to 1.")
