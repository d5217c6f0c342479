"""What the READMEs say is so: their program runs, their tests, files and commands exist, and both say the same."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from polymodal.cli import build_parser

ROOT = Path(__file__).resolve().parents[2]
READMES = ["README.md", "README.zh.md"]
LISTS = ["docs/what-works.md", "docs/what-works.zh.md"]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def programs_in(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", read(name), flags=re.DOTALL)


def program_in(name: str) -> str:
    """The one that asks the default model; the other composes a model."""
    first, _ = programs_in(name)
    return first


def named_tests(name: str) -> list[str]:
    return re.findall(r"`(tests/[\w/]+\.py::\w+)`", read(name))


def test_the_python_program_runs() -> None:
    done = subprocess.run([sys.executable, "-c", program_in("README.md")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = [line for line in done.stdout.splitlines() if line.strip()]
    assert len(answers) >= 4
    assert any(re.fullmatch(r"\d+ image tokens, [\d.]+ tokens/s", line) for line in answers)


def test_the_composing_program_runs(tmp_path: Path) -> None:
    """On random parts of the same families, in place of those that it names on the hub."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    from recipes.tiny.make_parts import main as make_parts

    make_parts(tmp_path)
    tower = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    SiglipVisionModel(tower).save_pretrained(tmp_path / "tower")
    shutil.copytree(ROOT / "examples/pictures", tmp_path / "pictures")
    says = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "An apple."}]
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "apple.png", "conversations": says}] * 30))
    program = programs_in("README.md")[1]
    assert program == programs_in("README.zh.md")[1] and len(program.splitlines()) <= 13
    for name, folder in (("google/siglip-base-patch16-224", "tower"), ("Qwen/Qwen2.5-0.5B-Instruct", "llm")):
        assert name in program
        program = program.replace(name, folder)
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my_model" / "polymodal.json").is_file()


def test_the_python_program_is_short_and_the_same_in_both_languages() -> None:
    def code(name: str) -> str:
        return ast.dump(ast.parse(program_in(name)))

    assert code("README.md") == code("README.zh.md")
    assert len([line for line in program_in("README.md").splitlines() if line.strip()]) <= 15


@pytest.mark.parametrize("name", [*READMES, *LISTS])
def test_every_row_names_a_test_that_exists(name: str) -> None:
    text = read(name) if name in LISTS else re.split(r"\n## ", read(name))[1]
    rows = [row for row in text.splitlines() if row.startswith("| ")]
    assert len(rows) - 1 == len(named_tests(name)) > 10  # the header has none
    for reference in named_tests(name):
        path, function = reference.split("::")
        assert (ROOT / path).is_file(), path
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert function in names, reference


def test_both_languages_name_the_same_tests_and_commands() -> None:
    assert named_tests("README.md") == named_tests("README.zh.md")
    assert named_tests(LISTS[0]) == named_tests(LISTS[1]) and set(named_tests("README.md")) <= set(
        named_tests(LISTS[0])
    )
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
