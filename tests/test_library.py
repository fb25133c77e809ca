"""`qat.load`, `qat.convert` and `Student.save`: the command's own results, and nothing left behind."""

import json
import logging
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import qat
from qat import checkpoints
from qat.errors import ArtifactError, ConfigError, MissingError, QatError
from qat.library import words
from qat.quant.linear import quantized
from tests import tiny
from tests.launching import LAUNCH, python

QUICK = [
    "instance=cpu",
    "instance.precision=fp32",
    "cache.length=16",
    "cache.top_k=8",
    "convert.calibration_tokens=256",
    "convert.rounds=1",
]
SMALL = {"mlp": {"bits": 3, "rank": 2}, "attn": {"bits": 4, "rank": 2}}
ROOT = Path(__file__).resolve().parents[1]
IDS = torch.arange(40).reshape(2, 20)


@pytest.fixture(scope="module")
def documents():
    draw = random.Random(0)
    return [" ".join("".join(draw.choices("abcdefg", k=5)) for _ in range(11)) for _ in range(40)]


@pytest.fixture(scope="module")
def loaded(teacher):
    """A teacher as anyone loads it, with a bias of its own so that it is nobody else's."""
    model = AutoModelForCausalLM.from_pretrained(teacher.path)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    return model, AutoTokenizer.from_pretrained(teacher.path)


@pytest.fixture(scope="module")
def made(loaded, documents, tmp_path_factory):
    """A student whose conversion is recorded."""
    outputs = tmp_path_factory.mktemp("library") / "outputs"
    model, tokenizer = loaded
    return qat.convert(model, SMALL, documents, tokenizer=tokenizer, outputs=outputs, overrides=QUICK), outputs


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_importing_it_is_free():
    heavy = "{'torch', 'transformers', 'hydra', 'omegaconf', 'rich'}"
    code = f"import sys, qat; print(*({heavy} & set(sys.modules)), dir(qat))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[") and "'convert', " in done.stdout and "'load', " in done.stdout


def test_no_other_name_is_there():
    with pytest.raises(AttributeError, match="module 'qat' has no attribute 'lode'"):
        qat.lode  # noqa: B018


