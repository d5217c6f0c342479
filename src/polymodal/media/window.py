"""The bytes of a video or a sound as ffmpeg sees them: opened in place, with an end to how much is read."""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polymodal.errors import MediaError, PolymodalError, first_line
from polymodal.media.source import local_path, read_bytes
from polymodal.messages import FileSlice
from polymodal.utils.extras import lacking
from polymodal.utils.files import regular_size


@dataclass
class Window:
    """A file as ffmpeg sees it: from `offset` on, `size` bytes long, with an end to how much is read."""

    file: Any
    offset: int
    size: int
    name: str
    left: int = 0
    place: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.left = 8 * self.size + 2**28

    def read(self, count: int) -> bytes:
        """Read on; at most as much in all as a sound file takes."""
        count = max(0, min(count, self.size - self.place))
        self.left -= count + 1024
        if self.left < 0:
            raise MediaError(f"{self.name}: has to be read over and over; convert it to MP4, WAV or FLAC")
        self.file.seek(self.offset + self.place)
        data: bytes = self.file.read(count)
        self.place += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a place."""
        place = offset + (0, self.place, self.size)[whence]
        if place < 0:
            raise OSError("before the start")
        self.place = place
        return place

    def tell(self) -> int:
        """The place where the next read begins."""
        return self.place


def open_window(source: Any, limit: int, name: str, in_memory: int) -> Window:
    """Open bytes without reading them, where they lie in a file; others, of at most `in_memory`, are read whole."""
    if isinstance(source, str) and source[:5].lower() != "data:":
        source = local_path(source, name)
    if not isinstance(source, Path | FileSlice):
        data = read_bytes(source, limit=min(limit, in_memory), name=name)
        return Window(io.BytesIO(data), 0, len(data), name)
    path, offset = (source.path, source.offset) if isinstance(source, FileSlice) else (source, 0)
    there = regular_size(path, name, MediaError)
    size = source.size if isinstance(source, FileSlice) else there
    if size > limit:
        raise MediaError(f"{name}: {size:,} bytes, at most {limit:,} are allowed; make the file smaller")
    if offset + size > there:
        raise MediaError(f"{name}: the file ends before it; it was cut off or has changed, fetch it again")
    if not size:
        raise MediaError(f"{name}: the file is empty (0 bytes); give a file with content", "empty-file")
    try:
        return Window(path.open("rb"), offset, size, name)
    except OSError as error:
        raise MediaError(f"{name}: cannot be read ({error.strerror}); check the path") from None


@contextlib.contextmanager
def guarded(name: str, kind: str, remedy: str, code: str = "") -> Iterator[None]:
    """Turn what ffmpeg and Pillow raise on damaged bytes into one line; `remedy` is for what is too large."""
    try:
        yield
    except PolymodalError:
        raise
    except ImportError as error:
        raise lacking("av", f"{name}: reading {kind} needs", "av", error, MediaError) from None
    except MemoryError:
        raise MediaError(f"{name}: too large for the memory there is; {remedy}", code) from None
    except Exception as error:  # a decoder that is fed damaged bytes may raise anything
        raise MediaError(f"{name}: is damaged or cut off ({reason(error)}); give a whole file") from error


def reason(error: Exception) -> str:
    """What ffmpeg or Pillow says of a file, in one line."""
    text = getattr(error, "strerror", None) or first_line(error)
    return " ".join(str(text).split())[:120]
