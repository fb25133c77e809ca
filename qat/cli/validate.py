"""Values and combinations that cannot work, found before anything is created."""

import importlib.util
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat import gpus, model_files, names, processes, provenance
from qat.artifacts import MANIFEST, read_manifest
from qat.checkpoint_files import find
from qat.cli import schema, trusted, weights
from qat.config import (
    Config,
    DataConfig,
    DataPart,
    DataSource,
    ExportFormat,
    ExportType,
    LossKind,
    ModelSource,
    Stage,
    Start,
    StoreKind,
    Tail,
)
from qat.data import mix, texts
from qat.errors import ArtifactError, ConfigError, UnavailableError
from qat.names import TRAINS

PROCESSES_A_CORE = 4  # that share batches on a computer without as many GPUs: beyond, they only wait for each other
LARGEST = 2**63 - 1  # what torch and JSON readers hold in an integer


@dataclass(frozen=True)
class Bound:
    """The values a key takes: from `low` to `high`, the ends included unless `open`."""

    low: float = -math.inf
    high: float = math.inf
    open: bool = False

    def holds(self, value: float) -> bool:
        """True for a value inside."""
        if self.open:
            return self.low < value < self.high
        return self.low <= value <= self.high

    def __str__(self) -> str:
        """The bound in words."""
        above, below = ("above", "below") if self.open else ("at least", "at most")
        ends = [(above, self.low), (below, self.high)]
        return " and ".join(f"{word} {end}" for word, end in ends if math.isfinite(end))


POSITIVE = Bound(low=0, open=True)
COUNT = Bound(low=1)
TEMPERATURE = Bound(0.01, 1000)  # beyond, a softmax in fp32 is one token or all alike
TINY = Bound(261, 2**20)  # tokens of a model over bytes, with five markers

BOUNDS = {
    "seed": Bound(0, 2**32 - 1),
    "model.vocab_size": Bound(low=2),
    "data.seed": Bound(0, 2**32 - 1),
    "data.documents": COUNT,
    "data.answers": COUNT,
    "data.answer_tokens": COUNT,
    "data.greedy_tokens": Bound(low=0),
    "data.temperature": TEMPERATURE,
    "data.eval_fraction": Bound(0, 1, open=True),
    "quant.mlp.bits": Bound(1, 8),
    "quant.mlp.rank": COUNT,
    "quant.mlp.group": COUNT,
    "quant.attn.bits": Bound(1, 8),
    "quant.attn.rank": COUNT,
    "quant.attn.group": COUNT,
    "cache.length": Bound(low=2),
    "cache.top_k": COUNT,
    "cache.random": Bound(low=0),
    "cache.sequences": COUNT,
    "convert.calibration_tokens": COUNT,
    "convert.passes": COUNT,
    "convert.rounds": COUNT,
    "convert.sweeps": Bound(low=0),
    "loss.temperature": TEMPERATURE,
    "loss.hard": Bound(low=0),
    "train.steps": COUNT,
    "train.batch_size": COUNT,
    "train.lr": POSITIVE,
    "train.learn.scales": Bound(low=0),
    "train.learn.codebooks": Bound(low=0),
    "train.learn.latent": Bound(low=0),
    "train.learn.norms": Bound(low=0),
    "train.warmup": Bound(0, 1),
    "train.weight_decay": Bound(low=0),
    "train.grad_clip": POSITIVE,
    "train.eval_every": COUNT,
    "train.save_every": COUNT,
    "train.keep": COUNT,
    "instance.micro_batch": COUNT,
    "instance.devices": COUNT,
    "evaluate.sample_tokens": COUNT,
    "evaluate.context": Bound(low=2),
    "evaluate.stride": COUNT,
    "evaluate.tokens": Bound(low=2),
    "evaluate.examples": COUNT,
    "export.context": COUNT,
    "chat.max_tokens": COUNT,
    "chat.temperature": Bound(0, TEMPERATURE.high),
}

BOUNDS |= {f"first.{key}": bound for key, bound in BOUNDS.items() if key.startswith(("quant.", "train."))}
THINKING = ("false", "true", "both")
READS_TEXT = (Stage.run, Stage.cache)
MOVES = (Stage.pull, Stage.push, Stage.store)
EXPORT_TYPES = {
    ExportFormat.hf: tuple(ExportType),
    ExportFormat.packed: tuple(ExportType),
    ExportFormat.anemll_v2: (ExportType.fp32, ExportType.fp16),
    ExportFormat.coreml: (ExportType.fp16,),
}


