"""docs/evaluation.md: its commands and programs run, on the tiny model and on generated sets."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.evaluation.mini.__main__ import WRITERS
from polymodal.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, flags=re.DOTALL)
COMMANDS = [line for language, block in BLOCKS if language == "sh" for line in block.splitlines() if line.strip()]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path, image_folder: Path) -> Path:
    """A folder with what the page speaks of: `default` is the tiny model there, and answers are kept apart."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model_folder, "default")
    rows = next(block for language, block in BLOCKS if language == "json")
    Path("rows.json").write_text(rows, encoding="utf-8")
    shutil.copytree(image_folder, "images")
    for name in ("vqav2", "gqa", "textvqa", "docvqa", "mmmu", "mmbench"):
        WRITERS[name](Path("mini") / name, 4)
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path / "cache"))
    return tmp_path


def run(command: str) -> None:
    words = shlex.split(command)
    assert words[0] == "polymodal", command
    short = ["--max-new-tokens", "2"] if words[2] not in ("tasks", "rescore", "diff") else []
    assert main([*words[1:], *short]) == 0, command


def test_the_commands_run(place: Path) -> None:
    assert len(COMMANDS) >= 8
    for command in COMMANDS:
        if command.startswith("python -m benchmarks.evaluation.mini"):
            continue  # the fixture wrote the same
        if "--tasks demo" in command:
            command += " --limit 1 --no-blind"
        if " rescore answers.json" in command:
            asked = [
                json.loads(line)
                for line in Path("runs/eval/default/gqa_testdev/samples.jsonl").read_text().splitlines()
            ]
            everything = json.loads(next(Path("mini/gqa").glob("testdev*questions.json")).read_text())
            answers = {sample["id"]: sample["answer"] for sample in asked}
            Path("answers.json").write_text(json.dumps([{"id": i, "answer": answers.get(i, "")} for i in everything]))
        if " diff " in command:
            for name in ("before", "after"):
                shutil.copytree("runs/eval/default", f"runs/eval/{name}")
        run(command)


def test_the_programs_run(place: Path) -> None:
    Path("answers.jsonl").write_text('{"answer": "9 May 1980", "answers": ["9 may 1980"]}\n')
    Path("signs").mkdir()
    Path("signs/val.json").write_text(
        json.dumps([{"id": 1, "question": "What does it say?", "image": "../images/cat.jpg", "answers": ["stop"]}])
    )
    programs = [block for language, block in BLOCKS if language == "python"]
    assert len(programs) == 2
    said = []
    for program in programs:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.strip())
    assert said[0] == "1.0" and said[1].startswith("{'score': ")


def test_a_metric_a_task_and_a_flag_that_the_page_names_exist() -> None:
    from polymodal.cli import build_parser
    from polymodal.evaluation.tasks import find_task
    from polymodal.metrics import CORPUS_METRICS, METRICS

    for name in ("exact", "contains", "anls", "vqa_accuracy", "rouge_l"):
        assert name in METRICS
    assert "cider" in CORPUS_METRICS
    for name in re.findall(r"`(mmmu_val|docvqa_test|gqa_testdev)`", PAGE):
        find_task(name)
    known = build_parser(["eval"]).format_help() + "".join(
        action.format_help()
        for action in build_parser(["eval"])._subparsers._group_actions[0].choices.values()  # type: ignore[union-attr,attr-defined]
    )
    for flag in re.findall(r"`(--[a-z-]+)", PAGE):
        assert flag in known, flag
