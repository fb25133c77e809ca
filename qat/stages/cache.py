"""Stage 1: text, then the teacher's outputs on it."""

from qat.artifacts import Artifact
from qat.cache.writer import obtain_cache
from qat.config import Config
from qat.data.documents import obtain_documents
from qat.runs import Run
from qat.stages.workspace import Workspace, open_workspace


def main(config: Config, run: Run) -> None:
    """`stage=cache`."""
    make(open_workspace(config, run))


def make(work: Workspace) -> Artifact:
    """The configured cache, from `outputs/artifacts` when it is already there."""
    config = work.config
    with work.timed("cache"):
        documents = obtain_documents(config.data, work.teacher, config.seed, work.machine, work.artifacts)
        name = f"{config.data.name}_chat_think_{config.data.thinking}"
        cache = obtain_cache(config.cache, documents, name, work.teacher, config.seed, work.machine, work.artifacts)
    work.run.result["paths"]["cache"] = str(cache.folder)
    return cache
