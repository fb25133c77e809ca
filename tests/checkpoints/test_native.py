import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qat import checkpoints
from qat.artifacts import open_artifact, publish
from qat.errors import ArtifactError
from qat.models import ModelFolder
from qat.quant.architectures import select
from qat.quant.linear import quantized
from tests import tiny

IDS = torch.arange(40).reshape(2, 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def made(teacher, cache, folder):
    return tiny.checkpoint_in(folder / "made", teacher, cache)


@pytest.fixture
def checkpoint(made, tmp_path):
    return shutil.copytree(made, tmp_path / "checkpoint")


def load(folder, teacher):
    return checkpoints.load(folder, teacher, tiny.FP32)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def test_a_checkpoint_comes_back_with_the_same_outputs(checkpoint, teacher, tmp_path):
    first, manifest = load(checkpoint, teacher)
    checkpoints.save(first, tmp_path / "again", checkpoints.heritage(manifest))
    second, again = load(tmp_path / "again", teacher)
    assert torch.allclose(logits(second), logits(first), rtol=1e-4, atol=1e-4)
    assert checkpoints.heritage(again) == checkpoints.heritage(manifest)
    third, _ = load(tmp_path / "again", teacher)
    assert torch.equal(logits(third), logits(second))
    for name, module in quantized(first).items():
        assert torch.equal(module.indices, quantized(second)[name].indices)


def test_saving_a_student_whose_scales_are_not_normalized_keeps_its_outputs(checkpoint, teacher, tmp_path):
    student, manifest = load(checkpoint, teacher)
    with torch.no_grad():
        for module in quantized(student).values():
            module.scale_A.mul_(torch.rand(module.scale_A.shape[1]) + 0.5)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    checkpoints.save(student, tmp_path / "trained", checkpoints.heritage(manifest))
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    reloaded, _ = load(tmp_path / "trained", teacher)
    assert torch.allclose(logits(reloaded), logits(student), rtol=1e-3, atol=1e-3)
    for module in quantized(reloaded).values():
        assert torch.allclose(module.scale_A.norm(dim=0), torch.ones(module.scale_A.shape[1]), atol=1e-5)


def test_the_manifest_says_what_the_layers_are(checkpoint, teacher):
    _, manifest = load(checkpoint, teacher)
    model = teacher.load(torch.float32, tiny.CPU)
    assert checkpoints.layers_of(manifest) == select(model, tiny.QUANT)
    assert manifest["teacher"] == teacher.fingerprint and manifest["kind"] == "checkpoint"
    assert manifest["quant"]["mlp"] == {"bits": 2, "rank": 4}


def test_everything_else_is_the_teachers(checkpoint, teacher):
    student, _ = load(checkpoint, teacher)
    model = teacher.load(torch.float32, tiny.CPU)
    for name, value in model.state_dict().items():
        if "_proj" not in name:
            assert torch.equal(student.state_dict()[name], value), name
    assert len(quantized(student)) == 14 and not any(p.requires_grad for p in student.parameters())


def test_indices_are_stored_in_their_bits(checkpoint, teacher):
    layers = checkpoints.layers_of(open_artifact(checkpoint).manifest)
    numbers = sum(2**layer.format.bits + layer.format.rank * (sum(layer.shape) + 1) for layer in layers)
    content = sum(layer.weights * layer.format.bits // 8 for layer in layers) + 4 * numbers
    size = (checkpoint / checkpoints.FILE).stat().st_size
    assert content < size < content + 20_000  # the names of the tensors


def named_as_before(checkpoint, folder, tensors):
    """A checkpoint with other tensors in its file."""
    with publish(folder, checkpoints.heritage(open_artifact(checkpoint).manifest)) as (scratch, _):
        save_file(tensors, scratch / checkpoints.FILE)
    return folder


def test_a_checkpoint_of_earlier_versions_loads(checkpoint, teacher, tmp_path):
    tensors = load_file(checkpoint / checkpoints.FILE)
    older = {name.replace(".codebook", ".lut"): value for name, value in tensors.items()}
    assert sum(name.endswith(".lut") for name in older) == 14
    student, _ = load(named_as_before(checkpoint, tmp_path / "older", older), teacher)
    assert torch.equal(logits(student), logits(load(checkpoint, teacher)[0]))
    both = named_as_before(checkpoint, tmp_path / "both", tensors | {name: x.clone() for name, x in older.items()})
    with pytest.raises(ArtifactError, match=r"holds model.*\.lut, which does not belong there"):
        load(both, teacher)


def test_another_teacher_is_refused(checkpoint, teacher):
    other = ModelFolder("other", teacher.path, "0123456789ab")
    with pytest.raises(ArtifactError, match=r"other weights than those of other: use model=tiny"):
        load(checkpoint, other)


@pytest.mark.parametrize("place", [0, 0.5, -1])
def test_a_flipped_byte_is_refused(checkpoint, teacher, place):
    path = checkpoint / checkpoints.FILE
    content = bytearray(path.read_bytes())
    content[int(place * len(content)) if place == 0.5 else place] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="altered"):
        load(checkpoint, teacher)


def test_a_file_cut_short_and_a_missing_one_are_refused(checkpoint, teacher):
    path = checkpoint / checkpoints.FILE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="bytes"):
        load(checkpoint, teacher)
    path.unlink()
    with pytest.raises(ArtifactError, match="missing"):
        load(checkpoint, teacher)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path, teacher):
    with pytest.raises(ArtifactError, match="manifest"):
        load(tmp_path, teacher)


@pytest.mark.parametrize("ask", [checkpoints.identity, checkpoints.latent])
def test_a_checkpoint_that_is_not_there_is_said_to_be_missing(tmp_path, ask):
    with pytest.raises(ArtifactError, match=r"there is no checkpoint .*gone: name"):
        ask(tmp_path / "gone")


def test_an_artifact_of_another_kind_is_refused_for_what_it_is(cache, teacher):
    with pytest.raises(ArtifactError, match="not a checkpoint"):
        load(cache.folder, teacher)


def test_saving_again_replaces_the_older_checkpoint(checkpoint, teacher):
    student, manifest = load(checkpoint, teacher)
    with torch.no_grad():
        next(iter(quantized(student).values())).codebook.mul_(2)
    checkpoints.save(student, checkpoint, checkpoints.heritage(manifest))
    assert torch.allclose(logits(load(checkpoint, teacher)[0]), logits(student), rtol=1e-3, atol=1e-3)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint"]
