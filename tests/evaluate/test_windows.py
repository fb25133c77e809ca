"""Sliding windows against the definition of perplexity, and against the procedure that transformers documents."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qat.errors import ConfigError
from qat.evaluate import evaluate, windows
from qat.evaluate.windows import Windows, read
from tests import tiny

TOKENS = torch.randint(512, (101,), generator=torch.Generator().manual_seed(0))


@given(st.integers(2, 90), st.integers(2, 40), st.data())
def test_every_token_but_the_first_is_scored_once_and_with_its_context(tokens, context, data):
    stride = data.draw(st.integers(1, context - 1))
    windows = Windows(torch.arange(tokens), context, stride)
    seen = dict.fromkeys(range(tokens), 0)
    for rows in windows.in_order(3):
        batch = windows.batch(rows)
        for row, place in batch.loss_mask.nonzero().tolist():
            token = int(batch.input_ids[row, place + 1])
            seen[token] += 1
            assert batch.input_ids[row, : place + 2].tolist() == list(range(token - place - 1, token + 1))
            assert place + 1 >= min(token, context - stride)
    assert seen == {0: 0} | dict.fromkeys(range(1, tokens), 1)


def test_disjoint_windows_leave_out_the_first_token_of_each():
    windows = Windows(torch.arange(50), 16, 16)
    batch = windows.batch(torch.arange(windows.rows))
    scored = sorted(batch.input_ids[:, 1:][batch.loss_mask].tolist())
    assert scored == [token for token in range(50) if token % 16]


@pytest.mark.parametrize(("context", "stride"), [(32, 8), (32, 31), (48, 48), (200, 50)])
def test_perplexity_is_that_of_each_token_after_its_context(teacher, context, stride):
    """Token by token in float64: where its window begins follows from the definition alone."""
    exact, total, scored = teacher.load(torch.float64, tiny.CPU), 0.0, 0
    for token in range(1, len(TOKENS)):
        steps = max(0, math.ceil((token + 1 - context) / stride))  # the first window that reaches the token
        if steps * stride == token:
            continue  # the first of a disjoint window
        with torch.no_grad():
            logits = exact(TOKENS[None, steps * stride : token]).logits[0, -1]
        total -= logits.log_softmax(-1)[TOKENS[token]].item()
        scored += 1
    model = teacher.load(torch.float32, tiny.CPU)
    found = evaluate(model, model, Windows(TOKENS, context, stride), 8, tiny.FP32)
    assert found.perplexity == pytest.approx(math.exp(total / scored), rel=1e-4)


@pytest.mark.parametrize(("context", "stride"), [(32, 16), (40, 7), (128, 64)])
def test_perplexity_is_that_of_the_procedure_in_transformers_guide(teacher, context, stride):
    """Windows from left to right through the model's own loss, labels that were scored before being -100."""
    model, total, scored, reached = teacher.load(torch.float32, tiny.CPU), 0.0, 0, 0
    for begin in range(0, len(TOKENS), stride):
        end = min(begin + context, len(TOKENS))
        labels = TOKENS[None, begin:end].clone()
        labels[:, : -(end - reached)] = -100
        count = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += model(TOKENS[None, begin:end], labels=labels).loss.item() * count
        scored, reached = scored + count, end
        if end == len(TOKENS):
            break
    found = evaluate(model, model, Windows(TOKENS, context, stride), 8, tiny.FP32)
    assert scored == len(TOKENS) - 1
    assert found.perplexity == pytest.approx(math.exp(total / scored), rel=1e-5)


def test_a_file_is_one_text(teacher, tmp_path):
    tokenizer, text = teacher.tokenizer(), "Ünits\n\n of one.\n"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    ids = read(str(tmp_path / "a.txt"), tokenizer, None)
    assert tokenizer.decode(ids) == text
    assert read(str(tmp_path / "a.txt"), tokenizer, 5).tolist() == ids[:5].tolist()


def test_a_text_longer_than_the_tokenizer_has_memory_for_is_read_in_parts(teacher, tmp_path, monkeypatch):
    tokenizer, text = teacher.tokenizer(), "".join(f"Line {n} with <|end|> in it.\n" for n in range(50))
    (tmp_path / "a.txt").write_text(text)
    whole = read(str(tmp_path / "a.txt"), tokenizer, None)
    monkeypatch.setattr(windows, "AT_ONCE", 100)
    assert read(str(tmp_path / "a.txt"), tokenizer, None).tolist() == whole.tolist()
    assert tokenizer.decode(whole) == text and tokenizer.eos_token_id not in whole


def test_rows_are_joined_by_blank_lines_also_empty_ones(teacher, tmp_path):
    rows = ["one", "", "two\n"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    tokenizer = teacher.tokenizer()
    assert tokenizer.decode(read(str(tmp_path / "a.jsonl"), tokenizer, None)) == "\n\n".join(rows)


@pytest.mark.parametrize("content", [b"", b"a", b"\xff\xfe\x00", b"fine\ncaf\xe9\n"])
def test_what_cannot_be_scored_is_told(teacher, tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.txt"):
        read(str(tmp_path / "a.txt"), teacher.tokenizer(), None)
