"""Training: which layers learn, from which loss, and how."""

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from qat.config.keys import COLD, HOT, key, section
from qat.config.quant import QuantConfig


class LossKind(Enum):
    """The loss: of imitation, or of answers that are given."""

    topk_kl = "KL over the cached top-k, both sides renormalised"
    bucket_kl = "KL over the cached top-k and one bucket for all other tokens"
    full_kl = "KL over the whole vocabulary, the teacher running beside the student"
    sft = "cross-entropy of answers, of which text knows the tokens"

    @property
    def needs_tail(self) -> bool:
        """Whether it looks at the probability outside the cached tokens, which a cache knows at temperature 1."""
        return self is LossKind.bucket_kl

    @property
    def needs_teacher(self) -> bool:
        """Whether it learns from the teacher beside the student, and not from what a cache says."""
        return self is LossKind.full_kl

    @property
    def needs_answers(self) -> bool:
        """Whether it learns from the tokens of answers, and from nothing that a teacher says."""
        return self is LossKind.sft

    @property
    def needs_targets(self) -> bool:
        """Whether it learns from what a cache keeps of the teacher at training rows."""
        return not (self.needs_teacher or self.needs_answers)


@dataclass
class ModeConfig:
    """Which layers learn."""

    name: str = MISSING
    mlp: bool = key(MISSING, "gate, up and down learn")
    attn: bool = key(MISSING, "q, k, v and o learn")
    embed: bool = key(False, "embedding and head learn too, where they are quantized to fewer than 8 bits")
    rank: int = key(0, "of low-rank adapters, which learn in place of these layers' own parts; 0 has none", low=0)
    alpha: float = key(16.0, "what adapters add counts alpha / rank times", above=0)


@dataclass
class LossConfig:
    """The loss; `temperature` divides the logits of both models."""

    name: str = MISSING
    kind: LossKind = MISSING
    temperature: float = key(1.0, "of both models; KL is multiplied by its square", low=COLD, high=HOT)
    hard: float = key(0.0, "weight of the cross-entropy on the teacher's first choice, which is added", low=0)


@dataclass
class LearnConfig:
    """What learns: the rate of each kind as a multiple of `train.lr`; 0 does not learn."""

    scales: float = key(1.0, "A, B and magnitudes of codebooks; scales and shifts of grids", low=0)
    codebooks: float = key(1.0, "codebook entries", low=0)
    latent: float = key(
        0.0, "weights whose nearest values the indices are: of 2 bits, those of more bits learn slower", low=0
    )
    norms: float = key(0.0, "weights of the normalisation layers", low=0)


@dataclass
class TrainConfig:
    """Distillation. The result never depends on the machine: `batch_size` is global."""

    steps: int = key(40, "updates", low=1)
    batch_size: int = key(16, "sequences a step", low=1)
    lengths: list[int] = key([], "tokens of the pieces into which sequences of a step are cut; [] cuts none")
    shares: list[float] = key([], "of a step's sequences, for each of train.lengths; [] shares evenly")
    lr: float = key(1e-3, "relative to each tensor's root mean square; of adapters as it is", above=0)
    learn: LearnConfig = section(LearnConfig)
    warmup: float = key(0.1, "share of the steps in which the rate rises", low=0, high=1)
    weight_decay: float = key(0.0, "decoupled, times the learning rate", low=0)
    grad_clip: float = key(1.0, "largest gradient norm", above=0)
    eval_every: int = key(20, "steps between evaluations on the held-apart split", low=1)
    save_every: int = key(100, "steps between states from which run.resume goes on", low=1, neutral=True)
    keep: int = key(2, "states kept, the newest", low=1, neutral=True)
    snap_fp16: bool = key(False, "the parts of formats pass through fp16, as on a Neural Engine")


@dataclass
class FirstConfig:
    """A student at more bits, trained first; the one that is asked for is then converted from it."""

    quant: QuantConfig = section(QuantConfig)
    mode: ModeConfig = section(ModeConfig)
    train: TrainConfig = section(TrainConfig)
