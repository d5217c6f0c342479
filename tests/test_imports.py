"""The import rule of docs/architecture.md, and that the command line and the package start light."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

import polymodal

SRC = Path(polymodal.__file__).parent
HEAVY = {
    "torch",
    "transformers",
    "PIL",
    "numpy",
    "peft",
    "accelerate",
    "matplotlib",
    "tokenizers",
    "safetensors",
    "pyarrow",
}

BASE = {"errors", "config", "messages", "geometry", "files", "page", "sandbox", "sandbox_size"}
RAW_INPUT = {"media", "processing"}
NETWORK = {
    "encoders",
    "projectors",
    "representation",
    "tokenizers",
    "llm",
    "attention",
    "loss",
    "seq2seq",
    "quantize",
    "model",
    "compose",
    "checkpoints",
}
JOIN = {"generation", "backends", "exchange"}
BELOW_TOP = BASE | RAW_INPUT | NETWORK | JOIN

ALLOWED = {
    **dict.fromkeys(BASE, BASE),
    **dict.fromkeys(RAW_INPUT, BASE | RAW_INPUT),
    **dict.fromkeys(NETWORK, BASE | NETWORK),
    **dict.fromkeys(JOIN, BELOW_TOP),
    # Records and readers: raw input only, so that data can be checked and built without a model.
    "data": BASE | RAW_INPUT | {"data"},
    "training": BELOW_TOP | {"data", "training"},
    "evaluation": BELOW_TOP | {"data", "evaluation"},
    "serving": BELOW_TOP | {"serving"},
    # The package's own front door: `polymodal.load` and the public names.
    "__init__": BELOW_TOP,
    "cli": BELOW_TOP | {"data", "training", "evaluation", "serving", "cli"},
    "__main__": {"cli"},
}
"""Which top-level parts of the package each part may import."""


def part_of(path: Path) -> str:
    """The top-level part that a source file belongs to: "media" for media/image.py, "config" for config.py."""
    first = path.relative_to(SRC).parts[0]
    return first.removesuffix(".py")


def parts_imported(source: str, package: tuple[str, ...]) -> set[str]:
    """Every part of polymodal that a module imports, at its top or inside functions; type-only imports do not count.

    Args:
        source: The module's text.
        package: The dotted package that relative imports start from, ("polymodal", "media") for media/image.py.
    """
    found: set[str] = set()

    def add(module: str, names: list[str]) -> None:
        if module == "polymodal":
            # `from polymodal import config`, or a public name of the package itself.
            for name in names:
                is_part = (SRC / f"{name}.py").exists() or (SRC / name).is_dir()
                found.add(name if is_part else "__init__")
        elif module.startswith("polymodal."):
            found.add(module.split(".")[1])

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "polymodal":
                    found.add("__init__")
                add(alias.name, [])
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                start = package[: len(package) - node.level + 1]
                module = ".".join((*start, *([module] if module else [])))
            add(module, [alias.name for alias in node.names])
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


FILES = sorted(SRC.rglob("*.py"))


def test_every_part_has_a_rule() -> None:
    assert {part_of(path) for path in FILES} <= set(ALLOWED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_import_rule(path: Path) -> None:
    package = ("polymodal", *path.relative_to(SRC).parts[:-1])
    forbidden = parts_imported(path.read_text(encoding="utf-8"), package) - ALLOWED[part_of(path)]
    assert not forbidden, f"{part_of(path)} must not import {sorted(forbidden)}"


@pytest.mark.parametrize(
    ("source", "package", "expected"),
    [
        ("from polymodal.model import X", ("polymodal",), {"model"}),
        ("from polymodal import config", ("polymodal",), {"config"}),
        ("from polymodal import load", ("polymodal",), {"__init__"}),
        ("import polymodal.media.image as m", ("polymodal",), {"media"}),
        ("def f():\n    from ..encoders import vision", ("polymodal", "media"), {"encoders"}),
        ("from . import image", ("polymodal", "media"), {"media"}),
        ("if TYPE_CHECKING:\n    from polymodal.model import X", ("polymodal",), set()),
        ("import torch", ("polymodal",), set()),
    ],
)
def test_the_reader_of_imports_sees_every_form(source: str, package: tuple[str, ...], expected: set[str]) -> None:
    assert parts_imported(source, package) == expected


def heavy_after(code: str) -> set[str]:
    """Which heavy libraries a fresh interpreter has loaded after running `code`."""
    script = f"{code}\nimport sys\nprint('LOADED', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = next(line for line in done.stdout.splitlines() if line.startswith("LOADED")).split()
    return HEAVY & {name.split(".")[0] for name in loaded}


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert heavy_after("import polymodal") == set()


def test_the_base_and_the_command_line_load_nothing_heavy() -> None:
    code = "import polymodal.cli, polymodal.config, polymodal.messages, polymodal.geometry, polymodal.errors"
    assert heavy_after(f"{code}\npolymodal.cli.build_parser()") == set()


def test_help_answers_within_a_second() -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "polymodal", "--help"], capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - start)
    assert "usage: polymodal" in done.stdout
    # The best of three: a busy machine slows a run down, nothing speeds one up.
    assert min(times) < 1.0
