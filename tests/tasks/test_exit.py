"""A command that is told to stop is soon gone, whatever it has imported."""

from __future__ import annotations

import subprocess
import sys

_LOOP = """
class Loop:
    def __del__(self):
        print("collected")

loop = Loop()
loop.itself = loop
"""


def test_no_garbage_is_looked_for_at_the_end_of_a_process() -> None:
    def said(first: str) -> str:
        return subprocess.run([sys.executable, "-c", first + _LOOP], capture_output=True, text=True, check=True).stdout

    assert said("") == "collected\n", "what Python does by itself"
    assert said("import tasks") == ""
