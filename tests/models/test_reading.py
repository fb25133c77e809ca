"""What lies on the disk is what is loaded: anything else is refused by name."""

import ast
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qat import model_files
from qat.errors import ConfigError
from qat.models import reading, tokenizers
from tests import parsed

UP = "model.layers.1.mlp.up_proj.weight"


def refused(folder, said):
    with pytest.raises(ConfigError, match=said) as error:
        folder.load()
    assert str(folder.path) in str(error.value) or folder.path.name in str(error.value)


def set_one(value):
    def change(tensors):
        tensors[UP][3, 5] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(UP), rf"odd lacks {UP}"),
        (lambda t: t.pop("model.embed_tokens.weight"), r"lacks .*model\.embed_tokens\.weight"),
        (lambda t: t.update({"score.weight": torch.zeros(2, 64)}), r"no place for, score\.weight"),
        (lambda t: t.update({UP: torch.zeros(128, 60)}), rf"{UP} \(\[128, 60\], not \[128, 64\]\)"),
        (lambda t: t.update({UP: t[UP].to(torch.int8)}), rf"quantized numbers in {UP} \(I8\)"),
        (lambda t: t.update({UP: t[UP].long()}), rf"quantized numbers in {UP} \(I64\)"),
        (lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}), rf"quantized numbers in {UP} \(F8_E4M3\)"),
        (lambda t: t.update({UP.removeprefix("model."): t[UP] + 1}), r"holds both layers\.1\.mlp\.up_proj\.weight and"),
        (set_one(float("nan")), rf"NaN or infinite in {UP}: the folder is damaged"),
        (set_one(-float("inf")), rf"NaN or infinite in {UP}"),
    ],
)
def test_tensors_that_are_not_those_of_the_model_are_refused_by_name(folder, change, said):
    refused(folder.tensors(change), said)


@pytest.mark.parametrize("change", [lambda t: None, lambda t: t.update({"model.rotary_emb.inv_freq": torch.ones(8)})])
def test_a_whole_model_is_read_number_by_number(folder, teacher, change):
    """Tied embeddings are stored once; what older files hold of buffers that are computed does not count."""
    loaded = dict(folder.tensors(change).load().named_parameters())
    stored = load_file(teacher.path / "model.safetensors")
    assert loaded.keys() == stored.keys() and all(torch.equal(loaded[name], stored[name]) for name in stored)


def test_numbers_that_a_type_cannot_hold_are_told_for_that_type_alone(folder):
    found = folder.tensors(set_one(1e6)).located()
    assert found.load(torch.float32, torch.device("cpu")) and found.load(torch.bfloat16, torch.device("cpu"))
    with pytest.raises(ConfigError, match=rf"{UP} in float16: try instance\.precision=bf16 or fp32"):
        found.load(torch.float16, torch.device("cpu"))


@pytest.mark.parametrize("shared", [False, True])
def test_a_head_of_its_own_is_kept_where_the_settings_say_that_it_is_the_embedding(folder, shared):
    head = load_file(folder.path / "model.safetensors")["model.embed_tokens.weight"] + (0 if shared else 1)
    model = folder.tensors(lambda t: t.update({"lm_head.weight": head})).load()
    assert torch.equal(model.lm_head.weight, head)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is shared


def test_a_missing_head_is_told_where_it_is_not_the_embedding(folder):
    refused(folder.settings(tie_word_embeddings=False), r"lacks lm_head\.weight")


@pytest.fixture
def shards(folder):
    """The same model in several files."""
    model = folder.load()
    (folder.path / "model.safetensors").unlink()
    model.save_pretrained(folder.path, max_shard_size="100KB")
    assert len(list(folder.path.glob("model-*.safetensors"))) > 3
    return folder


def shard_of(folder, name=UP):
    index = model_files.read(folder.path / "model.safetensors.index.json")
    return folder.path / index["weight_map"][name], index


def test_shards_are_one_model_and_what_else_lies_there_does_not_count(shards, teacher):
    whole = shards.located()
    shutil.copyfile(teacher.path / "model.safetensors", shards.path / "consolidated.safetensors")
    assert shards.located().fingerprint == whole.fingerprint
    wanted = load_file(teacher.path / "model.safetensors")
    loaded = dict(shards.load().named_parameters())
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)


