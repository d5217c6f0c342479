"""The import rule of docs/architecture.md: floors, circles, a light start, and a public face that is all there."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import polymodal
from tools import house

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
    "av",
    "openai",
}

ROOT = Path(__file__).resolve().parents[1]
GRAPH = house.import_graph()


def test_every_room_has_a_floor() -> None:
    assert {house.room_of(name) for name in GRAPH} <= {room for rooms in house.FLOORS.values() for room in rooms}


@pytest.mark.parametrize("name", GRAPH)
def test_arrows_point_down(name: str) -> None:
    room = house.room_of(name)
    wrong = sorted(other for other in GRAPH[name] if not house.may_import(room, house.room_of(other)))
    assert not wrong, f"{room} must not import {wrong}"


def test_no_module_imports_itself_around_a_corner() -> None:
    # Imports inside functions and for types alone count too.
    assert house.circles(GRAPH) == []


def test_a_circle_is_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert house.circles(graph) == [["a", "b", "c"]]
    assert house.circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize(
    ("source", "name", "expected"),
    [
        ("from polymodal.config import X", "polymodal.errors", {"polymodal.config"}),
        ("from polymodal import config", "polymodal.errors", {"polymodal.config"}),
        ("from polymodal import load", "polymodal.errors", {"polymodal"}),
        ("import polymodal.media.image as m", "polymodal.errors", {"polymodal.media.image"}),
        ("def f():\n    from ..config import X", "polymodal.media.image", {"polymodal.config"}),
        ("from . import image", "polymodal.media.source", {"polymodal.media.image"}),
        ("if TYPE_CHECKING:\n    from polymodal.config import X", "polymodal.errors", {"polymodal.config"}),
        ("import torch", "polymodal.errors", set()),
    ],
)
def test_the_reader_of_imports_sees_every_form(source: str, name: str, expected: set[str], tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(source, encoding="utf-8")
    assert house.imports_of(name, file, house.modules()) == expected


def test_the_package_keeps_its_size() -> None:
    figures = house.statistics()
    assert {name: figures[name] for name, limit in house.LIMITS.items() if figures[name] > limit} == {}


@pytest.mark.parametrize("name", polymodal.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(polymodal, name) is not None
    assert name in dir(polymodal)


def test_type_checkers_and_editors_see_what_is_there() -> None:
    """Names are loaded on first use; for who only reads the source, the same are imported from the same modules."""
    tree = ast.parse(Path(polymodal.__file__).read_text(encoding="utf-8"))
    (seen,) = (
        node.body for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    found = {}
    for node in seen:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            module = f"{node.module}.{alias.name}" if node.module == "polymodal" else node.module
            assert alias.asname is None
            found[alias.name] = module
    assert found == polymodal._LAZY
    at_once = [
        node for node in tree.body if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("polymodal")
    ]
    assert set(polymodal.__all__) == {*found, *(alias.name for node in at_once for alias in node.names)}


def test_every_public_name_is_in_the_reference() -> None:
    """`make docs` writes a page of each group of docs/api/; all names of `polymodal` and of `REACHED` are on one."""
    pages = [page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs/api").glob("*.md"))]
    named = [name for page in pages for name in re.findall(r"^::: (\S+)$", page, flags=re.MULTILINE)]
    assert len(named) == len(set(named))
    assert {*(f"polymodal.{name}" for name in polymodal.__all__), *house.REACHED} <= set(named)
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), yaml.BaseLoader)
    listed = set(re.findall(r"[\w./-]+\.md", str(config["nav"]))) - {"index.md", "changelog.md", "contributing.md"}
    assert listed == {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(polymodal.__file__).parent / "py.typed").is_file()
    namespace: dict[str, object] = {}
    exec("from polymodal import *", namespace)
    assert set(polymodal.__all__) <= set(namespace)


def loaded_after(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after running `code`."""
    script = f"{code}\nimport sys\nprint('LOADED', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(next(line for line in done.stdout.splitlines() if line.startswith("LOADED")).split()[1:])


def heavy_after(code: str) -> set[str]:
    """Which heavy libraries a fresh interpreter has loaded after running `code`."""
    return HEAVY & {name.split(".")[0] for name in loaded_after(code)}


def test_threads_wait_a_moment_unless_somebody_said_otherwise() -> None:
    script = "import os, polymodal; print(os.environ.get('GOMP_SPINCOUNT'))"
    mine = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    for given, wanted in (({}, "5000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"), ({"GOMP_SPINCOUNT": "7"}, "7")):
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**mine, **given})
        assert run.stdout.strip() == wanted


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert heavy_after("import polymodal") == set()


def test_opening_a_model_whose_parts_are_ours_loads_no_architecture() -> None:
    """Each of these takes a second or more, of the three that an answer by a graph takes with them left out."""
    code = "import polymodal.backends.local, polymodal.checkpoints.model_folder, polymodal.modeling.onnx_llm"
    slow = {"transformers.modeling_utils", "transformers.models", "torch._dynamo", "torch.distributed.tensor", "peft"}
    assert slow & loaded_after(code) == set()


def test_the_base_and_the_command_line_load_nothing_heavy() -> None:
    code = "import polymodal.cli, polymodal.config, polymodal.messages, polymodal.media_plan, polymodal.errors"
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
