"""The keys of two LoRA initialisations (`lora.init_lora_weights`): PEFT's classes, with their names and meanings."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtune.config.coerce import Group
from jaxtune.errors import ConfigError


@dataclass(frozen=True)
class LoftQConfig(Group):
    """PEFT's `LoftQConfig`: how the base is quantised, and for how many rounds."""

    group: ClassVar[str] = "lora.loftq_config"

    loftq_bits: Literal[4, 8] = 4  # of `quantization`: nf4 and nf4-dq, or int8
    loftq_iter: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.loftq_iter < 1:
            raise ConfigError(f"lora.loftq_config.loftq_iter is {self.loftq_iter}, but has to be at least 1.")


@dataclass(frozen=True)
class EvaConfig(Group):
    """PEFT's `EvaConfig`: how the inputs of matrices are analysed, and how ranks follow from them."""

    group: ClassVar[str] = "lora.eva_config"

    rho: float = 2.0  # a layer's rank is at most r * rho; 1: every layer has rank r
    tau: float = 0.99  # components have converged if their cosine similarity between batches is at least this
    use_label_mask: bool = True  # only tokens that are trained
    whiten: bool = False
    adjust_scaling_factors: bool = True  # alpha proportional to the rank, so that gradients have one scale

    def __post_init__(self):
        super().__post_init__()
        if self.rho < 1 or not 0 <= self.tau <= 1:
            raise ConfigError(f"lora.eva_config has rho {self.rho:g} and tau {self.tau:g}; rho has to be at least 1, tau from 0 to 1.")
