"""The most that a phase takes: what was resident inside of it, and nothing of what came before or after."""

import gc
import math
import resource
import sys

import pytest
import torch

from qat import peaks as module
from qat.peaks import Peaks, forget, taken

CPU = torch.device("cpu")
MB = 10**6
pytestmark = pytest.mark.usefixtures("tidied")
linux = pytest.mark.skipif(sys.platform != "linux", reason="begins the count anew by /proc")


def hold(megabytes):
    """Memory that is there for a moment, every page of it touched."""
    torch.ones(megabytes * MB, dtype=torch.uint8)


@pytest.fixture
def peaks():
    left = math.inf
    while left > (left := empty()) + MB:  # what would go inside of a phase goes before
        pass
    found = Peaks()
    found.begin(CPU)
    return found


def empty():
    """Bytes that are resident once what is free has gone."""
    hold(300)
    while gc.collect():
        pass
    forget(CPU)
    return taken(CPU)


@linux
def test_a_phase_has_what_was_taken_inside_of_it(peaks):
    hold(300)
    with peaks.phase("small"):
        hold(40)
    hold(300)
    with peaks.phase("large"):
        hold(120)
    assert 35 * MB < peaks.found["small"].device < 90 * MB
    assert 115 * MB < peaks.found["large"].device < 170 * MB
    assert peaks.found["small"].host == peaks.found["small"].device


@linux
def test_a_phase_inside_of_another_one_is_told_apart(peaks):
    with peaks.phase("outer"):
        hold(50)
        with peaks.phase("inner"):
            hold(200)
        hold(90)
    assert 85 * MB < peaks.found["outer"].device < 140 * MB
    assert 195 * MB < peaks.found["inner"].device < 250 * MB


@linux
def test_a_phase_that_comes_again_keeps_the_most(peaks):
    for megabytes in (150, 20):
        with peaks.phase("again"):
            hold(megabytes)
    assert 145 * MB < peaks.found["again"].device < 200 * MB


@linux
def test_what_was_there_at_the_start_counts_for_no_phase():
    kept = torch.ones(100 * MB, dtype=torch.uint8)
    found = Peaks()
    found.begin(CPU)
    with found.phase("little"):
        hold(30)
    assert found.start[0] > kept.nbytes and found.found["little"].device < 80 * MB


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


@linux
def test_what_nobody_has_any_more_counts_for_no_phase(peaks):
    circle = {"held": torch.ones(200 * MB, dtype=torch.uint8)}
    circle["itself"] = circle
    del circle
    with peaks.phase("little"):
        hold(30)
    assert peaks.found["little"].device < 80 * MB
