"""A teacher and a student of one tokenizer whose heads are filled up to different lengths, either the longer one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qat import checkpoints, footprint, models
from qat.config import Config, LossKind, ModelConfig, ModelSource
from qat.distill.head import Head
from qat.distill.loss import Loss
from qat.errors import ConfigError
from qat.evaluate import evaluate
from qat.evaluate.windows import Windows
from qat.forward import FAST, hidden_states, use
from qat.models import padding
from qat.models import tiny as tiny_model
from qat.models.sources import locate
from qat.stages import doctor, limits
from tests import tiny
from tests.stages.conftest import write_text

TOKENS, LONGER = 512, 520
FORMAT = ("quant=q2a4", "quant.mlp.rank=2", "quant.attn.rank=2")
TRAINING = (*FORMAT, "mode=e2e", "train.steps=4", "train.eval_every=4")
LEARNING = (*FORMAT, "mode=e2e", "train.steps=10", "train.eval_every=10", "train.learn.latent=2e-2")
FIGURES = ("loss_initial", "loss_best", "kd_loss_initial", "kl", "kl_initial", "perplexity", "teacher_perplexity")


def lengthened(folder, to):
    """A copy of a model with further rows that are as likely as letters."""
    shutil.copytree(folder, to)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(LONGER)
    with torch.no_grad():
        for end in (model.get_input_embeddings(), model.get_output_embeddings()):
            end.weight[TOKENS:] = end.weight[97 : 97 + LONGER - TOKENS]
    model.save_pretrained(to)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model and a larger teacher with a head of its own, each also with further rows."""
    folder = tmp_path_factory.mktemp("padded")
    tiny_model.write(folder / "model", TOKENS)
    torch.manual_seed(1)
    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4}
    settings = {"vocab_size": TOKENS, "max_position_embeddings": 512, "initializer_range": 0.2, "eos_token_id": 257}
    LlamaForCausalLM(LlamaConfig(**sizes, **settings)).save_pretrained(folder / "large")
    tiny_model.byte_tokenizer().save_pretrained(folder / "large")
    for name in ("model", "large"):
        lengthened(folder / name, folder / f"{name}_longer")
    write_text(folder / "text.txt")
    return folder


def folder_of(path):
    return locate(ModelConfig(name="local", source=ModelSource.folder, path=str(path)), path.parent / "artifacts")


def pair(place, model, teacher):
    student = folder_of(place / model)
    return student, models.teaching(student, folder_of(place / teacher))


def taught_by(path):
    return ("teacher=local", f"teacher.path={path}")


def eager(path, rows):
    """Logits [B, L, V] by transformers alone, in float64."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager")
    with torch.no_grad():
        return model(rows).logits


def divergence(theirs, ours):
    """KL over the student's vocabulary, of which a teacher of fewer tokens knows the first ones."""
    log_p, log_q = theirs.log_softmax(-1), ours.log_softmax(-1)[..., : theirs.shape[-1]]
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def test_a_teacher_with_further_rows_gives_the_same_student_from_its_own_text_on(job, place):
    words = (*TRAINING, "loss=bucket_kl")
    _, plain = job("model", *words, *taught_by(place / "large"))
    folder, padded = job("model", *words, *taught_by(place / "large_longer"))
    for name in FIGURES:
        assert padded["metrics"][name] == pytest.approx(plain["metrics"][name], rel=1e-5), name
    cache = json.loads((Path(padded["paths"]["cache"]) / "meta.json").read_text())
    assert cache["vocab_size"] == TOKENS
    assert padded["measured_on"]["teacher"]["fingerprint"] != folder_of(place / "large_longer").fingerprint
    assert json.loads((folder / "checkpoints" / "best" / "manifest.json").read_text())["model"] == "model"


def test_a_cut_teacher_computes_the_first_rows_whole_or_streamed(place, monkeypatch):
    rows = torch.randint(260, (2, 12))
    wanted = eager(place / "large_longer", rows)[..., :TOKENS]
    _, cut = pair(place, "model", "large_longer")
    assert cut.vocab_size() == cut.skeleton().config.vocab_size == TOKENS
    monkeypatch.setattr("qat.models.folder.FEW", 0)
    whole, streamed = cut.load(torch.float32, tiny.CPU), cut.stream(torch.float32, tiny.CPU)
    beside = cut.stream(torch.float32, tiny.CPU, streamed)
    for model in (whole, streamed, beside):
        with torch.no_grad():
            assert torch.allclose(model(rows).logits.double(), wanted, atol=1e-4)
        assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == TOKENS
    assert not cut.unstreamed(torch.float32, tiny.CPU)
    tied = pair(place, "model", "model_longer")[1].load(torch.float32, tiny.CPU)
    assert tied.get_input_embeddings().weight is tied.get_output_embeddings().weight
    assert torch.allclose(tied(rows).logits.double(), eager(place / "model_longer", rows)[..., :TOKENS], atol=1e-4)


@pytest.mark.parametrize(("model", "teacher"), [("model_longer", "large"), ("model", "large_longer")])
def test_figures_are_those_of_transformers_in_float64(place, model, teacher):
    rows = torch.randint(260, (3, 24))
    student, beside = (one.load(torch.float32, tiny.CPU) for one in pair(place, model, teacher))
    for one in (student, beside):
        use(one, FAST)
    found = evaluate(student, beside, Windows(rows.flatten(), 24, 24), 8, tiny.FP32)
    ours, theirs = (eager(place / name, rows)[:, :-1] for name in (model, teacher))
    assert found.kl == pytest.approx(divergence(theirs[..., :TOKENS], ours).mean().item(), rel=1e-4)
    nll = torch.nn.functional.cross_entropy(theirs[..., :TOKENS].flatten(0, 1), rows[:, 1:].flatten())
    assert found.teacher_perplexity == pytest.approx(nll.exp().item(), rel=1e-4)


