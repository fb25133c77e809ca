"""Weights & Biases: not imported when nobody is to be told, offline without a login, never in the way."""

import builtins
import json
import os

import pytest

from qat import tracking
from qat.config import CheckpointConfig, Config, ModeConfig, QuantConfig, Stage, TrackerConfig, TrackerKind, as_plain
from tests import described
from tests.launching import python

COMMON = """
import json, pathlib, sys
from qat.config import Config, ModeConfig, QuantConfig, TrackerConfig, TrackerKind
from qat.runs import Run
home = pathlib.Path(sys.argv[1])

def run(kind, name):
    (home / name).mkdir(exist_ok=True)
    config = Config(outputs=str(home), quant=QuantConfig("q2a4"), mode=ModeConfig("mlp", True, False),
                    tracker=TrackerConfig(kind, TrackerKind[kind]))
    return Run(config, home / name)
"""

NOBODY = """
record = run("none", "SR-001")
record.log({"step": 1, "loss": 0.5})
record.finish("complete")
print(json.dumps("wandb" in sys.modules))
"""

THRICE = """
said = []
for name, step, status in (("SR-001", 1, "interrupted"), ("SR-001", 2, "complete"), ("SR-002", 1, "complete")):
    record = run("wandb", name)
    inner = record._tracker._run
    record.log({"step": step, "loss": 0.5})
    record.result["metrics"] = {"kl": 0.28125}
    record.finish(status)
    said.append([inner.id, inner.name, inner.settings._offline])
print(json.dumps(said))
"""


