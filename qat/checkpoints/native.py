"""Our own checkpoint: the quantized layers of a student, in a folder that says what it belongs to.

It holds what quantization made (packed indices, the parts of formats) and names the teacher that everything
else (embeddings, norms, head) comes from, by fingerprint. Where a student differs from its teacher in
these too, `own.safetensors` has them; where training kept the weights that the quantized ones stand for,
`latent.safetensors` has those; adapters are in PEFT's files (`qat.checkpoints.adapters`).
"""

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from qat import manifests, older, system, tensor_files
from qat.artifacts import MANIFEST, open_artifact, publish, read_json, write_json
from qat.checkpoint_files import REMEDY
from qat.checkpoints import adapters
from qat.checkpoints.own import FILE as OWN
from qat.checkpoints.own import adopt, read_own, write_own
from qat.config import QuantConfig
from qat.errors import ArtifactError
from qat.machine import Machine
from qat.models import ModelFolder
from qat.norms import set_learned
from qat.quant import formats, packing, vocabulary
from qat.quant import latent as latents
from qat.quant.architectures import Layer, recorded, role_of, select
from qat.quant.choice import options
from qat.quant.embedding import empty, put
from qat.quant.linear import Quantized, quantized
from qat.quant.places import matrix, place
from qat.quant.size import bits_per_weight
from qat.tensor_files import Wanted, Writer

# File of the quantized layers; the old name "tables" for codebooks stays, so that older checkpoints load
FILE = "tables.safetensors"
# File of the latent weights `<layer>.latent`, fp32, from which training of indices continues
LATENT = "latent.safetensors"
FITTED = ".fitted"  # end of the name of a note beside a file of quantized layers that is being filled
UNPACKED = 1 << 24  # weights that are unpacked until what malloc holds between tensors is given back

log = logging.getLogger(__name__)


def describe(teacher: ModelFolder, quant: QuantConfig, layers: list[Layer]) -> dict[str, Any]:
    """What a checkpoint's manifest says of its origin and its layers."""
    return {
        "kind": "checkpoint",
        "model": teacher.name,
        "teacher": teacher.fingerprint,
        "quant": recorded(quant),
        "bits_per_weight": round(bits_per_weight(layers), 4),
        "layers": entries(layers),
    }


def entries(layers: list[Layer]) -> dict[str, dict[str, Any]]:
    """The manifest's entries for layers, by name."""
    return {layer.name: {"kind": layer.role, "shape": list(layer.shape), **layer.format.settings()} for layer in layers}


def has_formats(manifest: dict[str, Any], quant: QuantConfig, teacher: ModelFolder) -> bool:
    """True where a checkpoint's layers have the formats asked for, or were chosen under the same budget."""
    own = {layer.name: layer.format for layer in layers_of(manifest)}
    wanted = select(teacher.skeleton(), quant)
    asked, said = recorded(quant), manifest["quant"]
    return (
        own.keys() == {layer.name for layer in wanted}
        and all(own[layer.name] in options(layer.name, layer.role, layer.shape, quant) for layer in wanted)
        and all(asked.get(size) == said.get(size) for size in ("megabytes", "bits"))
    )


