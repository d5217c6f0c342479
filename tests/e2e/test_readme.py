"""What the READMEs say is so: their program runs, their tests, files and commands exist, and both say the same."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from polymodal.cli import build_parser

ROOT = Path(__file__).resolve().parents[2]
READMES = ["README.md", "README.zh.md"]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def program_in(name: str) -> str:
    (program,) = re.findall(r"```python\n(.*?)```", read(name), flags=re.DOTALL)
    return program


def named_tests(name: str) -> list[str]:
    return re.findall(r"`(tests/[\w/]+\.py::\w+)`", read(name))


def test_the_python_program_runs() -> None:
    done = subprocess.run([sys.executable, "-c", program_in("README.md")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = [line for line in done.stdout.splitlines() if line.strip()]
    assert len(answers) >= 4
    assert any(re.fullmatch(r"\d+ image tokens, [\d.]+ tokens/s", line) for line in answers)


def test_the_python_program_is_short_and_the_same_in_both_languages() -> None:
    def code(name: str) -> str:
        return ast.dump(ast.parse(program_in(name)))

    assert code("README.md") == code("README.zh.md")
    assert len([line for line in program_in("README.md").splitlines() if line.strip()]) <= 15


@pytest.mark.parametrize("name", READMES)
def test_every_row_names_a_test_that_exists(name: str) -> None:
    rows = [row for row in re.split(r"\n## ", read(name))[1].splitlines() if row.startswith("| ")]
    assert len(rows) - 1 == len(named_tests(name)) > 10  # the header has none
    for reference in named_tests(name):
        path, function = reference.split("::")
        assert (ROOT / path).is_file(), path
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert function in names, reference


def test_both_languages_name_the_same_tests_and_commands() -> None:
    assert named_tests("README.md") == named_tests("README.zh.md")
    assert [c[:2] for c in commands_in("README.md")] == [c[:2] for c in commands_in("README.zh.md")]


def commands_in(name: str) -> list[list[str]]:
    """The `polymodal …` lines of a README's indented blocks, without the remark after two spaces."""
    found = []
    for line in re.findall(r"^    (.*polymodal .*)$", read(name), flags=re.MULTILINE):
        command = re.split(r"\s{2,}", line.split("&&")[-1].strip())[0]
        found.append(shlex.split(command.replace("[", "").replace(" ...]", "")))
    return found


@pytest.mark.parametrize("command", commands_in("README.md"), ids=" ".join)
def test_every_command_is_understood(command: list[str]) -> None:
    assert command[0] == "polymodal"
    assert callable(build_parser().parse_args(command[1:]).run)


@pytest.mark.parametrize("name", [*READMES, *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))])
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", read(name)):
        if not target.startswith("https://"):  # other sites are not asked: tests run offline
            assert ((ROOT / name).parent / target).exists(), target


def test_make_knows_the_targets_that_are_named() -> None:
    makefile = read("Makefile")
    (line,) = re.findall(r"^    make (test .*)$", read("README.md"), flags=re.MULTILINE)
    for target in ["demo", *line.split(" | ")]:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_every_shipped_image_is_credited() -> None:
    folder = ROOT / "examples" / "pictures"
    credits = (folder / "CREDITS.md").read_text(encoding="utf-8")
    images = [path.name for path in folder.iterdir() if path.suffix in (".jpg", ".png")]
    assert len(images) >= 4
    for image in images:
        assert f"`{image}`" in credits
        assert (folder / image).stat().st_size <= 100_000


@pytest.mark.parametrize("name", READMES)
def test_every_extra_is_named(name: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    rows = re.findall(r"^\| `(\w+)` \| \S", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == list(extras)