def check(config: Config) -> None:
    """Checks every value by itself, then what they ask for together.

    Raises:
        ConfigError: the first that cannot work.
    """
    check_values(config)
    weights.check(config)
    if config.stage is not Stage.doctor:  # which tells of it
        check_folder("outputs", config.outputs)
    check_model(config)
    check_data(config)
    check_cache(config)
    check_store(config)
    manifest = check_checkpoint(config)
    check_mode(config, manifest)
    check_training(config)
    check_instance(config)
    if config.loss.kind is LossKind.bucket_kl and config.loss.temperature != 1:
        raise ConfigError(
            f"loss.temperature={config.loss.temperature}: bucket_kl works at 1, where the cache knows the tail's mass"
        )
    check_evaluate(config)
    if config.stage is Stage.export:
        check_export(config)


def check_values(config: Config) -> None:
    """Every number finite and within its bound."""
    for key, value in _numbers(config):
        if not math.isfinite(value) or abs(value) > LARGEST:
            raise ConfigError(f"{key}={value}: must be an ordinary finite number")
        bound = BOUNDS.get(key)
        if bound is not None and not bound.holds(value):
            raise ConfigError(f"{key}={value}: must be {bound}")
    if 0 < config.chat.temperature < TEMPERATURE.low:
        raise ConfigError(f"chat.temperature={config.chat.temperature}: must be 0 or {TEMPERATURE}")


def check_folder(key: str, folder: str) -> None:
    """A folder that is there and can be written to, or that can be made."""
    if not folder.strip():
        raise ConfigError(f"{key} is empty: name a folder")
    path = Path(os.path.abspath(folder))
    nearest = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise ConfigError(f"{key}={folder}: {nearest} is no folder that can be written to")


def check_model(config: Config) -> None:
    """A model on disk is named, there, and one by what shows without loading it."""
    model = config.model
    if model.source is ModelSource.tiny and not TINY.holds(model.vocab_size or TINY.low):
        raise ConfigError(f"model.vocab_size={model.vocab_size}: must be {TINY} for model={model.name}")
    if model.source is not ModelSource.folder:
        return
    if not model.path:
        raise ConfigError(f"model={model.name} needs a Hugging Face folder: model.path=<folder>")
    if config.stage is not Stage.doctor:  # which tells of it
        model_files.check(Path(model.path).expanduser())


def check_data(config: Config) -> None:
    """The text is named and there, when the stage reads it."""
    data = config.data
    if data.thinking not in THINKING:
        raise ConfigError(f"data.thinking={data.thinking}: must be false, true or both")
    if config.stage not in READS_TEXT or config.cache.path:
        return
    if (data.source is DataSource.mix) != bool(data.parts):
        raise ConfigError(
            "data=mix needs its sources, and only it has any:"
            " data.parts='[{source: alpaca, path: a.json, weight: 2}, {source: text, path: b.txt}]'"
        )
    for number, part in enumerate(data.parts):
        where = f"data.parts[{number}]"
        if part.source is DataSource.mix:
            raise ConfigError(f"{where}: a mixture cannot be a part of another")
        if not (math.isfinite(part.weight) and part.weight > 0):
            raise ConfigError(f"{where}.weight={part.weight}: must be above 0")
        if part.thinking is not None and str(part.thinking).lower() not in THINKING:
            raise ConfigError(f"{where}.thinking={part.thinking}: must be false, true or both")
        for name in ("documents", "answers", "answer_tokens", "greedy_tokens", "temperature"):
            value, bound = getattr(part, name), BOUNDS[f"data.{name}"]
            if value is not None and not (math.isfinite(value) and bound.holds(value)):
                raise ConfigError(f"{where}.{name}={value}: must be {bound}")
        _check_source(part, where)
    if data.parts:
        _check_mixture(data)
    else:
        _check_source(data, "data")
    for source in mix.parts(data):
        if source.path:
            texts.look(source)


def _check_mixture(data: DataConfig) -> None:
    """What only one source can have is not said of several."""
    if data.start is not DataConfig.start:
        raise _of_one(data, f"start={data.start.name}", data.start.name)
    files = "text, alpaca, chat_jsonl or openings"
    for name, options in {"path": f"prompts, {files}", "repo": files, "revision": files}.items():
        value = getattr(data, name)
        if value is not None:
            raise _of_one(data, f"{name}={value}", options)


