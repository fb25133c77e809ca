"""GGUF files as the package `gguf` decodes them, and as llama.cpp itself computes and answers."""

import json
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import AddedToken, pre_tokenizers

from qat import checkpoints
from qat.config import ExportConfig, ExportType, QuantConfig, WeightConfig
from qat.errors import ArtifactError, ConfigError
from qat.export.gguf import EXPORTER, FILE, blocks, families, tables, vocabulary, writer
from qat.export.gguf.types import type_of
from qat.export.source import Source
from qat.models import ModelFolder
from qat.models import tiny as tiny_model
from qat.quant.architectures import Layer, select
from qat.quant.formats import Format, GroupGrid, KQuant
from qat.quant.linear import QuantLinear
from qat.quant.places import matrix, put
from tests import tiny
from tests.export import engines
from tests.export.conftest import IDS
from tests.export.llama import next_token, served

HELD = {
    "Q2_0": GroupGrid(2, 128, "integers"),  # a scale for two blocks
    "Q4_0": GroupGrid(4, 64, "integers"),  # a scale for two blocks
    "Q4_1": GroupGrid(4, 32, "shifted"),
    "Q5_0": GroupGrid(5, 32, "integers"),
    "Q5_1": GroupGrid(5, 32, "shifted"),
    "Q8_0": GroupGrid(8, 32, "integers"),
    "IQ4_NL": GroupGrid(4, 32, "iq4nl"),
    **{f"Q{bits}_K": KQuant(bits) for bits in (2, 3, 4, 5, 6)},
}
QUANT = QuantConfig(
    "mixed", engines.grid(4, 32, "shifted"), engines.grid(4, 64, "integers"), embed=engines.grid(8, 32, "integers")
)
EXACT = ExportConfig("gguf", "gguf", ExportType.fp32)
SHAPE = {
    "vocab_size": tiny_model.VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.05,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
TIED = {**SHAPE, "head_dim": 32, "tie_word_embeddings": True}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1 + i / 20 for i in range(32)],  # llama.cpp takes these for the short contexts of the tests
    "long_factor": [2.0] * 32,
}
HALF = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
TWO = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0}}
MODELS = {
    "llama": transformers.LlamaConfig(**SHAPE, head_dim=32, rope_parameters=LLAMA3),
    "llama_biases": transformers.LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, rope_parameters=LINEAR),
    "mistral": transformers.MistralConfig(**SHAPE, sliding_window=None),
    "smollm3": transformers.SmolLM3Config(**SHAPE | {"num_hidden_layers": 4}),
    "granite": transformers.GraniteConfig(
        **SHAPE, embedding_multiplier=2.0, attention_multiplier=0.2, residual_multiplier=0.5, logits_scaling=3.0
    ),
    "qwen2": transformers.Qwen2Config(**SHAPE, rope_parameters=YARN),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=32),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **SHAPE, head_dim=32, moe_intermediate_size=64, num_experts=5, num_experts_per_tok=2, norm_topk_prob=True
    ),
    "olmo2": transformers.Olmo2Config(**SHAPE),
    "phi3": transformers.Phi3Config(**SHAPE, sliding_window=40, rope_parameters=HALF),
    "phi3_long": transformers.Phi3Config(
        **SHAPE, max_position_embeddings=2048, original_max_position_embeddings=512, rope_parameters=LONG
    ),
    "gemma": transformers.GemmaConfig(**TIED),
    "gemma2": transformers.Gemma2Config(
        **TIED, sliding_window=8, query_pre_attn_scalar=32, attn_logit_softcapping=5.0, final_logit_softcapping=7.0
    ),
    "gemma3": transformers.Gemma3TextConfig(
        **TIED | {"num_hidden_layers": 6}, sliding_window=8, query_pre_attn_scalar=32, rope_parameters=TWO
    ),
}


def layer_in(format: Format) -> QuantLinear:
    """Any numbers of their types."""
    draw, module = torch.Generator().manual_seed(format.bits), QuantLinear(format, 6, 512)
    module.indices.copy_(torch.randint(2**format.bits, (6, 512), generator=draw))
    for name, part in format.parts(6, 512).items():
        codes = torch.randint(part.lowest, part.lowest + 2**part.bits, part.shape, generator=draw)
        module.set_parts({name: codes.float() if part.bits < 16 else torch.randn(part.shape, generator=draw)})
    return module.requires_grad_(False)


