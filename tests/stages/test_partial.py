"""A student of which a part stays dense says so wherever it says how many bits it has."""

import shutil

import pytest
import torch
import transformers

from qat.shown import near
from tests.stages.conftest import write_text

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
SHARES = {"model.layers.*.self_attn.o_proj": 32 / 272, "model.layers.*.self_attn.qkv_proj": 96 / 272}


@pytest.fixture(scope="module")
def place(teacher, tmp_path_factory):
    """A model with fused projections: of a layer's 272 rows of 32 numbers, the MLP has 144."""
    place = tmp_path_factory.mktemp("partial")
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(transformers.Phi3Config(**SHAPE)).save_pretrained(place / "phi3")
    for file in teacher.path.glob("tokenizer*"):
        shutil.copyfile(file, place / "phi3" / file.name)
    write_text(place / "text.txt")
    return place


def test_what_stays_dense_is_told_on_the_screen_in_the_record_in_the_log_and_on_the_card(job, place, capsys):
    read = ("data=text", f"data.path={place / 'text.txt'}")
    _, result = job("phi3", "stage=convert", *read, "quant=q2a16", "quant.mlp.rank=4")
    assert result["quant"]["dense"] == {name: round(share, 4) for name, share in SHARES.items()}
    quantized, rounded, rest = 2 * 144 * 32, 2 * 300 * 32, 2 * 128 * 32 + 5 * 32
    assert result["quant"]["rounded"] == {"model.embed_tokens": 8.5, "lm_head": 8.5}
    bits = result["quant"]["bits_per_weight"] * quantized + 8.5 * rounded + 16 * rest
    bits /= quantized + rounded + rest
    assert result["quant"]["model_bits_per_weight"] == pytest.approx(bits, abs=1e-3)
    said = "model.layers.*.self_attn.qkv_proj (35.3%), model.layers.*.self_attn.o_proj (11.8%)"
    out, log = capsys.readouterr().out, (place / "outputs" / "RUNS.md").read_text()
    assert f"left dense, as shares of the decoder's weights: {said}\n" in out
    assert "model.embed_tokens and lm_head rounded to 8 bits there\n" in out
    assert "- **Rounded in the packed file**: `model.embed_tokens` 8.50 bits, `lm_head` 8.50 bits\n" in log
    left = f"{sum(result['quant']['dense'].values()):.1%} of the decoder's weights"
    assert f"**Left dense**: {left} (" in log
    start, output = f"checkpoint={result['paths']['conversion']}", place / "exports" / "hf"
    _, exported = job("phi3", "stage=export", start, "export=hf", f"export.output={output}")
    assert exported["quant"]["dense"] == result["quant"]["dense"]
    assert f"how to use it     {near(output / 'README.md')}\n" in capsys.readouterr().out
    card = (output / "README.md").read_text()
    told = f"Left dense, in full precision, are {left}: `model.layers.*.self_attn.o_proj`"
    assert told in card
    assert f"{result['quant']['model_bits_per_weight']} bits a weight over the whole model" in card
