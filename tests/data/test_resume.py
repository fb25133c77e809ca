"""Text that the teacher writes is gone on with after `kill -9`, and is the same in the end, byte for byte."""

import random

import pytest

from tests import launching, making

PROMPTS = 120  # four of which are a batch
KILLS = 2


@pytest.fixture(scope="module")
def processes():
    return launching.processes()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(f"Question {number}, {'and ' * (number % 5)}why?" for number in range(PROMPTS)))
    return str(path)


def the_documents(outputs):
    (folder,) = (path for path in (outputs / "documents").iterdir() if path.is_dir())
    return making.hashes(folder)


def batches(outputs):
    return len(making.found(outputs / "documents", ".*.partial/.answers-*.safetensors"))


def test_answers_killed_again_and_again_are_the_same_in_the_end(processes, prompts, tmp_path):
    whole, killed_there = tmp_path / "whole", tmp_path / "killed"
    making.make_again(processes, making.make_answers, whole, prompts)
    draw = random.Random(1)
    for _ in range(KILLS):
        process = processes.Process(target=making.make_answers, args=(str(killed_there), prompts))
        process.start()
        goal = batches(killed_there) + draw.randrange(1, PROMPTS // 4 // (KILLS + 2))
        assert making.kill_when(process, lambda goal=goal: batches(killed_there) >= goal)
    making.make_again(processes, making.make_answers, killed_there, prompts)
    assert the_documents(killed_there) == the_documents(whole)
