"""Files that are either whole or not there: atomic writes, hashes, and the user's cache folder."""

import errno
import glob
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from polymodal.errors import PolymodalError, first_line


def cache_folder() -> Path:
    """The folder for converted models and other things that can be made again."""
    if own := os.environ.get("POLYMODAL_CACHE"):
        return home_path(own)
    return home_path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "polymodal"


def shipped_folder() -> Path:
    """The folder of the models and towers that come with the package."""
    return Path(__file__).resolve().parent.parent / "models"


def shipped(name: str) -> Path | None:
    """Look up a model or tower that comes with the package."""
    folder = shipped_folder() / name
    return folder if name.isidentifier() and folder.is_dir() else None


def whole_path(name: str) -> str:
    """A part's name; of a file or folder its whole path, so that it is found from every working directory."""
    path = Path(name).expanduser()
    return str(path.resolve()) if shipped(name) is None and path.exists() else name


def sha256_file(path: Path) -> str:
    """Hash a file's bytes."""
    regular_size(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(data: Any) -> str:
    """Hash plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def sampled_hash(module: Any) -> str:
    """A hash of some numbers of every tensor of a module, with its name, type and shape; training changes them all."""
    import torch  # an endpoint does without

    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(repr((name, getattr(tensor, "dtype", None), getattr(tensor, "shape", tensor))).encode())
        if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided and not tensor.is_quantized:
            some = tensor.detach().flatten()[:: max(1, tensor.numel() // 1024)].contiguous().cpu()
            digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def regular_size(path: Path, name: str = "", error: type[PolymodalError] = PolymodalError) -> int:
    """The size of a file in bytes; pipes and devices, which may block or never end, are refused unopened."""
    name = name or str(path)
    try:
        info = path.stat()
    except FileNotFoundError:
        raise error(f"{name}: no such file; check the path", "missing-file") from None
    except PermissionError:
        raise error(f"{name}: no permission to read; check the file's mode") from None
    except (OSError, ValueError) as reason:  # ValueError: a null character in the path
        why = getattr(reason, "strerror", None) or str(reason)
        raise error(f"{name}: cannot be read ({why}); check the path") from None
    if stat.S_ISDIR(info.st_mode):
        raise error(f"{name}: is a directory; give a file")
    if not stat.S_ISREG(info.st_mode):
        raise error(f"{name}: is not a regular file; give a file")
    return info.st_size


def home_path(name: str | Path) -> Path:
    """A path as a person writes it, `~` being the home folder; a user that there is not stays as written."""
    return Path(os.path.expanduser(name))


@contextmanager
def atomic_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Write a folder that appears whole or not at all."""
    work = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    old = work.with_suffix(".old")
    try:
        if target.exists() and not replace:
            raise PolymodalError(f"{target}: is there already; choose another folder or remove it")
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):  # by a writer that was killed
            with suppress(OSError):  # others write and tidy here too
                if time.time() - left.stat().st_mtime > 86400:
                    shutil.rmtree(left)
        work.mkdir()
        yield work
        for path in work.rglob("*"):
            _fsync(path)
        _fsync(work)
        _put_in_place(work, target, old)
        _fsync(target.parent)
    except PolymodalError as error:
        if str(work) not in str(error):
            raise
        raise type(error)(str(error).replace(str(work), str(target))) from error.__cause__
    except Exception as error:
        # Libraries written in Rust raise types of their own.
        if not isinstance(error, OSError) and "(os error " not in str(error):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise PolymodalError(f"{target}: cannot be written ({reason}); nothing was changed") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        with suppress(OSError):
            if old.exists() and not target.exists():
                old.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def _put_in_place(work: Path, target: Path, old: Path) -> None:
    """Move a folder to where another may be, and where somebody else may put one at the same time."""
    for _ in range(100):
        shutil.rmtree(old, ignore_errors=True)
        with suppress(FileNotFoundError):
            target.rename(old)
        try:
            work.rename(target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    raise OSError(errno.EEXIST, "others go on writing it")


@contextmanager
def writing(path: Path, name: str = "") -> Iterator[None]:
    """Turn what the system says of a file or folder that cannot be written into one line."""
    try:
        yield
    except OSError as error:
        raise PolymodalError(
            f"{name}{path}: cannot be written ({error.strerror or error}); make room, or name a folder that can be"
        ) from error


def check_writable(path: Path, name: str = "", *, folder: bool = False, parents: bool = True) -> None:
    """Make sure that a file or folder can be written, before the work whose result it is to hold."""
    with writing(path, name):
        if path.exists() and not path.is_dir() and not path.is_file():
            return  # /dev/stdout and the like
        if path.exists() and path.is_dir() != folder:
            raise PolymodalError(f"{name}{path}: {'is no folder' if folder else 'is a folder; name a file'}")
        places = path.absolute().parents if not folder else (path.absolute(), *path.absolute().parents)
        above = next(place for place in places if place.exists())
        if not parents and above != path.absolute().parent:
            raise PolymodalError(f"{name}{path}: cannot be written (its folder is not there); make it first")
        tempfile.TemporaryFile(dir=above).close()


def make_folder(path: Path, name: str = "") -> None:
    """Make a folder and those above it."""
    with writing(path, name):
        path.mkdir(parents=True, exist_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file that is whole or unchanged."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file that is whole or unchanged."""
    if path.is_char_device() or path.is_fifo():  # /dev/stdout and the like, which no file may take the place of
        with writing(path):
            path.write_bytes(data)
        return
    work = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        work.write_bytes(data)
        _fsync(work)
        work.replace(path)
    except OSError as error:
        raise PolymodalError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        with suppress(OSError):  # on a read-only disk even what is not there cannot be removed
            work.unlink()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
