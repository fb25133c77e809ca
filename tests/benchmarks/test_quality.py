"""One whole comparison on the tiny model, then what a second command makes of the first one's results."""

import argparse
import json
from pathlib import Path

import conversion
import peers
import pytest
import quality
import results
import torch
from peers import rtn

from qat import checkpoints
from qat.config import ModelConfig, ModelSource
from qat.conversion.convert import Converted
from qat.conversion.costs import costs
from qat.errors import ArtifactError
from qat.models import locate
from qat.quant.linear import quantized
from qat.quant.size import bits_per_weight
from tests import tiny

BITS = ["2:32", "4:32"]
GRID = "{{format:grid,bits:{},group:32,levels:shifted}}"


@pytest.fixture
def options(teacher, tmp_path):
    rows = [{"instruction": f"say {i}", "output": " ".join(["word"] * 40)} for i in range(20)]
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    (tmp_path / "wiki.txt").write_text("\n\n".join(f"paragraph {i} of some text" * 3 for i in range(40)))
    return argparse.Namespace(
        model=str(teacher.path),
        calibration=[str(tmp_path / "wiki.txt")],
        evaluation=[str(tmp_path / "chat.json")],
        methods=["rtn"],
        bits=["2:32"],
        llama_cpp=[],
        mlx=[],
        ours=[],
        convert="fast",
        trained=[],
        tokens=256,
        calibration_tokens=256,
        shares=None,
        length=32,
        precision="fp32",
        micro_batch=4,
        outputs=str(tmp_path / "outputs"),
        json=str(tmp_path / "quality.json"),
        picture=str(tmp_path / "quality.png"),
        merge=[],
        draw=False,
    )


@pytest.fixture
def texts(options, tmp_path):
    """What two texts are given as."""
    return [*options.evaluation, str(tmp_path / "wiki.txt")]


@pytest.fixture
def attention_of_32(monkeypatch):
    monkeypatch.setattr(quality, "ATTENTION", (4, 32))  # rows of the tiny model are 64 long


@pytest.fixture
def run(options, monkeypatch, attention_of_32):
    def command(**changes):
        asked = argparse.Namespace(**vars(options) | changes)
        monkeypatch.setattr(quality, "arguments", lambda: asked)
        quality.main()
        return json.loads(Path(asked.json).read_text())

    return command


def test_a_comparison_and_its_picture(run, texts, teacher, tmp_path, capsys, drawn):
    rows = run(bits=BITS, evaluation=texts)
    assert [(row["method"], row["name"], row["text"]) for row in rows] == [
        ("RTN", bits, text) for bits in BITS for text in ("chat", "wiki")
    ]
    assert [row["bits"] for row in rows[::2]] == [2 + 18 / 32, 4 + 20 / 32]
    whole, layers = sum(p.numel() for p in teacher.skeleton().parameters()), quality.layers_of(teacher.skeleton())
    mlp, attention = (sum(x.weights for x in layers if x.role == role) for role in ("mlp", "attn"))
    rest = attention * (4 + 20 / 32) + 16 * (whole - mlp - attention)
    sizes = [round((mlp * bits + rest) / 8e6, 3) for bits in (2 + 18 / 32, 4 + 20 / 32)]
    assert [row["megabytes"] for row in rows[::2]] == sizes
    for coarse, fine in zip(rows[:2], rows[2:], strict=True):
        assert coarse["levels"] == {"attn": 16, "mlp": 4}
        assert coarse["teacher_levels"] == {"attn": 32, "mlp": 32}
        assert coarse["kl"] > fine["kl"] > 0
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    bits = [row["megabytes"] * 8e6 / whole for row in rows[::2]]
    assert [row["bits_model"] for row in rows[::2]] == pytest.approx(bits, rel=0.02)  # MB have few digits here
    assert f"| RTN | 2:32 | {sizes[0]:.1f} | {rows[0]['bits_model']:.2f} | 2.56 |" in capsys.readouterr().out