def _of_one(data: DataConfig, said: str, options: str) -> ConfigError:
    whole = f"data={data.name} is a mixture, and each of its sources has its own"
    return ConfigError(f"data.{said}: {whole}: use data={options}, or say it in data.parts")


def _check_source(source: DataConfig | DataPart, where: str) -> None:
    """A source has its files, or a hub data set to get them from."""
    paths = [source.path] if isinstance(source.path, str) else source.path or []
    if not (isinstance(paths, list) and all(isinstance(path, str) and path for path in paths)):
        raise ConfigError(f"{where}.path={source.path}: must be a file, a glob or a list of them")
    generated = source.source is DataSource.selfgen
    if not paths and not source.repo and not (generated and source.start is not Start.openings):
        what = f"{where}.start=openings" if generated else f"{where} of source {source.source.name}"
        raise ConfigError(f"{what} needs a file: {where}.path=<file>")
    if generated and source.start is Start.questions and source.documents is None:
        raise ConfigError(f"{where}.start=questions has no end of its own: say {where}.documents=<number>")


def check_cache(config: Config) -> None:
    """A cache on disk is named and there; no position keeps more tokens than there are."""
    cache = config.cache
    if cache.name == "local" and not cache.path:
        raise ConfigError("cache=local needs a cache folder: cache.path=<folder>")
    if cache.path and not (_cached(config) or names.archive_file(cache.path) or _in_a_store(config)):
        raise ConfigError(
            f"cache.path={cache.path}: no such folder or archive, and none of that name in {config.outputs}/caches"
        )
    if cache.path and config.stage in TRAINS and config.loss.kind is LossKind.bucket_kl and _lacks_tail(config):
        raise ConfigError(
            f"loss=bucket_kl needs the probability outside the top-k, which {cache.path} does not hold: use"
            " loss=topk_kl, which is exact, or cache.tail=estimate where it has a random sample"
        )
    if config.stage in TRAINS and _reads_targets(config) and not _has_targets(config):
        full = config.loss.kind is LossKind.full_kl
        which = f"loss.hard={config.loss.hard:g}" if full else f"loss={config.loss.name}"
        raise ConfigError(
            f"{which} learns from what the teacher says of training rows, and"
            f" {cache.path or 'cache.train_targets=false'} keeps their text alone: use loss=full_kl loss.hard=0, or a"
            " cache with cache.train_targets=true"
        )
    if cache.inspect and config.stage is not Stage.cache:
        raise ConfigError("cache.inspect=true goes with stage=cache")
    vocabulary = _vocabulary(config)
    for key, tokens in (("cache.top_k", cache.top_k), ("cache.random", cache.random)):
        if vocabulary is not None and tokens > vocabulary:
            raise ConfigError(f"{key}={tokens}: model={config.model.name} has only {vocabulary} tokens")


def _cached(config: Config) -> Path | None:
    """Where the named cache lies, if it is here already."""
    place = names.cached(config)
    return place if place and place.exists() else None


def _in_a_store(config: Config) -> bool:
    """Whether the named cache may be had from a store: from the one that is named, or it is a registered one."""
    return config.store.kind is not StoreKind.local or names.registered(str(config.cache.path), "cache") is not None


def _reads_targets(config: Config) -> bool:
    """False for a loss to which the teacher beside the student says everything."""
    return config.loss.kind is not LossKind.full_kl or config.loss.hard > 0


def _has_targets(config: Config) -> bool:
    """Whether the cache keeps what the teacher says of training rows."""
    if not config.cache.path:
        return config.cache.train_targets
    folder = _cached(config)
    if folder is None or not (folder / MANIFEST).is_file():
        return True
    return bool(_described(folder).get("train_targets", True))


def _lacks_tail(config: Config) -> bool:
    """True for a cache of the older scripts, and for one that was imported from it as it was."""
    folder = _cached(config)
    if folder is None:
        return False
    if (folder / MANIFEST).is_file():
        return _described(folder).get("tail") == "missing"
    return config.cache.tail is Tail.exact and any(folder.glob("shard_*.pt"))


