"""The model card of an export: what it is, how good, made how, and how to use it."""

from pathlib import Path
from typing import Any

from qat.config import ROLES, ExportConfig
from qat.export.exporter import exporter
from qat.export.source import Source
from qat.quant.formats import Codebook
from qat.records import Record
from qat.report.markdown import code, plain, table

ADAPTER = "adapter"  # folder of the adapters in an export
CARD = "README.md"

FIGURES = {
    "kl": "KL(teacher‖student), whole vocabulary",
    "kd_loss_best": "KD loss, top-k at temperature 2",
    "perplexity": "perplexity",
    "teacher_perplexity": "perplexity of the teacher",
    "top1_agreement": "same first choice as the teacher",
}
RECIPE = (
    ("data", "name"),
    ("cache", "length"),
)
TRAINING = (
    ("mode", "name"),
    ("loss", "name"),
    ("train", "steps"),
    ("train", "batch_size"),
    ("train", "lr"),
)


def write(source: Source, folder: Path, settings: ExportConfig, parity: str) -> None:
    """Writes `README.md`; `folder` still is a temporary one, its name in the card is the final one."""
    name = source.record.text("name") or (source.manifest and source.manifest["quant"]["name"]) or "full precision"
    parts = [
        _front_matter(source, settings),
        f"# {plain(source.teacher.name)}, {plain(str(name))}",
        f"Exported as `{settings.name}` ({settings.dtype.name}). {parity}",
        "## Use",
        exporter(settings.format).use.format(folder=Path(str(settings.output)).name),
        *_adapters(source, settings),
        *_bits(source.quant),
        *_table("Figures", "on text held apart from training", _figures(source.record)),
        *_table("Recipe", "of the run that made it", _recipe(source)),
    ]
    (folder / CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _adapters(source: Source, settings: ExportConfig) -> list[str]:
    """How low-rank adapters are used, or that they are part of the weights; nothing where there are none."""
    if not source.adapted:
        return []
    if source.adapters is None:
        return ["Low-rank adapters of the checkpoint are added to the weights."]
    folder = Path(str(settings.output)).name
    return [
        "By itself this is the student that low-rank adapters were trained on; figures below are of both. They lie"
        " beside it:\n\n"
        f'```python\nfrom peft import PeftModel\nmodel = PeftModel.from_pretrained(model, "{folder}/{ADAPTER}")\n```'
    ]


def _front_matter(source: Source, settings: ExportConfig) -> str:
    library = exporter(settings.format).library
    codebooks = any(isinstance(layer.format, Codebook) for layer in source.layers)
    tags = ["text-generation", *(["quantized"] if source.layers else []), *(["codebook"] if codebooks else [])]
    return "\n".join(["---", f"library_name: {library}", f"tags: [{', '.join(tags)}]", "---"])


def _bits(quant: dict[str, Any]) -> list[str]:
    if not quant:
        return []
    roles = [
        f"{quant[key]} in {quant[f'{role}_layers']} {role} layers" for role in ROLES if (key := _key(role)) in quant
    ]
    text = (
        f"{quant['file_bytes'] / 1e6:.1f} MB packed, {quant['model_bits_per_weight']} bits a weight over the whole"
        f" model. The {quant['layers']} quantized layers have {quant['bits_per_weight']}, scales and the like included"
        f" ({', '.join(roles)}); what is not quantized counts as 16."
    )
    return ["## Size", text, *_rounded(quant["rounded"]), *_dense(quant["dense"])]


def _rounded(bits: dict[str, float]) -> list[str]:
    """What only a packed file has in few bits; nothing where all of it is quantized, or left exact."""
    if not bits:
        return []
    named = " and ".join(f"{code(name)} ({number:.2f} bits a weight)" for name, number in bits.items())
    return [f"Not quantized, but rounded to 8 bits where the model is packed: {named}."]


def _dense(shares: dict[str, float]) -> list[str]:
    """What of the decoder is not quantized; nothing where all of it is."""
    if not shares:
        return []
    return [
        f"Left dense, in full precision, are {sum(shares.values()):.1%} of the decoder's weights:"
        f" {', '.join(f'{code(name)} ({share:.1%})' for name, share in shares.items())}."
    ]


def _key(role: str) -> str:
    return f"{role}_bits_per_weight"


def _figures(record: Record) -> dict[str, str]:
    found = {said: record.number("metrics", key) for key, said in FIGURES.items()}
    return {said: f"{value:.4g}" for said, value in found.items() if value is not None}


def _recipe(source: Source) -> dict[str, str]:
    record = source.record
    taught = record.text("config", "teacher", "name") and record.text("measured_on", "teacher", "name")
    pair = {"model": source.teacher.name, "teacher": taught} if taught else {"teacher": source.teacher.name}
    said = pair | {"run": record.text("run_id"), "commit": record.text("environment", "git")}
    trained = record.text("stage") != "convert"
    for section, key in (*RECIPE, *(TRAINING if trained else ())):
        said[section if key == "name" else f"{section}.{key}"] = record.text("config", section, key)
    origin = source.manifest.get("source", {})
    return {key: text for key, text in said.items() if text} | {key: str(value) for key, value in origin.items()}


def _table(title: str, note: str, rows: dict[str, str]) -> list[str]:
    if not rows:
        return []
    cells = [[plain(key), plain(value)] for key, value in rows.items()]
    return [f"## {title}", table((title.lower(), note), cells)]
