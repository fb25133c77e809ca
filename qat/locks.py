"""Locks of processes: each is a file of its own, and the kernel releases it when its process is gone, however it went.

The file stays when its lock is released, since whoever waits may have it open already: two processes would hold the
locks of two files of one name. On a file system without locks nothing is locked in another way (`OSError` instead), as
a file that stands for a lock outlives who made it. What a process forks does not hold what it holds.
"""

import json
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filelock import BaseFileLock

FIRST = 1  # bytes that precede the holder's name: on Windows nobody else can read the first one, which is locked


def take(path: Path) -> "BaseFileLock | None":
    """Takes a lock, until it is released, dropped, or this process ends; None while somebody else holds it."""
    from filelock import FileLock, Timeout  # as long to import as a third of what a command line needs

    lock = FileLock(path, blocking=False, preserve_lock_file=True, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        return None
    name = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%H:%M:%S")})
    with open(path, "r+b") as file:
        file.seek(FIRST)
        file.write(name.encode())
        file.truncate()
    return lock


def holder(path: Path) -> str:
    """Who holds a lock, as it wrote itself into the file."""
    try:
        with open(path, "rb") as file:
            file.seek(FIRST)
            said = json.loads(file.read())
        where = "" if said["host"] == socket.gethostname() else f" on {said['host']}"
        return f"process {said['pid']}{where}, since {said['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # the holder has not written its name yet
        return "it has just begun"