def test_a_shard_that_is_missing_or_not_listed_is_told(shards):
    file, index = shard_of(shards)
    kept = file.read_bytes()
    file.unlink()
    refused(shards, rf"{file.name} is not in .*odd, and model\.safetensors\.index\.json says")
    file.write_bytes(kept)
    listed = {name: shard for name, shard in index["weight_map"].items() if shard != file.name}
    shards.settings("model.safetensors.index.json", weight_map=listed)
    refused(shards, rf"odd lacks .*{UP}")
    shards.settings("model.safetensors.index.json", weight_map={UP: "../elsewhere.safetensors"})
    refused(shards, r"elsewhere\.safetensors is not in")


def test_a_tensor_in_two_files_is_refused_as_nobody_knows_which_counts(shards):
    file, index = shard_of(shards)
    other = next(shards.path / name for name in index["weight_map"].values() if name != file.name)
    tensors = load_file(other) | {UP: torch.zeros(128, 64)}
    save_file(tensors, other, metadata={"format": "pt"})
    refused(shards, rf"both hold {UP}")


@pytest.mark.parametrize("keep", [0, 100, -1000])
def test_a_file_that_is_cut_short_is_told(folder, keep):
    path = folder.path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, r"model\.safetensors cannot be read: copy or download it again")


def test_an_older_file_of_tensors_is_read_and_one_of_code_is_not(folder, teacher, tmp_path):
    class Code:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    tensors = load_file(folder.path / "model.safetensors")
    (folder.path / "model.safetensors").unlink()
    torch.save(tensors, folder.path / "pytorch_model.bin")
    assert torch.equal(folder.load().get_parameter(UP), tensors[UP])
    torch.save({UP: Code()}, folder.path / "pytorch_model.bin")
    refused(folder, r"pytorch_model\.bin cannot be read \(it is damaged or holds more than plain tensors")
    assert not (tmp_path / "ran").exists()


def test_every_call_that_could_run_a_folders_code_says_that_it_may_not():
    root, asked = Path(__file__).parents[2], []
    for file in [*(root / "qat").rglob("*.py"), *(root / "benchmarks").glob("*.py")]:
        for node in parsed.nodes(file):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func
            if called and called.attr in ("from_pretrained", "from_config") and "Auto" in ast.unparse(called).title():
                words = [(word.arg, ast.unparse(word.value)) for word in node.keywords]
                spread = any(name is None and "SAFE" in value for name, value in words)
                asked.append((file.name, node.lineno, spread or ("trust_remote_code", "False") in words))
    assert len(asked) > 12 and [call for call in asked if not call[-1]] == []
    assert reading.SAFE["trust_remote_code"] is False


def test_code_in_a_folder_is_never_run(folder, tmp_path):
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    (folder.path / "modeling_mine.py").write_text(code)
    (folder.path / "custom_generate").mkdir()
    (folder.path / "custom_generate" / "generate.py").write_text(code + "def generate(*_, **__): pass\n")
    model = folder.load()
    model.generate(torch.tensor([[1, 2]]), max_new_tokens=1)
    for kind in ("llama", "mine"):
        folder.settings(model_type=kind, auto_map={"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"})
        refused(folder, r"asks for code of its own \(auto_map: modeling_mine\), which is never run")
    folder.settings(model_type="llama", auto_map=None)
    folder.settings("tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_mine.Mine", None]})
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json asks for code of its own"):
        folder.located().tokenizer()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": None}, "names no model_type"),
        ({"model_type": "llamba"}, r"of type llamba, which transformers \d.* does not know"),
        ({"num_attention_heads": 7}, r"does not describe a model .*not a multiple of the number of attention heads"),
        ({"hidden_act": "none such"}, "makes no model .*none such"),
        ({"vocab_size": 600}, r"model\.embed_tokens\.weight \(\[512, 64\], not \[600, 64\]\)"),
        ({"num_hidden_layers": 2**70}, r"asks for num_hidden_layers=\d+, which no model has"),
        ({"num_hidden_layers": 1}, r"no place for, model\.layers\.1\..* and 6 more"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "a LlamaForSequenceClassification, which is no causal"),
        ({"architectures": ["LlamaModel"]}, "a LlamaModel, which is no causal language model"),
        ({"quantization_config": {"quant_method": "none such"}}, r"quantized \(none such\) .*does not know the method"),
    ],
)
def test_settings_that_make_no_such_model_are_told(folder, values, said):
    refused(folder.settings(**values), said)


