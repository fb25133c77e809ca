"""Rules for the fields of this project's manifests, by kind of folder, with limits. All of them are defined here.

Whatever is not in here nobody reads out of a manifest. Nothing here imports torch.
"""

from typing import Any

from qat import fields
from qat.config import ROLES
from qat.fields import LARGEST, Rule, Wrong, number, one_of, optional, record, several, text, truth, whole

SIDE = whole(1, 2**31 - 1)  # rows or columns of a matrix
BITS = whole(1, 8)
KEY = fields.matching("[0-9a-f]{12}", "a key of 12 hexadecimal digits")
SHA256 = fields.matching("[0-9a-f]{64}", "a SHA-256 of 64 hexadecimal digits")
VOCABULARY = 2**24  # maximum tokens of a vocabulary, since a cache stores token ids in at most 24 bits
SPLITS = ("train", "eval")


def check(manifest: dict[str, Any]) -> None:
    """Checks a manifest by the rules of its kind.

    Raises:
        Wrong: it breaks one.
    """
    ARTIFACT(manifest, "")
    if (rule := OF_KIND.get(manifest.get("kind", ""))) is not None:
        rule(manifest, "")


def _path(value: Any, where: str) -> None:
    """A rule: the path of a file inside, with forward slashes."""
    text(value, where)
    if any(part in ("", ".", "..") for part in value.split("/")) or "\\" in value or "\0" in value:
        raise Wrong(f"{where} is {value!a}, and a path inside the folder belongs there")


def positive(value: Any, where: str) -> None:
    """A rule: a finite number above 0."""
    number()(value, where)
    if value <= 0:
        raise Wrong(f"{where} is {value!a}, and a number above 0 belongs there")


def _format(value: Any, where: str) -> None:
    """A rule: a format of quantized weights, a codebook where no other is named."""
    NAMED(value, where)
    FORMATS[value.get("format", "codebook")](value, where)


def _layer(value: Any, where: str) -> None:
    """A rule: a quantized layer in its format."""
    LAYER(value, where)
    _format(value, where)


def _checkpoint(manifest: Any, where: str) -> None:
    """A rule: a checkpoint whose layers have roles that it says are quantized, unless it names layers one by one."""
    CHECKPOINT(manifest, where)
    if manifest["quant"].get("layers"):
        return
    for name, layer in manifest["layers"].items():
        if manifest["quant"].get(layer["kind"]) is None:
            raise Wrong(f"quant.{layer['kind']} is null, and {ascii(name)[1:-1][:80]} is a layer of that kind")


def _cache(manifest: Any, where: str) -> None:
    """A rule: a cache that keeps no more tokens at a position than there are."""
    CACHE(manifest, where)
    for name in ("top_k", "random"):
        if manifest[name] > manifest["vocab_size"]:
            raise Wrong(f"{name} is {manifest[name]} of a vocabulary of {manifest['vocab_size']} tokens")


ARTIFACT = record(
    {
        "files": fields.mapping(_path, record({"bytes": whole(), "sha256": SHA256}), least=1),
    },
    {
        "kind": text,
        "key": KEY,
        "name": text,
        "made": record({"seconds": number()}, {"at": text, "device": text, "cores": whole()}),
    },
)

# Settings of each quantization format (`qat.quant.formats`).
FORMATS = {
    "codebook": record({"bits": BITS, "rank": SIDE}),
    "grid": record(
        {"format": text, "bits": BITS, "group": SIDE},
        {"levels": one_of("halves", "integers", "shifted", "iq4nl"), "shifts": truth},  # `shifts` is in older files
    ),
}
FORMATS["kquant"] = record({"format": text, "bits": whole(2, 6)})
FORMATS["vector"] = record({"format": text, "bits": whole(1, 6), "dim": whole(2, 8), "rank": SIDE})
NAMED = record({}, {"format": one_of(*FORMATS)})
LAYER = record({"kind": one_of(*ROLES), "shape": several(SIDE, SIDE)})
CHECKPOINT = record(
    {
        "model": text,
        "teacher": text,
        "quant": record(
            {"name": text, "mlp": optional(_format), "attn": optional(_format)},
            {
                "embed": optional(_format),
                "head": optional(_format),
                "layers": fields.mapping(text, optional(_format)),
                "megabytes": number(),
                "bits": number(),
            },
        ),
        "bits_per_weight": number(),
        "layers": fields.mapping(text, _layer, least=1),
    },
    {"run": text, "source": record({}, {"file": text})},
)

