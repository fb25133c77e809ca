"""A V2 state dict or its folder is a checkpoint to the command line, found without torch."""

import pytest

from qat.cli import arguments, main, registered
from qat.errors import ConfigError


@pytest.fixture
def state_dict(here):
    file = here / "old" / "best_state_dict.pt"
    file.parent.mkdir()
    file.write_bytes(b"not opened here")
    return file


@pytest.mark.parametrize("stage", ["distill", "evaluate", "chat"])
@pytest.mark.parametrize("path", ["old", "old/best_state_dict.pt"])
def test_a_v2_checkpoint_passes(state_dict, compose, stage, path):
    config = compose(f"stage={stage}", f"checkpoint={path}", "mode=e2e", "quant=q2a16")
    registered.check(config)
    assert (config.checkpoint.name, config.checkpoint.path) == ("local", path)


def test_in_a_process_without_torch(state_dict, launch_alone):
    done = launch_alone("stage=evaluate", "checkpoint=old/best_state_dict.pt")
    assert (done.code, done.err, done.heavy) == (0, "", [])


@pytest.mark.parametrize(
    ("path", "says"),
    [("several", "several state dicts (a.pt, b.pt)"), ("several/notes.txt", "name a checkpoint folder or a V2 state")],
)
def test_what_is_none_is_told(here, path, says):
    (here / "several").mkdir()
    for name in ("a.pt", "b.pt", "notes.txt"):
        (here / "several" / name).touch()
    with pytest.raises(ConfigError) as refused:
        main.check(arguments.parse(["stage=evaluate", f"checkpoint={path}"]))
    assert says in str(refused.value)
