"""The recipes of docs/EXTENDING.md: their code, put into a copy of the project, does what they say."""

import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qat.config import QuantConfig, WeightConfig
from qat.errors import ConfigError
from qat.quant.architectures import select
from tests import family, launching

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(
    r"^(?:`(?P<path>[\w/.]+)`[^\n]*\n\n)?(?P<fence>`{3,})(?P<language>\w+)\n(?P<code>.*?)^(?P=fence)\n", re.M | re.S
)
NUMBERS = {"One": 1, "Two": 2, "Three": 3, "Four": 4}
PARTS = ("codebook", "scale_A", "scale_B", "rank_magnitude")


def recipe(title):
    """The blocks under a heading, and how many files of the package its first line counts."""
    text = (ROOT / "docs" / "EXTENDING.md").read_text(encoding="utf-8")
    (section,) = (part for part in re.split(r"^(?=## )", text, flags=re.M) if part.startswith(f"## {title}\n"))
    assert "```" not in BLOCK.sub("", section)
    return [found.groupdict() for found in BLOCK.finditer(section)], NUMBERS[section.split("\n")[2].split(" file")[0]]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What the tiny job makes before it trains, for recipes that change none of it."""
    outputs = tmp_path_factory.mktemp("made") / "outputs"
    assert launching.Launch(outputs, "+debug=tiny", "stage=convert").ended()[::2] == (0, "")
    return outputs / "artifacts"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the project, in which a recipe is followed to its end."""
    for folder in ("qat", "conf"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copyfile(ROOT / "launch.py", tmp_path / "launch.py")
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)

    def follow(title, before="pass", made=None):
        if made:
            shutil.copytree(made, tmp_path / "outputs" / "artifacts")
        blocks, files = recipe(title)
        written = [block for block in blocks if block["path"]]
        assert len([block for block in written if block["path"].startswith("qat/")]) == files
        assert {block["path"].split("/")[0] for block in written} <= {"qat", "conf"}
        for block in written:
            put(tmp_path / block["path"], block["language"], block["code"])
        lines = [line for block in blocks if block["language"] == "sh" for line in block["code"].splitlines()]
        assert lines and all(line.startswith("python launch.py ") for line in lines)
        words = shlex.split(" ';' ".join(line.removeprefix("python launch.py") for line in lines))
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = launching.python("-c", launching.of_a_copy(tmp_path, "launch.py", before), *words, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        return tmp_path

    return follow


def put(path, language, code):
    """A new file, or the changes of one: each replaces the one place in which its lines stand."""
    if language != "diff":
        assert not path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code, encoding="utf-8")
        return
    text = path.read_text(encoding="utf-8")
    for change in code.split("@@\n"):
        before, after = ("".join(x[1:] for x in change.splitlines(True) if x[0] in kept) for kept in (" -", " +"))
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    path.write_text(text, encoding="utf-8")


def result(folder):
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def indices(packed, bits, shape):
    """A bit stream, most significant bit first, as whole numbers."""
    stream = np.unpackbits(packed.numpy())[: bits * math.prod(shape)].reshape(-1, bits)
    return (stream @ (1 << np.arange(bits)[::-1])).reshape(shape)


def teacher(project):
    (file,) = project.glob("outputs/artifacts/models/*/model.safetensors")
    return load_file(file)


