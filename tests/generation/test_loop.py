"""The decoding loop: greedy as transformers, drawn from the distribution, never changed by its neighbours."""

from dataclasses import replace

import pytest
import torch
import transformers
from torch._dynamo.utils import counters

from qat import attention, models
from qat.forward import FAST, use
from qat.generation import Sampling, Writer, answers, bytes_a_row

END = 257
COMPILE = torch.compile
GREEDY = Sampling(tokens=12, greedy=12, temperature=1.0, ends=(END,))
PROMPTS = [[256, 72, 105], [256, *range(65, 95)], [70], [256, 87, 104, 121, 63]]


@pytest.fixture(scope="module")
def model(tiny, cpu):
    return tiny.load(cpu.dtype, cpu.device)


def quiet(amount=1, note=""):
    pass


def write(model, prompts=PROMPTS, seed=0, rows=None, compiled=False, **sampling):
    longest = max(map(len, prompts))
    writer = Writer(model, replace(GREEDY, **sampling), rows or len(prompts), longest, compiled)
    return said(writer, prompts, seed)


def said(writer, prompts=PROMPTS, seed=0):
    return answers(writer(prompts, seed, quiet), writer.sampling.ends)


def transformers_say(model, prompts, tokens):
    """The same by transformers' own loop: padded on the left, a cache that grows."""
    width = max(map(len, prompts))
    ids = torch.tensor([[END] * (width - len(prompt)) + prompt for prompt in prompts])
    seen = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = transformers.GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=END, pad_token_id=END, use_cache=True
    )
    written = models.generate(model, ids, settings, attention_mask=seen).tolist()
    return [row[: row.index(END) + 1] if END in row else row for row in written]


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_greedy_is_what_transformers_says(model, kind):
    if kind == "qwen3":
        shape = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6}
        config = transformers.Qwen3Config(
            **shape, vocab_size=300, num_key_value_heads=2, head_dim=24, initializer_range=0.3
        )
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME).eval()
    assert write(model) == transformers_say(model, PROMPTS, GREEDY.tokens)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_every_end_ends_an_answer_and_without_any_it_is_whole(model, count):
    """Of the tokens that come without ends, some are made ends: each row stops at the first of them."""
    whole = write(model, ends=())
    assert {len(row) for row in whole} == {GREEDY.tokens}
    ends = tuple(dict.fromkeys(row[3 + number] for number, row in enumerate(whole)))[:count]
    cut = [next((row[: place + 1] for place, token in enumerate(row) if token in ends), row) for row in whole]
    assert len(ends) == count and write(model, ends=ends) == cut


def test_texts_are_the_same_in_however_few_rows(model):
    """Drawn ones of many lengths, of which new ones follow in the places of ended ones."""
    ends = tuple(range(0, 512, 12))
    whole = write(model, PROMPTS * 4, rows=16, greedy=2, ends=ends)
    assert len(set(map(len, whole))) > 4
    for rows in (4, 5, 7, 11):
        assert write(model, PROMPTS * 4, rows=rows, greedy=2, ends=ends) == whole
    assert [write(model, [prompt], tokens=2, greedy=2, ends=ends)[0] for prompt in PROMPTS * 4] == [
        reply[:2] for reply in whole
    ]


def test_more_texts_than_there_is_room_for_are_refused(model):
    with pytest.raises(ValueError, match="9 prompts for 2 rows, which take at most 8"):
        write(model, PROMPTS[:1] * 9, rows=2)


def test_empty_rows_are_filled_and_do_not_look_back(model):
    writer, steps = Writer(model, replace(GREEDY, greedy=0, ends=tuple(range(0, 512, 8))), 4, 31), []

    def watch(texts_E, logits_EV):
        steps.append(len(texts_E))
        if len(texts_E) == writer.rows:
            assert ((writer.memory.position <= 1) >= (texts_E == writer.nobody)).all()

    writer.watch = watch
    lengths = list(map(len, said(writer, PROMPTS[2:3] * 16)))
    apart = sum(max(lengths[first : first + 4]) for first in range(0, 16, 4))  # steps of batches that wait for all
    assert min(lengths) < 3 < 8 < max(lengths)
    assert steps.count(4) - 1 <= sum(lengths) / 4 + max(lengths) < apart


def test_the_model_is_left_as_it_was(model):
    ids = torch.tensor([[256, 72, 105]])
    before, attention_before = model(ids).logits, model.config._attn_implementation
    write(model)
    assert torch.equal(model(ids).logits, before)
    assert model.config._attn_implementation == attention_before
    assert not any("memory" in vars(module) for module in model.modules())


