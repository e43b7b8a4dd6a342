"""The config of a run: one frozen, hashable, validated object, read from YAML and `key=value` overrides."""

from jaxtune.config.adapters import (
    AdaLoraConfig,
    BeftConfig,
    BOFTConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MatrixConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
)
from jaxtune.config.checks import interval
from jaxtune.config.load import describe, load_config, read_yaml
from jaxtune.config.schema import Config, DataConfig, DistributedConfig, EvalConfig, MeshConfig, ObjectiveConfig, Source

__all__ = [
    "AdaLoraConfig", "BOFTConfig", "BeftConfig", "Config", "DataConfig", "DistributedConfig", "EvalConfig", "IA3Config", "LNTuningConfig",
    "LoHaConfig", "LoKrConfig", "PrefixTuningConfig", "PromptConfig", "PromptEncoderConfig", "PromptTuningConfig",
    "LoraConfig", "MatrixConfig", "MeshConfig", "OFTConfig", "ObjectiveConfig", "Source", "VeraConfig", "describe", "interval",
    "load_config", "read_yaml",
]  # fmt: skip
