"""The whole job on the tiny model: what it writes, what it does not do twice, how its stages stand alone."""

import contextlib
import io
import json
import logging
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file

from qat import machine, stages
from qat.artifacts import open_artifact
from qat.cli import job, main
from qat.stages import distill
from tests import described, launching

ALONE = f"""
import json, runpy, sys
sys.argv = ["launch.py", *sys.argv[1:]]
try:
    runpy.run_path({launching.LAUNCH!r}, run_name="__main__")
finally:
    print(json.dumps("wandb" in sys.modules), file=sys.stderr)
"""
METRICS = (
    "kd_loss_initial",
    "kd_loss_final",
    "kd_loss_best",
    "kl",
    "perplexity",
    "teacher_perplexity",
    "top1_agreement",
)
LAYERS = "tables.safetensors"
LONGER = ("train.steps=8", "train.batch_size=8", "train.eval_every=8", "train.lr=5e-3")  # long enough to learn


@dataclass
class Outcome:
    """What a person finds after a launch."""

    code: int
    out: str
    err: str
    folder: Path | None

    @property
    def result(self):
        return json.loads((self.folder / "result.json").read_text(), parse_constant=pytest.fail)

    @property
    def log(self):
        """Messages of `train.log`."""
        lines = (self.folder / "train.log").read_text().splitlines()
        return [line.split(" INFO ", 1)[-1] for line in lines]

    @property
    def figures(self):
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


class Shop:
    """One outputs folder, and launches into it within this process."""

    def __init__(self, outputs):
        self.outputs = outputs

    def launch(self, *argv):
        from qat.cli.launch import launch

        before = set(self.outputs.glob("S*-*")) | set(self.outputs.glob("sweep-*"))
        handlers, level = list(logging.root.handlers), logging.root.level
        out, err = io.StringIO(), io.StringIO()
        job.failures.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["launch.py"])
            patch.setattr(machine, "matmul_flops", lambda machine: 1e11)  # a second each time
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main.main([*argv, f"outputs={self.outputs}"], launch)
        job.failures.clear()
        GlobalHydra.instance().clear()
        for handler in logging.root.handlers:
            if handler not in handlers:
                handler.close()
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
        new = (set(self.outputs.glob("S*-*")) | set(self.outputs.glob("sweep-*"))) - before
        assert len(new) <= 1
        return Outcome(code, out.getvalue(), err.getvalue(), new.pop() if new else None)

    def tiny(self, *argv):
        """A launch of the tiny job, which must succeed."""
        done = self.launch("+debug=tiny", "evaluate.sample_tokens=1", *argv)
        assert (done.code, done.err) == (0, ""), done.out
        return done

    def artifacts(self):
        """Every file of every artifact, with the moment it was written; notes of what was checked are none."""
        notes = (".checked", ".looked_at")
        files = [path for path in (self.outputs / "artifacts").rglob("*") if path.is_file()]
        return {path: path.stat().st_mtime_ns for path in files if path.suffix not in notes}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return Shop(tmp_path_factory.mktemp("pipeline") / "outputs")


@pytest.fixture(scope="module")
def first(shop):
    """The first run, in a process of its own; tests/footprint/test_taken.py has fresh interpreters."""
    done = launching.python("-c", ALONE, "+debug=tiny", f"outputs={shop.outputs}")
    return Outcome(done.returncode, done.stdout, done.stderr, shop.outputs / "SR-001")


@pytest.fixture
def conversion(first):
    return Path(first.result["paths"]["conversion"])


def learned(conversion, done):
    """Kinds of layers whose codebooks or scales are not those of the conversion (up to rounding); indices must be."""
    before, after = load_file(conversion / LAYERS), load_file(done.folder / "checkpoints" / "last" / LAYERS)
    assert before.keys() == after.keys()
    same = {name for name in before if torch.allclose(before[name].float(), after[name].float(), 1e-5, 1e-6)}
    assert all(torch.equal(before[name], after[name]) for name in before if name.endswith(".indices"))
    changed = before.keys() - same
    return {"mlp" if ".mlp." in name else "attn" for name in changed}


