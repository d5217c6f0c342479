"""Files that are either whole or not there: atomic writes, hashes, and the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from polymodal.errors import PolymodalError


def cache_folder() -> Path:
    """The folder for converted models and other things that can be made again."""
    if own := os.environ.get("POLYMODAL_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "polymodal"


def shipped_folder() -> Path:
    """The folder of the models and towers that come with the package."""
    return Path(__file__).resolve().parent.parent / "models"


def shipped(name: str) -> Path | None:
    """Look up a model or tower that comes with the package."""
    folder = shipped_folder() / name
    return folder if name.isidentifier() and folder.is_dir() else None


def sha256_file(path: Path) -> str:
    """Hash a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Write a folder that appears whole or not at all."""
    if target.exists() and not replace:
        raise PolymodalError(f"{target}: is there already; choose another folder or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    work.mkdir()
    try:
        yield work
        for path in work.rglob("*"):
            _fsync(path)
        _fsync(work)
        old = None
        if target.exists():
            old = work.with_suffix(".old")
            target.rename(old)
        work.rename(target)
        _fsync(target.parent)
        if old is not None:
            shutil.rmtree(old)
    except OSError as error:
        raise PolymodalError(f"{target}: cannot be written ({error.strerror or error}); nothing was changed") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file that is whole or unchanged."""
    work = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        work.write_text(text, encoding="utf-8")
        _fsync(work)
        work.replace(path)
    except OSError as error:
        raise PolymodalError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        work.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
