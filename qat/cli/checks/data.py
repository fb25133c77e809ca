"""Checks the text: every source is named and exists."""

from qat.config import Config, DataConfig, DataPart, DataSource, Stage, Start
from qat.data import mix, texts
from qat.errors import ConfigError

READS_TEXT = (Stage.run, Stage.cache)


def check(config: Config) -> None:
    """Checks that the text is named and exists, if the stage reads it."""
    data = config.data
    if config.stage not in READS_TEXT or config.cache.path:
        return
    if (data.source is DataSource.mix) != bool(data.parts):
        raise ConfigError(
            "data=mix needs its sources, and only it has any:"
            " data.parts='[{source: alpaca, path: a.json, weight: 2}, {source: text, path: b.txt}]'"
        )
    for number, part in enumerate(data.parts):
        if part.source is DataSource.mix:
            raise ConfigError(f"data.parts[{number}]: a mixture cannot be a part of another")
        _check_source(part, f"data.parts[{number}]")
    if data.parts:
        _check_mixture(data)
    else:
        _check_source(data, "data")
    for source in mix.parts(data):
        if source.path:
            texts.look(source)


def _check_mixture(data: DataConfig) -> None:
    """Checks that settings for a single source are not used with a mixture."""
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
    """Checks that a source has files, or a hub data set to fetch them from."""
    paths = [source.path] if isinstance(source.path, str) else source.path or []
    if not (isinstance(paths, list) and all(isinstance(path, str) and path for path in paths)):
        raise ConfigError(f"{where}.path={source.path}: must be a file, a glob or a list of them")
    generated = source.source is DataSource.selfgen
    if not paths and not source.repo and not (generated and source.start is not Start.openings):
        what = f"{where}.start=openings" if generated else f"{where} of source {source.source.name}"
        raise ConfigError(f"{what} needs a file: {where}.path=<file>")
    if generated and source.start is Start.questions and source.documents is None:
        raise ConfigError(f"{where}.start=questions has no end of its own: say {where}.documents=<number>")