def check_store(config: Config) -> None:
    """A store elsewhere is named."""
    store = config.store
    if store.kind not in (StoreKind.local, StoreKind.gdrive) and not store.path:
        raise ConfigError(f"store={store.name} needs a place: store.path=<folder, bucket or repository>")
    if store.kind is StoreKind.url and "://" not in str(store.path):
        raise ConfigError(f"store.path={store.path}: not a URL, such as s3://bucket/prefix or file:///folder")
    if store.kind is StoreKind.local and (config.stage in MOVES or store.mirror):
        what = "store.mirror=true" if store.mirror else f"stage={config.stage.name}"
        raise ConfigError(f"{what} needs a store: store=gdrive, gcs, hf or url")
    if store.archive and (store.archive[0] in "./" or ".." in store.archive.split("/")):
        raise ConfigError(f"store.archive={store.archive}: a name, or a path as stage=store lists it")
    if config.stage is Stage.push:
        check_push(config)
    named = config.checkpoint.name != names.TEACHER or names.cache_names(config)
    if config.stage is Stage.pull and not (store.archive or named):
        raise ConfigError(
            "stage=pull needs a name: checkpoint=q4_fp32, cache=alpaca_L64, or store.archive=<name> (stage=store lists"
            " them)"
        )


def check_push(config: Config) -> None:
    """What is to be pushed is named, and here; the name it gets there is one."""
    if "/" in (config.store.archive or ""):
        raise ConfigError(f"store.archive={config.store.archive}: a name, with no folders in it")
    place = _start(config) or names.cached(config)
    if place is None:
        raise ConfigError("stage=push needs something to push: checkpoint=<run, name or path> or cache.path=<folder>")
    if not place.exists():
        raise ConfigError(f"stage=push: {place} is not there: pull or unpack it first")


def check_checkpoint(config: Config) -> dict[str, Any] | None:
    """What is named is a checkpoint; returns its manifest, None for the teacher and where none is known yet."""
    given = config.checkpoint
    if given.name == "local" and not given.path:
        raise ConfigError("checkpoint=local needs a name or a path: checkpoint=<run, folder, V2 state dict or archive>")
    if given.name == "teacher" and not given.path and config.stage is Stage.distill:
        raise ConfigError(
            "stage=distill needs a quantized start: checkpoint=<path or run>, or stage=run, which converts first"
        )
    if config.stage is Stage.pull:
        return None
    place = _start(config)
    return _manifest(place) if place and place.exists() else None


def _start(config: Config) -> Path | None:
    try:
        return names.start(config)
    except ConfigError as error:
        raise ConfigError(f"checkpoint={error}") from error


def check_mode(config: Config, manifest: dict[str, Any] | None) -> None:
    """The layers that learn have tables to learn."""
    if config.stage not in TRAINS:
        return
    quant, whose = {"mlp": config.quant.mlp, "attn": config.quant.attn}, f"quant={config.quant.name}"
    if config.stage is Stage.distill and config.checkpoint.path and manifest is None:
        return  # a V2 state dict, whose tensors say what it is
    if manifest is not None and config.stage is Stage.distill:
        quant, whose = manifest["quant"], f"checkpoint={config.checkpoint.path}"
    learning = {"mlp": config.mode.mlp, "attn": config.mode.attn}
    for kind, learns in learning.items():
        if learns and not quant.get(kind):
            fitting = [f"mode={kind}" for kind in ("mlp", "attn") if quant.get(kind)]
            raise ConfigError(
                f"mode={config.mode.name} trains the {kind} layers, for which {whose} has no tables"
                + (f": use {fitting[0]}" if fitting else "")
            )
    if not any(learning.values()):
        raise ConfigError("mode.mlp and mode.attn are both false: nothing would learn")


def check_training(config: Config) -> None:
    """Something learns, and every process has a sequence of each batch."""
    if config.stage not in TRAINS:
        return
    learn = config.train.learn
    if not any((learn.scales, learn.codebooks, learn.latent, learn.norms)):
        raise ConfigError("train.learn.scales, codebooks, latent and norms are all 0: nothing would learn")
    if config.train.batch_size < config.instance.devices:
        raise ConfigError(
            f"train.batch_size={config.train.batch_size}: fewer sequences than instance.devices="
            f"{config.instance.devices}, so some would have nothing to do"
        )
    together = processes.place().count
    if config.train.batch_size < together:
        raise ConfigError(
            f"train.batch_size={config.train.batch_size}: fewer sequences than the {together} processes that share"
            " each batch, so some would have nothing to do"
        )


def check_instance(config: Config) -> None:
    """Switches are one of their words, and there is something for every process to compute with."""
    most = max(len(gpus.visible()), PROCESSES_A_CORE * provenance.cores())
    if config.instance.devices > most:
        raise ConfigError(
            f"instance.devices={config.instance.devices}: this computer has {len(gpus.visible())} GPUs and"
            f" {provenance.cores()} cores, and takes at most {most}"
        )
    for key in ("compile", "checkpointing"):
        value = getattr(config.instance, key)
        if value not in ("auto", "true", "false"):
            raise ConfigError(f"instance.{key}={value}: must be auto, true or false")


