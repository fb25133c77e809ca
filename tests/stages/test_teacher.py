"""What a teacher cannot do is told before a run does anything, and what it can is not refused."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qat.cli import arguments, main
from qat.config import DataConfig, DataSource, ExportConfig, ModeConfig, ModelConfig, ModelSource, Stage, Start
from qat.errors import ConfigError
from qat.models import locate
from qat.stages.teacher import check
from tests import tiny

SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 257,
}


@pytest.fixture(scope="module")
def configs():
    """Checked configurations of the tiny job, by their experiment."""
    lines = {"": [], "progressive": ["+experiment=progressive"]}
    return {name: main.check(arguments.parse(["+debug=tiny", *words])).configs[0] for name, words in lines.items()}


@pytest.fixture
def check_of(teacher, configs):
    """The check of a job of some stage with other values by their keys, of the tiny teacher or another."""

    def run(stage="run", teacher=teacher, machine=tiny.FP32, experiment="", **values):
        config = copy.deepcopy(configs[experiment])
        config.stage = Stage[stage]
        for key, value in values.items():
            section, _, name = key.rpartition("__")
            setattr(getattr(config, section) if section else config, name, value)
        check(config, teacher, teacher, machine)

    return run


@pytest.fixture
def other(teacher, tmp_path):
    """A teacher of another architecture, with the tiny one's tokenizer."""

    def make(kind, **shape):
        config = getattr(transformers, f"{kind}Config")(**SMALL | shape)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
        for file in [*teacher.path.glob("tokenizer*"), teacher.path / "chat_template.jinja"]:
            shutil.copyfile(file, tmp_path / "other" / file.name)
        return locate(ModelConfig(name="local", source=ModelSource.folder, path=str(tmp_path / "other")), tmp_path)

    return make


@pytest.mark.parametrize("stage", ["run", "convert", "cache", "evaluate"])
def test_an_ordinary_teacher_is_taken(check_of, stage):
    check_of(stage)


@pytest.mark.parametrize("stage", ["run", "convert"])
def test_weights_that_no_rule_fits_are_told_where_they_are_to_be_quantized(check_of, other, stage):
    griffin = other("RecurrentGemma")
    with pytest.raises(ConfigError, match=r"does not cover model\..*\.rg_lru\.\w+_weight .*quant\.partial=true"):
        check_of(stage, griffin)
    check_of(stage, griffin, quant__partial=True)
    check_of("cache", griffin)


def test_a_mode_that_trains_what_is_not_quantized_is_told(check_of, other):
    teacher = other("Mamba", state_size=4)
    for mode in (ModeConfig("mlp", True, False), ModeConfig("e2e", True, True)):
        said = rf"mode={mode.name} trains the mlp layers, and none of other is quantized: use mode=attn"
        with pytest.raises(ConfigError, match=said):
            check_of(teacher=teacher, mode=mode)
    attention = ModeConfig("attn", False, True)
    check_of(teacher=teacher, mode=attention)
    check_of("convert", teacher)


def test_an_adapter_that_a_layer_cannot_have_is_told(check_of, other):
    lora = ModeConfig("lora", True, True, rank=8)
    check_of(mode=lora)
    with pytest.raises(ConfigError, match=r"mode.rank=65: model.layers.0.self_attn.q_proj of tiny is 64 × 64"):
        check_of(mode=replace(lora, rank=65))
    experts = other("Mixtral", num_local_experts=2)
    said = r"mode.rank=8: model.layers.0.mlp.experts.0.gate_up_proj of other is an expert, .*: use mode.mlp=false"
    with pytest.raises(ConfigError, match=said):
        check_of(teacher=experts, mode=lora)
    check_of(teacher=experts, mode=replace(lora, mlp=False))
    with pytest.raises(ConfigError, match=r"mode=lora trains the mlp layers, .*: use mode.mlp=false"):
        check_of(teacher=other("Mamba", state_size=4), mode=lora)


def test_a_student_that_is_trained_first_has_its_layers_too(check_of, other):
    griffin = other("RecurrentGemma")
    with pytest.raises(ConfigError, match="quant=q4a4 does not cover"):
        check_of(teacher=griffin, experiment="progressive", quant__partial=True)


def test_a_layer_of_zeros_is_told_where_it_is_to_be_quantized(check_of, teacher, tmp_path):
    folder = shutil.copytree(teacher.path, tmp_path / "zeros")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    zeros = replace(teacher, path=folder, fingerprint="zeros")
    with pytest.raises(ConfigError, match=r"nothing but zeros in model\.layers\.1\.mlp\.up_proj, to which no format"):
        check_of(teacher=zeros)
    check_of("cache", zeros)
    check_of("convert", zeros, quant__mlp=None)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for tool in tools %}{% endfor %}", "the chat template refuses a conversation"),
        ("{{ raise_exception('tools are required') }}", r"tools are required"),
        ("{{ messages[1]['content'] }}", "the chat template refuses a conversation"),
        ("{% for %}", "the chat template refuses a conversation"),
        ("{{ 1 // 0 }}", "the chat template refuses a conversation"),
    ],
)
def test_a_template_that_takes_no_question_is_told_where_one_is_asked(check_of, teacher, tmp_path, template, said):
    folder = shutil.copytree(teacher.path, tmp_path / "template")
    (folder / "chat_template.jinja").write_text(template)
    found = replace(teacher, path=folder)
    with pytest.raises(ConfigError, match=said):
        check_of(teacher=found)
    check_of("cache", found, data=DataConfig("tokens", DataSource.selfgen, start=Start.tokens))


def test_the_checked_teacher_is_loaded_in_the_type_that_will_be_used(check_of, teacher, tmp_path):
    """A number that fp32 holds and fp16 does not."""
    folder = shutil.copytree(teacher.path, tmp_path / "large")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    large = replace(teacher, path=folder, fingerprint="large")
    check_of(teacher=large)
    with pytest.raises(ConfigError, match=r"infinite in model\.norm\.weight in float16"):
        check_of(teacher=large, machine=replace(tiny.FP32, dtype=torch.float16))


GGUF = ExportConfig("gguf", "gguf")


@pytest.mark.parametrize("stage", ["run", "convert"])
def test_what_an_engine_cannot_hold_is_told_before_anything_is_made(check_of, stage):
    with pytest.raises(ConfigError, match=r"llama\.cpp cannot hold model\.layers\.0.*quant=gguf_"):
        check_of(stage, export=GGUF)
    with pytest.raises(ConfigError, match=r"compressed-tensors cannot hold"):
        check_of(stage, export=ExportConfig("compressed", "compressed"))
    with pytest.raises(ConfigError, match=r"MLX cannot hold .*quant=mlx_"):
        check_of(stage, export=ExportConfig("mlx", "mlx"))


def test_an_architecture_or_tokenizer_that_an_engine_does_not_know_is_told_as_early(check_of, other, teacher, tmp_path):
    check_of(export=replace(GGUF, dense=True))
    with pytest.raises(ConfigError, match=r"export=gguf does not write models of type gpt_neox; it knows llama"):
        check_of(teacher=other("GPTNeoX"), export=GGUF)
    shutil.copytree(teacher.path, tmp_path / "split")
    described = json.loads((tmp_path / "split" / "tokenizer.json").read_text())
    described["pre_tokenizer"] = {"type": "Whitespace"}
    (tmp_path / "split" / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match=r"llama\.cpp's name for how this tokenizer splits text"):
        check_of(teacher=replace(teacher, path=tmp_path / "split"), export=replace(GGUF, dense=True))
