"""Quantized folders and models of more than text, as plain text models: number by number."""

from importlib.util import find_spec

import pytest
import torch
import transformers
from safetensors.torch import load_file

from qat.errors import ConfigError
from tests.models.conftest import SHAPE

FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
PROJECTION = "model.layers.0.mlp.down_proj.weight"
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
IDS = torch.arange(24)[None]


def in_blocks(weight):
    """A weight [O, I] as [O/32, 32, I/32, 32]."""
    rows, columns = weight.shape
    return weight.view(rows // 32, 32, columns // 32, 32)


def to_fp8(tensors):
    """Blocks of 32 by 32 in 8-bit floating point, each with its scale, as such models are published."""
    for name in [name for name in tensors if "proj" in name]:
        blocks = in_blocks(tensors[name])
        scale = blocks.abs().amax((1, 3)) / 448
        tensors[name] = (blocks / scale[:, None, :, None]).view_as(tensors[name]).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale


def test_eight_bit_blocks_become_their_products_with_their_scales(folder, teacher):
    folder.tensors(to_fp8).settings(quantization_config=FP8)
    stored, made = load_file(folder.path / "model.safetensors"), dict(folder.load().named_parameters())
    scaled = [name.removesuffix("_scale_inv") for name in stored if name.endswith("_scale_inv")]
    assert len(scaled) == 14
    for name in scaled:
        scale = stored[f"{name}_scale_inv"].double()[:, None, :, None]
        expected = (in_blocks(stored[name].double()) * scale).view_as(made[name])
        assert torch.allclose(made[name].double(), expected, rtol=1e-7, atol=0)
    original = load_file(teacher.path / "model.safetensors")
    assert torch.equal(made["model.norm.weight"], original["model.norm.weight"])
    assert not torch.equal(made[PROJECTION], original[PROJECTION])


def test_plain_weights_are_made_once_and_are_an_ordinary_folder(folder, teacher):
    found = folder.tensors(to_fp8).settings(quantization_config=FP8).located()
    before = (found.path / "model.safetensors").stat().st_mtime_ns
    assert folder.located() == found and (found.path / "model.safetensors").stat().st_mtime_ns == before
    assert "quantization_config" not in (found.path / "config.json").read_text()
    assert found.tokenizer()("hi")["input_ids"] == teacher.tokenizer()("hi")["input_ids"]
    folder.tensors(lambda t: t["model.norm.weight"].add_(1))
    assert folder.located().fingerprint != found.fingerprint


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "bitsandbytes", "hqq", "torchao"])
def test_what_transformers_cannot_read_here_is_one_sentence(folder, method):
    """Where a package is installed, these folders lack its tensors; they have plain ones, as it may leave them."""
    if method == "compressed-tensors" and find_spec("compressed_tensors"):
        pytest.skip("compressed-tensors is installed, and leaves layers that no group of its settings names plain")
    bits = {"load_in_8bit": True} if method == "bitsandbytes" else {"bits": 4, "group_size": 32}
    folder.settings(quantization_config={"quant_method": method, "quant_type": "int8_weight_only"} | bits)
    with pytest.raises(ConfigError, match=rf"odd is quantized \({method}\) and transformers cannot make plain|lacks"):
        folder.load()


def test_numbers_without_their_scale_are_refused_by_name(folder):
    def without(tensors):
        to_fp8(tensors)
        del tensors[f"{PROJECTION}_scale_inv"]

    with pytest.raises(ConfigError, match=rf"odd has no scale for {PROJECTION}: "):
        folder.tensors(without).settings(quantization_config=FP8).load()


FOUR_BITS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


@pytest.fixture
def mxfp4(causal):
    """Experts in 4-bit floating point: two a byte, a power of two as scale for each 32."""
    layers = ["sliding_attention", "full_attention"]
    folder = causal("GptOss", num_local_experts=2, num_experts_per_tok=1, layer_types=layers)
    draw = torch.Generator().manual_seed(0)

    def pack(tensors):
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, inputs, outputs = tensors.pop(name).shape
            shape = (experts, outputs, inputs // 32)
            tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=draw)
            tensors[f"{name}_scales"] = torch.randint(118, 126, shape, dtype=torch.uint8, generator=draw)

    return folder.tensors(pack).settings(quantization_config={"quant_method": "mxfp4"})


def test_four_bit_experts_become_their_products_with_their_scales(mxfp4):
    stored, model = load_file(mxfp4.path / "model.safetensors"), mxfp4.load()
    for name in ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"):
        blocks, scales = stored[f"{name}_blocks"], stored[f"{name}_scales"]
        digits = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
        values = FOUR_BITS[digits.long()] * 2.0 ** (scales.double()[..., None] - 127)
        expected = values.flatten(-2).mT
        assert torch.equal(model.get_parameter(name).double(), expected)


