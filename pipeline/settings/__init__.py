"""The settings: one typed, frozen, printable object, a section for each part of the work.

Reading them from a file, and telling what is wrong there, is in `pipeline/config.py`. Nothing here
imports torch or Ray, so that `plan` and a fully cached run answer at once.
"""

from pipeline.settings.config import CLIENT, ClusterConfig, Config, StorageConfig
from pipeline.settings.data import CACHE_BYTES, LABEL_FIELD, NOT_OF_THE_DATA_SET, DataConfig
from pipeline.settings.evaluate import EvaluateConfig, FeaturesConfig
from pipeline.settings.model import DiffusionConfig, ModelConfig
from pipeline.settings.notify import NotifyConfig
from pipeline.settings.retrain import PromoteConfig, RetrainConfig
from pipeline.settings.section import Section
from pipeline.settings.train import NOISE_GROUP, TrainConfig
from pipeline.settings.tune import SpaceConfig, TuneConfig

__all__ = [
    "CACHE_BYTES",
    "CLIENT",
    "LABEL_FIELD",
    "NOISE_GROUP",
    "NOT_OF_THE_DATA_SET",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "DiffusionConfig",
    "EvaluateConfig",
    "FeaturesConfig",
    "ModelConfig",
    "NotifyConfig",
    "PromoteConfig",
    "RetrainConfig",
    "Section",
    "SpaceConfig",
    "StorageConfig",
    "TrainConfig",
    "TuneConfig",
]