def test_job_succeeds_and_says_where_to_go_on(first):
    assert first.code == 0, first.err
    assert first.err == "false\n"  # whether wandb was imported; nothing else on stderr
    for part in ("14 layers converted (6 mlp + 8 attn)", "SR-001", "stage=chat checkpoint=", "samples.md"):
        assert part in first.out
    assert "\x1b[" not in first.out


def test_run_folder_holds_everything(first):
    assert {path.name for path in first.folder.iterdir()} == {
        ".hydra",
        "config_resolved.yaml",
        "result.json",
        "metrics.jsonl",
        "train.log",
        "checkpoints",
        "samples.md",
        "loss.png",
        "conversion.png",
    }
    for name in ("best", "last"):
        assert LAYERS in open_artifact(first.folder / "checkpoints" / name).manifest["files"]
    assert (first.folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_result_keeps_the_contract(first):
    result = first.result
    assert (result["schema"], result["run_id"], result["stage"]) == (1, "SR-001", "run")
    assert (result["status"], result["error"]) == ("complete", None)
    assert result["name"] == f"v2_q2a4_mlp_{result['metrics']['kd_loss_best']:.2f}_fp32"
    assert {key: result["quant"][key] for key in ("preset", "layers", "mlp_layers", "attn_layers")} == {
        "preset": "q2a4",
        "layers": 14,
        "mlp_layers": 6,
        "attn_layers": 8,
    }
    assert all(math.isfinite(result["metrics"][key]) for key in METRICS)
    assert 0 <= result["metrics"]["top1_agreement"] <= 1
    assert all(result["timing"][key] > 0 for key in ("cache_s", "convert_s", "distill_s", "total_s"))
    assert result["throughput"]["tokens_per_second"] > 0 and result["throughput"]["mfu"] >= 0
    assert result["memory"]["peak_bytes"] > 2**24
    assert all(Path(path).exists() for path in result["paths"].values())
    assert {"git", "torch", "device"} <= result["environment"].keys()
    assert (
        sum(result["timing"][f"{stage}_s"] for stage in ("cache", "convert", "distill", "evaluate"))
        <= (result["timing"]["total_s"])
    )


def test_bits_per_weight_count_indices_scales_and_codebooks(first):
    shapes = {"mlp": [(128, 64)] * 4 + [(64, 128)] * 2, "attn": [(64, 64)] * 4 + [(32, 64)] * 4}
    bits, rank = {"mlp": 2, "attn": 4}, {"mlp": 32, "attn": 8}
    stored = {
        kind: sum(bits[kind] * m * n + 16 * rank[kind] * (m + n) + 16 * 2 ** bits[kind] for m, n in shapes[kind])
        for kind in shapes
    }
    weights = {kind: sum(m * n for m, n in shapes[kind]) for kind in shapes}
    quant = first.result["quant"]
    assert quant["mlp_bits_per_weight"] == pytest.approx(stored["mlp"] / weights["mlp"], abs=1e-4)
    assert quant["attn_bits_per_weight"] == pytest.approx(stored["attn"] / weights["attn"], abs=1e-4)
    assert quant["bits_per_weight"] == pytest.approx(sum(stored.values()) / sum(weights.values()), abs=1e-4)


def test_metrics_have_a_row_for_each_step_and_each_look(first):
    rows = first.figures
    assert [(row["step"], "loss" in row, "kd_loss" in row) for row in rows] == [
        (0, False, True),
        (1, True, False),
        (1, False, True),
        (2, True, False),
        (2, False, True),
    ]
    looks = [row["kd_loss"] for row in rows if "kd_loss" in row]
    metrics = first.result["metrics"]
    assert (looks[0], looks[-1]) == (metrics["kd_loss_initial"], metrics["kd_loss_final"])
    trained = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    assert [metrics[f"loss_{when}"] for when in ("initial", "best", "final")] == [trained[0], min(trained), trained[-1]]
    assert metrics["kd_loss_best"] == looks[trained.index(min(trained))]


def test_samples_show_every_model_on_every_prompt(first):
    from qat.evaluate.answers import SAMPLE_PROMPTS

    text = (first.folder / "samples.md").read_text()
    assert all(f"## {prompt}\n" in text for prompt in SAMPLE_PROMPTS)
    for name in ("teacher", "converted", "distilled"):
        assert text.count(f"**{name}**") == len(SAMPLE_PROMPTS)


def test_a_recorded_run_trains_at_once_and_gives_the_same(first, shop):
    before = shop.artifacts()
    again = shop.launch("--config-path", str(first.folder))
    assert (again.code, again.err) == (0, "")
    assert shop.artifacts() == before
    told = [line.split(":")[0].split(" (")[0] for line in again.log]
    assert [line.split(",")[0] for line in told] == [
        f"{again.folder.name} on cpu",
        "last time",
        "memory",
        "cache reused",
        "convert reused",
        "distillation",
        "evaluation",
        "memory",
    ]
    reused = again.result["reused"]
    for what, kind in (("cache", "cache"), ("convert", "conversion")):
        made = open_artifact(Path(first.result["paths"][kind])).manifest["made"]
        assert reused[what] == {"path": first.result["paths"][kind], "made": made}
        assert 0 < made["seconds"] <= first.result["timing"][f"{what}_s"]
        assert f"made {made['at'][:16].replace('T', ' ')} in {made['seconds']:.1f} s on cpu" in "\n".join(again.log)
    assert first.result["reused"] == {} and again.result["made"] == []
    for key in METRICS:
        assert again.result["metrics"][key] == pytest.approx(first.result["metrics"][key], rel=1e-4)


def test_a_sweep_shares_text_and_conversion_and_its_seeds_read_the_text_in_another_order(first, shop):
    before = shop.artifacts()
    words = ("+debug=tiny", "evaluate.sample_tokens=1", "-m", "seed=1,2", "train.lr=1e-2")
    code, out, err = launching.Launch(shop.outputs, *words).ended()  # PyTorch's threads of this process outlive no fork
    assert (code, err) == (0, ""), out
    assert shop.artifacts() == before
    (folder,) = shop.outputs.glob("sweep-*")
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*/result.json"))]
    assert sorted(path.name for path in folder.glob("SR-*")) == [result["run_id"] for result in results]
    assert [result["status"] for result in results] == ["complete"] * 2
    results.append(first.result)
    assert len({result["run_id"] for result in results}) == 3
    assert len({result["paths"]["conversion"] for result in results}) == 1
    assert [result["measured_on"] for result in results] == [first.result["measured_on"]] * 3
    metrics = [result["metrics"] for result in results]
    assert metrics[0]["kl_initial"] == metrics[1]["kl_initial"]
    assert metrics[0]["kd_loss_initial"] == metrics[1]["kd_loss_initial"]
    assert len({found["loss_final"] for found in metrics}) == len({found["kd_loss_final"] for found in metrics}) == 3


def test_another_text_is_told_from_the_first(first, shop):
    other = shop.tiny("stage=cache", "data=prompts").result["measured_on"]
    assert other["text"] != first.result["measured_on"]["text"]
    assert other["teacher"] == first.result["measured_on"]["teacher"]
    smaller = shop.tiny("stage=cache", "cache.top_k=4").result  # of the same rows
    assert smaller["measured_on"]["text"] == first.result["measured_on"]["text"]


def test_a_student_that_is_no_better_than_the_checkpoint_it_was_trained_from_is_called_so(first, shop):
    done = shop.tiny("checkpoint=SR-001", "train.lr=3")
    assert "conversion" not in done.result["paths"]  # it has the same formats, so it is trained as it is
    verdict = done.result["verdict"]
    assert verdict.startswith("no better than it began") and done.result["training"]["best_step"] == 0
    assert f"verdict           {verdict}" in done.out
    assert f"**Result**: **{verdict}**" in (shop.outputs / "RUNS.md").read_text()


def test_cache_alone_can_be_looked_at(first, shop, drawn):
    done = shop.tiny("stage=cache", "cache.inspect=true")
    assert (done.result["status"], done.result["stage"]) == ("complete", "cache")
    assert done.result["paths"]["cache"] == first.result["paths"]["cache"]
    assert not (done.folder / "checkpoints").exists()
    assert (done.folder / "tail.png").read_bytes().startswith(b"\x89PNG")
    for part in ("the teacher expects", "share of positions that count", "bytes a position"):
        assert part in done.out
    shown = done.result["cache"]
    assert shown["train"]["sequences"] > shown["eval"]["sequences"] > 0 and 0 < shown["tail_mean"] < 1


def test_text_alone_trains_as_a_whole_cache_does_where_the_teacher_runs_beside(first, shop, conversion):
    start, loss = f"checkpoint={conversion}", "loss=full_kl"
    whole = shop.tiny("stage=distill", start, loss)
    alone = shop.tiny("stage=distill", start, loss, "cache.train_targets=false")
    assert alone.result["metrics"] == whole.result["metrics"]
    folder = alone.result["paths"]["cache"]
    assert folder != whole.result["paths"]["cache"]
    shown = shop.tiny("stage=cache", "cache.inspect=true", "cache=local", f"cache.path={folder}")
    assert "the teacher expects" in shown.out and 0 < shown.result["cache"]["tail_mean"] < 1
    refused = shop.launch("+debug=tiny", "stage=distill", start, "cache=local", f"cache.path={folder}")
    assert refused.code == 2 and f"{folder} keeps their text alone" in refused.err


def test_older_cache_trains_where_it_lies_and_can_be_imported(first, shop, conversion, teacher, tmp_path):
    model, draw = teacher.load(torch.float32, torch.device("cpu")), torch.Generator().manual_seed(0)
    for index in range(3):
        ids = torch.randint(512, (8, 16), generator=draw)
        logits, best = model(ids).logits[:, :-1].topk(8)
        shard = {"input_ids": ids.int(), "topk_idx": best.int(), "topk_logits": logits.half()}
        torch.save(shard, tmp_path / f"shard_{index:05d}.pt")
    older, start = ["cache=local", f"cache.path={tmp_path}"], f"checkpoint={conversion}"
    done = shop.tiny("stage=distill", start, "loss=topk_kl", *older)
    refused = shop.launch("+debug=tiny", "stage=distill", start, *older)
    assert refused.code == 2 and "use loss=topk_kl" in refused.err
    imported = shop.tiny("stage=cache", "cache.inspect=true", *older).result["paths"]["cache"]
    again = shop.tiny("stage=distill", start, "loss=topk_kl", "cache=local", f"cache.path={imported}")
    for key in ("kd_loss_initial", "kd_loss_final"):
        assert again.result["metrics"][key] == pytest.approx(done.result["metrics"][key], rel=1e-4)


def test_conversion_alone(first, shop):
    done = shop.tiny("stage=convert")
    assert done.result["status"] == "complete"
    assert done.result["quant"] == first.result["quant"]
    assert done.result["paths"]["conversion"] == first.result["paths"]["conversion"]
    assert done.result["metrics"]["kl"] == pytest.approx(first.result["metrics"]["kl_initial"])
    assert "before conversion" in done.out


def test_the_whole_job_from_a_checkpoint_with_other_formats_converts_it_first(first, shop):
    done = shop.tiny("checkpoint=SR-001", "quant=q4a4")
    assert done.result["paths"]["conversion"] != first.result["paths"]["conversion"]
    assert done.result["name"].startswith("v2_q4a4_mlp_") and "(6 mlp + 8 attn)" in done.out


def test_a_student_at_more_bits_is_trained_first_once_and_converted_further(first, shop):
    words = ("+experiment=progressive", "model=tiny", "convert=fast", "convert.calibration_tokens=256")
    short = ("first.train.steps=2", "first.train.batch_size=2", "train.steps=2", "train.batch_size=2")
    done = shop.tiny(*words, *short)
    before = open_artifact(Path(done.result["paths"]["first"])).manifest
    assert before["quant"]["mlp"]["bits"] == 4 and before["kd_loss_best"] <= before["kd_loss_initial"]
    assert {"latent.safetensors", LAYERS} <= before["files"].keys()
    after = open_artifact(Path(done.result["paths"]["conversion"])).manifest
    assert after["quant"]["mlp"]["bits"] == 2 and {".mlp." in name for name in after["figures"]} == {True}
    again = shop.tiny(*words, *short, "train.lr=1e-2")
    assert again.result["paths"]["first"] == done.result["paths"]["first"]


def test_training_alone_is_the_training_of_the_whole_job(first, shop, conversion):
    cache = ["cache=local", f"cache.path={first.result['paths']['cache']}"]
    done = shop.tiny("stage=distill", f"checkpoint={conversion}", *cache)
    for key in ("kd_loss_initial", "kd_loss_final", "kd_loss_best"):
        assert done.result["metrics"][key] == pytest.approx(first.result["metrics"][key], rel=1e-4)
    assert learned(conversion, done) == {"mlp"}
    assert open_artifact(done.folder / "checkpoints" / "best").manifest["run"] == done.folder.name
    before, best = (f"{done.result['metrics'][f'kd_loss_{when}']:.4f}" for when in ("initial", "best"))
    (line,) = (line for line in done.out.splitlines() if "KD loss (held-out)" in line)
    assert before in line and best in line
    assert f"stage=chat checkpoint={done.folder.name}" in done.out


def test_evaluation_alone_is_the_evaluation_of_the_whole_job(first, shop):
    done = shop.tiny("stage=evaluate", "checkpoint=SR-001")
    for key in ("kl", "perplexity", "teacher_perplexity", "top1_agreement"):
        assert done.result["metrics"][key] == pytest.approx(first.result["metrics"][key], rel=1e-4)
    assert done.result["metrics"]["kd_loss"] == pytest.approx(first.result["metrics"]["kd_loss_best"], rel=0.02)
    assert done.result["quant"] == first.result["quant"]


@pytest.mark.parametrize("checkpoint", ["teacher", "SR-001"])
def test_chat_answers_and_leaves_no_run(first, shop, checkpoint):
    done = shop.tiny("stage=chat", "chat.prompt=hi", "chat.max_tokens=4", f"checkpoint={checkpoint}")
    assert done.folder is None
    assert done.out.strip()


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [("SR-001", "hf"), ("SR-001", "packed"), ("teacher", "hf")],  # anemll_v2: see below
)
def test_export_lands_where_asked_and_is_replaced_when_asked_again(first, shop, checkpoint, name):
    folder = shop.outputs.parent / f"{name}-{checkpoint}"
    words = ("stage=export", f"checkpoint={checkpoint}", f"export={name}", f"export.output={folder}")
    for _ in range(2 if checkpoint == "SR-001" and name == "hf" else 1):
        done = shop.tiny(*words)
        assert str(folder) in done.out and (folder / "README.md").is_file()
        assert done.result["metrics"]["parity"] < (5e-2 if name == "packed" else 1e-5)


