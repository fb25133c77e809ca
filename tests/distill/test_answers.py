"""Training on answers alone, from the text of conversations to the loss."""

import json

import pytest
import torch

from qat.artifacts import open_artifact
from qat.cache import values
from qat.cache.reader import CacheReader
from qat.cache.writer import obtain_cache
from qat.config import CacheConfig, DataConfig, DataSource, LossKind, ModeConfig, Packing, TrainConfig
from qat.data.documents import obtain_documents, read_documents
from qat.distill.head import Head
from qat.distill.loss import Loss
from qat.errors import ArtifactError, ConfigError
from tests import tiny
from tests.distill.test_trainer import TRAIN, steps_of, trainer_of

LORA = ModeConfig(name="lora", mlp=True, attn=True, rank=3, alpha=6.0)
SFT = Loss(LossKind.sft)
LENGTH = 48


def rows():
    """Conversations of two questions, each with a word of its own."""
    for number in range(40):
        said = [("user", f"one {number}?"), ("assistant", f"first {number}"), ("user", "two?"), ("assistant", "second")]
        yield {"messages": [{"role": role, "content": text} for role, text in said]}


@pytest.fixture(scope="module")
def documents(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    data = DataConfig("own", DataSource.chat_jsonl, path=str(folder / "own.jsonl"), eval_fraction=0.3)
    found = {
        answers: obtain_documents(data, teacher, 0, tiny.FP32, folder, answers=answers) for answers in (False, True)
    }
    return found | {"data": data}


def cache_of(documents, teacher, folder, packing):
    settings = CacheConfig(name="L48", length=LENGTH, top_k=8, random=0, packing=packing, train_targets=False)
    return obtain_cache(settings, documents[True], "own", teacher, 0, tiny.FP32, folder)


@pytest.fixture(scope="module", params=Packing)
def recorded(request, documents, teacher, tmp_path_factory):
    return cache_of(documents, teacher, tmp_path_factory.mktemp("cache"), request.param)


def test_documents_with_answers_have_a_key_of_their_own(documents):
    plain, answered = documents[False], documents[True]
    assert plain.key != answered.key and "answers" not in plain.manifest
    assert [document.tokens for document in read_documents(answered, "train")] == [
        document.tokens for document in read_documents(plain, "train")
    ]
    assert all(not document.answers for document in read_documents(plain, "train"))


def test_documents_say_where_answers_are(documents, teacher):
    tokenizer, count = teacher.tokenizer(), 0
    for split in ("train", "eval"):
        for document in read_documents(documents[True], split):
            said = [tokenizer.decode(document.tokens[begin:end]) for begin, end in document.answers]
            number = document.origin.split()[1][:-1]
            end = tokenizer.decode([document.tokens[document.answers[0][1] - 1]])
            assert said == [f"first {number}{end}", f"second{end}"] and end.startswith("<|")
            count += 1
    assert count == 40
    told = documents[True].manifest["answers"]
    assert told["train"] == sum(e - b for d in read_documents(documents[True], "train") for b, e in d.answers)


def by_hand(document) -> list[bool]:
    return [any(begin <= place < end for begin, end in document.answers) for place in range(len(document.tokens))]


def test_rows_count_what_belongs_to_answers(documents, recorded):
    """Every document of a row, one token after the other."""
    reader = CacheReader(recorded, "train")
    batch = reader.batch(torch.arange(reader.rows))
    found = list(read_documents(documents[True], "train"))
    if recorded.manifest["packing"] == "joined":
        ids, said = ([x for d in found for x in each(d)] for each in (lambda d: d.tokens, by_hand))
        starts = {sum(len(d.tokens) for d in found[:n]) for n in range(len(found))}
        for row in range(reader.rows):
            at = range(row * LENGTH, (row + 1) * LENGTH)
            assert batch.input_ids[row].tolist() == [ids[place] for place in at]
            assert batch.answers[row].tolist() == [said[place] and place not in starts for place in at[1:]]
    else:
        pieces = [
            (d.tokens[n : n + LENGTH], by_hand(d)[n : n + LENGTH])
            for d in found
            for n in range(0, len(d.tokens), LENGTH)
            if len(d.tokens[n : n + LENGTH]) > 1
        ]
        assert len(pieces) == reader.rows
        for row, (ids, said) in enumerate(pieces):
            assert batch.input_ids[row, : len(ids)].tolist() == ids
            assert batch.answers[row].tolist() == said[1:] + [False] * (LENGTH - len(said))
    assert bool(batch.answers.any()) and not bool((batch.answers & ~batch.loss_mask).any())


def test_the_loss_is_the_cross_entropy_of_answers_in_float64(student, teacher, documents, tmp_path):
    apart = cache_of(documents, teacher, tmp_path, Packing.rows)  # a document a row, for which the definition is a line
    readers = CacheReader(apart, "train"), CacheReader(apart, "eval")
    trainer = trainer_of(student, readers, mode=LORA, loss=SFT, micro_batch=5)
    batch = readers[0].batch(readers[0].training_rows(0, TRAIN.batch_size, 0))
    parts = tiny.exact_weights(student)
    logits = tiny.exact_logits(teacher, student, parts, batch.input_ids)[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits[batch.answers], batch.input_ids[:, 1:][batch.answers])
    (figures,) = steps_of(trainer)
    assert figures.loss == pytest.approx(expected.item(), rel=1e-5)


def test_held_out_it_is_of_answers_and_the_run_logs_figure_of_all_positions(student, recorded):
    readers = CacheReader(recorded, "train"), CacheReader(recorded, "eval")
    whole = trainer_of(student, readers, mode=LORA, loss=Loss(LossKind.bucket_kl)).held_out()
    trainer = trainer_of(student, readers, TrainConfig(steps=10, batch_size=8, lr=1e-2), LORA, SFT)
    before = trainer.held_out()
    assert before.kd_loss == pytest.approx(whole.kd_loss, rel=1e-6)
    steps_of(trainer, 10)
    assert trainer.held_out().loss < 0.9 * before.loss


def test_the_gradient_reaches_the_hidden_states_as_autograd_says(student):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 64, generator=draw)
    ids, weight = torch.randint(512, (7, 1), generator=draw), torch.rand(7, generator=draw)
    value, grad = Head(student, SFT).backward(hidden, ids, torch.zeros(7, 1), weight, None)
    leaf, matrix = hidden.double().requires_grad_(), student.lm_head.weight.double()
    expected = (torch.nn.functional.cross_entropy(leaf @ matrix.T, ids[:, 0], reduction="none") * weight.double()).sum()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(grad.double(), leaf.grad, rtol=1e-4, atol=1e-6)


def test_a_mask_of_something_else_is_refused(documents, teacher, tmp_path, monkeypatch):
    from qat.data import packing

    monkeypatch.setattr(packing, "_said", lambda document: b"\3" * len(document.tokens))
    made = cache_of(documents, teacher, tmp_path, Packing.joined)
    (made.folder.parent / f".{made.folder.name}.looked_at").unlink()
    with pytest.raises(ArtifactError, match="the mask of answers holds something else than 0 and 1"):
        values.checked(open_artifact(made.folder))


def test_conversations_without_an_answer_as_in_a_chat_are_refused(teacher, documents, tmp_path, monkeypatch):
    tokenizer = teacher.tokenizer()
    shown = "{% if add_generation_prompt %}"
    tokenizer.chat_template = tokenizer.chat_template.replace(shown, shown + "!")
    monkeypatch.setattr(type(teacher), "tokenizer", lambda _: tokenizer)
    with pytest.raises(ConfigError, match="data=own has no answer in the train split"):
        obtain_documents(documents["data"], teacher, 0, tiny.FP32, tmp_path, answers=True)