METRICS = record(dict.fromkeys(("kl", "kd_loss", "perplexity", "teacher_perplexity", "top1_agreement"), number()))
ERRORS = record({"weight_error": number(), "output_error": number(), "seconds": number()})

# Further fields of a checkpoint: made by a conversion (CONVERSION), or trained as a step to another (TRAINED).
CONVERSION = record(
    {
        "metrics": record({"before": optional(METRICS), "after": METRICS}),
        "figures": fields.mapping(text, ERRORS),
    }
)
# The note beside a file of quantized layers that is being filled.
FITTED = record({"figures": fields.mapping(text, ERRORS), "digests": fields.mapping(text, SHA256)})
COSTS = fields.mapping(text, fields.mapping(text, number()))  # cost in nats of each layer in each format
TRAINED = record({"kd_loss_initial": number(), "kd_loss_best": number()})

COUNTS = record(dict.fromkeys(SPLITS, whole(1)))
CACHE = record(
    {
        "key": KEY,
        "format": whole(),
        "teacher": record({"name": optional(text), "fingerprint": optional(text)}),
        "vocab_size": whole(2, VOCABULARY),
        "length": whole(2, 2**24),
        "top_k": whole(1, VOCABULARY),
        "random": whole(0, VOCABULARY),
        "packing": one_of("joined", "rows", "plain"),
        "tail": one_of("exact", "estimated", "missing"),
        "seed": whole(0, 2**32 - 1),
        "shard_rows": whole(1, 2**24),
        "sequences": COUNTS,
    },
    {
        **dict.fromkeys(("train_targets", "answers"), truth),
        **dict.fromkeys(("positions", "document_starts"), COUNTS),
        "tokenizer_sha256": SHA256,
    },
)

LOSS = number(finite=False)  # infinite or null before the first evaluation
STATE = record(
    {"step": whole(1)},
    {
        "unlearned": text,
        **dict.fromkeys(("best_step", "tokens", "skipped", "skipped_in_a_row", "logged"), whole()),
        **{f"{loss}_{when}": LOSS for loss in ("loss", "kd_loss") for when in ("initial", "best", "final")},
        "seconds": number(),
        "changed": truth,
    },
)

TEXTS = record(
    {
        "inputs": record({}),
        "documents": record(dict.fromkeys(SPLITS, whole(0))),
        "tokens": record(dict.fromkeys(SPLITS, whole(0))),
    }
)

OF_KIND: dict[str, Rule] = {"checkpoint": _checkpoint, "caches": _cache, "state": STATE, "documents": TEXTS}

# Fields of `config.json` in a packed export.
PACKED = record(
    {
        "base_config": record({"model_type": text}),
        "quantization_config": record({"bits_per_weight": number(), "layers": fields.mapping(text, _format, least=1)}),
    }
)

# Fields of PEFT's `adapter_config.json` beside a checkpoint's adapters.
ADAPTERS = record({"peft_type": one_of("LORA"), "r": SIDE, "lora_alpha": positive})

# Fields of the settings beside files of the older scripts; each of them may be missing.
V2_SETTINGS = record(
    {},
    {
        "version": text,
        "model_id": optional(text),
        "config_preset": optional(text),
        "source_checkpoint": optional(text),
        "final_loss": optional(number(finite=False)),
        "force_positive_scales": optional(truth),
        "positive_scale_method": text,
        "magnitude_activation": text,
    },
)
OLDER_META = record({}, {"format": text, "teacher_model": optional(text), "vocab_size": optional(whole(2, LARGEST))})