def test_the_measured_model_is_the_one_with_rounded_weights(run, options, teacher):
    kl = run()[0]["kl"]
    student, exact = (teacher.load(torch.float32, tiny.CPU) for _ in range(2))
    for layer in quality.layers_of(student):
        grid = peers.PEERS["rtn"].grid(2 if layer.role == "mlp" else 4, 32)
        weight = student.get_submodule(layer.name).weight
        weight.data = rtn.round_to_nearest(weight.data, grid)
    ids = quality.texts(options.evaluation, teacher, 32, 256)
    ours, theirs = (model(ids).logits[:, :-1].double().log_softmax(-1) for model in (student, exact))
    assert kl == pytest.approx(float((theirs.exp() * (theirs - ours)).sum(-1).mean()), rel=1e-4)


def test_a_row_that_is_there_is_not_made_again(run, monkeypatch):
    rows = run()
    monkeypatch.setattr(quality.Work, "evaluate", lambda *_: pytest.fail("evaluated again"))
    assert run() == rows


def test_rows_are_made_anew_when_what_shapes_them_changed(run):
    before = run(bits=BITS)
    after = run(tokens=128)
    assert len(after) == 2
    changed = [row for row in after if row["settings"]["tokens"] == 128]
    assert {row["name"] for row in changed} == {"2:32"}
    assert [row for row in before if row["name"] == "4:32"] == [row for row in after if row["name"] == "4:32"]


def test_a_command_that_was_stopped_goes_on_without_quantizing_again(run, texts, monkeypatch):
    measured = quality.Work.evaluate

    def stop(work, student, text):
        if text == "wiki":
            raise KeyboardInterrupt
        return measured(work, student, text)

    with monkeypatch.context() as patch:
        patch.setattr(quality.Work, "evaluate", stop)
        with pytest.raises(KeyboardInterrupt):
            run(evaluation=texts)
    monkeypatch.setattr(rtn, "round_to_nearest", lambda *_: pytest.fail("quantized again"))
    assert [row["text"] for row in run(evaluation=texts)] == ["chat", "wiki"]


def test_weights_that_are_not_quantized_end_the_command(run, monkeypatch):
    monkeypatch.setattr(rtn, "round_to_nearest", lambda weight, grid: weight.clone())
    with pytest.raises(SystemExit, match="is not quantized"):
        run()


def test_a_missing_package_is_told_below_the_table(run, monkeypatch, capsys):
    absent = peers.Peer("Absent", "rtn", None, False, "no-such-package")
    monkeypatch.setitem(peers.PEERS, "absent", absent)
    rows = run(methods=["absent", "rtn"])
    assert {row["method"] for row in rows} == {"RTN"}
    assert "Absent was left out: Absent cannot run here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("engine", "package", "name", "bits"),
    [("llama_cpp", "llama_cpp", "Q8_0", 8.5), ("mlx", "mlx_lm", "4:32", 5.0)],
)
def test_an_engines_file_is_measured_as_it_is(engine, package, name, bits, run, options, teacher, tmp_path):
    pytest.importorskip(package, reason=f"{package} is not installed, which {engine} needs")
    row = run(methods=[], **{engine: [name]})[0]
    made = (tmp_path / "outputs" / "artifacts" / "peers").rglob("model.*")
    (file,) = (path for path in made if path.suffix in (".gguf", ".safetensors"))
    assert row["megabytes"] == round(file.stat().st_size / 1e6, 3)
    assert (row["bits"], row["bits_all"]) == (bits, bits) and bits < row["bits_model"] < bits + 0.5  # norms are not
    assert 0 < row["kl"] < 1
    assert run(methods=[], **{engine: [name]})[0] == row