def test_a_v2_state_dict_is_evaluated_like_the_checkpoint_it_was_made_from(first, shop):
    folder = shop.outputs.parent / "v2"
    made = shop.tiny("stage=export", "checkpoint=SR-001", "export=anemll_v2", f"export.output={folder}")
    assert (folder / "README.md").is_file() and made.result["metrics"]["parity"] < 1e-5
    done = shop.tiny("stage=evaluate", f"checkpoint={folder}/best_state_dict.pt")
    assert done.result["metrics"]["kl"] == pytest.approx(first.result["metrics"]["kl"], rel=1e-3)
    assert done.result["quant"]["bits_per_weight"] == first.result["quant"]["bits_per_weight"]


@pytest.mark.parametrize("loss", ["topk_kl", "full_kl"])  # bucket_kl: see below
def test_every_loss_trains(first, shop, conversion, loss):
    done = shop.tiny("stage=distill", f"checkpoint={conversion}", "data=prompts", f"loss={loss}", *LONGER)
    losses = [row["loss"] for row in done.figures if "loss" in row]
    assert len(losses) == 8 and all(loss > 0 for loss in losses)
    assert done.result["metrics"]["kd_loss_final"] < 0.97 * done.result["metrics"]["kd_loss_initial"]


def test_a_mode_trains_its_layers_and_no_others(first, shop, conversion):
    done = shop.tiny("stage=distill", f"checkpoint={conversion}", "mode=attn", "quant=q4a4")
    assert learned(conversion, done) == {"attn"}
    assert "_q2a4_attn_" in done.result["name"]  # by its own formats


