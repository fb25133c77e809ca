"""What a person types next."""

import shlex

from qat.config import Config
from qat.installation import command
from qat.options import defaults
from qat.runs import Run
from qat.shown import near

OUTPUTS = str(Config.__dataclass_fields__["outputs"].default)


def onward(config: Config, run: Run, stage: str) -> str:
    """The command of a stage that goes on with a run's checkpoint.

    It names the run's configuration where the defaults would take another model, or look for the run elsewhere.
    """
    plain = config.model.name == defaults()["model"] and config.outputs == OUTPUTS
    known = [] if plain else [f"--config-path {shlex.quote(near(run.folder))}"]
    return " ".join([command(), *known, f"stage={stage}", f"checkpoint={run.result['run_id']}"])