def test_a_model_without_named_classes_goes_by_its_type(folder):
    assert type(folder.settings(architectures=None).load()).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("kind", "config", "shape", "said"),
    [
        ("BertForMaskedLM", "BertConfig", {}, "a BertForMaskedLM, which is no causal language model"),
        ("T5ForConditionalGeneration", "T5Config", {"d_model": 32, "num_layers": 1, "d_ff": 32}, "with an encoder"),
        ("ViTForImageClassification", "ViTConfig", {}, "transformers has no causal language model of it alone"),
    ],
)
def test_models_that_write_no_text_are_refused(saved, kind, config, shape, said):
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = getattr(transformers, kind)(getattr(transformers, config)(**small | shape))
    refused(saved(model), said)


def test_a_model_that_sees_what_comes_later_is_refused(causal):
    window = {"sliding_window": 8, "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"]}
    assert causal("Gemma3Text", **window).load()
    refused(causal("Gemma3Text", **window, use_bidirectional_attention=True), "sees what comes later")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ((), "no config.json, so it is no model of transformers"),
        (("model.gguf",), r"no config\.json, but model\.gguf, and GGUF files in a folder are not read"),
        (("model_index.json",), "a pipeline of diffusers"),
        (("config.json", "consolidated.safetensors"), r"no weights .*, but consolidated\.safetensors: save the model"),
        (("config.json", "model.fp16.safetensors"), r"no weights .*, but model\.fp16\.safetensors"),
        (("config.json", "model-00001-of-00002.safetensors"), r"no weights .*, but model-00001-of"),
        (("config.json", "packed.safetensors"), "a packed export of this project: name its teacher"),
        (("config.json", "flax_model.msgpack"), "weights for Flax"),
        (("config.json", "adapter_config.json", "model.safetensors"), r"an adapter \(adapter_config\.json\) beside"),
        (("inner/config.json",), r"inner/config\.json lies one folder deeper"),
    ],
)
def test_a_folder_without_a_model_is_told_by_what_it_holds(tmp_path, files, said):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=said):
        model_files.check(tmp_path)


def test_an_adapter_is_told_with_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base"}')
    with pytest.raises(ConfigError, match="but an adapter of someone/base: merge the two"):
        model_files.check(tmp_path)


@pytest.mark.parametrize("content", ["{'a': 1}", "[]", ""])
def test_settings_that_are_no_json_object_are_told(folder, content):
    (folder.path / "config.json").write_text(content)
    refused(folder, r"config\.json (cannot be read as JSON|does not hold a JSON object)")


WEIRD = (None, "x", -1, 0, 1.5, 1e30, 2**70, [], [None], [[1]], {}, {"a": 1}, True, "../x")
KEYS = ("quantization_config", "text_config", "architectures", "eos_token_id", "layer_types", "transformers_weights")


@pytest.mark.parametrize("seed", range(24))
def test_any_settings_are_a_model_or_one_sentence(folder, seed):
    draw = random.Random(seed)
    name = draw.choice(("config.json", "config.json", "generation_config.json", "tokenizer_config.json"))
    described = json.loads((folder.path / name).read_text())
    described[draw.choice([*described, *KEYS])] = draw.choice(WEIRD)
    (folder.path / name).write_text(json.dumps(described))
    try:
        found = folder.located()
        assert folder.load() and found.vocab_size() and isinstance(found.ends(), tuple)
        tokenizers.check(found.path, found.tokenizer(), found.vocab_size())
    except ConfigError as error:
        assert "\n" not in str(error)
