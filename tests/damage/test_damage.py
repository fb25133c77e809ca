"""Hundreds of damaged files: each is refused in a sentence, or says what the undamaged one says."""

import contextlib
import json
import math
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qat import checkpoints, models, names, records
from qat.artifacts import MANIFEST
from qat.cache.format import META
from qat.cache.local import open_local
from qat.cache.reader import CacheReader
from qat.cli import arguments, main
from qat.config import DataConfig, DataSource, ModelConfig, ModelSource, Tail
from qat.data import sources, texts
from qat.data.tally import Tally
from qat.distill.state import State, States
from qat.errors import QatError
from qat.models import gguf_header, reading, tokenizers
from qat.store import archives
from qat.store.archives import Caps
from tests import tiny
from tests.damage import mutations
from tests.models.test_sources import write_gguf

SECONDS = 10.0  # for one file, on a machine that others use too
GIGABYTES = 1.0  # more than before
IDS = torch.arange(24).reshape(2, 12)

Use = Callable[[], Any]


class Trial:
    """Damaged files of one kind: how many were refused, how many were taken."""

    def __init__(self, good: Any) -> None:
        self.good, self.refused, self.taken = good, 0, 0

    def __call__(self, use: Use, what: str, free: bool = False) -> None:
        """Uses a damaged file; `free` where the damage may have made another good one of it."""
        began = time.monotonic()
        try:
            found = use()
        except QatError as error:
            told = str(error)
            assert told.strip() and len(told) < 3000 and "Traceback" not in told, what
            assert error.exit_code in (1, 2), what
            self.refused += 1
        else:
            assert free or same(found, self.good), f"{what}: taken, and it says something else"
            self.taken += 1
        assert time.monotonic() - began < SECONDS, what


def same(found: Any, good: Any) -> bool:
    if isinstance(good, torch.Tensor):
        return isinstance(found, torch.Tensor) and torch.equal(found, good)
    if isinstance(good, dict):
        return found.keys() == good.keys() and all(same(found[key], value) for key, value in good.items())
    return bool(found == good)


@pytest.fixture(autouse=True)
def bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is written where nobody works, and memory stays as it was."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6
    assert grown < GIGABYTES and list((tmp_path / "elsewhere").iterdir()) == []


@pytest.fixture
def copies(tmp_path: Path) -> Callable[[Path], Path]:
    """A new copy of a folder, which holds nothing else."""

    def copy(folder: Path) -> Path:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        return shutil.copytree(folder, tmp_path / "copy" / folder.name)

    return copy


@torch.no_grad()
def logits(path: Path, teacher: models.ModelFolder) -> Any:
    """What a student of a checkpoint says, with its latent weights."""
    student, manifest = checkpoints.load(path, teacher, tiny.FP32)
    assert math.isfinite(checkpoints.describe(teacher, tiny.QUANT, checkpoints.layers_of(manifest))["bits_per_weight"])
    return {"logits": student(IDS).logits, **checkpoints.latent(path)}


def test_manifests(good, copies, teacher):
    best = good / "outputs" / "SR-001" / "checkpoints" / "best"
    trial, dice = Trial(logits(best, teacher)), random.Random(1)
    said = json.loads((best / MANIFEST).read_text())
    for number in range(60):
        folder = copies(best)
        (folder / MANIFEST).write_bytes(mutations.json_text(said, dice))
        trial(lambda folder=folder: logits(folder, teacher), f"manifest {number}")
    assert trial.refused > 45


def test_tensors_of_a_checkpoint(good, copies, listed, teacher):
    best = good / "outputs" / "SR-001" / "checkpoints" / "best"
    trial, dice = Trial(logits(best, teacher)), random.Random(2)
    for number in range(25):
        folder = copies(best)
        name = dice.choice(["tables.safetensors", "own.safetensors", "latent.safetensors"])
        mutations.safetensors(folder / name, dice)
        listed(folder)
        # Numbers of the file's own are what they are: moved bits, and parameters that need not be there.
        trial(lambda folder=folder: logits(folder, teacher), f"{name} {number}", free=is_number(folder, best, name))
    assert trial.refused > 15