def test_experts_without_their_scales_are_refused_by_name(mxfp4):
    mxfp4.tensors(lambda t: t.pop("model.layers.1.mlp.experts.down_proj_scales"))
    with pytest.raises(ConfigError, match=r"lacks some of what model\.layers\.1\.mlp\.experts\.down_proj is made"):
        mxfp4.load()


def llava(text=None):
    vision = transformers.CLIPVisionConfig(**VISION)
    text = text or transformers.LlamaConfig(**SHAPE)
    return transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=299)


def gemma3():
    layers = ["sliding_attention", "full_attention"]
    text = transformers.Gemma3TextConfig(**SHAPE, layer_types=layers, query_pre_attn_scalar=16, sliding_window=8)
    settings = {"mm_tokens_per_image": 4, "image_token_index": 299, "boi_token_index": 297, "eoi_token_index": 298}
    vision = transformers.SiglipVisionConfig(**VISION)
    return transformers.Gemma3Config(text_config=text, vision_config=vision, eos_token_id=[257, 260], **settings)


def tied_above():
    """Embedding and head are one by what the whole says, and two by what its text part says."""
    text = transformers.MistralConfig(**SHAPE, tie_word_embeddings=False)
    vision = transformers.PixtralVisionConfig(**VISION)
    settings = {"image_token_index": 299, "tie_word_embeddings": True}
    return transformers.Mistral3Config(vision_config=vision, text_config=text, **settings)


@pytest.mark.parametrize(
    ("kind", "config", "alone"),
    [
        ("LlavaForConditionalGeneration", llava, "LlamaForCausalLM"),
        ("Gemma3ForConditionalGeneration", gemma3, "Gemma3ForCausalLM"),
        ("Mistral3ForConditionalGeneration", tied_above, "MistralForCausalLM"),
    ],
)
def test_the_text_part_of_a_model_says_what_the_whole_says_of_text(saved, kind, config, alone):
    whole = getattr(transformers, kind)(config())
    folder = saved(whole)
    model = folder.load()
    assert type(model).__name__ == alone and model.config.vocab_size == 300
    with torch.no_grad():
        expected, found = whole.eval()(input_ids=IDS).logits, model(IDS).logits
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    weights, text = dict(whole.named_parameters()), folder.located()
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in weights.values())
    assert text.ends() == ((257, 260) if kind.startswith("Gemma") else (257,))
    assert text.has_tokenizer()


def test_a_model_of_more_than_text_is_whole_or_refused(saved):
    folder = saved(transformers.LlavaForConditionalGeneration(llava()))
    name = next(name for name in load_file(folder.path / "model.safetensors") if "layers.1.mlp.up_proj" in name)
    with pytest.raises(ConfigError, match=r"lacks model\.language_model\.layers\.1\.mlp\.up_proj\.weight"):
        folder.tensors(lambda t: t.pop(name)).load()


def test_a_text_part_that_computes_something_else_alone_is_refused(saved):
    """Cohere's own class scales logits, which the class of text and pictures does not."""
    text, vision = transformers.Cohere2Config(**SHAPE), transformers.SiglipVisionConfig(**VISION)
    config = transformers.AyaVisionConfig(vision_config=vision, text_config=text, image_token_index=299)
    with pytest.raises(ConfigError, match=r"the text part of .* alone is not what the whole computes of text"):
        saved(transformers.AyaVisionForConditionalGeneration(config)).load()


def test_a_text_part_that_transformers_has_no_class_for_is_refused(saved):
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 14}
    config = transformers.Qwen2VLConfig(text_config=SHAPE | {"rope_parameters": rope}, vision_config=vision)
    with pytest.raises(ConfigError, match="transformers has no causal language model of it and its text part alone"):
        saved(transformers.Qwen2VLForConditionalGeneration(config)).load()


def test_a_quantized_model_of_more_than_text_becomes_plain_text(saved):
    folder = saved(transformers.LlavaForConditionalGeneration(llava()))

    def only_text(tensors):
        text = {name: tensors[name] for name in tensors if "language_model" in name and "mlp" in name}
        to_fp8(text)
        tensors.update(text)

    kept = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    folder.tensors(only_text).settings(quantization_config=FP8 | {"modules_to_not_convert": kept})
    stored = load_file(folder.path / "model.safetensors")
    name = next(name for name in stored if name.endswith(PROJECTION.removeprefix("model.")))
    expected = (in_blocks(stored[name].double()) * stored[f"{name}_scale_inv"].double()[:, None, :, None]).view(32, 64)
    assert torch.allclose(folder.load().get_parameter(PROJECTION).double(), expected, rtol=1e-7, atol=0)