def changed(file):
    """A file of the copy as a module of this project."""
    spec = importlib.util.spec_from_file_location(f"changed_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_a_weight_format(project, made):
    folder = project("A weight format", made=made)
    quant = result(folder / "outputs" / "SR-001")["quant"]
    assert quant["mlp_bits_per_weight"] == 2 + 16 / 32
    weights, stored = teacher(folder), load_file(folder / "outputs" / "ternary" / "packed.safetensors")
    scales = [name.removesuffix(".scale") for name in stored if name.endswith("_proj.scale")]
    assert len(scales) == quant["mlp_layers"] > 0
    for layer in scales:
        weight = weights[f"{layer}.weight"].double().numpy()
        index = indices(stored[f"{layer}.indices"], 2, weight.shape)
        assert set(np.unique(index)) == {0, 1, 2}
        student = (index - 1.0) * stored[f"{layer}.scale"].double().numpy().repeat(32, axis=1)
        assert np.linalg.norm(student - weight) < 0.7 * np.linalg.norm(weight)
    format, draw = changed(folder / "qat/quant/formats/ternary.py").Ternary(2, 32), torch.Generator().manual_seed(0)
    weight, grad = torch.randn(2, 3, 8, 64, generator=draw)
    fitted = format.start(weight, torch.ones(3, 64), None)
    better = format.alternated(fitted, weight, torch.ones(3, 64))
    errors = [(weight - format.weight(one.index_NOI, one.operands)).norm() for one in (better, fitted)]
    assert errors == sorted(errors) and errors[1] < 0.45 * weight.norm()  # of normal numbers the best has 0.44
    scale = fitted.operands["scale"].half().float().requires_grad_()
    format.weight(fitted.index_NOI, {"scale": scale}).backward(grad)
    found = format.gradients(grad, fitted.index_NOI, format.operands({"scale": scale.detach()}))
    assert torch.allclose(found["scale"], scale.grad, rtol=2e-3, atol=1e-3)  # autograd rounds to fp16


def test_a_loss(project, made):
    folder = project("A loss", made=made)
    draw = np.random.default_rng(0)
    student, theirs = draw.normal(0, 3, (2, 5, 8))
    p, q = (np.exp(x / 2) / np.exp(x / 2).sum(-1, keepdims=True) for x in (theirs, student))
    entropy = [-(x * np.log(x)).sum(-1) for x in ((p + q) / 2, p, q)]
    found = changed(folder / "qat/distill/loss.py").topk_js(torch.tensor(student), torch.tensor(theirs), 2.0)
    np.testing.assert_allclose(found, 4 * (entropy[0] - (entropy[1] + entropy[2]) / 2), rtol=1e-9)
    run = folder / "outputs" / "SR-001"
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert result(run)["status"] == "complete" and losses


def test_an_architecture(project, tmp_path):
    family.register()
    model = family.write(tmp_path / "family")
    quant = QuantConfig("q", mlp=WeightConfig(2, 4), attn=WeightConfig(4, 4))
    with pytest.raises(ConfigError, match=r"no rule of qat/quant/architectures\.py .*layers\.\*\.looker\.ask"):
        select(model, quant)
    folder = project("An architecture", f"sys.path.append({str(ROOT)!r}); from tests import family; family.register()")
    found = result(folder / "outputs" / "SR-001")
    assert (found["quant"]["attn_layers"], found["quant"]["mlp_layers"], found["quant"]["dense"]) == (8, 6, {})
    (moments,) = {layer.source for layer in changed(folder / "qat/quant/architectures.py").select(model, quant)[:3]}
    assert moments == "model.layers.0.looker.ask"


def test_a_text_source(project):
    folder = project("A text source")
    (file,) = folder.glob("outputs/artifacts/documents/*/documents.jsonl")
    texts = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(texts) == 24
    for text in texts:
        prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        assert text.startswith("#") and len(re.findall(r"^#", prose, re.M)) == 1, text


def test_an_exporter(project, made):
    folder = project("An exporter", made=made)
    (file,) = folder.glob("outputs/artifacts/checkpoints/*/tables.safetensors")
    manifest, parts = json.loads((file.parent / "manifest.json").read_text()), load_file(file)
    with np.load(folder / "outputs" / "numbers" / "weights.npz") as arrays:
        assert set(arrays) >= {f"{layer}.weight" for layer in manifest["layers"]}
        for layer, said in manifest["layers"].items():
            index = indices(parts[f"{layer}.indices"], said["bits"], said["shape"])
            codebook, A, B, magnitude = (parts[f"{layer}.{part}"].double().numpy() for part in PARTS)
            weight = codebook[index] * ((A * magnitude) @ B)
            np.testing.assert_allclose(arrays[f"{layer}.weight"], weight, rtol=1e-4, atol=1e-7)
