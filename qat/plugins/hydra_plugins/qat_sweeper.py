"""The sweeper that Hydra calls for `qat.sweeps`: launches the jobs of a plan that are not complete, all at once.

Hydra loads sweepers from the package `hydra_plugins` alone, which may lie in several folders of `sys.path`;
`qat.cli.sweeping` adds this one.
"""

from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper


class PlannedSweeper(BasicSweeper):
    """Runs what is left of the plan in `hydra.sweep.dir`, each job in the folder of its run."""

    def sweep(self, arguments: list[str]) -> Any:
        """Launches the remaining jobs; `arguments` are the first job's, with what is to change in all of them."""
        from qat import sweeps

        assert self.config is not None and self.launcher is not None
        plan = sweeps.load(Path(self.config.hydra.sweep.dir))
        changes = [text for text in arguments if text not in plan.jobs[0].overrides]
        left = plan.remaining()
        jobs = [[*sweeps.changed(job.overrides, changes), f"hydra.sweep.subdir={job.run_id}"] for job in left]
        return self.launcher.launch(jobs, initial_job_idx=0) if jobs else []
