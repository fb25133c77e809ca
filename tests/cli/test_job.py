"""What a stage without a record leaves."""

import sys
from types import ModuleType

import pytest

from qat.cli import job


@pytest.mark.parametrize("warned", [False, True])
def test_a_stage_without_a_record_leaves_no_folder_but_for_a_warning(compose, here, monkeypatch, warned):
    stages, folder = ModuleType("qat.stages"), here / "outputs" / "chat"
    stages.run_job = lambda *_: (folder / "train.log").touch() if warned else None
    monkeypatch.setitem(sys.modules, "qat.stages", stages)
    folder.mkdir(parents=True)
    job.start(compose("stage=chat"), folder, "", [])
    assert folder.exists() is warned
