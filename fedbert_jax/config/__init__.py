"""Configuration: frozen dataclasses, read from a ConfigDict and validated once, at the edge."""

from fedbert_jax.config.check import resolve_model, validate
from fedbert_jax.config.keys import all_keys, flatten, kind_of, to_dict, unknown_key
from fedbert_jax.config.load import default_config, from_dict
from fedbert_jax.config.schema import (
    ARRANGEMENTS,
    EXTENDABLE,
    HARMLESS,
    PRESETS,
    RESCHEDULED,
    AggregatorConfig,
    Arrangement,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    FederatedConfig,
    FinetuneConfig,
    MeshConfig,
    MlmConfig,
    ModelConfig,
    OptimizerConfig,
    PartitionConfig,
    PrecisionConfig,
    StrategyName,
    WireConfig,
)

__all__ = [
    "ARRANGEMENTS", "EXTENDABLE", "HARMLESS", "PRESETS", "RESCHEDULED", "AggregatorConfig", "Arrangement",
    "CheckpointConfig", "Config", "DataConfig", "EvalConfig", "FederatedConfig", "FinetuneConfig", "MeshConfig", "MlmConfig",
    "ModelConfig", "OptimizerConfig", "PartitionConfig", "PrecisionConfig", "StrategyName", "WireConfig", "all_keys",
    "default_config", "flatten", "from_dict", "kind_of", "resolve_model", "to_dict", "unknown_key", "validate",
]  # fmt: skip
