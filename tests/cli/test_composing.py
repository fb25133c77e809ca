"""What tests compose once is, node for node, what Hydra composes each time."""

import pytest
from hydra._internal import config_loader_impl
from hydra.types import RunMode
from omegaconf import Container

from qat.cli import recorded
from qat.cli.compose import Composer
from qat.identities import RESOLVED
from tests import composing

LINES = ["", "+debug=tiny train.lr=1e-3", "quant=q2a16 quant.mlp.bits=3", "~tracker tracker=none", "-m seed=1,2"]


def nodes(found, name=""):
    """Every node by its name: its class, its type, its flags, and its value."""
    below = found._content if isinstance(found, Container) else found._value()
    said = (type(found), found._metadata.ref_type, found._metadata.optional, dict(found._metadata.flags or {}))
    yield name, said, None if isinstance(below, dict | list) else below
    pairs = below.items() if isinstance(below, dict) else enumerate(below) if isinstance(below, list) else ()
    for key, node in pairs:
        yield from nodes(node, f"{name}.{key}")


def composed(line):
    words = line.removeprefix("-m").split()
    loader = Composer({}).loader
    return list(nodes(loader.load_configuration("config", words, RunMode.MULTIRUN if "-m" in line else RunMode.RUN)))


@pytest.mark.parametrize("line", LINES)
def test_it_is_what_hydra_composes(line, monkeypatch):
    assert config_loader_impl.create_defaults_list is composing._listed
    ours, again = composed(line), composed(line)
    monkeypatch.setattr(composing, "_is_ours", lambda repo: False)
    assert ours == again == composed(line)
    assert len(ours) > 200


def test_recorded_runs_are_each_their_own(tmp_path):
    found = []
    for steps in (3, 5):
        (tmp_path / recorded.FILE).write_text(f"train: {{steps: {steps}}}\n")
        recorded.offer(recorded.offered(tmp_path / recorded.FILE), ())
        loader = Composer({}).loader
        found.append(loader.load_configuration(RESOLVED, [], RunMode.RUN).train.steps)
    assert found == [3, 5]
