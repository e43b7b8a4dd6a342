"""The config: one frozen, hashable, checked object for a run, from YAML and `key=value` overrides."""

from jaxtune.config.checks import interval
from jaxtune.config.load import describe, load_config, read_yaml
from jaxtune.config.schema import Config, DataConfig, DistributedConfig, EvalConfig, LoraConfig, MeshConfig, ObjectiveConfig, Source

__all__ = [
    "Config", "DataConfig", "DistributedConfig", "EvalConfig", "LoraConfig", "MeshConfig", "ObjectiveConfig", "Source", "describe",
    "interval", "load_config", "read_yaml",
]  # fmt: skip
