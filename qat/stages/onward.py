"""What a person types next."""

import shlex

from qat.config import Config
from qat.installation import command
from qat.runs import Run
from qat.shown import near

OUTPUTS = str(Config.__dataclass_fields__["outputs"].default)


def onward(config: Config, run: Run, stage: str) -> str:
    """The command of a stage that goes on with a run's checkpoint.

    Training takes the run's configuration, and so its text; for others the checkpoint says enough, where it is found.
    """
    known = [f"--config-path {shlex.quote(near(run.folder))}"] if stage == "distill" else []
    place = [] if known or config.outputs == OUTPUTS else [shlex.quote(f"outputs={config.outputs}")]
    return " ".join([command(), *known, f"stage={stage}", f"checkpoint={run.result['run_id']}", *place])