def is_number(folder: Path, best: Path, name: str) -> bool:
    """Whether a file still is one of finite numbers of the same names, types and shapes, or of fewer optional ones."""
    from safetensors.torch import load_file

    with contextlib.suppress(Exception):
        found, known = load_file(folder / name), load_file(best / name)
        alike = all(
            one.shape == known[key].shape and (one.dtype is known[key].dtype or name.startswith("own"))
            for key, one in found.items()
        )
        finite = all(bool(one.isfinite().all()) for one in found.values() if one.is_floating_point())
        return alike and finite and (found.keys() == known.keys() or not name.startswith("tables"))
    return False


def test_state_dicts_of_the_older_scripts(good, copies, teacher):
    trial, dice = Trial(logits(good / "v2", teacher)), random.Random(3)
    said = json.loads((good / "v2" / "config.json").read_text())
    for number in range(20):
        folder = copies(good / "v2")
        if dice.random() < 0.2:
            (folder / "config.json").write_bytes(mutations.json_text(said, dice))
        else:
            mutations.pickled(folder / "best_state_dict.pt", dice)
        # Whatever may be missing is optional, and other finite numbers in it are another student's.
        trial(lambda folder=folder: logits(folder, teacher), f"state dict {number}", free=True)
    assert trial.refused > 10


def said_by(cache: Any) -> Any:
    """Everything that a cache says, split by split."""
    found = {}
    for split in ("train", "eval"):
        reader = CacheReader(cache, split)
        batch = reader.batch(torch.arange(reader.rows))
        found |= {f"{split}.{name}": value for name, value in batch.stored.items()}
    return found


def test_caches(cache, copies, listed, teacher):
    def use(folder):
        return said_by(open_local(folder, teacher, 0.25, Tail.exact))

    trial, dice = Trial(use(copies(cache.folder))), random.Random(4)
    said, meta = (json.loads((cache.folder / name).read_text()) for name in (MANIFEST, META))
    for number in range(60):
        folder = copies(cache.folder)
        kind = dice.randrange(3)
        if kind == 0:
            (folder / MANIFEST).write_bytes(mutations.json_text(said, dice))
        elif kind == 1:  # in both, and with its checksum: nothing but the bounds is left to notice it
            changed = mutations.json_value(json.loads(json.dumps(meta)), dice)
            (folder / META).write_bytes(json.dumps(changed).encode(errors="surrogatepass"))
            entered = {key: value for key, value in said.items() if key in changed or key not in meta} | changed
            entered.pop("checksums", None)
            (folder / MANIFEST).write_text(json.dumps(entered))
            listed(folder)
        else:
            mutations.safetensors(dice.choice(sorted(folder.glob("*.safetensors"))), dice)
            listed(folder)
        trial(lambda folder=folder: use(folder), f"cache {number}", free=kind == 2)
    assert trial.refused > 35


def test_caches_of_the_older_scripts(copies, teacher, tmp_path):
    draw = torch.Generator().manual_seed(5)
    whole = tmp_path / "alpaca_L12_K5_R4"
    whole.mkdir()
    for number in range(2):
        ids = torch.randint(512, (6, 12), generator=draw).int()
        kept, sample = (torch.randint(512, (6, 11, count), generator=draw).int() for count in (5, 4))
        shard = {"input_ids": ids, "attention_mask": torch.ones(6, 12, dtype=torch.uint8), "topk_idx": kept}
        shard |= {"topk_logits": torch.randn(kept.shape, generator=draw).half(), "rand_idx": sample}
        shard["rand_logits"] = torch.randn(sample.shape, generator=draw).half()
        torch.save(shard, whole / f"shard_{number:05d}.pt")
    said = {"format": "qwen_kd_topk_cache_v1", "teacher_model": "tiny", "topk": 5, "vocab_size": 512}
    (whole / META).write_text(json.dumps(said))

    def use(folder):
        return said_by(open_local(folder, teacher, 0.3, Tail.estimate))

    trial, dice = Trial(use(copies(whole))), random.Random(6)
    for number in range(15):
        folder = copies(whole)
        if dice.random() < 0.25:
            (folder / META).write_bytes(mutations.json_text(said, dice))
        else:
            mutations.pickled(folder / f"shard_{dice.randrange(2):05d}.pt", dice)
        trial(lambda folder=folder: use(folder), f"older cache {number}", free=True)
    assert trial.refused > 7


