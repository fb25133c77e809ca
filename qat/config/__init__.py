"""What a run can be told: one dataclass a config group, nothing computed.

Hydra composes `conf/` against these schemas. A field here is a key on the command line
(`train.lr=3e-4`); a class here is a group (`quant=q2a4`) or, for `train`, `evaluate`,
`chat` and `run`, a section without options. A key says its comment, its bounds and whether it can change a result
where it stands (`qat.config.keys`); what several of them ask for together is looked at in `qat.cli.checks`. So
importing this package stays free of torch and transformers.
"""

from dataclasses import dataclass

from qat.config.cache import CacheConfig, Packing, Tail
from qat.config.data import DataConfig, DataPart, DataSource, Start
from qat.config.evaluate import ChatConfig, EvaluateConfig
from qat.config.export import FORMATS, ExportConfig, ExportType, ScaleForm
from qat.config.instance import Device, InstanceConfig, Precision
from qat.config.keys import as_plain, key, section
from qat.config.model import CheckpointConfig, ModelConfig, ModelSource
from qat.config.quant import (
    ROLES,
    SETTINGS,
    USUAL_GROUPS,
    ConvertConfig,
    KMeansBackend,
    KMeansConfig,
    Levels,
    QuantConfig,
    WeightConfig,
    WeightFormat,
)
from qat.config.run import RunConfig, SweepConfig
from qat.config.stage import Stage
from qat.config.store import StoreConfig, StoreKind, TrackerConfig, TrackerKind
from qat.config.train import FirstConfig, LearnConfig, LossConfig, LossKind, ModeConfig, TrainConfig
from qat.installation import CONF

__all__ = [
    "CONF",
    "FORMATS",
    "ROLES",
    "SETTINGS",
    "USUAL_GROUPS",
    "CacheConfig",
    "ChatConfig",
    "CheckpointConfig",
    "Config",
    "ConvertConfig",
    "DataConfig",
    "DataPart",
    "DataSource",
    "Device",
    "EvaluateConfig",
    "ExportConfig",
    "ExportType",
    "FirstConfig",
    "InstanceConfig",
    "KMeansBackend",
    "KMeansConfig",
    "LearnConfig",
    "Levels",
    "LossConfig",
    "LossKind",
    "ModeConfig",
    "ModelConfig",
    "ModelSource",
    "Packing",
    "Precision",
    "QuantConfig",
    "RunConfig",
    "ScaleForm",
    "Stage",
    "Start",
    "StoreConfig",
    "StoreKind",
    "SweepConfig",
    "Tail",
    "TrackerConfig",
    "TrackerKind",
    "TrainConfig",
    "WeightConfig",
    "WeightFormat",
    "as_plain",
]


@dataclass
class Config:
    """One run, whole."""

    stage: Stage = Stage.run
    seed: int = key(0, "of training: which rows a step reads; text has its own, data.seed", low=0, high=2**32 - 1)
    outputs: str = key("outputs", "runs, sweeps and artifacts all land below it", neutral=True)
    model: ModelConfig = section(ModelConfig)
    teacher: ModelConfig | None = key(None, "a larger model of the same tokens to learn from; null is the model itself")
    data: DataConfig = section(DataConfig)
    quant: QuantConfig = section(QuantConfig)
    kmeans: KMeansConfig = section(KMeansConfig)
    cache: CacheConfig = section(CacheConfig)
    mode: ModeConfig = section(ModeConfig)
    loss: LossConfig = section(LossConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    instance: InstanceConfig = section(InstanceConfig, neutral=True)
    store: StoreConfig = section(StoreConfig, neutral=True)
    tracker: TrackerConfig = section(TrackerConfig, neutral=True)
    export: ExportConfig = section(ExportConfig, stage=Stage.export)
    convert: ConvertConfig = section(ConvertConfig)
    train: TrainConfig = section(TrainConfig)
    first: FirstConfig | None = key(None, "stage=run from the teacher: what is trained before")
    evaluate: EvaluateConfig = section(EvaluateConfig, stage=Stage.evaluate)
    chat: ChatConfig = section(ChatConfig, stage=Stage.chat)
    run: RunConfig = section(RunConfig, neutral=True)
    sweep: SweepConfig = section(SweepConfig, neutral=True)
