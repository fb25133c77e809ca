"""Registered names are the archives of the older run log, however they are packed and wherever they lie in a store."""

import json
from pathlib import Path

import pytest

from qat import names, transfer
from qat.checkpoint_files import find
from qat.config import (
    CacheConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    DataSource,
    EvaluateConfig,
    Stage,
    StoreConfig,
    StoreKind,
)
from qat.errors import ArtifactError, MissingError
from qat.report import log
from qat.stages import pull, push
from qat.stages import store as listing
from qat.store.names import find as find_in_store
from qat.store.names import own
from qat.store.places import Place
from tests import described
from tests.store.test_archives import compressed, entry, tar_of

OPTIONS = {  # and what each is called on the Drive of the log
    "q4_fp32": "anemll_v2_q4_a4_from_v1_finetuned",
    "q4_fp16": "anemll_v2_q4_a4_ste_fp16_from_v1",
    "q2_binit_0_5855": "Q2A4_BINIT_0.5855",
    "q2_0_5341": "v2_a2_q2_best_fp32_0.5341",
    "q2_init": "q2_init_from_q4",
}
CACHES = {"alpaca_L64": "alpaca_chat_think_both_L64_K64_R128", "alpaca_L128": "alpaca_chat_think_both_L128_K128_R1024"}


@pytest.fixture
def drive(tmp_path):
    folder = tmp_path / "drive"
    (folder / "qwen3_runs").mkdir(parents=True)
    return folder


@pytest.fixture
def outputs(tmp_path):
    (tmp_path / "outputs").mkdir()
    return tmp_path / "outputs"


def config(outputs, drive=None, checkpoint="teacher", **sections):
    word, kind = checkpoint, StoreKind.gdrive if drive else StoreKind.local
    given = CheckpointConfig(word) if word in {"teacher", *OPTIONS} else CheckpointConfig("local", word)
    path = sections.pop("cache", None)
    return Config(
        outputs=str(outputs),
        store=StoreConfig("there", kind, str(drive) if drive else None, sections.pop("archive", None)),
        checkpoint=given,
        cache=CacheConfig("some", path=path),
        data=DataConfig("prompts", DataSource.selfgen),
        **sections,
    )