@pytest.mark.parametrize("hard", [0.0, 0.5])
def test_what_a_student_spends_on_further_rows_costs_in_the_loss_and_its_gradient(place, hard):
    student, teacher = (one.load(torch.float32, tiny.CPU) for one in pair(place, "model_longer", "large"))
    rows, T = {"input_ids": torch.randint(260, (3, 12))}, 1.5
    hidden, theirs = hidden_states(student, rows), hidden_states(teacher, rows)
    head = Head(student, Loss(LossKind.full_kl, T, hard=hard, teacher=teacher))
    logits_V = teacher(**rows).logits[:, :-1].flatten(0, 1).double()
    first_1, weight = logits_V.argmax(-1, keepdim=True), torch.rand(len(hidden))
    value, grad = head.backward(hidden, first_1, torch.zeros(first_1.shape), weight, theirs)
    exact = hidden.double().requires_grad_()
    ours = exact @ student.get_output_embeddings().weight.double().mT
    surprise = torch.nn.functional.cross_entropy(ours, first_1[:, 0], reduction="none")
    wanted = ((T**2 * divergence(logits_V / T, ours / T) + hard * surprise) * weight).sum()
    wanted.backward()
    assert float(value) == pytest.approx(wanted.item(), rel=1e-4)
    assert torch.allclose(grad.double(), exact.grad, atol=1e-5, rtol=1e-3)
    losses = head.losses(hidden, first_1, torch.zeros(first_1.shape), theirs)
    assert float((losses * weight).sum()) == pytest.approx(wanted.item(), rel=1e-4)


def test_a_student_with_further_rows_learns_to_leave_them(job, place):
    text = ("data=text", f"data.path={place / 'text.txt'}")
    folder, result = job("model_longer", *LEARNING, *text, "loss=full_kl", *taught_by(place / "large"))
    assert result["metrics"]["loss_best"] < result["metrics"]["loss_initial"]
    model, teacher = pair(place, "model_longer", "large")
    rows = teacher.tokenizer()((place / "text.txt").read_text(), return_tensors="pt")["input_ids"][:, :320].view(10, 32)
    spent = []
    for made in (Path(result["paths"]["conversion"]), folder / "checkpoints" / "best"):
        student = checkpoints.load(made, model, tiny.FP32)[0]
        with torch.no_grad():
            logits = student(rows).logits
        assert logits.shape[-1] == LONGER
        spent.append(float(logits.softmax(-1)[..., TOKENS:].sum(-1).mean()))
    assert spent[1] < spent[0]
    words = ("stage=evaluate", f"checkpoint={folder}", f"evaluate.text={place / 'text.txt'}", "evaluate.context=32")
    _, found = job("model_longer", *words, "evaluate.tokens=320", *taught_by(place / "large"))
    with torch.no_grad():
        ours = student.double()(rows).logits[:, :-1]
    assert found["metrics"]["kl"] == pytest.approx(
        divergence(eager(place / "large", rows)[:, :-1], ours).mean().item(), rel=1e-3
    )


def test_an_export_has_the_rows_of_its_model(job, place):
    text = ("data=text", f"data.path={place / 'text.txt'}")
    made, _ = job("model_longer", "stage=convert", *FORMAT, *text, *taught_by(place / "large"))
    there, words = place / "there", ("stage=export", "export=hf", f"checkpoint={made}")
    job("model_longer", *words, f"export.output={there}", *taught_by(place / "large"))
    rows = torch.randint(260, (1, 12))
    student = checkpoints.load(made, folder_of(place / "model_longer"), tiny.FP32)[0]
    with torch.no_grad():
        assert torch.allclose(eager(there, rows), student(rows).logits.double(), atol=1e-4)


def test_the_plan_of_memory_is_that_of_the_rows_that_are_loaded(configured, place):
    def planned(teacher):
        config = configured("model", "loss=full_kl", *taught_by(place / teacher))
        places = limits.planned(config, *pair(place, "model", teacher), tiny.FP32)
        shown = [(one.what, one.found) for one in doctor._plan(config)]
        return {name: footprint.told(place) for name, place in places.items()}, shown

    assert planned("large_longer") == planned("large")


def test_other_tensors_of_that_length_are_not_cut(place):
    _, cut = pair(place, "model", "large_longer")
    model = AutoModelForCausalLM.from_pretrained(place / "large_longer")
    model.register_buffer("seen", torch.zeros(LONGER))
    with pytest.raises(ConfigError, match="520 rows in embedding and head, and its seen does not let it have 512"):
        padding.cut(place / "large_longer", model, cut.skeleton())


def test_no_more_tokens_are_cached_than_the_teacher_has(configured, place):
    config: Config = configured("model_longer", "cache.top_k=515", *taught_by(place / "large"))
    with pytest.raises(ConfigError, match=r"cache\.top_k=515: teacher=large has only 512 tokens"):
        limits.check(config, *pair(place, "model_longer", "large"), tiny.FP32)
