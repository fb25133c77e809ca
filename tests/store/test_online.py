"""Stores beyond this machine, each as a server on localhost: an S3 bucket, a repository of the hub."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest

from qat import transfer
from qat.errors import MissingError
from qat.store import names, places
from qat.store.places import Place
from tests.store.test_archives import compressed, entry, tar_of

ROOT = Path(__file__).resolve().parents[2]
CONFIG = b'{"version": "v2"}'
LARGE = os.urandom(12_000_000)  # more than one part of an upload


@pytest.fixture
def outputs(tmp_path):
    folder = tmp_path / "outputs"
    folder.mkdir()
    return folder


@pytest.fixture
def s3(monkeypatch):
    """A running S3 server with one bucket, `there`."""
    pytest.importorskip("moto"), pytest.importorskip("s3fs")
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(places, "PAUSE", 0.0)
    s3fs.S3FileSystem.clear_instance_cache()
    urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/reset", data=b"").close()  # one memory for all servers
    s3fs.S3FileSystem().mkdir("there")
    yield server
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def test_what_is_pushed_to_s3_comes_back(s3, outputs, tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    (made / "manifest.json").write_text("{}")
    (made / "tables.safetensors").write_bytes(LARGE)
    place = Place("s3://there/qat")
    transfer.push(place, made, "checkpoints", "mine")
    entries = place.entries()
    paths = ["checkpoints", "checkpoints/mine.tgz", "checkpoints/mine.tgz.sha256"]
    assert [found.path for found in entries] == paths
    pulled = transfer.pull(place, entries, names.find(entries, ["mine"]), outputs, "checkpoints")
    assert pulled == outputs / "checkpoints" / "mine"
    assert (pulled / "tables.safetensors").read_bytes() == LARGE


def test_plain_folder_of_s3_is_pulled(s3, outputs):
    place = Place("s3://there")
    place.fs.pipe({"there/old/q4_fp32/config.json": CONFIG, "there/old/q4_fp32/model.pt": LARGE})
    entries = place.entries()
    pulled = transfer.pull(place, entries, names.find(entries, ["q4_fp32"]), outputs, "checkpoints")
    assert (pulled / "model.pt").read_bytes() == LARGE and (pulled / "config.json").read_bytes() == CONFIG


@pytest.mark.parametrize("url", ["s3://nowhere/qat", "s3://there/no/such/prefix"])
def test_bucket_that_is_not_there_is_told(s3, url):
    with pytest.raises(MissingError, match=f"store {url}: listing failed"):
        Place(url).entries()


def test_s3_that_does_not_answer_is_told(s3, monkeypatch):
    place = Place("s3://there/qat")
    monkeypatch.setattr(place.fs, "retries", 1)
    s3.stop()
    with pytest.raises(MissingError, match=r"store s3://there/qat: listing failed 3 times .* reachable\?"):
        place.entries()


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as reading `me/things` takes; `files` are its content."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path in ("/api/models/me/things", "/api/models/me/things/revision/main"):
            self.reply(200, json.dumps({"id": "me/things", "sha": "0" * 40, "siblings": []}).encode(), body)
        elif path.startswith("/api/models/me/things/tree/main"):
            self.reply(200, json.dumps([self.listed(name) for name in self.files]).encode(), body)
        elif path.startswith("/me/things/resolve/main/") and path.rpartition("/")[2] in self.files:
            self.reply(200, self.files[path.rpartition("/")[2]], body)
        else:
            self.reply(404, b"{}", body)

    def listed(self, name: str) -> dict[str, object]:
        content = self.files[name]
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def reply(self, status: int, content: bytes, body: bool) -> None:
        first, last = 0, len(content) - 1
        if status == 200 and (asked := self.headers.get("Range", "").removeprefix("bytes=")):
            first, last = int(asked.split("-")[0]), min(int(asked.split("-")[1] or last), last)
            status = 206
        part = content[first : last + 1]
        self.send_response(status)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if body:
            self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def hub():
    """Its address; the repository holds one archive with its checksum."""
    archive = compressed(tar_of((entry("q4_fp32/config.json"), CONFIG), (entry("q4_fp32/model.pt"), LARGE)), ".tgz")
    said = f"{hashlib.sha256(archive).hexdigest()}  q4_fp32.tgz\n".encode()
    handler = type("Things", (Hub,), {"files": {"q4_fp32.tgz": archive, "q4_fp32.tgz.sha256": said}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def launch(address, *words):
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, str(ROOT / "launch.py"), "store=hf", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


def test_archive_of_the_hub_is_listed_and_pulled(hub, outputs):
    listed = launch(hub, "stage=store", "store.path=me/things", f"outputs={outputs}")
    assert (listed.returncode, listed.stderr) == (0, "") and "q4_fp32.tgz.sha256" in listed.stdout
    pulled = launch(hub, "stage=pull", "checkpoint=q4_fp32", "store.path=me/things", f"outputs={outputs}")
    assert (pulled.returncode, pulled.stderr) == (0, "")
    assert (outputs / "checkpoints" / "q4_fp32" / "model.pt").read_bytes() == LARGE


def test_repository_that_is_not_there_is_told_in_a_line(hub, outputs):
    done = launch(hub, "stage=pull", "checkpoint=q4_fp32", "store.path=me/nothing", f"outputs={outputs}")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "hf://me/nothing" in done.stderr
