"""A lock is one process's, which says so, until it is released or the process is gone; its file stays."""

import os
import signal
from pathlib import Path

from qat import locks

ROOT = Path(__file__).resolve().parents[1]


def forked(work) -> int:
    """What some work in a forked process returns."""
    process = os.fork()
    if not process:
        code = 99
        try:
            code = int(work())
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_a_lock_is_held_once_and_says_by_whom(tmp_path):
    path = tmp_path / ".name.lock"
    lock = locks.take(path)
    assert lock is not None and locks.take(path) is None
    assert forked(lambda: locks.take(path) is None) == 1
    assert locks.holder(path).startswith(f"process {os.getpid()}, since ")
    lock.release()
    assert path.exists()  # somebody may wait for this very file
    assert forked(lambda: locks.take(path) is None) == 0


def test_what_waits_has_the_file_that_the_next_one_opens(tmp_path):
    path = tmp_path / ".lock"
    inodes = []
    for _ in range(3):
        lock = locks.take(path)
        inodes.append(path.stat().st_ino)
        lock.release()
    assert len(set(inodes)) == 1


def test_a_killed_holder_holds_nothing(tmp_path):
    path = tmp_path / ".lock"

    def hold():
        kept = locks.take(path)
        os.kill(os.getpid(), signal.SIGKILL)
        return kept is None

    assert forked(hold) == -signal.SIGKILL
    lock = locks.take(path)
    assert lock is not None
    lock.release()


def test_a_forked_process_that_outlives_the_holder_holds_nothing(tmp_path):
    path, (read, write) = tmp_path / ".lock", os.pipe()

    def hold():
        kept = locks.take(path)
        if not os.fork():
            os.close(write)
            os.read(read, 1)  # until the test is done
        return kept is None

    assert forked(hold) == 0
    lock = locks.take(path)
    assert lock is not None
    lock.release()
    for end in (read, write):
        os.close(end)


def test_a_holder_without_a_name_has_just_begun(tmp_path):
    (tmp_path / "x").write_bytes(b"")
    assert {locks.holder(tmp_path / name) for name in ("x", "y")} == {"it has just begun"}
