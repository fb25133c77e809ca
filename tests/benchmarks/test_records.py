"""Records of made-up runs with real students of the tiny model."""

import argparse
import json
import shutil
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import records
import torch
from evaluation import Evaluation, as_packed

from qat import checkpoints
from qat.cache.batch import Text
from qat.checkpoint_files import BEST
from qat.cli import arguments, main
from qat.conversion.convert import install
from qat.evaluate import evaluate
from qat.quant.linear import quantized
from qat.runs import Run
from tests import tiny


@pytest.fixture
def options(teacher, tmp_path):
    (tmp_path / "wiki.txt").write_text("\n\n".join(f"paragraph {i} of some text" * 3 for i in range(40)))
    return argparse.Namespace(
        model=str(teacher.path),
        evaluation=[str(tmp_path / "wiki.txt")],
        tokens=256,
        length=32,
        precision="fp32",
        micro_batch=4,
        runs=[],
        looks=[],
        changed="everything",
        commit=None,
        json=str(tmp_path / "quality.json"),
        records=str(tmp_path / "records.json"),
        merge=[],
        page=str(tmp_path / "RECORDS.md"),
    )


@pytest.fixture
def command(options, monkeypatch, tmp_path):
    def run(**changes):
        monkeypatch.setattr(records, "arguments", lambda: argparse.Namespace(**vars(options) | changes))
        records.main()
        return json.loads((tmp_path / "records.json").read_text())

    return run


@pytest.fixture(scope="module")
def made(teacher):
    rows = torch.randint(256, (8, 32), generator=torch.Generator().manual_seed(0))
    return tiny.converted(teacher.load(torch.float32, tiny.CPU), rows)


@pytest.fixture(scope="module")
def student_of(teacher, made, tmp_path_factory):
    """Checkpoints by seed, each made once."""
    layers = [layer for layer, _, _ in made.values()]

    @cache
    def make(seed):
        student = teacher.load(torch.float32, tiny.CPU)
        install(student, {name: deepcopy(module) for name, (_, module, _) in made.items()})
        for module in list(quantized(student).values())[:3]:
            module.codebook.data *= 1 + seed / 10
        folder = tmp_path_factory.mktemp("seed") / str(seed)
        checkpoints.save(student, folder, checkpoints.describe(teacher, tiny.QUANT, layers))
        return folder

    return make


@pytest.fixture
def finished(tmp_path, student_of):
    """Makes the folder of a run, complete unless said otherwise."""

    def make(seed, status="complete", words=("+experiment=record_q2a4",), **timing):
        folder = tmp_path / "outputs" / f"SR-{seed:03d}"
        folder.mkdir(parents=True)
        line = ["model=tiny", "tracker=none", f"outputs={folder.parent}", f"seed={seed}", *words[1:]]
        config = main.check(arguments.parse(line)).configs[0]
        run = Run(config, folder, overrides=words)
        run.result["environment"] = {"git": "abcdef012345", "device": "cpu, float32"}
        run.result["timing"] |= timing
        run.finish(status)
        shutil.copytree(student_of(seed), folder / BEST)
        return str(folder)

    return make


def test_a_record_has_means_over_seeds_and_the_cost_of_what_was_made(command, finished, options, teacher):
    runs = [finished(1, cache_s=60.0, convert_s=3.0, distill_s=10.0), finished(2, cache_s=0.1, convert_s=4.0)]
    (record,) = command(runs=runs)
    assert record["seconds"]["cache"] == 60 and record["seconds"]["convert"] == 4 and record["seconds"]["distill"] == 10
    assert (record["experiment"], record["commit"], record["seeds"]) == ("record_q2a4", "abcdef012345", [1, 2])
    work = Evaluation(options)
    kl = []
    for run in runs:
        loaded, manifest = checkpoints.load(Path(run) / BEST, teacher, tiny.FP32)
        student, _ = as_packed(loaded, checkpoints.layers_of(manifest), teacher)
        exact = teacher.load(torch.float32, tiny.CPU)
        kl.append(evaluate(student, exact, Text(work.held_out["wiki"]), 8, tiny.FP32).kl)
    assert record["texts"]["wiki"]["kl"] == pytest.approx(sum(kl) / 2, rel=1e-4)
    assert record["texts"]["wiki"]["deviation"]["kl"] == pytest.approx(abs(kl[0] - kl[1]) / 2**0.5)


