"""Everything that can go wrong in a way the user can mend, as one small tree.

    QatError                 one clear sentence: what is wrong, where, what to do (exit code 1)
    ├── ConfigError          the command line or a configuration value is wrong (exit code 2)
    ├── MissingError         something asked for is not there: weights, checkpoint, cache, device
    ├── UnavailableError     the option is part of the design, its machinery is not installed
    ├── ArtifactError        a file is damaged, foreign or of another format
    ├── MachineError         memory or disk is used up, or a folder cannot be written
    ├── NumericsError        a value that must be finite or positive is not
    └── RankError            another of the processes that train together is gone

Anything else that is raised is a defect of this project, and keeps its traceback.
"""


LONGEST = 400  # maximum characters of another library's message that are shown


class QatError(Exception):
    """Base of every error that is told to the user as one sentence."""

    exit_code = 1


class ConfigError(QatError):
    """A wrong key, option, type or combination on the command line or in a file."""

    exit_code = 2


class MissingError(QatError):
    """Weights, a checkpoint, a cache or a device that is asked for cannot be had."""


class UnavailableError(QatError):
    """A known option whose machinery is not part of this installation."""


class ArtifactError(QatError):
    """A file that is truncated, altered or of a format this version does not read."""


class MachineError(QatError):
    """The machine is out of memory or disk, or refuses to write where it should."""


class NumericsError(QatError):
    """Zeros, infinities or NaN where the mathematics needs ordinary numbers."""


class RankError(QatError):
    """Another of the processes that train together has ended; it knows why, this one does not."""


def reason(error: BaseException) -> str:
    """What another library says went wrong, in one line, cut short where it repeats what a file holds."""
    said = _reason(error)
    return said if len(said) <= LONGEST else f"{said[:LONGEST]} …"


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if isinstance(error, KeyError):  # its text is only the missing key
        return f"no {lines[0]}"
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