@pytest.fixture(scope="module")
def adapted(first, shop):
    """A training of adapters."""
    start = f"checkpoint={first.result['paths']['conversion']}"
    return shop.tiny("stage=distill", start, "mode=lora", "data=prompts", *LONGER)


def test_adapters_learn_on_a_student_that_stays(first, shop, conversion, adapted):
    assert learned(conversion, adapted) == set()
    metrics = adapted.result["metrics"]
    assert metrics["kd_loss_final"] < 0.97 * metrics["kd_loss_initial"]
    files = {path.name for path in (adapted.folder / "checkpoints" / "best").iterdir()}
    assert files == {"manifest.json", LAYERS, "adapter_config.json", "adapter_model.safetensors"}
    numbers = 8 * sum(sum(layer["shape"]) for layer in manifest_of(adapted)["layers"].values())
    assert adapted.result["quant"]["adapter_bytes"] == 4 * numbers
    assert "_lora_" in adapted.result["name"]


def manifest_of(done):
    return json.loads((done.folder / "checkpoints" / "best" / "manifest.json").read_text())


def test_what_adapters_learned_is_evaluated_asked_exported_and_gone_on_with(first, shop, adapted):
    run = adapted.folder.name
    done = shop.tiny("stage=evaluate", f"checkpoint={run}", "data=prompts")
    metrics = adapted.result["metrics"]
    assert done.result["metrics"]["kd_loss"] == pytest.approx(metrics["kd_loss_best"], rel=1e-3)
    assert done.result["quant"]["adapter_bytes"] == adapted.result["quant"]["adapter_bytes"]
    assert shop.tiny("stage=chat", "chat.prompt=hi", "chat.max_tokens=4", f"checkpoint={run}").out.strip()
    for words in (["export=packed"], ["export=hf", "export.merge=true"]):
        folder = shop.outputs.parent / "-".join(["adapted", *words])
        shop.tiny("stage=export", f"checkpoint={run}", f"export.output={folder}", *words)
        assert (folder / "adapter" / "adapter_model.safetensors").is_file() == (len(words) == 1)
    more = shop.tiny("stage=distill", f"checkpoint={run}", "mode=lora", "data=prompts")
    assert more.result["metrics"]["kd_loss_initial"] == pytest.approx(metrics["kd_loss_best"], rel=1e-3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("stage=distill", "has adapters, beside which nothing else learns: use mode=lora"),
        ("stage=distill mode=lora mode.rank=4", "adapters of mode.rank=8 mode.alpha=16, which training"),
        ("mode=lora quant=q4a4", "is to be converted to quant=q4a4, which would lose them"),
        ("stage=convert quant=q4a4", "is to be converted to quant=q4a4, which would lose them"),
        ("stage=export export=gguf export.output=new", "cannot hold"),
        ("stage=export export=anemll_v2 export.output=new", "export=anemll_v2 has no place for adapters"),
        ("stage=export export=packed export.merge=true export.output=new", "holds weights of few bits"),
    ],
)
def test_what_adapters_cannot_be_used_for_is_told(first, shop, adapted, words, said):
    runs = sorted(shop.outputs.glob("SR-*"))
    done = shop.launch("+debug=tiny", f"checkpoint={adapted.folder.name}", *words.split())
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1
    assert sorted(shop.outputs.glob("SR-*")) == runs