def test_the_rows_of_a_record_are_those_of_the_comparison(command, finished, options):
    (record,) = command(runs=[finished(1), finished(2)])
    assert json.loads(Path(options.json).read_text()) == list(record["texts"].values())


def test_the_page_has_a_line_a_record_oldest_first(command, finished, options):
    command(runs=[finished(1)], commit="older", changed="nothing yet")
    command(runs=[finished(2), finished(3)], changed="two seeds")
    lines = [line for line in Path(options.page).read_text().splitlines() if line.startswith("| 2")]
    assert ["nothing yet" in lines[0], "two seeds" in lines[1]] == [True, True]
    assert "`older`" in lines[0] and "±" not in lines[0] and " ± " in lines[1]
    assert "[record_q2a4](../conf/experiment/record_q2a4.yaml)" in lines[0]


def test_the_same_record_again_replaces_itself(command, finished):
    runs = [finished(1), finished(2)]
    assert len(command(runs=runs)) == len(command(runs=runs)) == 1
    (record,) = command(runs=[*runs, finished(3)], changed="a third seed")
    assert (record["seeds"], record["changed"]) == ([1, 2, 3], "a third seed")


def test_some_seeds_of_a_record_again_take_none_away(command, finished, options):
    runs = [finished(1), finished(2)]
    command(runs=runs)
    kept = [Path(path).read_bytes() for path in (options.records, options.page, options.json)]
    with pytest.raises(SystemExit, match=r"record_q2a4 at abcdef012345 has seeds 1, 2: give all of them or others"):
        command(runs=[runs[1], finished(3)])
    assert [Path(path).read_bytes() for path in (options.records, options.page, options.json)] == kept


def test_records_of_another_machine_come_in_without_a_model(command, finished, tmp_path, monkeypatch):
    there = str(tmp_path / "there.json")
    command(runs=[finished(1)])
    (tmp_path / "records.json").rename(there)
    monkeypatch.setattr(records, "Evaluation", lambda _: pytest.fail("a model was wanted"))
    assert command(merge=[there], model=None) == json.loads(Path(there).read_text())


def test_seeds_of_several_machines_are_one_record(command, finished, options, tmp_path):
    runs = [finished(1, cache_s=9.0), finished(2, cache_s=1.0), finished(4)]
    (whole,) = command(runs=runs)
    (tmp_path / "records.json").unlink()
    parts = []
    for number, some in enumerate((runs[:1], runs[1:])):
        command(runs=some, changed="" if number else "everything")
        parts.append(str((tmp_path / "records.json").rename(tmp_path / f"{number}.json")))
    Path(options.json).unlink()
    (record,) = command(merge=parts)
    row, expected = record["texts"]["wiki"], whole["texts"]["wiki"]
    figures = {name for name, value in expected.items() if isinstance(value, float)} | {"deviation"}
    for name in figures:
        assert row[name] == pytest.approx(expected[name], rel=1e-6), name
    assert {k: v for k, v in row.items() if k not in figures} == {k: v for k, v in expected.items() if k not in figures}
    assert {k: v for k, v in record.items() if k != "texts"} == {k: v for k, v in whole.items() if k != "texts"}
    assert json.loads(Path(options.json).read_text()) == [row]


def test_seeds_measured_otherwise_do_not_join(command, finished, tmp_path):
    command(runs=[finished(1)])
    (tmp_path / "records.json").rename(tmp_path / "there.json")
    command(runs=[finished(2)], tokens=128)
    with pytest.raises(SystemExit, match=r"seeds of record_q2a4 were measured on different wiki"):
        command(merge=[str(tmp_path / "there.json")])


def test_a_seed_that_does_not_join_leaves_the_files_as_they_were(command, finished, options):
    command(runs=[finished(1)])
    kept = [Path(path).read_bytes() for path in (options.records, options.page, options.json)]
    with pytest.raises(SystemExit, match=r"measured on different wiki"):
        command(runs=[finished(2)], tokens=128)
    assert [Path(path).read_bytes() for path in (options.records, options.page, options.json)] == kept


def said(chat: float, wiki: float, deviation: float = 0.01, seeds: int = 3, megabytes: float = 50.0):
    """A record with these figures."""
    texts = {"chat": chat, "wiki": wiki}
    rows = {text: {"kl": kl, "deviation": {"kl": deviation}} for text, kl in texts.items()}
    return {"seeds": list(range(seeds)), "megabytes": megabytes, "texts": rows}