def test_neighbours_and_empty_rows_change_nothing(model):
    together = write(model, rows=7)
    assert together == [write(model, [prompt])[0] for prompt in PROMPTS] == write(model)


def test_first_tokens_are_the_most_likely_ones_and_later_ones_are_not(model):
    greedy, drawn = write(model), write(model, greedy=4, temperature=20.0)
    assert [reply[:4] for reply in drawn] == [first[:4] for first in greedy]
    assert sum(reply[4:] != first[4:] for reply, first in zip(drawn, greedy, strict=True)) >= 3


def test_answer_ends_with_the_end_token_or_at_its_longest(model):
    replies = write(model, PROMPTS * 16, tokens=40, greedy=0, temperature=50.0)
    ended = [reply for reply in replies if reply[-1] == END]
    assert ended and min(map(len, ended)) < 40
    assert all(END not in reply[:-1] for reply in replies)
    assert all(len(reply) == 40 for reply in replies if reply[-1] != END)


def test_a_writer_can_be_used_again_and_the_seed_decides(model):
    writer = Writer(model, replace(GREEDY, greedy=0), 4, 31)
    one, short, same, other = (
        said(writer, *call) for call in ((PROMPTS, 1), (PROMPTS[2:3], 5), (PROMPTS, 1), (PROMPTS, 2))
    )
    assert one == same != other and len(short) == 1


def test_all_tokens_are_reported_once(model):
    counted = []
    Writer(model, replace(GREEDY, tokens=40), 4, 31)(PROMPTS[:3], 0, lambda amount=1, note="": counted.append(amount))
    assert sum(counted) == 3 * 40 and min(counted) >= 0
    counted.clear()
    Writer(model, replace(GREEDY, tokens=40), 3, 31)(PROMPTS * 3, 0, lambda amount=1, note="": counted.append(amount))
    assert sum(counted) == 12 * 40 and min(counted) >= 0
    counted.clear()
    every = replace(GREEDY, greedy=0, temperature=1e5, tokens=200)  # all have ended before the longest
    Writer(model, every, 2, 31)(PROMPTS[:2], 0, lambda amount=1, note="": counted.append(amount))
    assert sum(counted) == 2 * 200


def test_second_tokens_follow_the_distribution(model):
    """Through the whole loop: 4,000 rows of one prompt."""
    logits = model(torch.tensor([PROMPTS[1]])).logits[0, -1].double()
    first = int(logits.argmax())
    p = (model(torch.tensor([[*PROMPTS[1], first]])).logits[0, -1].double() / 0.8).softmax(0)
    rows = 4000
    found = write(model, [PROMPTS[1]] * rows, tokens=2, greedy=1, temperature=0.8)
    counts = torch.tensor([reply[1] for reply in found]).bincount(minlength=len(p)).double()
    common = p * rows >= 5
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = rows * torch.cat([p[common], p[~common].sum()[None]])
    degrees = len(counts) - 1
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < degrees + 3.5 * (2 * degrees) ** 0.5


def test_all_layers_and_writers_are_compiled_as_one(model, tiny, cpu):
    torch._dynamo.reset()
    counters.clear()
    plain = write(model)
    writer = Writer(model, GREEDY, 4, 31, compiled=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qat.forward.torch.compile", lambda f, dynamic: COMPILE(f, dynamic=dynamic, backend="aot_eager"))
        assert said(writer) == plain == said(writer)
        assert write(tiny.load(cpu.dtype, cpu.device), compiled=True) == plain
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_bytes_of_a_row_are_those_of_its_memory(model):
    short, long = (Writer(model, GREEDY, 3, longest) for longest in (20, 900))
    held = [sum(tensor.nbytes for layer in writer.memory.layers for tensor in layer) for writer in (short, long)]
    counted = [bytes_a_row(model.config, longest, GREEDY, torch.float32) for longest in (20, 900)]
    assert 3 * (counted[1] - counted[0]) == held[1] - held[0] > 0
    assert 3 * counted[0] >= held[0] + 3 * 4 * 512  # and logits


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_recorded_step_writes_what_single_ones_do(tiny, compiled):
    model = tiny.load(torch.float32, torch.device("cuda"))
    use(model, FAST)
    longer = replace(GREEDY, tokens=24, greedy=24)
    plain = said(Writer(tiny.load(torch.float32, torch.device("cpu")), longer, 4, 31), PROMPTS * 3)
    writer = Writer(model, longer, 4, 31, compiled)
    assert said(writer, PROMPTS * 3) == plain
    places = [weight.data_ptr() for weight in model.parameters()]  # which the recording reads from
    assert said(writer, PROMPTS * 3) == plain
    assert [weight.data_ptr() for weight in model.parameters()] == places
    assert len(writer.recorder._graphs) == 1