def test_answers_of_ones_own_are_learned(first, shop, conversion):
    rows = [{"question": f"{number}?", "answer": "no"} for number in range(60)]
    (shop.outputs.parent / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["mode=lora", "loss=sft", "data=chat_jsonl", f"data.path={shop.outputs.parent / 'own.jsonl'}"]
    done = shop.tiny(f"checkpoint={conversion}", *words, "data.eval_fraction=0.3", *LONGER)
    metrics = done.result["metrics"]
    assert metrics["loss_best"] < 0.9 * metrics["loss_initial"] and not done.result["verdict"]
    meta = json.loads((Path(done.result["paths"]["cache"]) / "meta.json").read_text())
    assert meta["answers"] and not meta["train_targets"]
    assert "answers, nats a token" in done.out


def test_a_run_that_fails_is_told_in_one_sentence_and_recorded(first, shop):
    done = shop.launch("+debug=tiny", "train.lr=1e18")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert (done.result["status"], f"error: {done.result['error']}\n") == ("failed", done.err)


@pytest.mark.parametrize("place", ["SR", "new/mine", "there"])
def test_a_refusal_before_any_work_takes_no_number_and_leaves_nothing(first, shop, place, tmp_path):
    words = [] if place == "SR" else [f"hydra.run.dir={tmp_path / place}"]
    (tmp_path / "there").mkdir()
    before = sorted([*shop.outputs.glob("*"), *shop.outputs.glob(".ids/*"), *shop.outputs.parent.glob("*")])
    log = (shop.outputs / "RUNS.md").read_bytes()
    (other := tmp_path / "damaged").mkdir()
    files = {"gone": {"bytes": 1, "sha256": "0" * 64}}
    (other / "manifest.json").write_text(json.dumps(described.checkpoint(files=files)))
    done = shop.launch("+debug=tiny", "stage=distill", f"checkpoint={other}", *words)
    assert (done.code, done.err.count("\n"), done.folder) == (1, 1, None) and "gone is missing" in done.err
    assert sorted([*shop.outputs.glob("*"), *shop.outputs.glob(".ids/*"), *shop.outputs.parent.glob("*")]) == before
    assert (shop.outputs / "RUNS.md").read_bytes() == log
    assert not (tmp_path / "new").exists()
    assert list((tmp_path / "there").glob("*")) == []


def test_defect_is_recorded_with_its_traceback(first, shop, monkeypatch):
    def fail(*_):
        raise RuntimeError("a hole")

    monkeypatch.setattr(distill, "_trainer", fail)
    with pytest.raises(RuntimeError, match="a hole"):
        launch_and_raise(shop)
    (folder,) = (p.parent for p in shop.outputs.glob("SR-*/result.json") if "a hole" in p.read_text())
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["error"]) == ("failed", "RuntimeError: a hole")


def test_interruption_from_the_keyboard_is_recorded(first, shop, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(distill, "_trainer", stop)
    with pytest.raises(KeyboardInterrupt):
        launch_and_raise(shop)
    (path,) = (p for p in shop.outputs.glob("SR-*/result.json") if "stopped from the keyboard" in p.read_text())
    assert json.loads(path.read_text())["status"] == "interrupted"


def launch_and_raise(shop):
    """The tiny job without Hydra, which would turn what is raised into an exit."""
    from qat.cli import arguments

    config = main.check(arguments.parse(["+debug=tiny", f"outputs={shop.outputs}"])).configs[0]
    folder = shop.outputs / main.claim(config, [], False)[0].split("/")[-1].strip("'")
    folder.mkdir()
    stages.run_job(config, folder)
