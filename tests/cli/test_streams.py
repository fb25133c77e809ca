"""A run outlives whoever reads what it says."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SAYS = """
import os, sys
sys.path.insert(0, sys.argv[1])
from qat.cli.streams import outlive_readers
outlive_readers()
sys.stdin.readline()
from rich.console import Console
import logging
logging.basicConfig(stream=sys.stdout, level=logging.INFO)
for number in range(3):
    print("line", number, flush=True)
    Console().print("shown", number)
    logging.info("told %d", number)
os.write(1, b"by a library")
print("the end", file=sys.stderr)
"""


def said_by(first_closed: bool) -> tuple[int, str, str]:
    """Exit code, standard output and error of a process whose reader may be gone before it says anything."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", SAYS, str(ROOT)], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    out = ""
    if first_closed:
        process.stdout.close()
    process.stdin.write("\n")
    process.stdin.close()
    if not first_closed:
        out = process.stdout.read()
    err = process.stderr.read()
    return process.wait(60), out, err


def test_what_is_read_arrives():
    code, out, err = said_by(first_closed=False)
    assert (code, err.splitlines()[-1]) == (0, "the end")
    assert [f"line {n}" in out and f"shown {n}" in out for n in range(3)] == [True] * 3 and out.endswith("by a library")


def test_a_reader_that_is_gone_ends_nothing():
    assert said_by(first_closed=True)[::2] == (0, "the end\n")


def test_a_command_goes_on_behind_head(tmp_path):
    words = [sys.executable, str(ROOT / "launch.py"), "--help"]
    first = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path, env=dict(os.environ))
    first.stdout.readline()
    first.stdout.close()
    assert (first.stderr.read(), first.wait(60)) == (b"", 0)
