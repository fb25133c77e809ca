"""Stage 1: text, then what the teacher predicts on it."""

from dataclasses import replace
from pathlib import Path

from qat.artifacts import Artifact
from qat.cache import older
from qat.cache.local import open_local
from qat.cache.reader import CacheReader
from qat.cache.writer import obtain_cache
from qat.config import Config, Stage
from qat.data.documents import obtain_documents
from qat.distill.lengths import pattern
from qat.errors import ConfigError
from qat.peaks import CACHE, TEXT, peaks
from qat.runs import Run
from qat.stages import inspect
from qat.stages.workspace import Workspace, open_workspace

TRAINS = (Stage.run, Stage.distill)


def main(config: Config, run: Run) -> None:
    """`stage=cache`; an older cache is imported, and any is shown with `cache.inspect=true`."""
    work = open_workspace(config, run)
    cache = make(work)
    if cache.manifest["format"] == older.FORMAT:
        with work.timed("cache"):
            cache = older.import_older(cache, work.artifacts)
        work.run.result["paths"]["cache"] = str(cache.folder)
    if config.cache.inspect:
        inspect.show(work, cache)


def make(work: Workspace) -> Artifact:
    """The configured cache, from `outputs/artifacts` or `cache.path` when it is already there."""
    config = work.config
    with work.timed("cache"):
        cache = _local(work, Path(config.cache.path)) if config.cache.path else _recorded(work)
    work.run.uses("cache", cache)
    work.run.result["paths"]["cache"] = str(cache.folder)
    work.measures_on(CacheReader(cache, "eval").text_key(), f"held-out text of {cache.folder.name}")
    return cache


def _recorded(work: Workspace) -> Artifact:
    config = work.config
    answers = config.loss.kind.needs_answers
    settings = replace(config.cache, train_targets=False) if answers else config.cache
    with peaks.phase(TEXT):
        documents = obtain_documents(config.data, work.teacher, config.data.seed, work.machine, work.artifacts, answers)
    if documents.fresh:
        work.run.uses("documents", documents)
    template = "plain" if config.data.source.plain else "chat"
    name = f"{config.data.name}_{template}_think_{config.data.thinking}"
    whole = config.stage is not Stage.convert  # a conversion alone never holds all of the teacher
    with peaks.phase(CACHE):
        cache = obtain_cache(
            settings, documents, name, work.teacher, config.data.seed, work.machine, work.artifacts, whole
        )
    if cache.fresh and not documents.fresh:
        work.run.uses("documents", documents)
    return cache


def _local(work: Workspace, path: Path) -> Artifact:
    config = work.config
    cache = open_local(path.expanduser(), work.teacher, config.data.eval_fraction, config.cache.tail)
    longest = work.context()
    if longest is not None and cache.manifest["length"] > longest:
        length = cache.manifest["length"]
        raise ConfigError(f"{path} has rows of {length} tokens, {work.model.name} is made for at most {longest}")
    if config.stage in TRAINS:  # before a conversion, after which training would say so
        pattern(config.train.lengths, config.train.shares, config.train.batch_size, cache.manifest["length"])
    if cache.manifest["teacher"]["fingerprint"] is None:  # an imported cache does not say which teacher made it
        work.settle(work.teacher, CacheReader(cache, "eval"))
    if config.loss.kind.needs_answers and config.stage in TRAINS and not cache.manifest.get("answers"):
        raise ConfigError(f"loss={config.loss.name} learns from answers, and {path} does not say which tokens are any")
    if cache.manifest["tail"] == "missing" and config.loss.kind.needs_tail and config.stage in TRAINS:
        raise ConfigError(
            f"loss={config.loss.name} needs the probability outside the top-k, which {path} does not hold: use"
            " loss=topk_kl, which is exact, or cache.tail=estimate where it has a random sample"
        )
    return cache
