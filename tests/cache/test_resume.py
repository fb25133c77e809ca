"""`kill -9` at any moment, several processes at once: the finished cache is the same, byte for byte."""

import json
import random
import shutil

import pytest

from tests import launching, making

KILLS = 2


@pytest.fixture(scope="module")
def processes():
    return launching.processes()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"Paragraph {number}: " + "some words " * (1 + number % 4) for number in range(80)))
    return str(path)


@pytest.fixture(scope="module")
def whole(processes, text, tmp_path_factory):
    """The outputs folder of a process that nothing disturbed."""
    outputs = tmp_path_factory.mktemp("whole")
    process = processes.Process(target=making.make_cache, args=(str(outputs), text))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    return outputs


def the_cache(outputs):
    (folder,) = (path for path in (outputs / "caches").iterdir() if path.is_dir())
    return folder


def seed_of(outputs, whole):
    """The teacher and the documents, so that only the cache is left to make."""
    for kind in ("models", "documents"):
        shutil.copytree(whole / kind, outputs / kind)


def shards(outputs):
    return len(making.found(outputs / "caches", ".*.partial/*.safetensors"))


def test_cache_killed_again_and_again_is_the_same_in_the_end(processes, text, whole, tmp_path):
    seed_of(tmp_path, whole)
    draw, count = random.Random(0), len(list(the_cache(whole).glob("*.safetensors")))
    assert count > 40
    for _ in range(KILLS):
        process = processes.Process(target=making.make_cache, args=(str(tmp_path), text))
        process.start()
        goal = shards(tmp_path) + draw.randrange(1, count // (KILLS + 2))
        assert making.kill_when(process, lambda goal=goal: shards(tmp_path) >= goal)
    making.make_again(processes, making.make_cache, tmp_path, text)
    assert making.hashes(the_cache(tmp_path)) == making.hashes(the_cache(whole))
    assert (tmp_path / "said").read_text().count("going on with") == KILLS
    assert list((tmp_path / "caches").glob(".*.partial")) == []


def test_cache_killed_while_a_shard_is_being_written_is_the_same(processes, text, whole, tmp_path):
    seed_of(tmp_path, whole)
    process = processes.Process(target=making.make_cache, args=(str(tmp_path), text))
    process.start()
    assert making.kill_when(process, lambda: making.found(tmp_path / "caches", ".*.partial/.*.tmp"))
    making.make_again(processes, making.make_cache, tmp_path, text)
    assert making.hashes(the_cache(tmp_path)) == making.hashes(the_cache(whole))


def test_shards_of_another_machine_are_not_gone_on_with(processes, text, whole, tmp_path):
    seed_of(tmp_path, whole)
    process = processes.Process(target=making.make_cache, args=(str(tmp_path), text))
    process.start()
    assert making.kill_when(process, lambda: shards(tmp_path) > 3)
    (note,) = (tmp_path / "caches").glob(".*.partial/.made_with.json")
    note.write_text(json.dumps(json.loads(note.read_text()) | {"machine": "another, bfloat16"}))
    making.make_again(processes, making.make_cache, tmp_path, text)
    assert "starting over" in (tmp_path / "said").read_text()
    assert making.hashes(the_cache(tmp_path)) == making.hashes(the_cache(whole))


def test_two_processes_at_once_make_it_once_and_the_second_says_who_is_at_it(processes, text, whole, tmp_path):
    seed_of(tmp_path, whole)
    both = [processes.Process(target=making.make_cache, args=(str(tmp_path), text)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    said = (tmp_path / "said").read_text()
    (waited,) = (line for line in said.splitlines() if line.startswith("waiting:"))
    assert any(f"process {process.pid}, since " in waited for process in both) or "it has just begun" in waited
    assert said.count("teacher outputs:") == 1
    assert making.hashes(the_cache(tmp_path)) == making.hashes(the_cache(whole))


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_processes_of_one_torchrun_make_one_cache(processes, text, whole, tmp_path, interrupted):
    seed_of(tmp_path, whole)

    def start(attempt):
        """Two processes with the environment that torchrun gives."""
        common = {"WORLD_SIZE": "2", "MASTER_PORT": "29500", "TORCHELASTIC_RESTART_COUNT": str(attempt)}
        crew = [
            processes.Process(
                target=making.make_cache,
                args=(str(tmp_path), text, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}),
            )
            for rank in range(2)
        ]
        for process in reversed(crew):  # the second is there first
            process.start()
        return crew

    if interrupted:
        for process in start(0):  # torchrun ends all when one dies
            assert making.kill_when(process, lambda: shards(tmp_path) > 6)
    crew = start(1)
    for process in crew:
        process.join(60)
    assert [process.exitcode for process in crew] == [0, 0]
    assert (tmp_path / "said").read_text().count("teacher outputs:") == 2
    assert making.hashes(the_cache(tmp_path)) == making.hashes(the_cache(whole))
