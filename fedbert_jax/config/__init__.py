"""Configuration: frozen dataclasses, read from a ConfigDict and validated once, at the edge."""

from fedbert_jax.config.arrangement import ARRANGEMENTS, Arrangement, register, strategy_title
from fedbert_jax.config.changes import EXTENDABLE, FREE, HARMLESS, RESCHEDULED, WORKED_OUT
from fedbert_jax.config.check import resolve_model, validate
from fedbert_jax.config.codecs import CODECS, register_codec
from fedbert_jax.config.extent import as_begun, choose, work_out
from fedbert_jax.config.keys import all_keys, flatten, kind_of, listed, replace, to_dict, type_of, unknown_key
from fedbert_jax.config.load import default_config, from_dict, from_text
from fedbert_jax.config.ranges import HUB_NAME
from fedbert_jax.config.schema import (
    PRESETS,
    AggregatorConfig,
    AuditConfig,
    Config,
    DataConfig,
    FederatedConfig,
    FinetuneConfig,
    MeshConfig,
    MlmConfig,
    ModelConfig,
    NetworkConfig,
    OptimizerConfig,
    PartitionConfig,
    PrecisionConfig,
    PrivacyConfig,
    WireConfig,
)
from fedbert_jax.config.telling import CheckpointConfig, EvalConfig, ExportConfig, MetricsConfig

__all__ = [
    "ARRANGEMENTS",
    "CODECS",
    "EXTENDABLE",
    "FREE",
    "HARMLESS",
    "HUB_NAME",
    "PRESETS",
    "RESCHEDULED",
    "WORKED_OUT",
    "AggregatorConfig",
    "Arrangement",
    "AuditConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "ExportConfig",
    "FederatedConfig",
    "FinetuneConfig",
    "MeshConfig",
    "MetricsConfig",
    "MlmConfig",
    "ModelConfig",
    "NetworkConfig",
    "OptimizerConfig",
    "PartitionConfig",
    "PrecisionConfig",
    "PrivacyConfig",
    "WireConfig",
    "all_keys",
    "as_begun",
    "choose",
    "default_config",
    "flatten",
    "from_dict",
    "from_text",
    "kind_of",
    "listed",
    "register",
    "register_codec",
    "replace",
    "resolve_model",
    "strategy_title",
    "to_dict",
    "type_of",
    "unknown_key",
    "validate",
    "work_out",
]
