"""Lines as people type, paste and drop them; Tab; the sign that something is loading."""

import io
import sys
import time
from pathlib import Path

import pytest

from polymodal.cli.terminal import completions, dropped, loading


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in ("cat.jpg", "my cat.png", "it's.png", "notes.txt", "clip.mp4", "größe.jpg"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "sub").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("line", "names", "text"),
    [
        ("{f}/cat.jpg", ["cat.jpg"], ""),
        ("'{f}/my cat.png' ", ["my cat.png"], ""),
        ('"{f}/my cat.png"', ["my cat.png"], ""),
        (r"{f}/my\ cat.png {f}/cat.jpg ", ["my cat.png", "cat.jpg"], ""),
        ("{f}/my cat.png", ["my cat.png"], ""),
        ("{f}/it\\'s.png what?", ["it's.png"], "what?"),
        ("file://{f}/my%20cat.png What is it?", ["my cat.png"], "What is it?"),
        ("file://localhost{f}/gr%C3%B6%C3%9Fe.jpg", ["größe.jpg"], ""),
        ("What is in {f}/cat.jpg?", ["cat.jpg"], "What is in cat.jpg?"),
        ("What is this? {f}/clip.mp4", ["clip.mp4"], "What is this?"),
        ("Is it in ({f}/absent.jpg)?", [], None),
        ("Read {f}/notes.txt", [], None),
        ("It's a cat, isn't it?", [], None),
        ("a \\ b  c", [], None),
    ],
)
def test_files_in_a_line(line: str, names: list[str], text: str | None, files: Path) -> None:
    line = line.format(f=files)
    found, rest = dropped(line)
    assert [path for _, path in found] == [str(files / name) for name in names]
    assert rest == (line if text is None else text)
    assert all(kind == ("video" if path.endswith("mp4") else "image") for kind, path in found)


def test_a_bare_name_stays_in_the_question(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    assert dropped("Describe cat.jpg briefly.") == ([("image", "cat.jpg")], "Describe cat.jpg briefly.")


def test_what_tab_offers(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = ("/image", "/clear", "/help")
    assert completions("/im", commands) == ["/image "]
    assert completions(f"/image {files}/ca", commands) == [f"{files}/cat.jpg "]
    assert completions(f"What is {files}/my", commands) == [f"{files}/my\\ cat.png "]
    assert completions(f"{files}/my\\ c", commands) == [f"{files}/my\\ cat.png "]
    assert completions(f"{files}/su", commands) == [f"{files}/sub/"]
    monkeypatch.setenv("HOME", str(files))
    assert completions("/image ~/no", commands) == ["~/notes.txt "]
    assert completions("", commands) == []


def test_a_loading_line_is_there_at_once_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with loading("mine"):
        for _ in range(100):
            if "loading mine, 0 s" in terminal.getvalue():
                break
            time.sleep(0.01)
        assert "loading mine, 0 s" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with loading("mine"):
        pass
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]
