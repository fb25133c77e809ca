"""Spends a budget: chooses the formats of all layers after the cost of each is known.

The costs are an artifact, which budgets of any size share. A choice is a configuration like one that a person wrote
(`quant.layers`), and what follows knows no other.
"""

import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from torch import nn

from qat import checkpoints, json_objects, manifests
from qat.artifacts import Artifact, obtain, write_json, write_text
from qat.cache.reader import CacheReader
from qat.config import ROLES, QuantConfig, WeightConfig
from qat.console import table
from qat.conversion.costs import costs as measure
from qat.errors import ArtifactError
from qat.peaks import CONVERSION, peaks
from qat.quant import budget
from qat.quant.architectures import NUMBER, Layer, recorded, select
from qat.quant.budget import LEFT, MEGA, Costs
from qat.quant.formats import Format
from qat.quant.size import bits_per_weight, file_bytes, model_bits_per_weight
from qat.shaping import shaping
from qat.stages.source import Source, calibration
from qat.stages.workspace import Workspace, start_folder

COSTS = "costs.json"  # file in the artifact: cost in nats by layer and format
FILE = "choice.json"  # file with the choice, in the run's folder and beside the weights converted by it
OPTION = "quant.yaml"  # file with the same choice as an option of `quant`


def make(work: Workspace, cached: Artifact) -> Workspace:
    """The run with formats in place of a budget, which it shows and writes into its folder; any other as it is."""
    quant, model = work.config.quant, work.model.skeleton()
    if not quant.candidates:
        return work
    layers = select(model, quant)
    choices = [(layer, formats) for layer in layers if len(formats := budget.formats_of(layer, quant)) > 1]
    with work.timed("choose"):
        costs = _known(work, cached, choices) if choices else {}
        chosen = budget.chosen(quant, layers, model, costs)
    _show(chosen, costs, model, budget.budget(quant, model).said)
    spelled = spell(quant, chosen)
    write_json(work.run.folder / FILE, described(spelled, chosen, costs))
    write_text(work.run.folder / OPTION, option(spelled, work.run.result["run_id"]))
    work.run.result["paths"]["choice"] = str(work.run.folder / OPTION)
    return replace(work, config=replace(work.config, quant=spelled))


def keep(work: Workspace, folder: Path) -> None:
    """Puts the choice that a conversion follows, if it does, beside what was converted so."""
    if work.config.quant.megabytes or work.config.quant.bits:
        shutil.copyfile(work.run.folder / FILE, folder / FILE)


def spell(quant: QuantConfig, layers: list[Layer]) -> QuantConfig:
    """A configuration that names the format of every layer, and the budget that these keep."""
    size = f"{quant.megabytes:g}mb" if quant.megabytes is not None else f"{quant.bits:g}b"
    left = {pattern: None for pattern, settings in quant.layers.items() if settings is None}
    by_name = {layer.name: configured(layer.format) for layer in layers}
    made = replace(quant, name=f"{quant.name}_{size}", layers=left | by_name, candidates=[])
    for role in ROLES:
        setattr(made, role, None)
    return made


def described(quant: QuantConfig, layers: list[Layer], costs: Costs) -> dict[str, Any]:
    """A choice as JSON: each layer's format with what it costs before training, in nats a token."""
    known = {layer.name: costs.get(layer.name, {}).get(layer.format) for layer in layers}
    return {
        "quant": quant.name,
        "layers": {layer.name: layer.format.settings() | {"nats": known[layer.name]} for layer in layers},
    }


def option(quant: QuantConfig, run: str) -> str:
    """A choice as an option of `quant`, to be edited and used again."""
    said = recorded(quant)
    head = f"# chosen by {run}; as quant/<name>.yaml in a folder of yours: --config-dir <folder> quant=<name>\n"
    chosen = {"name": said["name"], "layers": said["layers"]}
    return head + yaml.safe_dump(chosen, default_flow_style=None, sort_keys=False, width=math.inf)


