"""Records of other runs, damaged in every way that a generator thinks of: who reads them goes on, naming them once."""

import contextlib
import copy
import json
import os
import random
import re
from pathlib import Path

import pytest

from qat import bounded, names, plots, records, sweeps
from qat.cli import completion
from qat.errors import QatError
from qat.identities import claim_run, claim_sweep, places
from qat.report import log, page
from qat.shown import shown
from tests.report import synthetic

CASES = 25  # of a seed
DEEP = "[" * 1_000 + "]" * 1_000
ODD = [
    *(None, True, [], {}, "", 0, -1, -1e300, 1e300, 10**400, -(10**30), 2**63, 5e-324, "\ud800", "\0", "x" * 30_000),
    *([[[]]], [None], {"": {}}, {"a": 10**400}, "SR-" + "9" * 5_000, "SR-٣٤٥", "../../x", "99999-12-31T00:00:00Z"),
    *("\x1b]0;owned\x07", "</script><script>", "| a | `b` |\n# c", "[x](javascript:x)", "\u202eevil", float("nan")),
]
WHOLE = [b"", b"null", b"[]", b"3", b'"x"', b"{", b"\xff\xfe", DEEP.encode(), b'{"a": ' + b"9" * 5_000 + b"}", b"\0"]
FILES = ["SR-001/result.json", "SR-002/metrics.jsonl", "SR-003/samples.md", "SR-005x/result.json"]
FILES += ["sweep-001/sweep.json", ".ids/SR-004/folders"]
FILES += ["artifacts/caches/L64-abc/manifest.json", "sweep-001/SR-005/result.json"]
FILES += ["artifacts/checkpoints/tiny_q2a4_init-abc/manifest.json"]
FOLDERS = ["SR-", "SR-²", "SR-٣٤٥", "SR-00", "SR-" + "9" * 200, "sweep-", "sweep-٣", "SR-007-", "sr-008", "SR-009\n# x"]
FOLDERS += ["sweep-\x1b[31m", "SR-1`|<b>"]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The files of an outputs folder in order."""
    outputs = tmp_path_factory.mktemp("good")
    synthetic.fill(outputs, 6, steps=4)
    job = {"run_id": "SR-005", "overrides": ["train.lr=1", "run.goal='a b'"], "key": "k"}
    plan = {"command": "c", "flags": {}, "outputs": None, "jobs": [job]}
    synthetic.write(outputs / "sweep-001" / "sweep.json", plan)
    synthetic.write(outputs / ".ids" / "SR-004" / "folders", "elsewhere\n")
    synthetic.write(outputs / "SR-005x" / "result.json", {"run_id": "SR-006", "config": {"a": [1]}})
    return {str(path.relative_to(outputs)): path.read_bytes() for path in outputs.rglob("*") if path.is_file()}


def mutated(content: bytes, draw: random.Random) -> bytes:
    """A file with something odd in the place of one or more of its values, or no file of its kind at all."""
    kind = draw.random()
    if kind < 0.15:
        return draw.choice(WHOLE)
    if kind < 0.3:
        place = draw.randrange(len(content))
        return content[:place] + draw.choice((b"", bytes([draw.randrange(256)]))) + content[place + 1 :]
    try:
        tree = json.loads(content)
    except ValueError:
        return content + json.dumps(draw.choice(ODD)).encode() + b"\n"
    for _ in range(draw.randint(1, 4)):
        inside = tree
        while isinstance(inside, dict | list) and inside:
            key = draw.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
            if draw.random() < 0.4 or not isinstance(inside[key], dict | list) or not inside[key]:
                inside[key] = copy.deepcopy(draw.choice(ODD))
                break
            inside = inside[key]
    return json.dumps(tree).encode()


def damage(outputs: Path, good: dict[str, bytes], draw: random.Random) -> None:
    for name, content in good.items():
        (outputs / name).parent.mkdir(parents=True, exist_ok=True)
        (outputs / name).write_bytes(content)
    for name in draw.sample(FILES, draw.randint(1, 3)):
        path = outputs / name
        if draw.random() < 0.85:
            path.write_bytes(mutated(path.read_bytes() or b"{}", draw))
            continue
        path.unlink()
        draw.choice([Path.mkdir, lambda path: path.symlink_to(path.name), os.mkfifo])(path)
    for name in draw.sample(FOLDERS, 2):
        (outputs / name).mkdir()
        (outputs / name / "result.json").write_bytes(mutated(good["SR-001/result.json"], draw))
        (outputs / name / "sweep.json").write_bytes(mutated(good["sweep-001/sweep.json"], draw))


def read_all(outputs: Path) -> tuple[str, str]:
    """Every reader of other people's folders; what each may raise is a refusal of the very thing asked for."""
    text, html = log.render(outputs), page.render(outputs)
    assert claim_run(outputs) != claim_run(outputs) and claim_sweep(outputs).is_dir()
    assert all(re.fullmatch(r"run\.resume=[\w.+-]*", word) for word in completion.complete("launch.py run.resume=S"))
    sweeps.find(outputs, ["k"])
    for run_id, folder in places(outputs):
        assert len(run_id) < 300
        sweeps.has_job(folder)
        names.called(folder, outputs)
        for look in (names.run, names.checkpoint, names.sweep):
            with contextlib.suppress(QatError):
                look(run_id, outputs)
    for plan in outputs.glob("sweep-*"):
        with contextlib.suppress(QatError):
            sweep = sweeps.load(plan)
            sweeps.summarize(sweep), sweeps.how_to_go_on(sweep)
    return text, html


