"""Folders as people have them: the tiny model's with something odd, and small ones of other architectures."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qat.config import ModelConfig, ModelSource
from qat.models import locate

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}


class Folder:
    """A model's folder that can be spoiled."""

    def __init__(self, path, artifacts):
        self.path, self._artifacts = path, artifacts

    def tensors(self, change):
        """Lets `change` work on the tensors by name."""
        tensors = load_file(self.path / "model.safetensors")
        change(tensors)
        save_file(tensors, self.path / "model.safetensors", metadata={"format": "pt"})
        return self

    def settings(self, name="config.json", **values):
        """Sets values of one of its JSON files; None takes one away."""
        path = self.path / name
        described = (json.loads(path.read_text()) if path.is_file() else {}) | values
        path.write_text(json.dumps({key: value for key, value in described.items() if value is not None}))
        return self

    def located(self):
        """As a teacher."""
        return locate(ModelConfig(name="local", source=ModelSource.folder, path=str(self.path)), self._artifacts)

    def load(self, dtype=torch.float32):
        """The teacher's model."""
        return self.located().load(dtype, torch.device("cpu"))


@pytest.fixture
def folder(teacher, tmp_path):
    """A copy of the tiny model's folder, without the manifest that only an artifact has."""
    copy = shutil.copytree(teacher.path, tmp_path / "odd")
    (copy / "manifest.json").unlink()
    return Folder(copy, tmp_path / "artifacts")


@pytest.fixture
def saved(teacher, tmp_path):
    """Saves a model beside the tiny one's tokenizer."""

    def save(model):
        path = tmp_path / "other"
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                draw = torch.Generator().manual_seed(number)
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2 + (parameter.dim() == 1))
        model.save_pretrained(path)
        for file in teacher.path.glob("tokenizer*"):
            shutil.copyfile(file, path / file.name)
        return Folder(path, tmp_path / "artifacts")

    return save


@pytest.fixture
def causal(saved):
    """A small random causal language model of some architecture."""
    return lambda kind, **shape: saved(
        transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**SHAPE | shape))
    )
