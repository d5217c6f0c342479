"""docs/tutorial.md: every block runs as the page has it, one after the other in one folder, on small random parts."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import yaml
from PIL import Image

from polymodal.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
PARTS = {"google/siglip-base-patch16-224": "tower", "Qwen/Qwen2.5-0.5B-Instruct": "llm"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image_folder: Path) -> Path:
    """A folder with 30 captioned images, and random parts of the families that the page names."""
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel

    from recipes.tiny.make_parts import main as make_parts

    make_parts(tmp_path)
    torch.manual_seed(1)
    tower = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    SiglipVisionModel(tower).save_pretrained(tmp_path / "tower")
    drawn = sorted(path for path in image_folder.iterdir() if path.suffix in (".jpg", ".png"))
    (tmp_path / "pictures").mkdir()
    for number in range(30):
        source = drawn[number % len(drawn)]
        with Image.open(source) as image:
            turned = image.convert("RGB").rotate(90 * (number // len(drawn)), expand=True)
        turned.thumbnail((160, 160))
        turned.save(tmp_path / "pictures" / f"{number + 1:03}.jpg")
        (tmp_path / "pictures" / f"{number + 1:03}.txt").write_text(f"A picture of a {source.stem}.\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path / "cache"))
    return tmp_path


def with_parts(text: str, port: int) -> str:
    """The block with folders in place of what the page names on the hub, and a port that is free."""
    for name, folder in PARTS.items():
        text = text.replace(name, folder)
    return text.replace("8000", str(port))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def serving(words: list[str], port: int) -> Iterator[None]:
    """A server in a process of its own, once it is ready."""
    server = subprocess.Popen([sys.executable, "-m", *words], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(server.communicate(timeout=10)[1]) from None
                time.sleep(0.2)
        yield
    finally:
        server.terminate()
        server.communicate(timeout=60)


def run_line(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line)
    if words[0] == "pip":
        return  # the environment of the tests holds these extras
    if words[0] != "polymodal":
        subprocess.run(words, check=True)
        return
    if words[1] == "chat":
        reads, writes = os.pipe()
        os.write(writes, b"What is in this picture?\n/quit\n")
        os.close(writes)
        with os.fdopen(reads) as typed:
            monkeypatch.setattr(sys, "stdin", typed)
            assert main(words[1:]) == 0, line
        return
    assert main(words[1:]) == 0, line


def replace_sections(block: str) -> None:
    """Put a block's sections in the place of those in the file that its first line names."""
    file = Path(block.splitlines()[0].removeprefix("# "))
    recipe, sections = yaml.safe_load(file.read_text()), yaml.safe_load(block)
    assert set(sections) <= set(recipe)
    file.write_text(yaml.safe_dump({**recipe, **sections}))


@pytest.mark.slow
def test_every_block_runs(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    kinds = [kind for kind, _ in BLOCKS]
    assert set(kinds) == {"sh", "python", "yaml", "text"} and len(kinds) >= 20
    said: list[str] = []
    server = ExitStack()
    for kind, block in BLOCKS:
        text = with_parts(block, port)
        if kind == "sh" and text.startswith("polymodal serve"):
            server.enter_context(serving(shlex.split(text), port))
        elif kind == "sh":
            for line in text.splitlines():
                run_line(line, monkeypatch)
        elif kind == "yaml":
            replace_sections(text)
        elif kind == "python":
            with server:  # asked by the program that follows it
                exec(compile(text, "docs/tutorial.md", "exec"), {"__name__": "__main__"})
        told = capsys.readouterr()
        said.append(told.out + told.err)
    everything = "\n".join(said)
    assert everything.count("30 rows: 30 good, 0 to look at, 0 to drop") == 2  # the folder; both files
    assert everything.count("finished before") == 3  # the second train
    assert re.search(r"my_vlm-stage2: step 20: 'What is in this picture\?' was answered '", everything)
    assert len(re.findall(r"^steps +\d+ ", everything, flags=re.MULTILINE)) == 2  # the plan counts both stages' rows
    assert "parity: token_ids ok, pixels ok, logits ok, greedy ok, batch ok" in everything
    assert json.loads(Path("runs/eval/mine/results.json").read_text())
    for part in PARTS.values():
        shutil.rmtree(part)
    for folder in ("my_vlm", "my_model"):  # in another place, and without the parts
        assert main(["generate", "--model", f"elsewhere/{folder}", "pictures/003.jpg", "What?"]) == 0
