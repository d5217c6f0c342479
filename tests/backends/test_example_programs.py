"""The example programs on tiny random weights of the classes that they are for."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_llava_next_describes_a_image(tiny_vlm: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "describe_picture.py"))["main"](str(tiny_vlm("llava_next")))
    assert capsys.readouterr().out.strip()


def test_three_images_are_compared(tiny_vlm: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "compare_pictures.py"))["main"](str(tiny_vlm("idefics3")))
    counts = re.search(r"\[3 images: (\d+) of (\d+) prompt tokens\]", capsys.readouterr().out)
    assert counts is not None and 0 < int(counts[1]) < int(counts[2])


@pytest.mark.parametrize("script", ["describe_picture.py", "compare_pictures.py"])
def test_a_mistake_is_one_line(script: str) -> None:
    argv = [sys.executable, str(EXAMPLES / script), "absent/folder/of/a/model"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "no such model folder" in done.stderr