def process(tmp_path, script):
    """Runs a script with a home of its own and nothing in the environment that tells wandb what to do."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    env = kept | {"HOME": str(tmp_path), "WANDB_SILENT": "true", "WANDB_CACHE_DIR": str(tmp_path / "cache")}
    done = python("-c", COMMON + script, str(tmp_path), env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def config(tmp_path):
    return Config(
        outputs=str(tmp_path),
        quant=QuantConfig("q2a4"),
        mode=ModeConfig("mlp", True, False),
        tracker=TrackerConfig("wandb", TrackerKind.wandb),
    )


def test_nobody_is_told_without_importing_wandb(tmp_path):
    assert process(tmp_path, NOBODY) is False


def test_without_login_a_run_and_its_going_on_are_one_offline_wandb_run_and_another_is_another(tmp_path):
    first, again, second = process(tmp_path, THRICE)
    assert first == again and first[0] != second[0]
    assert (first[1:], second[1:]) == (["SR-001", True], ["SR-002", True])
    for name, run in (("SR-001", first), ("SR-002", second)):
        folders = list((tmp_path / name / "wandb").glob("offline-run-*"))
        assert {folder.name.split("-")[3] for folder in folders} == {run[0]}
        assert all(b"0.28125" in written.read_bytes() for folder in folders for written in folder.glob("*.wandb"))


def test_wandb_that_fails_is_left_out_and_the_run_told(tmp_path, config, monkeypatch, caplog):
    wandb = pytest.importorskip("wandb")

    def fail(*_):
        raise wandb.errors.CommError("no route")

    monkeypatch.setattr(tracking, "_start_wandb", fail)
    tracker = tracking.open_tracker(config, tmp_path, "SR-001")
    tracker.log({"step": 1, "loss": 1.0})
    tracker.finish({}, failed=False)
    assert isinstance(tracker, tracking.NoTracker)
    assert "wandb is left out of this run: no route" in caplog.text


def test_no_tracker_asks_for_no_import(tmp_path, config, monkeypatch):
    config.tracker.kind = TrackerKind.none
    imported = builtins.__import__

    def guard(name, *rest):
        assert not name.startswith("wandb")
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", guard)
    assert isinstance(tracking.open_tracker(config, tmp_path, "SR-001"), tracking.NoTracker)


@pytest.mark.parametrize(
    ("key", "netrc", "logged_in"),
    [
        ("", None, False),
        ("x" * 40, None, True),
        ("", "machine api.wandb.ai login user password secret\n", True),
        ("", "machine elsewhere.org login user password secret\n", False),
        ("", "no such word", False),
    ],
)
def test_login_is_an_environment_key_or_a_netrc_entry(tmp_path, monkeypatch, key, netrc, logged_in):
    at_home(tmp_path, monkeypatch)
    monkeypatch.setenv("WANDB_API_KEY", key)
    if netrc is not None:
        (tmp_path / ".netrc").write_text(netrc)
        (tmp_path / ".netrc").chmod(0o600)
    assert tracking.logged_in() is logged_in


def at_home(folder, monkeypatch):
    """Logins and settings are those in a folder alone."""
    monkeypatch.setenv("HOME", str(folder))
    for name in ("API_KEY", "BASE_URL", "CONFIG_DIR", "IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.delenv("NETRC", raising=False)


@pytest.mark.parametrize("said", ["environment", "settings"])
def test_login_for_a_host_of_ones_own_is_seen_and_no_other(tmp_path, monkeypatch, said):
    at_home(tmp_path, monkeypatch)
    logins = tmp_path / "logins"
    logins.write_text("machine wandb.here.org:8080 login user password secret\n")
    logins.chmod(0o600)
    monkeypatch.setenv("NETRC", str(logins))
    assert tracking.logged_in() is False
    if said == "environment":
        monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.here.org:8080/")
    else:
        (tmp_path / ".config" / "wandb").mkdir(parents=True)
        (tmp_path / ".config" / "wandb" / "settings").write_text("[default]\nbase_url = https://wandb.here.org:8080\n")
    assert tracking.host() == "wandb.here.org:8080" and tracking.logged_in() is True
    logins.write_text("machine api.wandb.ai login user password secret\n")
    assert tracking.logged_in() is False


def test_a_run_that_was_kept_offline_says_how_to_send_it(tmp_path, caplog):
    class Inner:
        def __init__(self):
            self.summary = {}

        def finish(self, exit_code):
            """Nothing."""

    for name, sent in (("offline-run-20261103_100000-a1", True), ("offline-run-20261103_110000-a1", False)):
        (tmp_path / "wandb" / name).mkdir(parents=True)
        (tmp_path / "wandb" / name / "run-a1.wandb").touch()
        if sent:
            (tmp_path / "wandb" / name / "run-a1.wandb.synced").touch()
    caplog.set_level("INFO")
    tracking.WandbTracker(Inner(), tmp_path).finish({}, failed=False)
    assert f"wandb sync {tmp_path}/wandb/offline-run-20261103_110000-a1" in caplog.text
    assert "100000" not in caplog.text


def test_rows_go_under_their_own_step_and_the_end_says_whether_it_failed(tmp_path):
    class Inner:
        def __init__(self):
            self.logged, self.summary, self.code = [], {}, None

        def log(self, row, step):
            self.logged.append((step, row))

        def finish(self, exit_code):
            self.code = exit_code

    inner = Inner()
    tracker = tracking.WandbTracker(inner, tmp_path)
    tracker.log({"step": 3, "loss": 0.5})
    tracker.finish({"kl": 0.25}, failed=True)
    assert (inner.logged, inner.summary, inner.code) == ([(3, {"loss": 0.5})], {"kl": 0.25}, 1)


def test_wandb_that_breaks_on_the_way_fails_no_run(tmp_path, caplog):
    class Broken:
        def __init__(self):
            self.asked = 0

        def log(self, row, step):
            self.asked += 1
            raise RuntimeError("the service is gone")

    inner = Broken()
    tracker = tracking.WandbTracker(inner, tmp_path)
    for step in range(3):
        tracker.log({"step": step, "loss": 0.5})
    tracker.finish({"kl": 0.25}, failed=False)
    assert inner.asked == 1
    assert caplog.text.count("wandb is told no more of this run: RuntimeError: the service is gone") == 1


@pytest.mark.parametrize(("folder", "group"), [("sweep-002/SR-005", "sweep-002"), ("SR-005", "SR-005")])
def test_run_carries_its_configuration_and_jobs_of_a_sweep_are_grouped(tmp_path, config, monkeypatch, folder, group):
    wandb = pytest.importorskip("wandb")
    asked = {}
    monkeypatch.setattr(wandb, "init", lambda **settings: asked.update(settings))
    tracking.open_tracker(config, tmp_path / folder, "SR-005")
    assert (asked["name"], asked["group"], asked["mode"]) == ("SR-005", group, "offline")
    assert asked["job_type"] == "run"
    assert asked["config"] == as_plain(config)


@pytest.mark.parametrize(
    ("measured", "group"),
    [
        ("SR-001", "SR-001"),
        ("SR-001/checkpoints/best", "SR-001"),
        ("sweep-002/SR-003", "sweep-002"),
        ("elsewhere", "SR-005"),
        (None, "SR-005"),
    ],
)
def test_an_evaluation_joins_the_group_of_the_run_that_it_measures(tmp_path, config, monkeypatch, measured, group):
    wandb = pytest.importorskip("wandb")
    asked = {}
    monkeypatch.setattr(wandb, "init", lambda **settings: asked.update(settings))
    config.stage = Stage.evaluate
    for run in ("SR-001", "sweep-002/SR-003"):
        (tmp_path / run / "checkpoints" / "best").mkdir(parents=True)
        (tmp_path / run / "result.json").write_text("{}")
        manifest = json.dumps(described.checkpoint(True, True))
        (tmp_path / run / "checkpoints" / "best" / "manifest.json").write_text(manifest)
    (tmp_path / "elsewhere").mkdir()
    config.checkpoint = CheckpointConfig("teacher", str(tmp_path / measured) if measured else None)
    tracking.open_tracker(config, tmp_path / "SR-005", "SR-005")
    assert (asked["group"], asked["job_type"], asked["name"]) == (group, "evaluate", "SR-005")


@pytest.mark.parametrize("stage", [Stage.cache, Stage.export])
def test_what_has_no_figures_is_not_told_of(tmp_path, config, monkeypatch, stage):
    monkeypatch.setattr(tracking, "_start_wandb", lambda *_: pytest.fail("told"))
    config.stage = stage
    assert isinstance(tracking.open_tracker(config, tmp_path, "SR-001"), tracking.NoTracker)
