"""Twenty families and more, in small: what is recorded, measured and trained is what transformers' eager pass says.

`benchmarks/architectures.py` takes all there are, through whole jobs.
"""

from dataclasses import replace
from functools import cache

import architectures
import pytest
import torch
import transformers
import zoo

from qat import models
from qat.cache.reader import CacheReader
from qat.cache.writer import obtain_cache
from qat.config import (
    CacheConfig,
    ConvertConfig,
    DataConfig,
    DataSource,
    KMeansBackend,
    KMeansConfig,
    LearnConfig,
    LossKind,
    ModeConfig,
    ModelConfig,
    ModelSource,
    Packing,
    TrainConfig,
)
from qat.conversion.convert import install, quantize
from qat.conversion.moments import gather
from qat.data.documents import obtain_documents
from qat.distill.loss import Loss
from qat.distill.trainer import Trainer
from qat.errors import ConfigError
from qat.evaluate import evaluate
from qat.evaluate.windows import Windows, read
from qat.fidelity import Sample, settle
from qat.machine import Machine
from qat.models.tiny import byte_tokenizer
from qat.quant.architectures import select
from qat.quant.places import matrix
from tests import tiny

# Whether the model's own code computes attention and what follows the head, and whether documents may share rows.
FAMILIES = {
    "bloom": "own attention, one document a row",
    "cohere2": "own head",
    "deepseek_v3": "fast",
    "exaone4": "fast",
    "falcon_h1": "own head, one document a row",
    "gemma2": "own attention and head",
    "gemma3_text": "fast",
    "gemma3n_text": "own head",
    "gpt2": "fast",
    "gpt_oss": "own attention, one document a row",
    "granite": "own head",
    "granitemoe": "own head",
    "lfm2": "fast",
    "llama4_text": "fast",
    "minimax": "fast, one document a row",
    "mistral": "fast",
    "nemotron_h": "fast, one document a row",
    "olmo3": "fast",
    "phi3": "fast",
    "qwen3_5_text": "fast, one document a row",
    "recurrent_gemma": "own head, one document a row",
    "rwkv": "fast, one document a row",
}
TRAINED = ("gemma2", "gemma3n_text", "gpt_oss", "granite", "phi3", "qwen3_5_text")
LENGTH = 48
WIDE = Machine(tiny.CPU, torch.float32, 16)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return architectures.write_text(tmp_path_factory.mktemp("text") / "text.txt")


class Family:
    """A tiny model of one, in a folder of its own."""

    def __init__(self, name, folder, text):
        self.folder, self.text = folder, text
        zoo.tiny(transformers.CONFIG_MAPPING[name]).save_pretrained(folder / "model")
        byte_tokenizer().save_pretrained(folder / "model")
        self.teacher = models.locate(ModelConfig("it", ModelSource.folder, path=str(folder / "model")), folder)
        self.own = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")

    def cache(self, packing=Packing.joined):
        data = DataConfig(name="text", source=DataSource.text, path=str(self.text), eval_fraction=0.4)
        documents = obtain_documents(data, self.teacher, 0, WIDE, self.folder)
        settings = CacheConfig("L", length=LENGTH, top_k=8, packing=packing)
        return obtain_cache(settings, documents, "text", self.teacher, 0, WIDE, self.folder)


@pytest.fixture(scope="module")
def family_of(text, tmp_path_factory):
    """Families by name, each made once; read only."""
    return cache(lambda name: Family(name, tmp_path_factory.mktemp(name), text))


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_recorded_and_measured_is_what_the_model_says(name, family_of, text):
    family = family_of(name)
    recorded = [family.cache(Packing.joined)]
    assert architectures.way(recorded[0].manifest) == FAMILIES[name]
    if "one document a row" not in FAMILIES[name]:  # else that was one already
        recorded.append(family.cache(Packing.rows))
    for made in recorded:
        assert architectures.compared(family.own, made.folder)["largest"] <= architectures.LARGEST
    windows = Windows(read(str(text), family.teacher.tokenizer(), architectures.TEXT), 96, 48)
    model = family.teacher.load(torch.float32, tiny.CPU)
    settle(family.teacher, WIDE, Sample.of_rows(windows), model)
    found = evaluate(model, model, windows, 16, WIDE)
    assert found.perplexity == pytest.approx(architectures.perplexity(family.own, text), rel=1e-3) and found.kl < 1e-6


