"""The one schema of the configuration. Each section has its module here, and `load` reads a file.

Configurations are YAML files, such as those under configs/. Relative paths in them start at the working directory.
An unknown key is an error that names the nearest valid one.
"""

from selfplay.config.base import Section
from selfplay.config.cluster import ClusterConfig, RoleConfig
from selfplay.config.evaluate import EvaluateConfig, GateConfig
from selfplay.config.generate import EngineConfig, GenerateConfig
from selfplay.config.guard import GuardConfig, Limits
from selfplay.config.loading import load
from selfplay.config.pairs import DepthConfig, PairsConfig
from selfplay.config.placement import PlacementConfig
from selfplay.config.policy import PolicyConfig, SwapConfig
from selfplay.config.prompts import BreadthConfig, ColumnsConfig, EvolveConfig, PromptsConfig
from selfplay.config.publish import PublishConfig
from selfplay.config.retention import RetentionConfig
from selfplay.config.reward import (
    CacheConfig,
    EnsembleConfig,
    JudgeConfig,
    MemberConfig,
    RewardConfig,
    RewardSource,
    ShapingConfig,
)
from selfplay.config.run import RunConfig
from selfplay.config.schedule import EndConfig, ScheduleConfig
from selfplay.config.schema import Config
from selfplay.config.service import ServiceConfig
from selfplay.config.suites import SuiteConfig, SuiteGate
from selfplay.config.train import Ema, EveryN, LoraConfig, TrainConfig

__all__ = [
    "BreadthConfig",
    "CacheConfig",
    "ClusterConfig",
    "ColumnsConfig",
    "Config",
    "DepthConfig",
    "Ema",
    "EndConfig",
    "EngineConfig",
    "EnsembleConfig",
    "EvaluateConfig",
    "EveryN",
    "EvolveConfig",
    "GateConfig",
    "GenerateConfig",
    "GuardConfig",
    "JudgeConfig",
    "Limits",
    "LoraConfig",
    "MemberConfig",
    "PairsConfig",
    "PlacementConfig",
    "PolicyConfig",
    "PromptsConfig",
    "PublishConfig",
    "RetentionConfig",
    "RewardConfig",
    "RewardSource",
    "RoleConfig",
    "RunConfig",
    "ScheduleConfig",
    "Section",
    "ServiceConfig",
    "ShapingConfig",
    "SuiteConfig",
    "SuiteGate",
    "SwapConfig",
    "TrainConfig",
    "load",
]