def check_evaluate(config: Config) -> None:
    """What is measured is there, and so is everything it is compared with."""
    evaluate = config.evaluate
    for key in ("against", "text", "tasks"):
        if getattr(evaluate, key) and config.stage is not Stage.evaluate:
            raise ConfigError(f"evaluate.{key} goes with stage=evaluate")
    if evaluate.text and not os.path.isfile(os.path.expanduser(evaluate.text)):
        raise ConfigError(f"evaluate.text={evaluate.text}: no such file")
    if evaluate.stride > evaluate.context:
        raise ConfigError(
            f"evaluate.stride={evaluate.stride} is longer than evaluate.context={evaluate.context}: tokens between"
            " two windows would not be scored"
        )
    for name in evaluate.against:
        try:
            names.checkpoint(name, Path(config.outputs))
        except ConfigError as error:
            raise ConfigError(f"evaluate.against={error}") from error
    _check_tasks(evaluate.tasks)


def _check_tasks(tasks: list[str]) -> None:
    """lm-eval is installed, and tasks that are files are there."""
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise UnavailableError("evaluate.tasks needs lm-eval: run `pip install 'qat-speedrun[lm_eval]'`")
    for task in tasks:
        if not task.endswith((".yaml", ".yml")):
            continue
        if not os.path.isfile(os.path.expanduser(task)):
            raise ConfigError(f"evaluate.tasks={task}: no such file")
        trusted.refuse_data(Path(os.path.expanduser(task)), f"evaluate.tasks={task}")  # which may have code run


def check_export(config: Config) -> None:
    """The format can hold what is exported, and the folder is free or an older export."""
    export = config.export
    if not export.output:
        raise ConfigError("stage=export needs a folder to write to: export.output=<folder>")
    if export.dtype not in EXPORT_TYPES[export.format]:
        known = " or ".join(dtype.name for dtype in EXPORT_TYPES[export.format])
        raise ConfigError(f"export.dtype={export.dtype.name}: export={export.name} is written in {known}")
    if config.checkpoint.name == "teacher" and export.format is not ExportFormat.hf:
        raise ConfigError(
            f"export={export.name} needs a quantized model: checkpoint=<path>; the teacher takes export=hf"
        )
    folder = Path(export.output).expanduser()
    check_folder("export.output", str(folder))
    if folder.is_dir() and any(folder.iterdir()) and not _is_export(folder):
        raise ConfigError(f"export.output={export.output}: there are other files in it: name a new or empty folder")


def _is_export(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() and _described(folder).get("kind") == "export"


def _numbers(config: Config) -> Iterator[tuple[str, float]]:
    """Every number that is set, with its key; a section that is null has none."""
    for key in schema.keys().values():
        if key.type not in (int, float):
            continue
        section, _, name = key.name.rpartition(".")
        value = getattr(_section(config, section), name, None)
        if value is not None:
            yield key.name, value


def _section(config: Config, name: str) -> Any:
    """A section by its dotted name; None where it or one around it is null."""
    found: Any = config
    for part in filter(None, name.split(".")):
        found = getattr(found, part, None)
    return found


def _vocabulary(config: Config) -> int | None:
    """The number of tokens: as configured, else as the folder's config.json says."""
    model = config.model
    if model.vocab_size is not None or model.source is not ModelSource.folder:
        return model.vocab_size
    described = model_files.settings(Path(str(model.path)).expanduser())
    sizes = [part.get("vocab_size") for part in (described, described.get("text_config")) if isinstance(part, dict)]
    return next((size for size in sizes if isinstance(size, int)), None)


def _manifest(place: Path) -> dict[str, Any] | None:
    """The manifest of the checkpoint at a place; None for a V2 state dict, whose tensors say what it is."""
    try:
        found = find(place)
        if found.is_file():
            return None
        manifest = read_manifest(found)
    except ArtifactError as error:
        raise ConfigError(f"checkpoint={place}: {error}") from None
    if manifest.get("kind") != "checkpoint":
        raise ConfigError(f"checkpoint={found}: its {MANIFEST} describes no checkpoint")
    return manifest


def _described(folder: Path) -> dict[str, Any]:
    """What the manifest in a folder says."""
    try:
        return read_manifest(folder)
    except ArtifactError as error:
        raise ConfigError(str(error)) from None