def student(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {"config.json": '{"final_loss": 0.5}', **files}.items():
        (folder / name).write_text(text)
    return folder


def put(path: Path, nest: str = "", suffix: str = ".tgz") -> None:
    files = {"config.json": b'{"version": "v2", "final_loss": 0.5341}', "student.pt": b"tensors"}
    packed = compressed(tar_of(*((entry(nest + name), data) for name, data in files.items())), suffix)
    (path.parent / f"{path.name}{suffix}").write_bytes(packed)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("nest", ["", "{name}/", "{name}/{name}/"])
def test_a_registered_checkpoint_is_pulled_found_and_listed(outputs, drive, option, nest):
    name = OPTIONS[option]
    put(drive / "qwen3_runs" / name, nest.format(name=name))
    pull.main(config(outputs, drive, option, stage=Stage.pull))
    for word in (option, option.upper(), name, f"{name}.tgz"):
        assert find(names.checkpoint(word, outputs)).read_bytes() == b"tensors"
    assert names.called(names.checkpoint(option, outputs), outputs) == option
    assert f"| `{option}` | 0.5341 | – | – | – | – | `checkpoints/{option}` |" in (outputs / log.FILE).read_text()


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.lz4", ".tar.zst"])
def test_the_same_in_other_archives_and_by_the_archives_own_name(outputs, drive, suffix):
    put(drive / "qwen3_runs" / "q2_init_from_q4", suffix=suffix)
    pull.main(config(outputs, drive, archive=f"q2_init_from_q4{suffix}"))
    assert names.checkpoint("q2_init", outputs) == outputs / "checkpoints" / "q2_init_from_q4"
    assert "| `q2_init` | 0.5341 |" in log.render(outputs)


@pytest.mark.parametrize(
    "wanted",
    [
        {"checkpoint": "q2_binit_0_5855"},
        {"checkpoint": "Q2A4_BINIT_0.5855/best_state_dict.pt"},
        {"archive": "Q2A4_BINIT_0.5855"},
        {"archive": "Q2A4_BINIT_0.5855/best_state_dict.pt"},
        {"archive": "qwen3_runs/Q2A4_BINIT_0.5855"},
    ],
)
def test_of_a_folder_of_training_only_the_student_that_is_read_is_pulled(outputs, drive, wanted):
    states = {"best_state_dict.pt": "best", "last_state_dict.pt": "last", "checkpoint_500.pt": "500"}
    student(drive / "qwen3_runs" / "Q2A4_BINIT_0.5855", **states)
    pull.main(config(outputs, drive, **wanted))
    place = names.checkpoint("q2_binit_0_5855", outputs)
    assert {path.name for path in place.iterdir()} == {"best_state_dict.pt", "config.json"}
    assert find(place).read_text() == "best"


def test_a_folder_of_students_none_of_which_is_the_one_is_refused(outputs, drive):
    student(drive / "q2_init", **{"a.pt": "a", "b.pt": "b"})
    with pytest.raises(ArtifactError, match=r"q2_init in .* holds several state dicts \(a.pt, b.pt\)"):
        pull.main(config(outputs, drive, "q2_init"))
    assert not list((outputs / "checkpoints").glob("[!.]*"))


def test_cache_and_checkpoint_are_pulled_at_once(outputs, drive, capsys):
    put(drive / "qwen3_runs" / OPTIONS["q4_fp32"])
    (drive / "qwen3_caches").mkdir()
    for name in CACHES.values():
        shards = tar_of((entry(f"{name}/{name}/shard_00000.pt"), b"x"))
        (drive / "qwen3_caches" / f"{name}.tgz").write_bytes(compressed(shards, ".tgz"))
    for name in CACHES.values():
        pull.main(config(outputs, drive, "q4_fp32", cache=name))
        assert names.cached(config(outputs, cache=name)) == outputs / "caches" / name
    assert f"q4_fp32 is now {outputs}/checkpoints/q4_fp32" in " ".join(capsys.readouterr().out.split())
    text = log.render(outputs)
    assert "| `alpaca_L64` |" in text and "| `alpaca_L128` |" in text


def test_what_is_compared_with_is_pulled_as_well(outputs, drive):
    put(drive / "qwen3_runs" / OPTIONS["q4_fp32"])
    against = EvaluateConfig(against=["teacher", "q4_fp32"])
    transfer.with_named(config(outputs, drive, evaluate=against))
    transfer.with_named(config(outputs, evaluate=against))  # without a store
    with pytest.raises(MissingError, match=r"q2_init is neither in .* nor in the store"):
        transfer.with_named(config(outputs, drive, evaluate=EvaluateConfig(against=["q2_init"])))


def test_an_archive_is_a_checkpoint_and_a_changed_one_another(outputs, drive, tmp_path):
    put(tmp_path / "mine", "mine/")
    archive, places = tmp_path / "mine.tgz", set()
    for content in ("tensors", "others"):
        found = transfer.with_named(config(outputs, None, str(archive))).checkpoint.path
        assert find(Path(found)).read_text() == content
        assert transfer.with_named(config(outputs, None, str(archive))).checkpoint.path == found
        places.add(found)
        changed = tar_of((entry("student.pt"), b"others"))
        archive.write_bytes(compressed(changed, ".tgz"))
    assert len(places) == 2
    archive.write_bytes(archive.read_bytes()[:50])
    with pytest.raises(ArtifactError, match="cut short"):
        transfer.with_named(config(outputs, None, str(archive)))
    assert {str(path) for path in (outputs / "checkpoints").glob("[!.]*")} == places


def test_an_archived_cache_is_a_cache(outputs, tmp_path):
    archive = tmp_path / "some.tgz"
    archive.write_bytes(compressed(tar_of((entry("shard_00000.pt"), b"x")), ".tgz"))
    found = Path(transfer.with_named(config(outputs, cache=str(archive))).cache.path)
    assert [path.name for path in found.iterdir()] == ["shard_00000.pt"]


@pytest.mark.parametrize("given", ["run/best_state_dict.pt", "run", "mine.pt"])
def test_a_state_dict_is_pushed_with_its_configuration_and_comes_back(outputs, drive, tmp_path, given):
    student(tmp_path / "run", **{"best_state_dict.pt": "best"})
    student(tmp_path, **{"mine.pt": "best"})
    push.main(config(outputs, drive, str(tmp_path / given)))
    name = given.split("/")[0].removesuffix(".pt")
    pull.main(config(outputs, drive, name))
    pulled = names.checkpoint(name, outputs)
    state = "mine.pt" if name == "mine" else "best_state_dict.pt"
    assert {path.name for path in pulled.iterdir()} == {"config.json", state}


def test_a_conversion_is_pushed_by_its_run_and_a_pulled_one_by_its_name(outputs, drive):
    made = outputs / "artifacts" / "checkpoints" / "tiny_init-0123"
    student(made, **{"manifest.json": json.dumps(described.checkpoint(name="tiny_init"))})
    said = {"run_id": "SR-001", "stage": "convert", "paths": {"conversion": str(made)}}
    student(outputs / "SR-001", **{"result.json": json.dumps(said)})
    push.main(config(outputs, drive, "SR-001"))
    push.main(config(outputs, drive, "SR-001", archive="q2_init"))
    pull.main(config(outputs, drive, "q2_init"))
    push.main(config(outputs, drive / "other", "q2_init"))
    found = {path.relative_to(drive).as_posix() for path in drive.rglob("*.tgz")}
    assert found == {"checkpoints/SR-001_tiny_init.tgz", "checkpoints/q2_init.tgz", "other/checkpoints/q2_init.tgz"}


def test_the_store_is_listed_with_the_names_here(outputs, drive, capsys):
    put(drive / "qwen3_runs" / OPTIONS["q2_0_5341"])
    put(drive / "qwen3_runs" / CACHES["alpaca_L64"])
    student(drive / "qwen3_runs" / "Q2A4_BINIT_0.5855")
    pull.main(config(outputs, drive, "q2_0_5341"))
    capsys.readouterr()
    listing.main(config(outputs, drive))
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert rows["qwen3_runs/v2_a2_q2_best_fp32_0.5341.tgz"][2:] == ["q2_0_5341", "KD", "loss", "0.5341"]
    assert rows["qwen3_runs/Q2A4_BINIT_0.5855"] == ["folder", "q2_binit_0_5855"]
    assert rows[f"qwen3_runs/{CACHES['alpaca_L64']}.tgz"][2:] == ["alpaca_L64"]


def test_whatever_the_store_lists_is_a_name_of_it(drive):
    put(drive / "qwen3_runs" / "one", suffix=".tar.gz")
    student(drive / "two" / "three", **{"student.pt": "x"})
    offered = Place(str(drive)).entries()
    for listed in offered:
        found = find_in_store(offered, [listed.path])
        assert found == (None if listed.name == "config.json" else listed)
    called = {name: own(find_in_store(offered, [name])) for name in ("ONE", "student", "two/three")}
    assert called == {"ONE": "one", "student": "student", "two/three": "three"}
