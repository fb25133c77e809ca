"""`config.json` for readers that look where settings were before transformers 5."""

import json

import pytest
import torch
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qat.export.hf import writer as hf
from qat.export.moved import older_keys
from qat.export.source import Source
from tests.export.conftest import IDS

LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 64,
}
WINDOWS = ["sliding_attention", "sliding_attention", "full_attention"] * 2
# Settings of a configuration, and what files of transformers 4 said in their place.
MOVED = {
    "llama": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
        {"rope_theta": 7.0, "rope_scaling": None},
    ),
    "qwen3": (
        {"rope_parameters": LLAMA3},
        {"rope_theta": 500.0, "rope_scaling": {key: LLAMA3[key] for key in LLAMA3 if key != "rope_theta"}},
    ),
    "phi3": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.5}},
        {"rope_theta": 7.0, "partial_rotary_factor": 0.5},
    ),
    "gemma3_text": (
        {
            "num_hidden_layers": 6,
            "layer_types": WINDOWS,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 7.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5.0},
            },
        },
        {"rope_theta": 7.0, "rope_local_base_freq": 5.0, "sliding_window_pattern": 3},
    ),
    "gpt2": ({"n_positions": 64}, {"n_ctx": 64}),
    "cohere2": ({"num_hidden_layers": 6, "layer_types": WINDOWS}, {"sliding_window_pattern": 3}),
    "gpt_neox": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.5}},
        {"rotary_emb_base": 7.0, "rotary_pct": 0.5},
    ),
    "qwen3_moe": ({"num_experts": 6}, {"num_experts": 6}),
    "qwen3_next": (
        {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2},
        {"full_attention_interval": 2},
    ),
}


@pytest.mark.parametrize("kind", MOVED)
def test_what_moved_is_said_in_both_places_and_read_alike(kind, tmp_path):
    given, wanted = MOVED[kind]
    config = CONFIG_MAPPING[kind](**given)
    described = config.to_dict() | {"dtype": "float16"}
    older = older_keys(described, {}, type(config))
    assert older["torch_dtype"] == "float16"
    assert {key: (described | older)[key] for key in wanted} == wanted
    both, today = read(tmp_path / "both", older | described), read(tmp_path / "today", described)
    assert {key: both[key] for key in today} == today


def read(folder, described):
    """What transformers makes of a file."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(described))
    return AutoConfig.from_pretrained(folder).to_dict() | {"_name_or_path": ""}


def test_windows_without_a_period_say_none():
    types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    config = CONFIG_MAPPING["gemma3_text"](num_hidden_layers=4, layer_types=types)
    assert "sliding_window_pattern" not in older_keys(config.to_dict() | {"dtype": "float16"}, {}, type(config))


def test_what_transformers_would_read_otherwise_is_left_out():
    """Where rotations differ by layer in an architecture that never said so otherwise."""
    config = CONFIG_MAPPING["mellum"]()
    older = older_keys(config.to_dict() | {"dtype": "float16"}, {}, type(config))
    assert "rope_scaling" not in older and older["rope_theta"] == 500_000.0


def test_settings_of_the_teachers_own_file_are_kept_and_what_it_says_of_files_is_not():
    config = CONFIG_MAPPING["llama"]()
    own = {"sliding_window_pattern": 4, "quantization_config": {"bits": 4}, "auto_map": {}, "hidden_size": 3}
    older = older_keys(config.to_dict() | {"dtype": "float16"}, own, type(config))
    assert older["sliding_window_pattern"] == 4
    assert not {"quantization_config", "auto_map", "hidden_size"} & older.keys()


@pytest.fixture
def rotated(teacher):
    """The tiny teacher with another base of rotations, as a source."""
    model = teacher.load(torch.float32, torch.device("cpu"))
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 20.0}
    return Source(teacher, type(model)(model.config).eval())


@torch.no_grad()
def test_mlx_lm_reads_the_dense_export(rotated, tmp_path, monkeypatch):
    """A reader of its own, to which a base that it does not find is 10000."""
    mx = pytest.importorskip("mlx.core", reason="the engine mlx is not installed: pip install -e '.[engines]'")
    utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed: pip install -e '.[engines]'")
    from qat.config import ExportConfig, ExportType

    monkeypatch.setattr(hf, "dense", lambda source, *_: source.model)
    hf.write(rotated, tmp_path, ExportConfig("hf", "hf", ExportType.fp32))
    model, _ = utils.load_model(tmp_path)
    made = torch.tensor(model(mx.array(IDS.numpy())).tolist())
    expected = rotated.model(IDS).logits
    assert (made - expected).norm() < 1e-5 * expected.norm()


def test_a_packed_export_says_it_too(best, export):
    base = json.loads((export(best, "packed") / "config.json").read_text())["base_config"]
    assert base["rope_theta"] == base["rope_parameters"]["rope_theta"] and base["torch_dtype"] == base["dtype"]

