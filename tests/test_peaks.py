"""The most that a phase takes: what was resident inside of it, and nothing of what came before or after."""

import json
import math
import resource
import sys

import pytest
import torch

from qat import peaks as module
from qat.peaks import Peaks, forget, taken
from tests import launching

CPU = torch.device("cpu")
MB = 10**6
linux = pytest.mark.skipif(sys.platform != "linux", reason="begins the count anew by /proc")


class Memory:
    """A computer's memory: what is resident, and the most that was since that was last forgotten."""

    def __init__(self):
        self.now = self.most = 0

    def hold(self, amount):
        """Memory that is there for a moment."""
        self.most = max(self.most, self.now + amount)

    def forget(self, device):
        self.most = self.now


@pytest.fixture
def memory(monkeypatch):
    made = Memory()
    monkeypatch.setattr(module, "taken", lambda device: made.most)
    monkeypatch.setattr(module, "forget", made.forget)
    return made


@pytest.fixture
def peaks(memory):
    """Peaks that began when 1,000 were resident."""
    found = Peaks()
    memory.hold(5000)
    memory.now = 1000
    found.begin(CPU)
    return found


def test_a_phase_has_what_was_taken_inside_of_it(memory, peaks):
    memory.hold(300)
    with peaks.phase("small"):
        memory.hold(40)
    memory.hold(300)
    with peaks.phase("large"):
        memory.hold(120)
        memory.hold(90)
    assert {name: one.device for name, one in peaks.found.items()} == {"small": 40, "large": 120}
    assert all(one.host == one.device for one in peaks.found.values())
    assert peaks.start == (1000, 1000)


def test_a_phase_inside_of_another_one_is_told_apart(memory, peaks):
    with peaks.phase("outer"):
        memory.hold(50)
        with peaks.phase("inner"):
            memory.hold(200)
        memory.hold(90)
    assert {name: one.device for name, one in peaks.found.items()} == {"outer": 90, "inner": 200}


def test_a_phase_that_comes_again_keeps_the_most(memory, peaks):
    for amount in (150, 20):
        with peaks.phase("again"):
            memory.hold(amount)
    assert peaks.found["again"].device == 150


def test_what_stays_counts_in_every_later_phase_and_what_goes_for_none(memory, peaks):
    with peaks.phase("first"):
        memory.now += 70
        memory.hold(0)
    with peaks.phase("second"):
        memory.hold(10)
    memory.now -= 500
    with peaks.phase("third"):
        memory.hold(10)
    assert {name: one.device for name, one in peaks.found.items()} == {"first": 70, "second": 80, "third": 0}


REAL = """
import importlib, json
import torch
from qat import peaks, system

importlib.reload(system)  # tests spare their processes the look for garbage

def hold(megabytes):
    torch.ones(megabytes * 10**6, dtype=torch.uint8)

hold(300)
kept = torch.ones(100 * 10**6, dtype=torch.uint8)
found = peaks.Peaks()
found.begin(torch.device("cpu"))
circle = {"held": torch.ones(400 * 10**6, dtype=torch.uint8)}
circle["itself"] = circle
del circle
hold(300)
with found.phase("little"):
    hold(100)
hold(300)
with found.phase("much"):
    hold(300)
print(json.dumps({"start": found.start} | {name: [one.device, one.host] for name, one in found.found.items()}))
"""


@linux
def test_what_is_resident_is_counted_by_the_system_and_what_nobody_has_any_more_is_not():
    """In a process of its own, as other tests leave much that may go at any time."""
    done = launching.python("-c", REAL)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert min(found.pop("start")) > 100 * MB
    for name, megabytes in (("little", 100), ("much", 300)):
        device, host = found.pop(name)
        assert device == host
        assert math.isclose(device, megabytes * MB, abs_tol=60 * MB), name
    assert not found


def test_where_the_count_cannot_begin_anew_it_is_that_of_the_process(monkeypatch, tmp_path):
    for name in ("STATUS", "FORGET"):
        monkeypatch.setattr(module, name, tmp_path / "none" / name)
    forget(CPU)
    unit = 1 if sys.platform == "darwin" else 1024
    assert taken(CPU) == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, rel=0.01)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_memory_of_recorded_graphs_counts():
    device = torch.device("cuda")
    found = Peaks()
    found.begin(device)
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        hidden = torch.ones(200 * MB, dtype=torch.uint8, device=device)
        del hidden
    with found.phase("replayed"):
        graph.replay()
    assert found.found["replayed"].device >= 200 * MB