def _known(work: Workspace, cached: Artifact, choices: list[tuple[Layer, list[Format]]]) -> Costs:
    """What every layer costs in every format that it may have, from `outputs/artifacts` when it is already there."""
    config, start = work.config, start_folder(work.config.checkpoint)
    inputs = {
        "teacher": work.model.fingerprint,
        "cache": cached.key,
        "choices": {layer.name: [label(one) for one in formats] for layer, formats in choices},
        "kmeans": config.kmeans.backend.name,
        "convert": {key: value for key, value in shaping(config.convert).items() if key not in ("name", "passes")},
        "checkpoint": checkpoints.identity(start) if start else None,
    }

    def fill(folder: Path) -> dict[str, Any]:
        source, text = Source(work, start), calibration(work, cached)
        source.settle(CacheReader(cached, "train"))
        device = work.machine.device
        with peaks.phase(CONVERSION):
            found = measure(choices, source.load, source.weight, text, config.convert, config.kmeans, device, folder)
        write_json(folder / COSTS, {name: {label(one): nats for one, nats in of.items()} for name, of in found.items()})
        return {}

    made = obtain(work.artifacts, "costs", work.model.name, inputs, fill, at=work.machine.place())
    work.run.uses("choose", made)
    return _read(made, choices)


def _read(made: Artifact, choices: list[tuple[Layer, list[Format]]]) -> Costs:
    """The costs of an artifact.

    Raises:
        ArtifactError: they are not those of these layers and formats.
    """
    path = made.folder / COSTS
    try:
        said = json_objects.read(path)
        manifests.COSTS(said, "")
        return {layer.name: {one: said[layer.name][label(one)] for one in formats} for layer, formats in choices}
    except (OSError, ValueError, KeyError) as error:
        wrong = f"{path} holds no costs of these layers ({error})"
        raise ArtifactError(f"{wrong}: delete {made.folder} and run again") from None


def label(format: Format) -> str:
    """A format in one line."""
    return ", ".join(f"{name} {value}" for name, value in format.settings().items())


def configured(format: Format) -> WeightConfig:
    """A format as a configuration asks for it."""
    said = OmegaConf.merge(OmegaConf.structured(WeightConfig), {"format": format.name} | format.settings())
    made = OmegaConf.to_object(said)
    assert isinstance(made, WeightConfig)
    return made


def _show(layers: list[Layer], costs: Costs, model: nn.Module, said: str) -> None:
    """One row for layers of one name: how many have so many bits, what they take and what that costs."""
    used = sorted({layer.format.bits for layer in layers})
    rows = []
    for name, members in _alike(layers).items():
        counts = Counter(layer.format.bits for layer in members)
        numbers = [str(counts[bits]) if counts[bits] else "" for bits in used]
        size = sum(layer.format.stored_bits(*layer.shape) for layer in members) / 8 / MEGA
        rows.append([name, *numbers, f"{bits_per_weight(members):.2f}", f"{size:.2f}", f"{_nats(members, costs):.4f}"])
    bits = model_bits_per_weight(layers, model)
    size = file_bytes(layers, model) / MEGA
    title = f"formats for {said}: {size:.2f} MB, {bits:.2f} bits a weight, {_nats(layers, costs):.3f} nats reckoned"
    table(title, ["layers of bits", *map(str, used), "bits", "MB", "nats"], rows)


def _alike(layers: list[Layer]) -> dict[str, list[Layer]]:
    """Layers by the last part of their names that is no number."""
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        found.setdefault(NUMBER.sub("", layer.name).rpartition(".")[2], []).append(layer)
    return found


def _nats(layers: list[Layer], costs: Costs) -> float:
    """What formats are reckoned to cost, as training leaves it; nothing is known of layers that had no choice."""
    return sum(LEFT[x.format.bits] * costs[x.name][x.format] for x in layers if x.name in costs)