def test_a_student_is_what_the_command_makes(made, loaded, documents, tmp_path, monkeypatch):
    """The same checkpoint to the last byte as `stage=convert` on the same folder, text and settings."""
    monkeypatch.chdir(tmp_path)
    student, outputs = made
    recorded = json.loads((outputs / "SR-001" / "result.json").read_text())
    model, tokenizer = loaded
    model.save_pretrained("mine"), tokenizer.save_pretrained("mine")
    Path("text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    words = ["model=local", "model.path=mine", "data=text", "data.path=text.jsonl", "tracker=none", *QUICK]
    quant = ["quant.mlp={bits: 3, rank: 2}", "quant.attn={bits: 4, rank: 2}"]
    done = python(LAUNCH, "stage=convert", *words, *quant)
    assert done.returncode == 0, done.stderr
    (folder,) = [path.parent for path in Path("outputs/artifacts/checkpoints").glob("[!.]*/manifest.json")]
    typed = (folder / checkpoints.FILE).read_bytes()
    assert (student.folder / checkpoints.FILE).read_bytes() == typed
    assert recorded["metrics"] == json.loads(Path("outputs/SR-001/result.json").read_text())["metrics"]
    assert recorded["status"] == "complete" and "stage=convert" in recorded["command"]


def test_the_model_is_an_ordinary_one_that_computes_as_the_student(made, loaded, tmp_path):
    student, _ = made
    model, tokenizer = student
    assert not quantized(model) and not model.training and all(part.requires_grad for part in model.parameters())
    exact = checkpoints.load(student.folder, student._teacher, tiny.FP32)[0]
    assert torch.equal(logits(model), logits(exact))
    assert not torch.equal(logits(model), logits(loaded[0]))
    model.save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.allclose(logits(plain), logits(model), atol=1e-4)  # attention in another order
    asked = tokenizer("a question", return_tensors="pt")
    settings = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert model.generate(**asked, generation_config=settings).shape[1] > asked.input_ids.shape[1]
    assert model.generation_config.eos_token_id == list(student._teacher.ends())
    assert repr(student) == f"Student(folder={student.folder!r})"


def test_the_given_model_stays_as_it_is(loaded, teacher):
    before = AutoModelForCausalLM.from_pretrained(teacher.path).state_dict()
    before["model.norm.weight"] *= 1.5
    assert all(torch.equal(before[name], value) for name, value in loaded[0].state_dict().items())


@pytest.mark.parametrize("name", ["SR-001", "sr-001", "folder", "run"])
def test_a_student_is_loaded_by_any_of_its_names(made, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    student, outputs = made
    word = {"folder": student.folder, "run": outputs / "SR-001"}.get(name, name)
    more = {"model": student._teacher.path} if name == "folder" else {}
    model, tokenizer = qat.load(word, outputs=outputs, overrides=QUICK[:2], **more)
    assert torch.equal(logits(model), logits(student.model))
    assert tokenizer.get_vocab() == student.tokenizer.get_vocab()
    assert os.listdir() == []


def test_exports_are_the_commands_and_are_loaded_again(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    student, outputs = made
    packed = student.save("packed", dtype="fp32", dense=True)
    assert packed == Path("packed") and json.loads((packed / "manifest.json").read_text())["format"] == "packed"
    runs = sorted(path.name for path in outputs.glob("SR-*"))
    words = ["--config-path", str(outputs / "SR-001"), "stage=export", f"checkpoint={student.folder}"]
    words += ["export=packed", "export.dtype=fp32", "export.dense=true", "export.output=typed"]
    done = python(LAUNCH, *words)
    assert done.returncode == 0, done.stderr
    assert Path("typed/packed.safetensors").read_bytes() == Path("packed/packed.safetensors").read_bytes()
    assert runs == ["SR-001"]
    model, _ = qat.load("packed", overrides=["instance=cpu"])
    error = (logits(model) - logits(student.model)).norm() / logits(student.model).norm()
    assert 0 < error < 2e-3  # scales and codebooks are packed in 16 bits
    student.save(tmp_path / "dense", export="hf")
    dense = qat.load(tmp_path / "dense")
    assert torch.allclose(logits(dense.model.cpu()), logits(student.model), atol=1e-4)  # attention in another order
    with pytest.raises(ConfigError, match="is an export already"):
        dense.save("again")


def test_nothing_stays_where_nothing_is_asked_for(documents, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    student = qat.convert("tiny", SMALL, documents, overrides=QUICK)
    assert os.listdir() == ["temporary"]
    assert student.folder.is_dir() and student.manifest["bits_per_weight"] > 3
    student.save("kept")
    folder = student.folder
    del student
    assert not folder.exists() and os.listdir("temporary") == []
    with pytest.raises(ConfigError, match=r"unknown key quant.mlp.bit .*quant.mlp.bits"):
        qat.convert("tiny", {"mlp": {"bit": 3}}, documents)
    assert os.listdir("temporary") == []


def test_a_refused_conversion_leaves_no_run(documents, tmp_path):
    with pytest.raises(ConfigError, match="no document for the eval split"):
        qat.convert("tiny", SMALL, documents[:1], outputs=tmp_path / "outputs", overrides=QUICK)
    assert not list((tmp_path / "outputs").glob("SR-*"))


def test_other_libraries_say_what_they_said_before(made, capfd, monkeypatch):
    _, outputs = made
    plugins = list(Plugins.instance().plugin_type_to_subclass_list[SearchPathPlugin])
    kinds = dict(SourcesRegistry.instance().types)
    transformers.logging.set_verbosity_info()
    transformers.utils.logging.enable_progress_bar()
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    try:
        capfd.readouterr()
        qat.load("SR-001", outputs=outputs, overrides=QUICK[:2])
        assert capfd.readouterr() == ("", "")
        list(tqdm(range(2)))
        assert "2/2" in capfd.readouterr().err
        assert transformers.logging.get_verbosity() == transformers.logging.INFO
        assert transformers.utils.logging.is_progress_bar_enabled() and "TQDM_DISABLE" not in os.environ
    finally:
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    assert Plugins.instance().plugin_type_to_subclass_list[SearchPathPlugin] == plugins
    assert SourcesRegistry.instance().types == kinds


MISTAKES = {
    "run": (lambda s: qat.load("SR-9", outputs=s.folder.parents[2]), r"SR-9: no such folder .*did you mean SR-00.\?"),
    "teacher": (lambda s: qat.load("teacher"), "teacher is no student"),
    "nobody": (lambda s: qat.load(s.folder), "no run says where that is: give model="),
    "preset": (lambda s: qat.convert("tiny", "q2a5"), r"quant=q2a5: no such option .*q2a4"),
    "bits": (lambda s: qat.convert("tiny", {"mlp": {"bits": 9, "rank": 1}}, ["a"]), r"quant.mlp.bits=9"),
    "empty": (lambda s: qat.convert("tiny", text=["", "a"]), "text takes documents"),
    "none": (lambda s: qat.convert("tiny", text=[]), "text takes documents"),
    "file": (lambda s: qat.convert("tiny", text="gone.txt", overrides=QUICK), "gone.txt"),
    "model": (lambda s: qat.convert(3), "model is int, not a model of transformers"),
    "option": (lambda s: qat.convert("tinny"), r"model=tinny: no such option .*did you mean tiny\?"),
    "two": (lambda s: qat.convert("tiny", tokenizer=s.tokenizer), "tokenizer goes with a model in memory"),
    "flag": (lambda s: qat.convert("tiny", overrides=["-m"]), "-m cannot be one of the overrides"),
    "outputs": (lambda s: qat.convert("tiny", overrides=["outputs=x"]), "outputs=x cannot be one of the overrides"),
    "size": (lambda s: qat.convert("tiny", "budget", overrides=["quant.bits=0.1"]), r"quant\.bits=0\.1 is less than"),
    "mapping": (lambda s: qat.convert("tiny", SMALL, overrides=["quant.bits=4"]), "quant.bits=4 cannot be one of the"),
    "word": (lambda s: qat.convert("tiny", overrides="instance=cpu"), "give a list of words"),
    "key": (lambda s: qat.convert("tiny", overrides=["trian.lr=1"]), r"unknown key trian.lr .*train.lr"),
    "export": (lambda s: s.save("x", "ggfu"), r"export=ggfu: no such option .*gguf"),
    "setting": (lambda s: s.save("x", dtipe="fp16"), r"unknown key export.dtipe .*export.dtype"),
    "grid": (lambda s: s.save("x", "mlx"), "mlx"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_sentence_of_the_commands(made, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, said = MISTAKES[name]
    with pytest.raises(QatError, match=said) as refused:
        call(made[0])
    assert "\n" not in str(refused.value)
    assert os.listdir() == []


def test_an_option_and_a_folder_of_one_name_are_two_things(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    with pytest.raises(ConfigError, match="model=tiny is an option and a folder here"):
        qat.convert("tiny", text=["a"])


def test_a_model_from_nowhere_needs_a_tokenizer(loaded):
    made = type(loaded[0])(loaded[0].config)
    made.config._name_or_path = made.name_or_path = ""
    with pytest.raises(MissingError, match="no tokenizer is found for a model that was not loaded from anywhere"):
        qat.convert(made)


def test_a_damaged_export_is_refused(made, tmp_path):
    folder = made[0].save(tmp_path / "packed")
    content = bytearray((folder / "packed.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "packed.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match="was altered"):
        qat.load(folder)


def test_an_export_for_another_engine_is_named(tmp_path):
    described = {"kind": "export", "format": "coreml", "files": {"a": {"bytes": 1, "sha256": "0" * 64}}}
    (tmp_path / "manifest.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match="is an export for coreml, which transformers does not read: it reads packed"):
        qat.load(tmp_path)


def blocks():
    """Python in docs/LIBRARY.md, as one program."""
    text = (ROOT / "docs" / "LIBRARY.md").read_text(encoding="utf-8")
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


def cells():
    """The code of docs/library.ipynb by tag or place."""
    notebook = json.loads((ROOT / "docs" / "library.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_shows_what_it_gave_from_top_to_bottom():
    assert [cell["execution_count"] for cell in cells()] == list(range(1, len(cells()) + 1))
    said = [output for cell in cells() for output in cell["outputs"]]
    assert {output["output_type"] for output in said} == {"execute_result", "stream"}
    assert {output["name"] for output in said if output["output_type"] == "stream"} == {"stdout"}
    assert sum(len(cell["outputs"]) for cell in cells()) >= 5


@pytest.fixture
def quick(monkeypatch):
    """Conversions of documents and notebooks are told to be quick."""
    given = words.refuse_said

    def more(overrides, changed=""):
        said = {word.partition("=")[0] for word in overrides}
        return [*given(overrides, changed), *(word for word in QUICK if word.partition("=")[0] not in said)]

    monkeypatch.setattr(words, "refuse_said", more)


def test_examples_of_the_document_run(loaded, documents, quick, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    loaded[0].save_pretrained("mine"), loaded[1].save_pretrained("mine")
    Path("notes.txt").write_text("\n\n".join(documents))
    level = logging.getLogger("qat").level
    program = blocks().replace('"HuggingFaceTB/SmolLM2-135M-Instruct"', '"mine"')
    try:
        exec(compile(program, "LIBRARY.md", "exec"), {})
    finally:
        logging.getLogger("qat").setLevel(level)
    bits, kl = map(float, capsys.readouterr().out.split()[:2])
    assert bits > 3 and 0 < kl < 5
    assert {path.name for path in Path().iterdir()} >= {"outputs", "student", "student-dense"}
    assert [path.name for path in Path("outputs").glob("SR-*")] == ["SR-001"]


def test_the_notebook_runs(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    space = {}
    for cell in cells():
        source = "".join(cell["source"])
        if "parameters" in cell["metadata"].get("tags", []):
            source = 'MODEL = "tiny"'
        exec(compile(source, cell["id"], "exec"), space)
    assert space["MODEL"] == "tiny" and Path("student/packed.safetensors").is_file()
