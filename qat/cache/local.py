"""`cache=local cache.path=<folder>`: a cache that is there already, of this project or of the older scripts."""

from hashlib import sha256
from pathlib import Path

from qat.artifacts import MANIFEST, Artifact, open_artifact
from qat.cache import older
from qat.cache.older import SHARDS
from qat.cache.values import checked
from qat.config import Tail
from qat.errors import ArtifactError
from qat.models import ModelFolder


def open_local(folder: Path, teacher: ModelFolder, eval_fraction: float, tail: Tail) -> Artifact:
    """The cache in a folder, after a check that it is from this teacher.

    Raises:
        ArtifactError: the folder holds no cache, a damaged one, or another teacher's.
    """
    if (folder / MANIFEST).is_file():
        return checked(_ours(folder, teacher))
    if any(folder.glob(SHARDS)):
        _check_vocabulary(folder, older.described_as(folder).get("vocab_size"), teacher, _sizes(teacher))
        return checked(older.open_older(folder, teacher.vocab_size(), eval_fraction, tail))
    inside = next((path.parent for name in (MANIFEST, SHARDS) for path in folder.glob(f"*/{name}")), None)
    hint = f": did you mean {inside}?" if inside else ""
    raise ArtifactError(f"cache.path={folder} holds neither a {MANIFEST} nor {SHARDS}, so no teacher cache{hint}")


def _ours(folder: Path, teacher: ModelFolder) -> Artifact:
    cache = open_artifact(folder)
    meta = cache.manifest
    if meta.get("kind") != "caches":
        raise ArtifactError(f"{folder} is not a teacher cache but of kind {meta.get('kind')}")
    made_by = meta["teacher"]
    if made_by["fingerprint"] not in (None, teacher.fingerprint):  # an imported cache has no teacher fingerprint
        raise ArtifactError(
            f"{folder} was recorded from {made_by['name']} with other weights than those of {teacher.name}:"
            f" use model={made_by['name']} and the same revision"
        )
    _check_vocabulary(folder, meta["vocab_size"], teacher, {teacher.vocab_size()})
    if teacher.text and teacher.has_tokenizer() and meta.get("tokenizer_sha256") not in (None, _tokenizer(teacher)):
        raise ArtifactError(f"{folder} was recorded with another tokenizer than {teacher.name}'s: record it again")
    return cache


def _sizes(teacher: ModelFolder) -> set[int]:
    """Sizes of the vocabulary that the older scripts may record: tokens of the head, or of the tokenizer."""
    return {teacher.vocab_size(), *([len(teacher.tokenizer())] if teacher.has_tokenizer() else [])}


def _check_vocabulary(folder: Path, stated: int | None, teacher: ModelFolder, known: set[int]) -> None:
    if stated is not None and stated not in known:
        raise ArtifactError(
            f"{folder} is of a vocabulary of {stated} tokens, {teacher.name} has {teacher.vocab_size()}: it was made"
            " with another teacher"
        )


def _tokenizer(teacher: ModelFolder) -> str:
    """As a cache notes it."""
    return sha256(teacher.tokenizer().backend_tokenizer.to_str().encode()).hexdigest()