def heritage(manifest: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint keeps from the one it was trained from: teacher, preset, bits and layers."""
    shared = ("kind", "model", "teacher", "quant", "bits_per_weight", "layers")
    return {key: manifest[key] for key in shared if key in manifest}


def layers_of(manifest: dict[str, Any]) -> list[Layer]:
    """The layers a manifest lists."""
    return [_layer(name, dict(entry)) for name, entry in manifest["layers"].items()]


def _layer(name: str, entry: dict[str, Any]) -> Layer:
    return Layer(name, entry.pop("kind"), tuple(entry.pop("shape")), formats.of(entry))


def write_layers(modules: dict[str, Quantized], folder: Path) -> None:
    """Writes the quantized layers, their parts normalized; the modules themselves stay as they are."""
    tensors: dict[str, torch.Tensor] = {}
    for name, module in modules.items():
        tensors |= _tensors(name, module)
    save_file(tensors, folder / FILE)


def _tensors(name: str, module: Quantized) -> dict[str, torch.Tensor]:
    """What the file holds of a layer."""
    parts = {f"{name}.{part}": value.float().cpu().contiguous() for part, value in module.normalized().items()}
    bits = module.format.indices(module.outputs, module.inputs).bits
    return {f"{name}.indices": packing.pack(module.indices, bits)} | parts


def _filled(layer: Layer, tensor: Callable[[str], torch.Tensor], device: torch.device | None = None) -> Quantized:
    """A layer's module made of the tensors that a file holds of it, on a device."""
    with device or torch.device("cpu"):
        module = empty(layer)
    packed, indices = tensor(f"{layer.name}.indices").to(module.indices.device), layer.format.indices(*layer.shape)
    module.indices.copy_(packing.unpack(packed, indices.bits, indices.shape))
    module.set_parts({part: tensor(f"{layer.name}.{part}") for part in module.parts()})
    return module.requires_grad_(False)


class Shelf:
    """The file of quantized layers, written layer by layer; its bytes are those of `write_layers`.

    A note beside it says which layers are there for good, so that whoever is killed is gone on with. It has a digest
    of each, of its bytes and figures: where one differs, all layers are made anew.

    Attributes:
        figures: of these layers, by name.
    """

    def __init__(self, path: Path, layers: list[Layer], made_with: dict[str, Any]) -> None:
        """Makes room for these layers, or finds what was put where all was made with the same."""
        self.path, self._made_with, self._note = path, made_with, path.with_name(f".{path.name}{FITTED}")
        self._names = {layer.name: list(_wanted([layer])) for layer in layers}
        known = _noted(self._note)
        wanted = {name: (one.kinds[0], one.shape) for name, one in _wanted(layers).items()}
        self._file = Writer(path, wanted, go_on=known.get("made_with") == made_with)
        self._digests: dict[str, str] = {}
        self.figures: dict[str, dict[str, float]] = {}
        if self._file.begun and self._holds(known):
            self.figures, self._digests = known["figures"], known["digests"]

    def _holds(self, known: dict[str, Any]) -> bool:
        """Whether the file has the layers of a note as they were when it was written."""
        said = known["figures"]
        strange = said.keys() - self._names.keys()
        if not strange and known["digests"] == {name: self._digest(name, said[name]) for name in said}:
            return True
        log.warning("%s is not as it was left: all of it is made anew", self.path)
        return False

    def _digest(self, name: str, figures: dict[str, float]) -> str:
        """SHA-256 of a layer's bytes in the file and its figures."""
        found = hashlib.sha256(json.dumps(figures, sort_keys=True).encode())
        for key in self._names[name]:
            found.update(self._file.get(key).contiguous().flatten().view(torch.uint8).numpy().data)
        return found.hexdigest()

    def put(self, name: str, module: Quantized) -> None:
        """Writes a layer, its parts normalized; the module stays as it is."""
        for key, tensor in _tensors(name, module).items():
            self._file.put(key, tensor)

    def note(self, figures: dict[str, dict[str, float]]) -> None:
        """Says that layers which were put stay, with their figures."""
        self._file.flush()
        self.figures |= figures
        self._digests |= {name: self._digest(name, said) for name, said in figures.items()}
        write_json(self._note, {"made_with": self._made_with, "figures": self.figures, "digests": self._digests})

    def get(self, layer: Layer) -> Quantized:
        """A layer that was written, in host memory."""
        return _filled(layer, self._file.get)

    def complete(self) -> None:
        """Removes the note: nobody goes on with what has all."""
        self._note.unlink(missing_ok=True)

    def discard(self) -> None:
        """Removes the file and its note."""
        self.path.unlink()
        self.complete()


def _noted(note: Path) -> dict[str, Any]:
    """What a note says; nothing where it cannot be read as one."""
    try:
        found = read_json(note)
        manifests.FITTED(found, "")
    except (ArtifactError, manifests.Wrong):
        return {}
    return found


def save(model: PreTrainedModel, folder: Path, description: dict[str, Any]) -> None:
    """Publishes a student's quantized layers as a checkpoint at `folder`, replacing an older one there."""
    with publish(folder, dict(description)) as (scratch, _):
        write(model, scratch)


def write(model: PreTrainedModel, folder: Path) -> None:
    """Writes a student's part of a checkpoint into a folder that is not published yet."""
    write_layers(quantized(model), folder)
    write_own(model, folder)
    adapters.write(model, folder)
    if latents := _latents(model):
        save_file({key: value.float().cpu().contiguous() for key, value in latents.items()}, folder / LATENT)


def load(folder: Path, teacher: ModelFolder, machine: Machine) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The student of a checkpoint folder, and the checkpoint's manifest.

    Raises:
        ArtifactError: the files are damaged or no checkpoint's, or the checkpoint belongs to another teacher.
    """
    manifest = check(folder, teacher)
    layers = layers_of(manifest)
    tensors = tensor_files.read(folder / FILE, _wanted(layers), REMEDY, names=older.names)
    model = teacher.load(machine.dtype, machine.device)
    unpacked = 0
    for layer in layers:
        put(model, layer.name, _filled(layer, tensors.__getitem__, machine.device))
        unpacked += layer.weights
        if unpacked > UNPACKED:
            system.trim()
            unpacked = 0
    own = read_own(folder / OWN, model, REMEDY) if _has(folder, manifest, OWN) else {}
    adopt(model, own)
    set_learned(model, own)
    if _has(folder, manifest, adapters.FILE):
        adapters.read(model, folder, REMEDY)
    return model, manifest


def check(folder: Path, teacher: ModelFolder) -> dict[str, Any]:
    """What a checkpoint of this teacher says of itself.

    Raises:
        ArtifactError: as `load`.
    """
    manifest = opened(folder)
    if manifest.get("teacher") != teacher.fingerprint:
        raise ArtifactError(
            f"{folder} was made from {manifest.get('model')} with other weights than those of {teacher.name}:"
            f" use model={manifest.get('model')} and the same revision"
        )
    _check_layers(folder, manifest, teacher)
    return manifest


def latent(folder: Path) -> dict[str, torch.Tensor]:
    """The latent weights [O, I] by layer; empty where training kept none."""
    manifest = opened(folder)
    if not _has(folder, manifest, LATENT):
        return {}
    wanted = {f"{layer.name}.latent": Wanted(("F32",), layer.shape) for layer in layers_of(manifest)}
    found = tensor_files.read(folder / LATENT, wanted, REMEDY, some=True)
    return {name.removesuffix(".latent"): weight for name, weight in found.items()}


def add_latents(model: PreTrainedModel, known: dict[str, torch.Tensor], teacher: ModelFolder) -> None:
    """Sets the latent weights of every quantized layer: the known ones, else new ones near the teacher's."""
    layers = quantized(model)
    original = None if known.keys() >= layers.keys() else teacher.load(torch.float32, torch.device("cpu"))
    for name, layer in layers.items():
        device, value = layer.indices.device, known.get(name)
        if value is None and original is not None:
            value = latents.between(layer, matrix(original, name).to(device))
        layer.latent = torch.nn.Parameter(cast(torch.Tensor, value).to(device, torch.float32), requires_grad=False)


def _latents(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    layers = quantized(model).items()
    return {f"{name}.latent": layer.latent.detach() for name, layer in layers if layer.latent is not None}


def opened(folder: Path) -> dict[str, Any]:
    """What a checkpoint folder says of itself, its files checked."""
    found = open_artifact(folder).manifest
    if found.get("kind") != "checkpoint":
        raise ArtifactError(f"{folder} is not a checkpoint: give a folder such as checkpoints/best of a run")
    if FILE not in found["files"]:
        raise ArtifactError(f"{folder / MANIFEST} lists no {FILE}, without which it is no checkpoint: {REMEDY}")
    layers = layers_of(found)
    for layer in layers:
        if misfit := layer.format.misfit(*layer.shape):
            said, name = f"{misfit.setting} {layer.format.settings()[misfit.setting]}", ascii(layer.name)[1:-1]
            raise ArtifactError(f"{folder / MANIFEST} says {said} of {name}, which {misfit.why}: {REMEDY}")
    if abs(found["bits_per_weight"] - bits_per_weight(layers)) > 1e-4:
        raise ArtifactError(f"{folder / MANIFEST} says other bits per weight than its layers have: {REMEDY}")
    return found


def _has(folder: Path, manifest: dict[str, Any], name: str) -> bool:
    """Whether a checkpoint has an optional file.

    Raises:
        ArtifactError: the file exists, but the manifest does not list it.
    """
    if name not in manifest["files"] and (folder / name).exists():
        raise ArtifactError(f"{folder / name} is not in the {MANIFEST} beside it, and is none of its files: remove it")
    return name in manifest["files"]


def _wanted(layers: list[Layer]) -> dict[str, Wanted]:
    """The tensors that `FILE` must hold; it may hold no others."""
    wanted: dict[str, Wanted] = {}
    for layer in layers:
        wanted[f"{layer.name}.indices"] = Wanted(("U8",), (packing.packed_bytes(layer.weights, layer.format.bits),))
        for name, part in layer.format.parts(*layer.shape).items():
            wanted[f"{layer.name}.{name}"] = Wanted(("F32",), part.shape)
    return wanted


def _check_layers(folder: Path, manifest: dict[str, Any], teacher: ModelFolder) -> None:
    """Checks that the layers are matrices of the teacher."""
    layers = layers_of(manifest)
    outer = any(layer.role in vocabulary.ROLES for layer in layers)
    roles = vocabulary.roles(teacher.skeleton()) if outer else {}
    for layer in layers:
        found = place(teacher.skeleton(), layer.name)
        there = None if found is None else found.shape
        if there != layer.shape or (roles.get(layer.name) or role_of(layer.name)) != layer.role:
            raise ArtifactError(
                f"{folder / MANIFEST} lists {ascii(layer.name)[1:-1]}, {layer.role} {list(layer.shape)}, and"
                f" {teacher.name} has {'no such layer' if there is None else list(there)} there: {REMEDY}"
            )