@pytest.mark.parametrize("seed", range(1))
def test_no_record_is_the_trouble_of_another_run(good, tmp_path, monkeypatch, seed):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "sweep", lambda *_: None)  # which takes most of the time
    draw = random.Random(seed)
    for case in range(CASES):
        outputs = tmp_path / str(case) / "outputs"
        damage(outputs, good, draw)
        text, html = read_all(outputs)
        data = json.loads(re.search(r'<script[^>]*id="data"[^>]*>(.*?)</script>', html, re.DOTALL)[1])
        for words in (text, json.dumps(data, ensure_ascii=False)):
            assert shown(words) == words and len(words) < 2_000_000
        assert [line for line in text.splitlines() if line.startswith("# ")] == ["# Run log"]
        outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", text)
        assert "SR-006" in text and not re.search(r"(?<!\\)[<\x1b]", outside)


def test_a_damaged_record_is_named_once(tmp_path, caplog):
    for run in ("SR-001", "SR-002"):
        synthetic.write(tmp_path / run / "result.json", "{")
    for _ in range(3):
        log.render(tmp_path)
    assert [record.message.count("SR-00") for record in caplog.records] == [1, 1]
    assert all("it is left out" in record.message for record in caplog.records)


def test_a_line_without_end_takes_no_memory(tmp_path):
    with open(tmp_path / "metrics.jsonl", "wb") as file:
        file.write(b'{"step": 1, "loss": 2.0}\n{"step": "')
        file.truncate(100_000_000)
        file.seek(0, os.SEEK_END)
        file.write(b'\n{"step": 2, "loss": 1.0}\n')
    found = records.metrics(tmp_path)
    assert [row["step"] for row in found] == [1, 2]
    with open(tmp_path / "result.json", "wb") as file:
        file.truncate(bounded.LARGEST + 1)
    assert records.read(tmp_path, tmp_path).status == "unreadable"


def test_whatever_is_read_fits_bounds():
    value = {"a": [float("inf"), 10**400, 2**62, "\ud800", True], "b": {"c": 1.5}}
    assert bounded.row(json.dumps(value).encode()) == {"a": [None, None, 2**62, "?", True], "b": {"c": 1.5}}
    assert bounded.row(b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}") is not None
    assert bounded.row(b'{"a": ' + b"[" * 100_000) is None
