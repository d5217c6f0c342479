"""The benchmark of starts times processes, and its script of steps is Python that names every step once."""

from __future__ import annotations

import re
import sys

from benchmarks.start import GOALS, STEPS, timed


def test_a_process_is_timed_by_wall_and_processor() -> None:
    wall, processor = timed([sys.executable, "-c", "import time; time.sleep(0.4); sum(range(3_000_000))"])
    assert 0.4 < wall < 30 and 0.01 < processor < wall


def test_the_steps_are_python() -> None:
    compile(STEPS, "steps", "exec")
    names = re.findall(r'step\("(.*?)"\)', STEPS)
    assert len(names) == len(set(names)) == 6 and "generate, a graph" in GOALS
