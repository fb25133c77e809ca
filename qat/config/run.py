"""What is said of a run, and which run or sweep goes on."""

from dataclasses import dataclass

from qat.config.keys import key


@dataclass
class RunConfig:
    """What the run log says about a run in the user's own words."""

    goal: str = key("", "what it is for", prose=True)
    notes: str = key("", "anything else", prose=True)
    resume: str | None = key(None, "SR-007 or its folder: go on with that interrupted run, where it lies")


@dataclass
class SweepConfig:
    """Going on with a sweep."""

    resume: str | None = key(None, "sweep-001 or its folder: runs what is not complete there")