def test_presets_and_checkpoints_of_ours(run, options, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(quality.Converter, "convert", small_conversion)
    known_as_folder = locate(ModelConfig(name="model", source=ModelSource.folder, path=options.model), tmp_path)
    trained = tiny.checkpoint_in(tmp_path / "trained", known_as_folder, cache)
    rows = run(methods=[], ours=["q2a4"], trained=[f"mine={trained}"])
    assert [(row["method"], row["name"]) for row in rows] == [
        ("ours, convert=fast", "q2a4"),
        ("ours, trained", "mine"),
    ]
    assert all(row["kl"] > 0 and "levels" not in row for row in rows)


def test_budgets_of_the_same_formats_share_their_costs(run, monkeypatch):
    tried, few = [], f"quant.candidates=[{GRID.format(2)},{GRID.format(4)}]"
    monkeypatch.setattr(conversion, "costs", lambda *given: tried.append(given) or costs(*given))
    asked = [f"budget quant.megabytes={size} {few}" for size in (0.05, 0.07)]
    small, large = run(methods=[], ours=asked)
    assert small["megabytes"] <= 0.05 < large["megabytes"] <= 0.07 and small["kl"] > large["kl"] > 0
    assert len(tried) == 1


def test_a_checkpoint_may_call_the_model_by_its_artifact(run, tmp_path, teacher, cache):
    trained = tiny.checkpoint_in(tmp_path / "trained", teacher, cache)
    rows = run(methods=[], trained=[f"mine={trained}"])
    described = checkpoints.layers_of(checkpoints.manifest(trained, teacher, tiny.FP32))
    assert rows[0]["bits"] == round(bits_per_weight([x for x in described if x.role == "mlp"]), 4)


def test_checkpoints_of_one_name_are_one_point(run, tmp_path, teacher, cache):
    seeds = [tiny.checkpoint_in(tmp_path / "0", teacher, cache), changed_in(tmp_path / "1", teacher, cache)]
    alone = [run(methods=[], trained=[f"x={seed}"], json=str(tmp_path / f"{seed.name}.json")) for seed in seeds]
    together = run(methods=[], trained=[f"x={seed}" for seed in seeds])
    assert len(together) == 1
    for row, first, second in zip(together, *alone, strict=True):
        assert row["seeds"] == 2 and first["kl"] != second["kl"]
        assert row["kl"] == pytest.approx((first["kl"] + second["kl"]) / 2)
        assert row["deviation"]["kl"] == pytest.approx(abs(first["kl"] - second["kl"]) / 2**0.5, rel=1e-4)


def test_rows_of_other_files_come_in_and_replace_older_ones(run, options, tmp_path):
    elsewhere = str(tmp_path / "elsewhere.json")
    other = run(tokens=128, json=elsewhere)
    before = run(bits=BITS)
    after = run(draw=True, merge=[elsewhere])
    assert after == [row for row in before if row["name"] == "4:32"] + other


def test_a_file_to_merge_that_is_not_there_is_said(run, tmp_path):
    with pytest.raises(SystemExit, match=r"nowhere.json: no such file"):
        run(draw=True, merge=[str(tmp_path / "nowhere.json")])


def test_drawing_needs_no_model(run, monkeypatch):
    rows = run()
    monkeypatch.setattr(quality, "Work", lambda _: pytest.fail("a model was wanted"))
    assert run(draw=True, model=None) == rows


def test_a_foreign_file_of_results_is_refused(tmp_path):
    (tmp_path / "other.json").write_text('[{"name": "something else"}]')
    with pytest.raises(ArtifactError, match="does not hold rows of this script"):
        _ = results.Results(tmp_path / "other.json").rows


def changed_in(folder, teacher, cache):
    """A checkpoint like that of `tiny`, with other codebooks in the first layers."""
    student, manifest = checkpoints.load(tiny.checkpoint_in(folder / "as is", teacher, cache), teacher, tiny.FP32)
    for module in list(quantized(student).values())[:3]:
        module.codebook.data *= 1.1
    layers = checkpoints.layers_of(manifest)
    checkpoints.save(student, folder / "changed", checkpoints.describe(teacher, tiny.QUANT, layers))
    return folder / "changed"


def small_conversion(converter, quant):
    return [Converted(*parts) for parts in tiny.converted(converter.teacher, converter.calibration_NL[:4]).values()]