def test_archives(good, tmp_path):
    archives.pack(good / "v2", tmp_path / "whole.tgz", "v2")
    caps = Caps(files=50, bytes=1 << 22)

    def use(archive):
        folder = tmp_path / "out"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        archives.unpack(archive, folder, caps)
        return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    trial, dice = Trial(use(tmp_path / "whole.tgz")), random.Random(7)
    content = (tmp_path / "whole.tgz").read_bytes()
    for number in range(60):
        (tmp_path / "bad.tgz").write_bytes(dice.choice(mutations.broken(content, dice)))
        trial(lambda: use(tmp_path / "bad.tgz"), f"archive {number}")
    assert trial.refused > 35


TEXTS = {
    "chat.jsonl": "\n".join(
        json.dumps({"messages": [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": f"a {n} ü"}]})
        for n in range(12)
    ),
    "list.json": json.dumps([{"instruction": f"do {n}", "input": "", "output": f"done {n}"} for n in range(12)]),
    "table.csv": "instruction,output\n" + "\n".join(f"do {n},done {n}" for n in range(12)),
    "plain.txt": "\n\n".join(f"some text {n}" for n in range(12)),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts(name, teacher, tmp_path):
    dice, content = random.Random(8), TEXTS[name].encode()
    kind = DataSource.text if name == "plain.txt" else DataSource.chat_jsonl
    data = DataConfig(name="text", source=kind, path=str(tmp_path / name))
    tokenizer = teacher.tokenizer()

    def use():
        tally = Tally.of(data)
        texts.look(data)
        made = list(sources.render(data, tokenizer, tally))
        tally.settle()
        assert made and all(0 <= token < 512 for _, tokens in made for token in tokens)
        return made

    trial = Trial(None)
    for number in range(25):
        damaged = content
        for _ in range(dice.choice([1, 1, 4])):
            damaged = dice.choice(mutations.broken(damaged, dice))
        if name == "list.json" and dice.random() < 0.3:
            damaged = mutations.json_text(json.loads(content), dice)
        (tmp_path / name).write_bytes(damaged)
        trial(use, f"{name} {number}", free=True)  # a row more or less is a text all the same
    assert trial.refused


def test_configurations(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    said = {
        "defaults": ["schema", "_self_"],
        "train": {"lr": 0.001, "steps": 20, "learn": {"scales": 1.0}},
        "quant": {"name": "mine", "mlp": {"bits": 2, "rank": 4}, "attn": None},
        "data": {"name": "prompts", "source": "selfgen", "thinking": "false", "eval_fraction": 0.1},
        "run": {"goal": "a goal"},
    }
    trial, dice = Trial(None), random.Random(9)
    for number in range(10):
        (folder / "config.yaml").write_bytes(mutations.json_text(said, dice))  # which is YAML as well
        trial(
            lambda: main.check(arguments.parse(["--config-path", str(folder)])).configs[0].outputs,
            f"configuration {number}",
            free=True,
        )
    assert trial.refused > 5


def test_records(good, copies):
    said = json.loads((good / "outputs" / "SR-001" / "result.json").read_text())

    def found(outputs):
        called = [names.checkpoint(word, outputs) for word in ("SR-001", "SR-001/best")]
        return [path.relative_to(outputs) for path in called], [run.folder.name for run in records.runs(outputs)]

    dice, trial = random.Random(10), Trial(found(good / "outputs"))
    for number in range(40):
        outputs = copies(good / "outputs")
        (outputs / "SR-001" / "result.json").write_bytes(mutations.json_text(said, dice))
        trial(lambda outputs=outputs: found(outputs), f"record {number}")
    assert trial.taken == 40  # a checkpoint needs no record


def test_model_folders(good, copies, tmp_path):
    def use(folder):
        config = ModelConfig(name="local", source=ModelSource.folder, path=str(folder))
        found = models.locate(config, tmp_path / "artifacts")
        found.ends()
        if found.has_tokenizer():
            tokenizers.check(found.path, found.tokenizer(), found.vocab_size())
        return found.load(torch.float32, tiny.CPU)(IDS).logits

    with torch.no_grad():
        trial, dice = Trial(use(good / "model")), random.Random(11)
        for number in range(25):
            folder = copies(good / "model")
            path = dice.choice(sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")))
            if path.suffix == ".json":
                path.write_bytes(mutations.json_text(json.loads(path.read_text()), dice))
            else:
                mutations.safetensors(path, dice)
            trial(lambda folder=folder: use(folder), f"{path.name} {number}", free=True)
    assert trial.refused > 12


def test_packed_exports(good, copies):
    def use(folder):
        return reading.read(folder, "auto")(IDS).logits

    with torch.no_grad():
        trial, dice = Trial(use(good / "packed")), random.Random(12)
        said = json.loads((good / "packed" / "config.json").read_text())
        for number in range(20):
            folder = copies(good / "packed")
            described = dice.random() < 0.5
            if described:
                (folder / "config.json").write_bytes(mutations.json_text(said, dice))
            else:
                mutations.safetensors(folder / "packed.safetensors", dice)
            trial(lambda folder=folder: use(folder), f"packed {number}", free=True)
    assert trial.refused > 10


def test_states_of_training(tmp_path):
    folder = tmp_path / "checkpoints"
    whose = {"run_id": "SR-001", "started": "then"}
    states = States(folder, 2, whose)
    for step in (1, 2):
        states.save(State(step, {"parameter.x": torch.full((8,), float(step))}, {"logged": step, "loss_best": 0.5}))
    states.wait()
    said = json.loads((folder / "state-00000002" / MANIFEST).read_text())
    trial, dice = Trial(None), random.Random(13)
    for number in range(40):
        shutil.copytree(folder, tmp_path / "copy", dirs_exist_ok=True)
        newest = tmp_path / "copy" / "state-00000002"
        if dice.random() < 0.5:
            (newest / MANIFEST).write_bytes(mutations.json_text(said, dice))
        else:
            mutations.safetensors(newest / "state.safetensors", dice)
        trial(lambda: States(tmp_path / "copy", 2, whose).newest().step, f"state {number}", free=True)
    assert trial.taken == 40  # of a damaged one the one before is taken


def test_gguf_files(teacher, tmp_path):
    write_gguf(teacher, tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    trial, dice = Trial(None), random.Random(14)
    sizes = [4, 8, 16, *(at for at in range(24, 4000, 4) if 0 < int.from_bytes(content[at : at + 8], "little") < 600)]
    for number in range(60):
        if dice.random() < 0.3:
            damaged = dice.choice(mutations.broken(content, dice))
        else:  # a count, a length or an offset
            at, claimed = dice.choice(sizes), dice.choice([0, 2**31, 2**40, 2**60, 2**64 - 1])
            damaged = content[:at] + claimed.to_bytes(8, "little") + content[at + 8 :]
        (tmp_path / "bad.gguf").write_bytes(damaged)
        trial(lambda: gguf_header.check(tmp_path / "bad.gguf"), f"gguf {number}", free=True)
    assert trial.refused > 30