def quantized_to(settings: WeightConfig, teacher: ModelFolder):
    """A model whose MLP and attention are in a format."""
    model = teacher.load(torch.float32, tiny.CPU)
    for layer in select(model, QuantConfig("all", settings, settings)):
        place(model, layer)
    return model


def place(model, layer: Layer) -> None:
    """Quantizes a layer of a model to its format."""
    made = layer.format.start(matrix(model, layer.name)[None], torch.ones(1, layer.shape[1]), None)
    module = QuantLinear(layer.format, *layer.shape)
    module.indices.copy_(made.index_NOI[0])
    module.set_parts({name: part[0] for name, part in made.operands.items()})
    put(model, layer.name, module.requires_grad_(False))


def folder_of(kind: str, path) -> ModelFolder:
    """A random model with a token a byte that says letters alone: of half a character llama.cpp tells nothing."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[kind], dtype=torch.float32)
    tokens, head = tiny_model.byte_tokenizer().get_vocab(), model.lm_head.weight
    with torch.no_grad():  # biases and norms that say something
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
        letters = [number for token, number in tokens.items() if token.isascii() and token.isalnum()]
        model.lm_head.weight.copy_(torch.zeros_like(head).index_copy(0, torch.tensor(letters), 5 * head[letters]))
    model.save_pretrained(path)
    tiny_model.byte_tokenizer().save_pretrained(path)
    return ModelFolder(kind, path, kind)


def away(file, model) -> float:
    """How far llama.cpp's log-probabilities are from a model's, as a share of their size."""
    rows = [model(row[None]).logits[0, -1].log_softmax(-1) for row in IDS]
    row, expected = next(
        (row, said) for row, said in zip(IDS, rows, strict=True) if said.argmax() != 257
    )  # after an end it says nothing
    return float((next_token(served(file), row) - expected).norm() / expected.norm())


def away_from(again, model) -> float:
    """The same of a model read back."""
    expected = model(IDS).logits
    return float((again(IDS).logits - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def checkpoint(teacher, cache, tmp_path_factory):
    return engines.checkpoint(tmp_path_factory.mktemp("gguf") / "best", teacher, cache, QUANT)


@pytest.fixture(scope="module")
def student(teacher, checkpoint):
    return checkpoints.load(checkpoint, teacher, tiny.FP32)[0]


@pytest.mark.parametrize("kind", HELD)
def test_every_weight_decodes_to_the_last_bit(kind):
    format = HELD[kind]
    module = layer_in(format)
    made = blocks.packed(format, module.indices, module.normalized())
    assert type_of(format.settings()) == kind
    decoded = tables.decoded(made, tables.kind(kind))
    made, given = (array + np.float32(0) for array in (decoded, module.weight(torch.float32).numpy()))  # zeros alike
    assert np.array_equal(made.view(np.uint32), given.view(np.uint32))


@torch.no_grad()
def test_llama_cpp_computes_the_students_log_probabilities(checkpoint, student, export):
    folder = export(checkpoint, "gguf", "fp32")
    assert away(folder / FILE, student) < 1e-2  # it rounds what enters a product to 8 bits
    stored = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(folder / FILE).tensors}
    assert (stored["token_embd.weight"], stored["blk.0.ffn_up.weight"], stored["blk.1.attn_k.weight"]) == (
        "Q8_0",
        "Q4_1",
        "Q4_0",
    )
    assert "output.weight" not in stored and stored["output_norm.weight"] == "F32"


@torch.no_grad()
def test_llama_cpp_answers_word_for_word(tmp_path):
    teacher = folder_of("mistral", tmp_path / "model")
    student = quantized_to(engines.grid(8, 32, "integers"), teacher)
    writer.write(Source(teacher, student), tmp_path, EXACT)
    server, said = served(tmp_path / FILE), []
    for text in engines.PROMPTS:
        asked = {"messages": engines.chat(text), "temperature": 0.0, "max_tokens": engines.TOKENS}
        said.append(server.handle_chat_completions(asked)["choices"][0]["message"]["content"].strip())
    assert said == engines.ours(student, teacher) and all(said)


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_llama_cpp_computes_each_architecture(kind, tmp_path):
    teacher = folder_of(kind, tmp_path / "model")
    model = teacher.load(torch.float32, tiny.CPU)
    families.refuse_architecture(teacher.settings().to_dict())
    writer.write(Source(teacher, model), tmp_path, EXACT)
    assert away(tmp_path / FILE, model) < 1e-4
    assert away_from(writer.read(Source(teacher, model), tmp_path), model) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("kind", ["phi3", "gemma2", "granite", "qwen3_moe"])
def test_llama_cpp_computes_students_of_each_shape(kind, tmp_path):
    teacher = folder_of(kind, tmp_path / "model")
    model = quantized_to(engines.grid(8, 32, "integers"), teacher)
    writer.write(Source(teacher, model), tmp_path, EXACT)
    writer.read(Source(teacher, model), tmp_path)  # which compares every weight
    assert away(tmp_path / FILE, model) < 2e-2


def test_a_model_with_windows_says_that_it_is_for_as_many_tokens(capsys):
    described = transformers.MistralConfig(**SHAPE, sliding_window=64).to_dict()
    families.refuse_architecture(described)
    assert families.fields(described)["context_length"] == 64
    assert families.fields(MODELS["gemma2"].to_dict())["context_length"] == 8192


@torch.no_grad()
def test_llama_cpp_computes_k_quants(tmp_path):
    """Layers in turn have 2 to 6 bits."""
    teacher = folder_of("mistral", tmp_path / "model")
    model = teacher.load(torch.float32, tiny.CPU)
    layers = select(model, QuantConfig("all", engines.grid(8, 32, "integers"), engines.grid(8, 32, "integers")))
    for number, layer in enumerate(layers):
        place(model, replace(layer, format=KQuant(2 + number % 5)))
    writer.write(Source(teacher, model), tmp_path, EXACT)
    writer.read(Source(teacher, model), tmp_path)  # which compares every weight
    assert away(tmp_path / FILE, model) < 2e-2
    stored = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / FILE).tensors}
    assert stored >= {f"Q{bits}_K" for bits in range(2, 7)}


@torch.no_grad()
def test_llama_cpp_computes_a_type_that_the_package_does_not_have(teacher, cache, export, tmp_path):
    best = engines.checkpoint(tmp_path / "best", teacher, cache, engines.preset("gguf_q2_0"))
    file = export(best, "gguf", "fp32") / FILE
    assert away(file, checkpoints.load(best, teacher, tiny.FP32)[0]) < 2e-2
    stored = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(file).tensors}
    assert {stored["token_embd.weight"].name, stored["blk.0.attn_k.weight"].name} == {"Q2_0"}
    assert int(stored["token_embd.weight"]) == 42


@torch.no_grad()
def test_experts_in_several_types_are_written_out(tmp_path, capsys):
    teacher = folder_of("qwen3_moe", tmp_path / "model")
    model = quantized_to(engines.grid(8, 32, "integers"), teacher)
    first = model.model.layers[0].mlp.experts.get_submodule("0.down_proj")
    put(model, "model.layers.0.mlp.experts.0.down_proj", on_four_bits(first))
    writer.write(Source(teacher, model), tmp_path, EXACT)
    assert "5 layers are in no type of llama.cpp" in capsys.readouterr().out
    again = writer.read(Source(teacher, model), tmp_path).model.layers[0].mlp.experts.down_proj
    assert torch.equal(again, model.model.layers[0].mlp.experts.down_proj)


def on_four_bits(layer: QuantLinear) -> QuantLinear:
    """A layer with fewer bits."""
    made = QuantLinear(GroupGrid(4, 32, "integers"), *layer.indices.shape)
    made.indices.copy_(layer.indices >> 4)
    made.set_parts({name: 16 * value for name, value in layer.normalized().items()})
    return made.requires_grad_(False)


def test_experts_that_llama_cpp_has_in_one_tensor_are_in_one_type():
    eight, four = ({"format": "grid", "bits": b, "group": 32, "levels": "integers", "shape": [8, 64]} for b in (8, 4))
    names = [f"model.layers.0.mlp.experts.{number}.down_proj" for number in range(2)]
    EXPORTER.grid.refuse({names[0]: eight, names[1]: eight, "model.layers.0.self_attn.q_proj": four})
    with pytest.raises(ConfigError, match=r"experts of model.*mlp\.experts\.down_proj in one tensor, and .*1"):
        EXPORTER.grid.refuse({names[0]: eight, names[1]: four})


def test_what_decodes_otherwise_is_not_published(checkpoint, export, tmp_path, monkeypatch):
    right = blocks.packed
    monkeypatch.setattr(blocks, "packed", lambda format, index, parts: right(format, index.flip(1), parts))
    with pytest.raises(ArtifactError, match=r"decodes to other weights than the student has: nothing was published"):
        export(checkpoint, "gguf", "fp32", output=tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_codebooks_are_refused_with_a_preset_and_written_out_on_request(best, student, export, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"cannot hold .* codebook.*quant=gguf_q2_0 fits, and export.dense"):
        export(best, "gguf", "fp32", output=tmp_path / "no")
    folder = export(best, "gguf", "fp32", output=tmp_path / "dense", dense=True)
    assert "are in no type of llama.cpp and are written in fp32" in capsys.readouterr().out
    types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(folder / FILE).tensors}
    assert types == {"F32"}


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        ({"bits": 2, "rank": 8, "shape": [512, 512]}, "codebook, bits 2, rank 8: a student made with quant=gguf_q2_k"),
        ({"bits": 2, "rank": 8, "shape": [512, 576]}, "a student made with quant=gguf_"),
        ({"format": "grid", "bits": 4, "group": 16, "shape": [8, 48]}, "of 32 or 64 or 256 do not divide rows of 48"),
        ({"format": "grid", "bits": 4, "group": 64, "levels": "halves", "shape": [8, 64]}, "quant=gguf_"),
    ],
)
def test_what_no_type_holds_is_told_with_what_would(layer, told):
    with pytest.raises(ConfigError, match=told):
        EXPORTER.grid.refuse({"it": layer})


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (transformers.MambaConfig(), r"does not write models of type mamba; it knows llama, mistral"),
        (transformers.LlamaConfig(hidden_act="gelu"), "with hidden_act=silu, and this one has gelu"),
        (transformers.Qwen2Config(rope_parameters=LLAMA3), r"of type llama3 with .* in models of type qwen2"),
        (transformers.Qwen2Config(rope_parameters=YARN | {"attention_factor": 2.0}), "rotations of type yarn with"),
        (transformers.Olmo2Config(tie_word_embeddings=True), "tie_word_embeddings=False, and this one has True"),
        (transformers.GraniteConfig(attention_bias=True), "attention_bias=False, and this one has True"),
        (transformers.Gemma2Config(query_pre_attn_scalar=144), "query_pre_attn_scalar=256, and this one has 144"),
        (transformers.Gemma2Config(final_logit_softcapping=None), "final_logit_softcapping=True"),
        (transformers.Gemma3TextConfig(sliding_window_pattern=4), r"layer_types=\['sliding_attention'"),
        (transformers.SmolLM3Config(no_rope_layer_interval=3), r"no_rope_layers=\[1, 1, 1, 0"),
        (transformers.Qwen3MoeConfig(), "norm_topk_prob=True, and this one has False"),
        (transformers.Qwen3MoeConfig(norm_topk_prob=True, mlp_only_layers=[1]), r"mlp_only_layers=\[\], and this one"),
        (transformers.Phi3Config(hidden_size=96, num_attention_heads=4, head_dim=32), "head_dim=24, and this one has"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(changed, told):
    with pytest.raises(ConfigError, match=told):
        families.refuse_architecture(changed.to_dict())


def described_with(*steps) -> dict:
    """A tokenizer that splits text in some steps."""
    backend = tiny_model.byte_tokenizer().backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    return json.loads(backend.to_str())


def split(pattern: str):
    from tokenizers import Regex

    return pre_tokenizers.Split(Regex(pattern), "isolated")


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def test_how_text_is_split_is_found_by_what_is_done():
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert vocabulary.splits(described_with(words)) == "gpt-2"
    assert vocabulary.splits(described_with(pre_tokenizers.Digits(individual_digits=True), words)) == "smollm"
    assert vocabulary.splits(described_with(split(QWEN2), BYTES)) == "qwen2"
    llama3 = described_with(split(QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")), BYTES)
    assert vocabulary.splits(llama3) == "dbrx"
    llama3["model"]["ignore_merges"] = True
    assert vocabulary.splits(llama3) == "llama-bpe"


def test_an_unknown_split_is_refused_by_what_it_does():
    with pytest.raises(ConfigError, match=r"splits text \(split x\+, then bytes False\); it knows gpt-2, smollm"):
        vocabulary.splits(described_with(split("x+"), BYTES))


def test_tokens_are_listed_with_their_kinds():
    tokenizer = tiny_model.byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens, kinds = vocabulary.listed(tokenizer, described, 300)
    kind = dict(zip(tokens, kinds, strict=True))
    assert (len(tokens), tokens[257], tokens[261], tokens[299]) == (300, "<|end|>", "<tool>", "[PAD299]")
    assert [kind[token] for token in ("a", "<|end|>", "<tool>", "[PAD299]")] == [1, 3, 4, 5]
