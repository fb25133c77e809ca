"""A student learns from another model than its own; one of other sizes that computes the same gives the same."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qat import models
from qat.config import LossKind, ModelConfig, ModelSource
from qat.distill.head import Head
from qat.distill.loss import Loss
from qat.errors import ConfigError
from qat.forward import hidden_states
from qat.models import tiny as tiny_model
from qat.models.sources import locate
from qat.stages import chat, limits
from tests import tiny
from tests.stages.conftest import write_text

FORMAT = ("quant=q2a4", "quant.mlp.rank=2", "quant.attn.rank=2")
TRAINING = (*FORMAT, "data=text", "mode=e2e", "train.steps=6", "train.eval_every=6")
FIGURES = ("loss_initial", "loss_best", "kd_loss_initial", "kd_loss_final", "kl", "kl_initial", "perplexity")


def widened(folder, to):
    """A copy of a model with twice the hidden size, the second half of it zero, that computes the same."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = model.config
    hidden = settings.hidden_size
    settings.head_dim = hidden // settings.num_attention_heads
    settings.hidden_size = 2 * hidden
    settings.rms_norm_eps /= 2  # as are the mean squares
    wide = AutoModelForCausalLM.from_config(settings)
    filled = {}
    for name, value in wide.state_dict().items():
        old = model.state_dict()[name]
        filled[name] = torch.zeros_like(value)
        filled[name][tuple(map(slice, old.shape))] = old / math.sqrt(2) if "norm" in name else old
    wide.load_state_dict(filled)
    wide.save_pretrained(to)
    tiny_model.byte_tokenizer().save_pretrained(to)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, a teacher that computes the same, and one of other sizes and other weights."""
    folder = tmp_path_factory.mktemp("pair")
    tiny_model.write(folder / "model", 512)
    widened(folder / "model", folder / "wide")
    torch.manual_seed(1)
    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4}
    settings = {"vocab_size": 512, "max_position_embeddings": 512, "initializer_range": 0.2, "eos_token_id": 257}
    LlamaForCausalLM(LlamaConfig(**sizes, **settings)).save_pretrained(folder / "other")
    tiny_model.byte_tokenizer().save_pretrained(folder / "other")
    write_text(folder / "text.txt")
    return folder


def folder_of(path):
    return locate(ModelConfig(name="local", source=ModelSource.folder, path=str(path)), path.parent / "artifacts")


def taught_by(path):
    return ("teacher=local", f"teacher.path={path}")


def logits(path):
    rows = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(rows).logits


def test_the_widened_copy_computes_the_same(place):
    assert (logits(place / "model") - logits(place / "wide")).abs().max() < 1e-4


def test_a_teacher_that_computes_the_same_gives_the_same_student(job, place):
    words = (*TRAINING, f"data.path={place / 'text.txt'}", "loss=full_kl")
    _, alone = job("model", *words)
    folder, taught = job("model", *words, *taught_by(place / "wide"))
    for name in FIGURES:
        assert taught["metrics"][name] == pytest.approx(alone["metrics"][name], rel=2e-3), name
    assert taught["metrics"]["loss_best"] < taught["metrics"]["loss_initial"]
    assert taught["measured_on"]["teacher"]["name"] == "wide" and alone["measured_on"]["teacher"]["name"] == "model"
    manifest = json.loads((folder / "checkpoints" / "best" / "manifest.json").read_text())
    assert manifest["model"] == "model"
    assert taught["quant"]["file_bytes"] == alone["quant"]["file_bytes"]


def test_the_loss_and_its_gradient_are_those_of_both_whole_distributions(place):
    student, teacher = (folder_of(place / name).load(torch.float32, tiny.CPU) for name in ("model", "other"))
    rows = {"input_ids": torch.randint(260, (3, 12))}
    hidden = hidden_states(student, rows)
    head = Head(student, Loss(LossKind.full_kl, 1.5, teacher=teacher))
    none, weight = torch.zeros(len(hidden), 0), torch.rand(len(hidden))
    value, grad = head.backward(hidden, none.long(), none, weight, hidden_states(teacher, rows))
    exact = hidden.double().requires_grad_()
    ours = exact @ student.get_output_embeddings().weight.double().mT
    theirs = teacher(**rows).logits[:, :-1].flatten(0, 1).double()
    log_p, log_q = (theirs / 1.5).log_softmax(-1), (ours / 1.5).log_softmax(-1)
    wanted = 1.5**2 * ((log_p.exp() * (log_p - log_q)).sum(-1) * weight).sum()
    wanted.backward()
    assert float(value) == pytest.approx(wanted.item(), rel=1e-4)
    assert torch.allclose(grad.double(), exact.grad, atol=1e-5, rtol=1e-3)


def test_what_is_before_and_after_conversion_is_told_against_the_teacher(job, place):
    text = ("data=text", f"data.path={place / 'text.txt'}")
    bits = ("quant.mlp.bits=8", "quant.attn.bits=8", "quant.mlp.rank=4", "quant.attn.rank=4")
    _, result = job("model", "stage=convert", *text, *bits, *taught_by(place / "other"))
    manifest = json.loads((Path(result["paths"]["conversion"]) / "manifest.json").read_text())
    before, after = manifest["metrics"]["before"]["kl"], manifest["metrics"]["after"]["kl"]
    assert before > 1 and after == pytest.approx(before, rel=0.05)  # 8 bits leave the model where it was
    assert manifest["teacher"] == folder_of(place / "model").fingerprint


def test_an_evaluation_is_against_the_teacher(job, place):
    text = ("data=text", f"data.path={place / 'text.txt'}")
    made, result = job("model", "stage=convert", *FORMAT, *text, *taught_by(place / "other"))
    words = ("stage=evaluate", f"checkpoint={made}", *text)
    _, again = job("model", *words, *taught_by(place / "other"))
    assert again["metrics"]["kl"] == pytest.approx(result["metrics"]["kl"], rel=1e-4)
    _, own = job("model", *words)
    assert own["metrics"]["kl"] != pytest.approx(result["metrics"]["kl"], rel=0.05)
    assert own["metrics"]["perplexity"] == pytest.approx(again["metrics"]["perplexity"], rel=1e-4)


def swapped(folder):
    path = folder / "tokenizer.json"
    said = json.loads(path.read_text())
    vocabulary = said["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(said))


def splitting(folder):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "Lowercase"}}))


def ending(folder):
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [257, 258]}))


def shorter(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(259)
    model.save_pretrained(folder)


def mute(folder):
    for file in [*folder.glob("token*"), *folder.glob("special*")]:
        file.unlink()


def templated(folder):
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


def changed(place, change):
    """The wide model with other files."""
    folder = place / change.__name__
    shutil.copytree(place / "wide", folder)
    change(folder)
    return folder_of(folder)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (swapped, r"have different tokens \(\d+ is 'a' and 'b', \d+ is 'b' and 'a'\): choose"),
        (splitting, "have the same tokens and split text otherwise"),
        (ending, r"end texts with different tokens, 257 \('<\|end\|>'\) and 257 .* 258 \('<\|system\|>'\)"),
        (shorter, r"has tokens up to number 260 \(<\|assistant\|>\) and the model knows 259"),
        (mute, "no tokenizer, so nothing tells whether"),
    ],
)
def test_a_model_of_other_tokens_is_no_teacher(place, change, told):
    with pytest.raises(ConfigError, match=told):
        models.teaching(folder_of(place / "model"), changed(place, change))


def test_a_teacher_of_another_template_speaks_by_the_models(place, caplog):
    model, teacher = folder_of(place / "model"), changed(place, templated)
    given = models.teaching(model, teacher)
    assert "chat templates" in caplog.text
    assert given.tokenizer().chat_template == model.tokenizer().chat_template != teacher.tokenizer().chat_template
    assert given.fingerprint == teacher.fingerprint and given.text != teacher.text


def test_the_model_itself_is_no_other_teacher(place):
    model = folder_of(place / "model")
    assert models.teaching(model, folder_of(place / "model")) is model


def test_both_models_are_in_the_plan_of_memory(configured, place, monkeypatch):
    monkeypatch.setattr("qat.footprint.training.PRODUCT", 0)  # larger than a step of models as small as these
    config = configured("model", "loss=full_kl", *taught_by(place / "other"))
    model, teacher = folder_of(place / "model"), folder_of(place / "other")

    def planned(asked, beside):
        found = limits.planned(asked, model, beside, tiny.FP32)["training"].parts
        return {part.what: part.bytes for part in found}

    parts = planned(config, teacher)
    held = teacher.load(torch.float32, tiny.CPU)
    assert parts["the teacher's weights"] == 4 * sum(value.numel() for value in held.parameters())
    assert parts["the student's weights"] < parts["the teacher's weights"]
    alone = planned(configured("model", "loss=full_kl"), model)
    assert alone["the teacher's weights"] == alone["the student's weights"] == parts["the student's weights"]
    states = parts["the teacher's hidden states"] / alone["the teacher's hidden states"]
    assert states == held.config.hidden_size / model.settings().hidden_size


def test_the_larger_model_chats_as_the_teacher(configured, place, capsys):
    said = {}
    for name in ("wide", "other"):
        words = ("stage=chat", "chat.prompt=ab", "chat.max_tokens=8", *taught_by(place / name))
        chat.main(configured("model", *words))
        said[name] = capsys.readouterr().out
    chat.main(configured("model", "stage=chat", "chat.prompt=ab", "chat.max_tokens=8"))
    assert said["wide"] == capsys.readouterr().out != said["other"]
