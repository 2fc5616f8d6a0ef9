"""A kernel that spins without atomics never returns: the watchdog ends the process and says where."""

import re
import subprocess
import sys

import pytest

import emulated

CODE = """
import cases_bugs, emulated
print(cases_bugs.run(emulated.load(emulated.library_path("plain")), "plain", "exchange", "spin_on_memory"))
"""


@pytest.mark.usefixtures("libraries")
def test_spin_loop_is_reported():
    environment = {"SIMT_WATCHDOG": "1", "PYTHONPATH": str(emulated.HERE), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert re.search(r"simt watchdog: block \(\d,0,0\) thread \d+ has run for 1 s", done.stderr)
