"""The memory that a run can use: of the computer, of its container, or of a GPU."""

from pathlib import Path

import psutil
import torch

# Where a container's memory limit, its use and its reclaimable part are read: first cgroup 2, then cgroup 1.
CONTAINERS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def host() -> tuple[int, int]:
    """Free and total bytes of memory for this process; memory in reclaimable caches counts as free."""
    memory = psutil.virtual_memory()
    free, whole = memory.available, memory.total
    for folder, limit, usage, idle in CONTAINERS:
        allowed = _number(folder / limit)
        if allowed is not None and allowed < whole:
            given_back = _listed(folder / "memory.stat").get(idle, 0)
            free, whole = min(free, allowed - (_number(folder / usage) or 0) + given_back), allowed
    return max(0, free), whole


def device(which: torch.device) -> int | None:
    """Bytes that are free on a GPU; None for a device that shares the computer's memory."""
    return int(torch.cuda.mem_get_info(which)[0]) if which.type == "cuda" else None


def whole(which: torch.device) -> int | None:
    """Bytes of a GPU's memory; None for a device that shares the computer's."""
    return int(torch.cuda.get_device_properties(which).total_memory) if which.type == "cuda" else None


def roomy(needed: float, which: torch.device) -> bool:
    """Whether a device has room for so many bytes and as many again for what is done with them."""
    free = device(which)
    return 2 * needed <= (host()[0] if free is None else free)


def _number(path: Path) -> int | None:
    """The number in a file; None if there is no file or no limit."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _listed(path: Path) -> dict[str, int]:
    try:
        pairs = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
