"""Files that are whole or not there, on disks that are full, read-only or no folders."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from polymodal.errors import PolymodalError
from polymodal.utils import files
from polymodal.utils.files import atomic_folder, check_writable, write_text


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """While active, no file can grow past a size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    """Errors of Python, of our own writer and of a library in Rust, whose error is no OSError."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "before").write_text("kept")

    def in_rust(folder: Path) -> None:
        save_file({"a": torch.zeros(4000)}, folder / "model.safetensors")

    for write in (in_rust, lambda f: write_text(f / "a", "x" * 9000), lambda f: (f / "a").write_text("x" * 9000)):
        for target in ("out", "new"):
            wrong = pytest.raises(PolymodalError, match="cannot be written")
            with full_disk(5000), wrong as error, atomic_folder(tmp_path / target, replace=True) as work:
                write(work)
            text = str(error.value)
            assert str(tmp_path / target) in text and "too large" in text and "\n" not in text and ".tmp" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "before").read_text() == "kept"
    with full_disk(100), pytest.raises(PolymodalError, match=r"before: cannot be written \(File too large"):
        write_text(tmp_path / "out" / "before", "x" * 200)
    assert (tmp_path / "out" / "before").read_text() == "kept" and len(list((tmp_path / "out").iterdir())) == 1


def test_a_place_that_takes_no_files_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PolymodalError, match="cannot be written"), atomic_folder(tmp_path / "file" / "out"):
        pass
    with pytest.raises(PolymodalError, match="cannot be written"), atomic_folder(tmp_path / ("x" * 300)):
        pass
    with pytest.raises(PolymodalError, match="cannot be written"):
        write_text(tmp_path / "file" / "a.json", "{}")

    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    for name in ("mkdir", "write_bytes", "unlink"):
        monkeypatch.setattr(Path, name, read_only)
    with pytest.raises(PolymodalError, match=r"out: cannot be written \(Read-only"), atomic_folder(tmp_path / "out"):
        pass
    with pytest.raises(PolymodalError, match=r"a\.json: cannot be written \(Read-only"):
        write_text(tmp_path / "a.json", "{}")


def test_a_folder_that_cannot_take_the_place_of_the_old_one_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "before").write_text("kept")
    rename = Path.rename

    def fails_for_the_new(path: Path, target: Path) -> Path:
        if path.suffix == ".tmp":
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(files.Path, "rename", fails_for_the_new)
    with pytest.raises(PolymodalError, match="No space left"), atomic_folder(tmp_path / "out", replace=True) as work:
        (work / "a").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "before").is_file()


def test_other_errors_are_no_fault_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(KeyError), atomic_folder(tmp_path / "out"):
        raise KeyError("a")
    with pytest.raises(PolymodalError, match=r"^a line$"), atomic_folder(tmp_path / "out"):
        raise PolymodalError("a line")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_known_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("kept")
    for place, folder in (("new", False), ("file", False), ("a/b.json", False), ("a/b", True), (".", True)):
        check_writable(tmp_path / place, folder=folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"] and (tmp_path / "file").read_text() == "kept"
    check_writable(Path("/dev/null"))
    bad: list[tuple[str, dict[str, bool], str]] = [
        (".", {}, "is a folder; name a file"),
        ("file", {"folder": True}, "is no folder"),
        ("no/a.json", {"parents": False}, "its folder is not there"),
        ("file/a.json", {}, "cannot be written"),
        ("file/a", {"folder": True}, "cannot be written"),
        ("n" * 300, {}, "name too long"),
    ]
    for name, options, needle in bad:
        with pytest.raises(PolymodalError, match=f"(?i)^--json: .*{needle}"):
            check_writable(tmp_path / name, "--json: ", **options)

    def refused(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refused)
    for name, folder in (("a.json", False), ("a/b", True)):
        with pytest.raises(PolymodalError, match=r"cannot be written \(Permission denied\)"):
            check_writable(tmp_path / name, folder=folder)


def test_a_pipe_is_written_into_and_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "text")
    assert os.read(reader, 100) == b"text" and (tmp_path / "pipe").is_fifo()
    os.close(reader)