@pytest.mark.parametrize("name", ["bert", "doge"])
def test_what_depends_on_later_tokens_is_refused_in_one_sentence(name, tmp_path, text):
    with pytest.raises(ConfigError, match=r"says something else of rows|sees what comes later") as error:
        Family(name, tmp_path, text).cache()
    assert "\n" not in str(error.value) and not list((tmp_path / "caches").glob("[!.]*"))


@pytest.mark.parametrize("name", TRAINED)
def test_a_student_is_converted_trained_and_measured_as_it_computes_itself(name, family_of):
    family = family_of(name)
    recorded = family.cache()
    training, held_out = CacheReader(recorded, "train"), CacheReader(recorded, "eval")
    teacher, student = (family.teacher.load(torch.float32, tiny.CPU) for _ in range(2))
    layers = converted(student, training, gradients=name in ("gemma3n_text", "granite"))
    train = TrainConfig(steps=2, batch_size=4, lr=1e-2, eval_every=2, learn=LearnConfig())
    mode, loss = ModeConfig("e2e", mlp=True, attn=True), Loss(LossKind.bucket_kl)
    trainer = Trainer(student, layers, (training, held_out), train, mode, loss, tiny.FP32, 0)
    history = trainer.run(lambda row: None, lambda: None)
    found = evaluate(student, teacher, held_out, 8, tiny.FP32)
    kl, kd_loss = own_losses(family.own, student, held_out)
    assert found.kl == pytest.approx(kl, rel=1e-3)
    assert history.kd_loss_final != history.kd_loss_initial
    assert history.kd_loss_final == pytest.approx(kd_loss, rel=1e-2)  # the cache is rounded to 16 bits


def converted(model, training, gradients):
    """Puts codebooks into a model; the quantized layers with their kinds."""
    chosen, text = select(model, replace(tiny.QUANT, partial=True)), [training.batch(torch.arange(training.rows))]
    moments, settings = gather(model, chosen, text, gradients), ConvertConfig("", rounds=2)
    weights = {layer.name: matrix(model, layer.name) for layer in chosen}
    exact = KMeansConfig("", KMeansBackend.exact)
    made = quantize(chosen, weights.__getitem__, moments, settings, exact, tiny.CPU)
    install(model, {one.layer.name: one.module for one in made})
    return {one.layer.name: (one.layer.role, one.module) for one in made}


@torch.no_grad()
def own_losses(own, student, held_out):
    """KL and KD loss by transformers' eager passes over each document alone, at the positions that count."""
    for module in student.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "eager"
    batch, pairs = held_out.batch(torch.arange(held_out.rows)), []
    for row in range(held_out.rows):
        ids, counts = batch.input_ids[row], batch.loss_mask[row]
        starts = batch.stored["document_starts"][row].nonzero()[:, 0].tolist() if batch.joined else [0]
        ends = [*starts[1:], LENGTH if batch.joined else int(counts.sum()) + 1]
        for first, end in zip(starts, ends, strict=True):
            if end - first > 1:
                logits = [m(ids[None, first:end], use_cache=False).logits[0, :-1] for m in (own, student)]
                best = logits[0].topk(8).indices
                pairs.append([logits, [z.gather(1, best) / 2 for z in logits]])
    kl, kd = (torch.cat([divergence(*both) for both in side]) for side in zip(*pairs, strict=True))
    return float(kl.mean()), 4 * float(kd.mean())


def divergence(theirs, ours):
    p, q = theirs.log_softmax(-1), ours.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
