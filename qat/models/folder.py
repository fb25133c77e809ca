"""A teacher on disk, and the two ways it is asked: for logits and for text."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from qat import model_files
from qat.forward import OWN, Found, use
from qat.models import padding, reading, streamed, tokenizers
from qat.peaks import COMPARISON, peaks
from qat.quant.architectures import NUMBER

FEW = 1 << 30  # bytes of all decoder layers up to which a model is held whole
SOUND: set[tuple[str, torch.dtype]] = set()  # models that this process has checked, by fingerprint and type


@dataclass(frozen=True)
class ModelFolder:
    """A teacher on disk.

    Attributes:
        name: what a person calls it.
        path: a Hugging Face folder with plain weights of a causal language model.
        fingerprint: identifies its weights in every key built on them.
        text: identifies its tokenizer where the fingerprint does not.
        spoken: another folder whose tokenizer and chat template it takes, of the same tokens (`qat.models.pairing`).
        rows: of embedding and head that are loaded, the first of those in its files; None loads all.
        stated: its `config.json` where the folder is yet to be made; None reads that of the folder.
        found: what was found out about computing it (`qat.fidelity`).
    """

    name: str
    path: Path
    fingerprint: str
    text: str = ""
    spoken: Path | None = None
    rows: int | None = None
    stated: PreTrainedConfig | None = field(default=None, compare=False, repr=False)
    found: Found = field(default_factory=Found, compare=False, repr=False)
    _loaded: "WeakValueDictionary[Any, PreTrainedModel]" = field(
        default_factory=WeakValueDictionary, init=False, compare=False, repr=False
    )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer with its chat template, padding on the left as generation needs.

        Raises:
            ConfigError: there is none, or none that goes with the model.
        """
        return tokenizers.load(self.spoken or self.path, self.ends())

    def has_tokenizer(self) -> bool:
        """Whether the folder has a tokenizer."""
        return model_files.has_tokenizer(self.path)

    def ends(self) -> tuple[int, ...]:
        """The tokens after which a text is over, whichever file names them, ascending.

        Files of a chat model often disagree: one names the end of a document, another that of an answer.
        """
        return self._ends

    def load(self, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """The model for inference, without gradients and without a key-value cache unless asked for.

        It is computed as was last found right for that type and device, else by its own code with eager attention.

        Raises:
            ConfigError: it does not lie there whole, or a number of it is none, or none in this type.
        """
        model = self._cut(reading.read(self.path, dtype, attn_implementation=OWN.attention))
        use(model, self.found.passes.get((dtype, device.type), OWN))
        cast(nn.Module, model).to(device)
        model.eval().requires_grad_(False)
        if (self.fingerprint, dtype) not in SOUND:
            reading.refuse_not_finite(self.path, model)
            reading.refuse_foresight(self.path, model)
            SOUND.add((self.fingerprint, dtype))
        return model

    def shared(self, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """As `load`, but one and the same for all who have it at a time: sources of a text, say, that take turns."""
        key = dtype, str(device)
        model = self._loaded.get(key)
        if model is None:
            model = self._loaded[key] = self.load(dtype, device)
        return model

    def stream(
        self, dtype: torch.dtype, device: torch.device, like: PreTrainedModel | None = None
    ) -> PreTrainedModel:
        """The model for inference, its decoder layers read when they are computed (`qat.models.streamed`).

        One whose layers are few bytes, or cannot be computed one after the other, is loaded; `unstreamed` says why.

        Args:
            dtype: of its numbers.
            device: computes.
            like: such a model of the same type and device, with which it shares all but decoder layers.

        Raises:
            ConfigError: as `load`.
        """
        if self.unstreamed(dtype, device):
            return self.load(dtype, device)
        rest = True if like is None or streamed.stream_of(like) is None else like
        model = self._cut(streamed.open_stream(self.path, self._stored, dtype, device, rest))
        use(model, self.found.passes.get((dtype, device.type), OWN))
        return model

    def matrices(self) -> Callable[[str], torch.Tensor]:
        """Gives matrices [O, I] of the model by name, in fp32 in host memory, read when they are asked for.

        Raises:
            ConfigError: as `load`.
        """
        cpu = torch.device("cpu")
        try:
            few = self.small(torch.float32)
            model = None if few else streamed.open_stream(self.path, self._stored, torch.float32, cpu, rest=False)
        except NotImplementedError:
            model = None
        return partial(streamed.matrix_of, model or self.load(torch.float32, cpu))

    def small(self, dtype: torch.dtype) -> bool:
        """Whether all decoder layers together are few bytes: then reading them again saves next to nothing."""
        inside = sum(weights for name, weights in self._sizes.items() if NUMBER.search(name))
        return inside * dtype.itemsize <= FEW

    def unstreamed(self, dtype: torch.dtype, device: torch.device) -> str:
        """Why the model's decoder layers cannot be read one at a time; empty where they can.

        Raises:
            ConfigError: as `load`.
        """
        known, key = self.found.streams, (dtype, device.type)
        if key not in known:
            known[key] = "all of them are few bytes" if self.small(dtype) else self._unstreamed(dtype, device)
        return known[key]

    def _unstreamed(self, dtype: torch.dtype, device: torch.device) -> str:
        try:
            model = self._cut(streamed.open_stream(self.path, self._stored, dtype, device))
        except NotImplementedError as error:
            return str(error)
        with peaks.phase(COMPARISON):
            alone = streamed.inspect(self.path, model)
        SOUND.add((self.fingerprint, dtype))
        return "" if alone else "more than hidden states passes from one decoder layer to the next"

    def skeleton(self) -> PreTrainedModel:
        """The model without memory behind it: names and shapes."""
        return self._skeleton

    def vocab_size(self) -> int:
        """Rows of the head that are loaded, which may be more than the tokenizer has tokens."""
        return int(self.settings().get_text_config().vocab_size)

    def context(self) -> int | None:
        """Tokens that the model was made to see at once; None where its config.json names no such number."""
        longest = getattr(self.settings().get_text_config(), "max_position_embeddings", None)
        return None if longest is None else int(longest)

    def settings(self) -> PreTrainedConfig:
        """Its `config.json`, of the rows that are loaded."""
        return self._settings

    def _cut(self, model: PreTrainedModel) -> PreTrainedModel:
        if self.rows is not None:
            padding.cut(self.path, model, self.skeleton())
        return model

    @cached_property
    def _stored(self) -> PreTrainedConfig:
        return self.stated or reading.settings(self.path)

    @cached_property
    def _settings(self) -> PreTrainedConfig:
        return self._stored if self.rows is None else padding.described(self._stored, self.rows)

    @cached_property
    def _skeleton(self) -> PreTrainedModel:
        return reading.skeleton(self.settings(), self.path)

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {name: parameter.numel() for name, parameter in self.skeleton().named_parameters()}

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        # As the files have them: a configuration's class has an end of its own where its file names none.
        files = [model_files.read(self.path / name) for name in (model_files.CONFIG, model_files.GENERATION)]
        named = [described.get("eos_token_id") for described in files]
        if self.has_tokenizer():
            named.append(tokenizers.load(self.path).eos_token_id)
        flat = [token for entry in named for token in (entry if isinstance(entry, list | tuple) else [entry])]
        return tuple(sorted({token for token in flat if isinstance(token, int) and 0 <= token < self.vocab_size()}))


@torch.inference_mode()
def generate(
    model: PreTrainedModel, prompts_BT: torch.Tensor, settings: GenerationConfig, **extras: Any
) -> torch.Tensor:
    """Token ids [B, T'] written after prompts that are padded on the left with `settings.pad_token_id`.

    Args:
        model: any causal language model.
        prompts_BT: token ids [B, T].
        settings: length, sampling, end and padding tokens.
        extras: further arguments of transformers' `generate`, such as `attention_mask` or a streamer.
    """
    # An index copies the last position; the slice that `generate` would take stays strided, for which torch
    # multiplies every sequence by a copy of the head of its own: gigabytes, and about half
    # of the time of a prefill on a CPU.
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        extras["logits_to_keep"] = torch.tensor([-1], device=prompts_BT.device)
    with _by(model, settings):
        written = cast(Any, model).generate(prompts_BT, generation_config=settings, **extras)
    return cast(torch.Tensor, written)[:, prompts_BT.shape[1] :]


@contextmanager
def _by(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Keeps transformers from taking what `settings` leave open (penalties, beams) from the model's folder."""
    before, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = before
