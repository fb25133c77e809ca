"""What is named is found, wherever it lies and however it is written; what could be two things is refused."""

import json
import os
from pathlib import Path

import pytest

from qat import identities, names, records
from qat.checkpoint_files import find
from qat.config import CacheConfig, CheckpointConfig, Config, DataConfig, DataSource
from qat.errors import ArtifactError, ConfigError
from qat.report import log
from tests import described
from tests.report.synthetic import write

OUTPUTS = Path("outputs")
CONVERSION = "artifacts/checkpoints/tiny_q2a4_init-0123"
PULLED = "checkpoints/anemll_v2_q4_a4_from_v1_finetuned"
ARCHIVE = "alpaca_chat_think_both_L64_K64_R128"


def run(folder: Path, run_id: str, stage: str = "run", status: str = "complete", **paths: str) -> Path:
    said = {"run_id": run_id, "stage": stage, "status": status, "paths": paths, "error": None, "name": "v2_q2a4"}
    write(folder / "result.json", said | ({"error": "no space"} if status == "failed" else {}))
    (folder / "config_resolved.yaml").touch()
    return folder


def trained(folder: Path, run_id: str) -> Path:
    for name in ("best", "last"):
        write(folder / "checkpoints" / name / "manifest.json", described.checkpoint())
    return run(folder, run_id)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current directory with an outputs folder that has a run of each sort; two lie in folders of their own."""
    monkeypatch.chdir(tmp_path)
    write(OUTPUTS / CONVERSION / "manifest.json", described.checkpoint(name="tiny_q2a4_init"))
    run(OUTPUTS / "SR-001", "SR-001", "convert", conversion=f"outputs/{CONVERSION}")
    trained(OUTPUTS / "SR-002", "SR-002")
    trained(OUTPUTS / "sweep-001" / "SR-003", "SR-003")
    trained(Path("elsewhere/own"), "SR-004")
    run(Path("elsewhere/q2"), "SR-005", "convert", conversion=str(tmp_path / OUTPUTS / CONVERSION))
    trained(OUTPUTS / "nested" / "deep", "SR-006")
    for folder in ("elsewhere/own", "elsewhere/q2", "outputs/nested/deep"):
        identities.note(OUTPUTS, str(identities.recorded(Path(folder))), Path(folder))
    write(OUTPUTS / PULLED / "model.pt", "")
    write(OUTPUTS / PULLED / "config.json", {"final_loss": 0.7312})
    write(Path("old/best_state_dict.pt"), "")
    return tmp_path


BEST = "checkpoints/best"
FOUND = {
    "SR-001": f"outputs/{CONVERSION}",
    "sr-001": f"outputs/{CONVERSION}",
    "outputs/SR-001/": f"outputs/{CONVERSION}",
    "./outputs/../outputs/SR-001": f"outputs/{CONVERSION}",
    "{here}/outputs/SR-001": f"outputs/{CONVERSION}",
    "SR-002": f"outputs/SR-002/{BEST}",
    "SR-002/last": "outputs/SR-002/checkpoints/last",
    "SR-002/checkpoints/last/": "outputs/SR-002/checkpoints/last",
    "SR-003": f"outputs/sweep-001/SR-003/{BEST}",
    "sweep-001/sr-003": f"outputs/sweep-001/SR-003/{BEST}",
    "SR-003/last": "outputs/sweep-001/SR-003/checkpoints/last",
    "SR-004": f"elsewhere/own/{BEST}",
    "own": f"elsewhere/own/{BEST}",
    "elsewhere/own/checkpoints/best": f"elsewhere/own/{BEST}",
    "~/own": f"elsewhere/own/{BEST}",
    "SR-005": f"outputs/{CONVERSION}",
    "elsewhere/q2": f"outputs/{CONVERSION}",
    "SR-006": f"outputs/nested/deep/{BEST}",
    "nested/deep": f"outputs/nested/deep/{BEST}",
    "q4_fp32": f"outputs/{PULLED}/model.pt",
    "Q4_FP32": f"outputs/{PULLED}/model.pt",
    "anemll_v2_q4_a4_from_v1_finetuned.tgz": f"outputs/{PULLED}/model.pt",
    "checkpoints/anemll_v2_q4_a4_from_v1_finetuned": f"outputs/{PULLED}/model.pt",
    "old": "old/best_state_dict.pt",
    "old/best_state_dict.pt": "old/best_state_dict.pt",
}


@pytest.mark.parametrize("word", FOUND)
def test_a_checkpoint_is_found(here, word, monkeypatch):
    monkeypatch.setenv("HOME", str(here / "elsewhere"))
    place = names.checkpoint(word.format(here=here), OUTPUTS)
    assert find(place).resolve() == here / FOUND[word]
    assert names.settled(CheckpointConfig("local", str(place)), OUTPUTS).path == str(place)


@pytest.mark.parametrize("word", ["SR-001", "SR-003", "SR-004", "SR-005", "own", "q4_fp32", "sweep-001/sr-003"])
def test_names_hold_in_any_working_directory(here, word, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("else"))
    assert find(names.checkpoint(word, here / OUTPUTS)).resolve() == here / FOUND[word]


def test_a_moved_outputs_folder_keeps_its_names(here, tmp_path_factory, monkeypatch):
    moved = tmp_path_factory.mktemp("moved") / "results"
    (here / OUTPUTS).rename(moved)
    monkeypatch.chdir(moved.parent)
    for word, place in (("SR-001", CONVERSION), ("SR-006", f"nested/deep/{BEST}"), ("q4_fp32", f"{PULLED}/model.pt")):
        assert find(names.checkpoint(word, Path("results"))).resolve() == moved / place


def test_links_to_one_place_are_one_thing(here):
    os.symlink(here / "elsewhere" / "own", OUTPUTS / "latest")
    os.symlink(here / "outputs" / "SR-002", "SR-002")
    assert find(names.checkpoint("latest", OUTPUTS)).resolve() == here / "elsewhere/own" / BEST
    assert find(names.checkpoint("SR-002", OUTPUTS)).resolve() == here / "outputs/SR-002" / BEST


def test_what_could_be_two_things_is_refused_with_both(here):
    trained(Path("SR-002"), "SR-002")
    trained(OUTPUTS / "sweep-002" / "SR-004", "SR-004")
    run(Path("q4_fp32"), "SR-007", "convert", conversion=str(here / OUTPUTS / CONVERSION))
    for word, places in {
        "SR-002": "./SR-002 and ./outputs/SR-002",
        "SR-004": f"./outputs/sweep-002/SR-004 and {here}/elsewhere/own",
        "q4_fp32": f"./q4_fp32 and ./outputs/{PULLED}",
    }.items():
        with pytest.raises(ConfigError, match=f"^{word} is in 2 places, {places}: name the one you mean$"):
            names.checkpoint(word, OUTPUTS)
    for word in ("./SR-002", "outputs/SR-002", "elsewhere/own", "./q4_fp32", f"./outputs/{PULLED}"):
        settled = names.settled(CheckpointConfig("local", word), OUTPUTS)
        assert names.settled(settled, OUTPUTS) == settled
        assert names.checkpoint(settled.path, OUTPUTS).resolve() == names.checkpoint(word, OUTPUTS).resolve()
    with pytest.raises(ConfigError, match="SR-004 is in 2 places"):
        names.run("SR-004", OUTPUTS)


def test_a_folder_of_the_same_name_without_a_checkpoint_is_not_meant(here):
    Path("SR-002").mkdir()
    Path("q4_fp32").mkdir()
    assert names.checkpoint("SR-002", OUTPUTS) == OUTPUTS / "SR-002" / BEST
    assert names.checkpoint("q4_fp32", OUTPUTS) == OUTPUTS / PULLED


def test_an_own_folder_may_be_called_like_a_registered_name_that_is_not_here(here):
    folder = run(Path("q2_init"), "SR-007", "convert", conversion=str(here / OUTPUTS / CONVERSION))
    assert names.checkpoint("q2_init", OUTPUTS) == folder


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (("run", "interrupted"), r"interrupted, or is still at work; .*-path outputs/SR-007 run.resume=SR-007$"),
        (("distill", "failed"), r"it failed \(no space\); to make it: .*-path outputs/SR-007 run.resume=SR-007$"),
        (("convert", "interrupted"), r"interrupted, or is still at work; .*-path outputs/SR-007$"),
        (("convert", "failed"), r"it failed \(no space\); to make it"),
        (("run", "complete"), "it was deleted; to make it"),
        (("evaluate", "complete"), "it is a run of stage=evaluate, which makes none"),
        (("export", "failed"), "it is a run of stage=export, which makes none"),
    ],
)
def test_a_run_without_checkpoint_says_why_and_what_to_do(here, made, says):
    run(OUTPUTS / "SR-007", "SR-007", *made)
    with pytest.raises(ConfigError, match=f"^outputs/SR-007 has no checkpoint: .*{says}"):
        names.checkpoint("SR-007", OUTPUTS)


def test_a_conversion_that_is_gone_is_told(here):
    (OUTPUTS / CONVERSION / "manifest.json").unlink()
    (OUTPUTS / CONVERSION).rmdir()
    with pytest.raises(ConfigError, match=r"conversion tiny_q2a4_init-0123 is gone; .*-path outputs/SR-001$"):
        names.checkpoint("SR-001", OUTPUTS)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("SR-033", r"no run in outputs \(did you mean SR-003\?\)"),
        ("q4_fp23", r"no registered or pulled name \(did you mean q4_fp32\?\); registered are teacher, q2_0_5341"),
        ("nowhere/at/all", "no such folder or file"),
        ("", "no such folder or file"),
        ("~nobody/x", "no such folder or file"),
        ("x" * 300, "no such folder or file"),
    ],
)
def test_what_is_nothing_is_told_with_the_nearest_of_each_kind(here, word, says):
    with pytest.raises(ConfigError, match=says):
        names.checkpoint(word, OUTPUTS)


def test_a_folder_of_its_own_that_is_gone_is_told(here):
    (here / "elsewhere" / "own").rename("away")
    with pytest.raises(ConfigError, match=r"SR-004: its folder .*/elsewhere/own is not there: it was moved"):
        names.checkpoint("SR-004", OUTPUTS)
    assert names.checkpoint("away", OUTPUTS) == Path("away") / BEST


def test_another_run_in_the_same_folder_takes_its_place(here):
    trained(Path("elsewhere/own"), "SR-008")
    identities.note(OUTPUTS, "SR-008", Path("elsewhere/own"))
    assert names.run("SR-008", OUTPUTS) == here / "elsewhere/own"
    with pytest.raises(ConfigError, match="no such run"):
        names.run("SR-004", OUTPUTS)
    assert [record.run_id for record in records.runs(OUTPUTS)].count("SR-008") == 1


@pytest.mark.parametrize("word", ["SR-003", "sr-003", "sweep-001/SR-003", "outputs/sweep-001/SR-003/"])
def test_a_run_is_found(here, word):
    assert names.run(word, OUTPUTS) == OUTPUTS / "sweep-001" / "SR-003"


def test_called_by_the_shortest_name_that_finds_it(here):
    for word, name in {
        "outputs/SR-001": "SR-001",
        "outputs/SR-002/checkpoints/best": "SR-002",
        "outputs/SR-002/checkpoints/last": "SR-002/last",
        "elsewhere/own/checkpoints/best": "SR-004",
        "elsewhere/q2": "SR-005",
        f"outputs/{PULLED}": "q4_fp32",
        "old/best_state_dict.pt": "old/best_state_dict.pt",
    }.items():
        assert names.called(Path(word), OUTPUTS) == name
        assert find(names.checkpoint(name, OUTPUTS)).resolve() == find(Path(word)).resolve()


def test_runs_with_folders_of_their_own_are_in_the_log(here):
    text = log.render(OUTPUTS)
    assert [line.split()[1] for line in text.splitlines() if line.startswith("### ")] == [
        f"SR-00{number}" for number in range(1, 7)
    ]
    assert f"- **Folder**: `{here}/elsewhere/own`" in text and "- **Folder**: `nested/deep`" in text
    assert f"| `q4_fp32` | 0.7312 | – | – | – | – | `{PULLED}` |" in text
    assert text == log.render(here / OUTPUTS)


def test_a_sweep_of_its_own_folder_is_one(here):
    trained(Path("elsewhere/mine/SR-009"), "SR-009")
    write(Path("elsewhere/mine/sweep.json"), "{}")
    identities.note(OUTPUTS, "SR-009", Path("elsewhere/mine/SR-009"))
    assert names.sweep("mine", OUTPUTS) == names.sweep(f"{here}/elsewhere/mine/", OUTPUTS)
    assert [record.sweep for record in records.runs(OUTPUTS) if record.run_id == "SR-009"] == [f"{here}/elsewhere/mine"]


def cached(**settings):
    return names.cached(Config(outputs="outputs", **settings))


def test_a_cache_is_found_by_its_name_and_its_archive(here):
    data = DataConfig("alpaca", DataSource.alpaca, thinking="both")
    option = CacheConfig("alpaca_L64", path=ARCHIVE)
    assert cached(cache=CacheConfig("L64"), data=data) is None
    assert cached(cache=option) == OUTPUTS / "caches" / ARCHIVE  # where it will be
    write(OUTPUTS / "caches" / ARCHIVE / "shard_00000.pt", "")
    for word in (ARCHIVE, "alpaca_L64", f"{ARCHIVE}.tgz", f"outputs/caches/{ARCHIVE}/", f"caches/{ARCHIVE}"):
        assert cached(cache=CacheConfig("local", path=word)).resolve() == here / OUTPUTS / "caches" / ARCHIVE
    assert cached(cache=CacheConfig("L64"), data=data) == OUTPUTS / "caches" / ARCHIVE


def test_registered_names_are_those_of_the_run_log():
    for word, names_of_it in {
        "q4_fp32": ["q4_fp32", "anemll_v2_q4_a4_from_v1_finetuned"],
        "Q4_FP16": ["q4_fp16", "anemll_v2_q4_a4_ste_fp16_from_v1"],
        "Q2_BINIT_0.5855": ["q2_binit_0_5855", "Q2A4_BINIT_0.5855"],
        "Q2_0.5341": ["q2_0_5341", "v2_a2_q2_best_fp32_0.5341"],
        "q2_init": ["q2_init", "q2_init_from_q4"],
        "Q2A4_BINIT_0.5855/best_state_dict.pt": ["Q2A4_BINIT_0.5855", "q2_binit_0_5855"],
        "q2_init_from_q4.tar.lz4": ["q2_init_from_q4", "q2_init"],
        "mine": ["mine"],
    }.items():
        assert names.aliases(word) == names_of_it
    assert names.registered(f"{ARCHIVE}.tgz", "cache") == "alpaca_L64"
    assert names.registered("alpaca_chat_think_both_L128_K128_R1024", "cache") == "alpaca_L128"


def test_a_configuration_compares_whatever_the_directory_it_was_typed_in():
    def plain(path, outputs):
        return {"outputs": outputs, "checkpoint": {"name": "local", "path": path}, "seed": 0}

    near, far = plain("outputs/SR-001", "outputs"), plain("/a/outputs/SR-001", "/a/outputs")
    assert names.comparable(near)["checkpoint"] == names.comparable(far)["checkpoint"]
    assert names.comparable(plain("old/x.pt", "outputs")) == plain("old/x.pt", "outputs")


def test_a_damaged_record_is_no_traceback(here):
    for content in ("{", "[]", '{"run_id": 3, "paths": 7, "stage": []}', "[" * 9000):
        write(OUTPUTS / "SR-001" / "result.json", content)
        with pytest.raises((ConfigError, ArtifactError), match="has no checkpoint"):
            names.checkpoint("SR-001", OUTPUTS)
        json.dumps(list(map(str, identities.places(OUTPUTS))))
