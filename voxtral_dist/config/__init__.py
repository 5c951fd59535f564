"""The configuration of a run: a tree of immutable sections from YAML and overrides, validated before a GPU is used.

Unknown keys are errors that name the nearest known key. The resolved tree is stored with the run as `config.yaml`, and
`voxtral-dist config schema` prints its JSON schema for editors.
"""

from voxtral_dist.config.builtin import deepspeed_file, deepspeed_files, recipes, refuse_missing_deepspeed_file, summary
from voxtral_dist.config.data import (
    AugmentationStep,
    ContextConfig,
    ShardSetConfig,
    SpecAugmentConfig,
    StorageConfig,
    TrainDataConfig,
)
from voxtral_dist.config.engine import CheckpointConfig, EngineConfig, Fsdp2Config, OptimizerConfig
from voxtral_dist.config.evaluation import (
    MIN_NEW_TOKENS,
    NORMALIZERS,
    ErrorRate,
    EvaluationConfig,
    GuardConfig,
    SelectionConfig,
    TestContextConfig,
    TestSetConfig,
    check_normalizer,
)
from voxtral_dist.config.loading import config_schema, dump_config, load_config, read_yaml
from voxtral_dist.config.model import ActivationCheckpointingConfig, LoraConfig, ModelConfig, TrainableConfig
from voxtral_dist.config.recipe_text import edited_recipe
from voxtral_dist.config.run import CardConfig, DistributedConfig, ExportConfig, MetricsConfig, RunConfig, TrackerKind
from voxtral_dist.config.section import (
    TEXT_STEPS,
    Argument,
    Component,
    HubName,
    Section,
    TextStep,
    check_text_step,
    is_function_name,
    is_hub_name,
)

__all__ = [
    "MIN_NEW_TOKENS",
    "NORMALIZERS",
    "TEXT_STEPS",
    "ActivationCheckpointingConfig",
    "Argument",
    "AugmentationStep",
    "CardConfig",
    "CheckpointConfig",
    "Component",
    "ContextConfig",
    "DistributedConfig",
    "EngineConfig",
    "ErrorRate",
    "EvaluationConfig",
    "ExportConfig",
    "Fsdp2Config",
    "GuardConfig",
    "HubName",
    "LoraConfig",
    "MetricsConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "Section",
    "SelectionConfig",
    "ShardSetConfig",
    "SpecAugmentConfig",
    "StorageConfig",
    "TestContextConfig",
    "TestSetConfig",
    "TextStep",
    "TrackerKind",
    "TrainDataConfig",
    "TrainableConfig",
    "check_normalizer",
    "check_text_step",
    "config_schema",
    "deepspeed_file",
    "deepspeed_files",
    "dump_config",
    "edited_recipe",
    "is_function_name",
    "is_hub_name",
    "load_config",
    "read_yaml",
    "recipes",
    "refuse_missing_deepspeed_file",
    "summary",
]