@pytest.mark.parametrize(
    ("fresh", "wins"),
    [
        (said(0.27, 0.27), True),
        (said(0.27, 0.31), True),  # no worse on the other text than chance allows
        (said(0.27, 0.33), False),
        (said(0.285, 0.285), False),  # by less than 0.01 + 0.01
        (said(0.285, 0.285, deviation=0.001), True),
        (said(0.27, 0.27, deviation=0.03), False),
        (said(0.1, 0.1, seeds=2), False),
        (said(0.1, 0.1, megabytes=51.0), False),
        (said(0.2, float("nan")), False),
    ],
)
def test_a_record_is_beaten_by_more_than_chance_alone(fresh, wins):
    old = said(0.3, 0.3)
    assert records.standing([said(0.2, 0.2, seeds=1), old, fresh]) is (fresh if wins else old)


def test_before_three_seeds_no_record_stands(command, finished, options, tmp_path):
    assert records.standing([said(0.2, 0.2, seeds=2)]) is None
    command(runs=[finished(seed) for seed in (1, 2, 3)], commit="older")
    command(runs=[finished(4)], commit="newer")
    lines = [line for line in Path(options.page).read_text().splitlines() if line.startswith("| 2")]
    assert ["**" in line for line in lines] == [True, False]
    assert json.loads(Path(options.json).read_text())[0]["seeds"] == 3


def test_runs_that_are_no_record_are_refused(command, finished):
    one = finished(1)
    with pytest.raises(SystemExit, match=r"SR-002 is not the folder of a complete stage=run"):
        command(runs=[one, finished(2, status="interrupted")])
    with pytest.raises(SystemExit, match=r"SR-001 and SR-003 differ in train\.lr, train\.steps"):
        command(runs=[one, finished(3, words=("+experiment=record_q2a4", "train.lr=0.1", "train.steps=7"))])
    with pytest.raises(SystemExit, match="the same seed"):
        command(runs=[one, one])
    with pytest.raises(SystemExit, match=r"SR-004 was not started with \+experiment"):
        command(runs=[finished(4, words=())])


@pytest.fixture
def looks(tmp_path):
    """Makes the folder of a stage=evaluate of a run's student."""

    def make(run, number, **words):
        sides = {f"SR-{number}": 0.1 * number, "teacher": 0.5}
        models = {
            name: {"answers": {"greedy": {"ended": x}}, "scores": {f"local_{t}": {"acc": x} for t in TASKS}}
            for name, x in sides.items()
        }
        found = {
            "stage": "evaluate",
            "status": "complete",
            "config": {"checkpoint": {"path": run}},
            "metrics": {"kl": 1.0, "kl_64_128": 0.1 * number, "kl_1024_2048": 0.2 * number},
            "evaluation": {"models": models},
        }
        folder = tmp_path / f"look-{number}"
        folder.mkdir()
        (folder / "result.json").write_text(json.dumps(found | words))
        return str(folder)

    return make


TASKS = ("cloze", "choice", "instructions")


def test_a_record_says_what_evaluation_found_of_its_seeds(looks):
    found = [records.look(Path(looks("outputs/SR-001", number)), ["outputs/SR-001"]) for number in (1, 3)]
    words = dict.fromkeys(("preset", "experiment", "changed", "commit", "date", "device"), "x")
    seconds = dict.fromkeys((*records.STAGES, "total"), 1.0)
    record = {**words, "seeds": [0, 1], "seconds": seconds, "bits": 2.0, "megabytes": 1.0, "texts": {}}
    cells = [line.split(" | ") for line in records.table([record | {"looks": found}, record])]
    columns = dict(zip(cells[0], zip(*cells[2:], strict=True), strict=True))
    assert columns["KL at 64 to 127"] == ("0.200", "–") and columns["KL at 1,024 to 2,047"] == ("0.400", "–")
    assert columns["answers that end"] == ("20% (50%)", "–") and columns["accuracy"] == ("20.0% (50.0%)", "–")
    other = record | {"looks": found[:1]}
    assert records.joined(other | {"texts": {}}, other | {"texts": {}})["looks"] == found[:1] * 2


def test_an_evaluation_of_another_student_is_refused(looks):
    with pytest.raises(records.ConfigError, match="measured outputs/SR-002, which is no student of outputs/SR-001"):
        records.look(Path(looks("outputs/SR-002", 1)), ["outputs/SR-001"])
    with pytest.raises(records.ConfigError, match="not the folder of a complete stage=evaluate"):
        records.look(Path(looks("outputs/SR-001", 2, status="failed")), ["outputs/SR-001"])
