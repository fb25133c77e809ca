"""A small cache in several shards, and the documents below it."""

import dataclasses

import pytest

from qat.cache import writer
from qat.config import CacheConfig, DataConfig, DataSource
from qat.data.documents import obtain_documents

SHARD_ROWS = 5
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


@pytest.fixture(scope="package")
def small_shards():
    """Five sequences a shard, so that a small cache has several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "SHARD_ROWS", SHARD_ROWS)
        yield SHARD_ROWS


@pytest.fixture(scope="package")
def workplace(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="package")
def documents(workplace, tiny, cpu):
    """52 documents, each of a letter of its own and of 9 to 33 tokens; about a quarter held apart."""
    path = workplace / "text.txt"
    path.write_text("\n\n".join(letter * (8 + 5 * number % 25) for number, letter in enumerate(LETTERS)))
    data = DataConfig(name="text", source=DataSource.text, path=str(path), eval_fraction=0.25)
    return obtain_documents(data, tiny, 0, cpu, workplace)


@pytest.fixture(scope="package")
def obtain(workplace, documents, tiny, cpu, small_shards):
    """The cache of some settings; everything not named is as in the `cache` fixture."""

    def make(documents=documents, seed=9, machine=cpu, artifacts=workplace, **settings):
        cache = CacheConfig(**{"name": "L20", "length": 20, "top_k": 6, "random": 10, **settings})
        return writer.obtain_cache(cache, documents, "text", tiny, seed, machine, artifacts)

    return make


@pytest.fixture(scope="package")
def cache(obtain):
    return obtain()


@pytest.fixture
def other_documents(documents):
    """The same text under another key."""
    return dataclasses.replace(documents, manifest={**documents.manifest, "key": "0" * 12})
