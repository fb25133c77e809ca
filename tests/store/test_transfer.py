"""Pull, push and mirror through real folders, URLs and an unreliable file system."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from qat import transfer
from qat.config import CacheConfig, CheckpointConfig, Config, DataConfig, DataSource, StoreConfig, StoreKind
from qat.errors import ArtifactError, MissingError, UnavailableError
from qat.names import cache_names
from qat.store import names, places
from qat.store.places import Place
from tests import described
from tests.store.test_archives import SMALL, compressed, entry, tar_of
from tests.test_pipeline import Shop

V2 = [(entry("q4_fp32/config.json"), b'{"version": "v2"}'), (entry("q4_fp32/model.pt"), b"tensors")]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(places, "PAUSE", 0.0)


@pytest.fixture
def drive(tmp_path):
    folder = tmp_path / "drive"
    folder.mkdir()
    return folder


@pytest.fixture
def outputs(tmp_path):
    folder = tmp_path / "outputs"
    folder.mkdir()
    return folder


def store(path, kind=StoreKind.gdrive, **settings):
    return StoreConfig("there", kind, str(path), **settings)


def config(outputs, drive=None, checkpoint="q4_fp32", **sections):
    kind = StoreKind.gdrive if drive else StoreKind.local
    archive = {"q2_0_5341": "q2_0.5341"}.get(checkpoint)
    return Config(
        outputs=str(outputs),
        store=StoreConfig("there", kind, str(drive) if drive else None),
        checkpoint=CheckpointConfig(checkpoint, None, archive),
        data=sections.pop("data", DataConfig("prompts", DataSource.selfgen)),
        **sections,
    )


def listing(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.name.endswith(".lock"))


@pytest.mark.parametrize("suffix", [".tgz", ".tar.gz", ".tar.lz4", ".tar.zst", ".tar"])
@pytest.mark.parametrize("nest", ["", "q4_fp32/"])
def test_registered_checkpoint_is_pulled_once_by_name(outputs, drive, suffix, nest):
    nested = [(entry(nest + header.name), data) for header, data in V2]
    (drive / "old").mkdir()
    (drive / "old" / f"q4_fp32{suffix}").write_bytes(compressed(tar_of(*nested), suffix))
    found = transfer.with_named(config(outputs, drive)).checkpoint
    assert Path(found.path) == outputs / "checkpoints" / "q4_fp32"
    assert listing(outputs) == [
        "checkpoints",
        "checkpoints/q4_fp32",
        *(f"checkpoints/q4_fp32/{name}" for name in ("config.json", "model.pt")),
    ]
    shutil.rmtree(drive)
    assert transfer.with_named(config(outputs, drive)).checkpoint == found  # without a look at the store


def test_plain_folder_of_a_store_is_pulled(outputs, drive):
    (drive / "q2_0.5341" / "q2_0.5341").mkdir(parents=True)
    (drive / "q2_0.5341" / "q2_0.5341" / "model.pt").write_bytes(b"x" * 5000)
    found = transfer.with_named(config(outputs, drive, "q2_0_5341")).checkpoint
    assert (Path(found.path) / "model.pt").read_bytes() == b"x" * 5000


def test_registered_cache_is_found_by_the_run_logs_name(outputs, drive):
    alpaca = DataConfig("alpaca", DataSource.alpaca, thinking="both")
    name = "alpaca_chat_think_both_L64_K64_R128"
    settings = {"data": alpaca, "cache": CacheConfig("L64"), "checkpoint": "teacher"}
    assert transfer.with_named(config(outputs, drive, **settings)).cache.path is None
    archive = tar_of((entry(f"{name}/{name}/meta.json"), b"{}"), (entry(f"{name}/{name}/shard_00000.pt"), b"x"))
    (drive / f"{name}.tgz").write_bytes(compressed(archive, ".tgz"))
    assert transfer.with_named(config(outputs, drive, **settings)).cache.path == str(outputs / "caches" / name)
    settings["cache"] = CacheConfig("L128", 128, 128)
    assert transfer.with_named(config(outputs, drive, **settings)).cache.path is None
    assert cache_names(config(outputs, **settings))[0] == "alpaca_chat_think_both_L128_K128_R1024"


def test_checkpoint_that_nobody_has_is_told(outputs, drive):
    for place in (None, drive):
        with pytest.raises(MissingError, match=r"q4_fp32 is neither in .* nor in the store"):
            transfer.with_named(config(outputs, place))


@pytest.mark.parametrize("kind", ["drive", "file", "memory"])
def test_what_is_pushed_comes_back(outputs, drive, tmp_path, kind):
    url = {"drive": str(drive), "file": f"file://{drive}", "memory": f"memory://{tmp_path.name}"}[kind]
    made = tmp_path / "made"
    (made / "deep").mkdir(parents=True)
    (made / "manifest.json").write_text("{}")
    (made / "deep" / "tables.safetensors").write_bytes(bytes(100_000))
    place = Place(url)
    path = transfer.push(place, made, "checkpoints", "mine")
    assert path == "checkpoints/mine.tgz"
    assert [found.path for found in place.entries()] == ["checkpoints", path, path + ".sha256"]
    assert place.text(path + ".sha256").split()[1] == "mine.tgz"
    entries = place.entries()
    pulled = transfer.pull(place, entries, names.find(entries, ["mine"]), outputs, "checkpoints")
    assert (pulled / "deep" / "tables.safetensors").read_bytes() == bytes(100_000)
    assert (pulled / "manifest.json").read_text() == "{}"


DAMAGE = {
    "altered": (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "is not what its .sha256 says"),
    "cut short": (lambda data: data[: len(data) // 2], "is not what its .sha256 says"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_noticed_and_publishes_nothing(outputs, drive, what):
    damage, says = DAMAGE[what]
    data = compressed(tar_of(*V2), ".tgz")
    (drive / "q4_fp32.tgz").write_bytes(damage(data))
    (drive / "q4_fp32.tgz.sha256").write_text(f"{hashlib.sha256(data).hexdigest()}  q4_fp32.tgz\n")
    with pytest.raises(ArtifactError, match=says):
        transfer.with_named(config(outputs, drive))
    assert listing(outputs) == ["checkpoints"]
    (drive / "q4_fp32.tgz").write_bytes(data)
    assert transfer.with_named(config(outputs, drive)).checkpoint.path


REFUSED = {
    "link": [*V2, entry("q4_fp32/x", b"2", linkname="/etc/passwd")],
    "parent": [*V2, (entry("../x"), b"")],
    "twice": [*V2, V2[0]],
    "bomb": [*V2, (entry("q4_fp32/zeros"), bytes(1 << 21))],
    "foreign": [(entry("holiday.jpg"), b"x")],
}


@pytest.mark.parametrize("what", REFUSED)
def test_hostile_archive_is_refused_and_publishes_nothing(outputs, drive, what):
    (drive / "q4_fp32.tgz").write_bytes(compressed(tar_of(*REFUSED[what]), ".tgz"))
    place = Place(str(drive))
    entries = place.entries()
    with pytest.raises(ArtifactError):
        transfer.pull(place, entries, names.find(entries, ["q4_fp32"]), outputs, "checkpoints", SMALL)
    assert listing(outputs) == ["checkpoints"]
    assert listing(drive) == ["q4_fp32.tgz"]


def test_vanished_store_is_told(outputs, drive):
    gone = Place(str(drive))
    drive.rmdir()
    with pytest.raises(MissingError, match="not there"):
        gone.entries()
    with pytest.raises(MissingError, match="gone"):
        gone.upload(Path(__file__), "x")
    assert not drive.exists()  # an empty mount point is not filled
    with pytest.raises(MissingError, match="is it mounted"):
        Place(str(drive / "a" / "b")).prepare()


class Flaky(LocalFileSystem):
    """A Drive that fails the first two times it is read."""

    failures = 0

    def _open(self, path, mode="rb", **rest):
        if "r" in mode and Flaky.failures < 2:
            Flaky.failures += 1
            raise OSError("transport endpoint is not connected")
        return super()._open(path, mode, **rest)


def test_flaky_store_is_tried_again(outputs, drive, caplog):
    (drive / "q4_fp32.tgz").write_bytes(compressed(tar_of(*V2), ".tgz"))
    place = Place(str(drive))
    place.fs = Flaky()
    entries = place.entries()
    assert transfer.pull(place, entries, names.find(entries, ["q4_fp32"]), outputs, "checkpoints").is_dir()
    assert caplog.text.count("trying again") == 2


def test_store_that_stays_away_is_told(drive, monkeypatch):
    place = Place(str(drive))
    monkeypatch.setattr(type(place.fs), "exists", lambda *_: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(MissingError, match=r"listing failed 3 times \(OSError: no route\)"):
        place.entries()


def test_missing_client_is_named():
    with pytest.raises(UnavailableError, match="pip install"):
        Place("nonsense://x")


@pytest.mark.parametrize(
    ("kind", "path", "url"),
    [
        (StoreKind.gcs, "bucket/x", "gs://bucket/x"),
        (StoreKind.gcs, "gs://bucket", "gs://bucket"),
        (StoreKind.hf, "owner/name", "hf://owner/name"),
        (StoreKind.url, "s3://bucket/x", "s3://bucket/x"),
        (StoreKind.gdrive, "/mnt/drive", "/mnt/drive"),
    ],
)
def test_stores_are_urls(kind, path, url):
    assert places.url_of(store(path, kind)) == url


def test_mounted_drive_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "COLAB", tmp_path / "content" / "MyDrive")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/sda1 / ext4 rw 0 0\nremote: {tmp_path}/r\\040clone fuse.rclone rw 0 0\n")
    assert list(places._drives(mounts)) == [tmp_path / "content" / "MyDrive", tmp_path / "r clone"]
    mac = tmp_path / "home" / "Library" / "CloudStorage" / "GoogleDrive-me@x.org" / "My Drive"
    mac.mkdir(parents=True)
    assert places.drive() == mac
    (tmp_path / "content" / "MyDrive").mkdir(parents=True)
    assert places.url_of(StoreConfig("gdrive", StoreKind.gdrive)) == str(tmp_path / "content" / "MyDrive" / "qat")
    shutil.rmtree(tmp_path / "content"), shutil.rmtree(tmp_path / "home")
    monkeypatch.setattr(places, "_drives", lambda: iter([tmp_path / "nowhere"]))
    with pytest.raises(MissingError, match="no Google Drive is mounted"):
        places.drive()


def test_run_is_mirrored_while_it_goes_on_and_when_it_ends(tmp_path, drive, outputs):
    run = tmp_path / "SR-007"
    run.mkdir()
    (run / "result.json").write_text('{"status": "interrupted"}')
    archive = drive / "runs" / "SR-007.tgz"
    with transfer.mirrored(store(drive, mirror=True), run, "SR-007", seconds=0.01):
        for _ in range(1000):
            if archive.exists():
                break
            __import__("time").sleep(0.01)
        assert archive.exists()
        (run / "result.json").write_text('{"status": "complete"}')
    place = Place(str(drive))
    entries = place.entries()
    pulled = transfer.pull(place, entries, names.find(entries, ["SR-007"]), outputs, "runs")
    assert pulled == outputs / "SR-007"
    assert json.loads((pulled / "result.json").read_text())["status"] == "complete"
    assert not list(drive.rglob("*.scratch"))


def test_mirror_leaves_another_machines_run_of_the_same_number_alone(tmp_path, drive, outputs, caplog):
    def goes_on(machine, state):
        run = tmp_path / machine / "SR-001"
        run.mkdir(parents=True, exist_ok=True)
        with transfer.mirrored(store(drive, mirror=True), run, "SR-001"):
            (run / "result.json").write_text(json.dumps([machine, state]))

    goes_on("first", "begins")
    goes_on("second", "begins")
    assert "already has a run SR-001: this one is kept there as SR-001-2" in caplog.text
    goes_on("second", "ends")
    goes_on("first", "ends")
    place = Place(str(drive))
    entries = place.entries()
    for name, machine in (("SR-001", "first"), ("SR-001-2", "second")):
        pulled = transfer.pull(place, entries, names.find(entries, [name]), outputs, "runs")
        assert json.loads((pulled / "result.json").read_text()) == [machine, "ends"]


def test_mirror_that_fails_fails_no_run(tmp_path, caplog):
    (tmp_path / "SR-001").mkdir()
    with transfer.mirrored(store(tmp_path / "a" / "b", mirror=True), tmp_path / "SR-001", "SR-001", 0.01):
        pass
    assert "SR-001 was not mirrored" in caplog.text


def test_stages_as_commands(outputs, drive):
    checkpoint = outputs / "SR-001" / "checkpoints" / "best"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text(json.dumps(described.checkpoint()))
    (outputs / "SR-001" / "result.json").write_text('{"run_id": "SR-001", "name": "v2_q2a4_mlp_0.73_fp32"}')
    shop, words = Shop(outputs), ("store=gdrive", f"store.path={drive}/qat")
    pushed = shop.launch("stage=push", "checkpoint=SR-001", *words)
    assert (pushed.code, pushed.err) == (0, "")
    name = "SR-001_v2_q2a4_mlp_0.73_fp32"
    assert listing(drive) == [
        "qat",
        "qat/checkpoints",
        f"qat/checkpoints/{name}.tgz",
        f"qat/checkpoints/{name}.tgz.sha256",
    ]
    listed = shop.launch("stage=store", *words)
    assert (listed.code, f"checkpoints/{name}.tgz" in listed.out) == (0, True)
    pulled = shop.launch("stage=pull", f"store.archive={name}", *words)
    assert (pulled.code, pulled.err) == (0, "")
    assert json.loads((outputs / "checkpoints" / name / "manifest.json").read_text()) == described.checkpoint()
    wrong = shop.launch("stage=pull", "store.archive=SR-001_v2_q2a4_mlp_0.37_fp32", *words)
    assert (wrong.code, wrong.err.count("\n")) == (1, 1)
    assert f"did you mean {name}?" in wrong.err
