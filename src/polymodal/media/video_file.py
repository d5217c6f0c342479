"""An open video: what every kind of it gives, and what it may cost."""

import io
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from PIL import Image as PILImage

from polymodal.config import MAX_PIXELS as MOST_PIXELS
from polymodal.errors import MediaError
from polymodal.media.image import FORMATS as IMAGES
from polymodal.media.image import allowed_pixels, to_rgb, what_is_it
from polymodal.media.source import MAX_BYTES
from polymodal.media.window import Window, guarded, reason

WHITE = (255, 255, 255)
"""What shows through where a frame is transparent, as in images."""
GUARD = ("video", "scale it down", "too-many-pixels")
"""What `guarded` says of a video."""

_LISTS = (b"#extm3u", b"ffconcat", b"<mpd", b"[playlist]", b"v=0\r\n", b"v=0\n")
_NESTED = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf")
_COUNTS = {b"stsz": 16, b"stz2": 16, b"trun": 12}  # boxes that count packets, and where
_BOXES = 100_000
_SMALL = 2**20  # pixels that every frame counts for at least


@dataclass(frozen=True)
class VideoLimits:
    """What a video may cost; files beyond it are refused with one line."""

    bytes: int = 16 * 2**30  # Of the file; it is never held in memory
    seconds: float = 6 * 3600.0  # That it lasts
    pixels: int = 2**25  # Of a frame: 8K has 33.2 million
    decoded: int = 5 * 10**10  # Pixels of all frames that are decoded on the way; a frame counts for 2**20 at least
    packets: int = 4_000_000  # That the file is cut into; six hours of 120 frames a second have 2.6 million
    output: int = 2 * 2**30  # Bytes of the frames that come out


@dataclass(frozen=True)
class FrameTable:
    """When each frame is shown, in seconds from the first, in the order of showing."""

    times: np.ndarray  # float64 [N]
    keys: np.ndarray  # bool [N]: can be decoded without another frame
    duration: float  # Until the last frame goes
    tick: float = 0.001  # The smallest difference that the file can write


class VideoFile:
    """An open video; `frames` gives its images upright, in RGB, as large as they are stored."""

    claimed: int | None = None  # Frames, as the file says
    duration: float | None = None  # Seconds, as the file says
    rate: float | None = None  # Frames a second, as the file says
    rotation = 0  # Degrees clockwise that its frames were turned by
    audio = False
    size = (0, 0)  # Height and width that they should be shown in: upright, square pixels

    def __init__(self, limits: VideoLimits, name: str) -> None:
        self.name, self.limits = name, limits
        self.pixels = allowed_pixels(limits.pixels)
        self._table: FrameTable | None = None
        self._spent = 0

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""

    def scan(self) -> FrameTable:
        """Read the packets' times."""
        raise NotImplementedError

    def decode(self, wanted: list[int]) -> Iterator[tuple[int, int, np.ndarray]]:
        """Decode frames: the number that was wanted, the one that came out, its pixels."""
        raise NotImplementedError

    def locate(self, wanted: Sequence[int]) -> bool:
        """Find frames by number without the table; False where that takes the table."""
        return False

    def seconds(self, number: int) -> float:
        """When a frame is shown."""
        return float(self.table().times[number])

    def table(self) -> FrameTable:
        """When each frame is shown."""
        if self._table is None:
            with guarded(self.name, *GUARD):
                self._table = self.scan()
            if not len(self._table.times):
                raise MediaError(f"{self.name}: has no frame that can be decoded; give a whole video")
            self.check_duration(self._table.duration)
        return self._table

    def frames(self, wanted: Sequence[int]) -> Iterator[tuple[int, int, np.ndarray]]:
        """Decode the frames of these numbers; a damaged one's neighbour comes in its place."""
        with guarded(self.name, *GUARD):
            yield from self.decode(sorted(set(wanted)))

    def check_duration(self, seconds: float | None) -> None:
        """Refuse what lasts too long."""
        if seconds is not None and not seconds <= self.limits.seconds:
            raise MediaError(
                f"{self.name}: lasts {seconds:,.0f} seconds, at most {self.limits.seconds:,.0f} are allowed; cut it, "
                "or give VideoLimits(seconds=...)"
            )

    def check_size(self, height: int, width: int) -> None:
        """Refuse frames of too many pixels."""
        if height * width > self.pixels:
            allow = f", or allow it with --max-pixels {height * width}" if height * width <= MOST_PIXELS else ""
            raise MediaError(
                f"{self.name}: frames of {width}x{height} pixels (width x height), at most {self.pixels:,} are "
                f"allowed; scale it down{allow}",
                "too-many-pixels",
            )

    def check_packets(self, number: int) -> None:
        """Refuse what is cut into too many pieces."""
        if number > self.limits.packets:
            most = f"more than {self.limits.packets:,} packets"
            raise MediaError(f"{self.name}: has {most}; cut it, or give VideoLimits(packets=...)")

    def spend(self, pixels: int) -> None:
        """Count a frame that is decoded."""
        self._spent += max(pixels, _SMALL)
        if self._spent > self.limits.decoded:
            raise MediaError(
                f"{self.name}: more than {self.limits.decoded:,} pixels have to be decoded to reach these frames; take "
                "fewer, convert it with more key frames, or give VideoLimits(decoded=...)"
            )


def read_boxes(window: Window) -> tuple[int, bool]:
    """How many packets the boxes of an MP4 claim, which is memory before any is read; whether it is in fragments."""
    place, number, claimed, fragments = 0, 0, 0, False
    while place + 8 < window.size and number < _BOXES:
        window.seek(place)
        head = window.read(20)
        size, kind = int.from_bytes(head[:4]), head[4:8]
        start = 16 if size == 1 else 8
        size = int.from_bytes(head[8:16]) if size == 1 else size
        if kind == b"cmov":
            raise MediaError(f"{window.name}: its header is compressed, as long ago; convert it to MP4")
        if size < start:
            break
        if (at := _COUNTS.get(kind)) is not None:
            claimed += int.from_bytes(head[at : at + 4])
        fragments |= kind == b"moof"
        place, number = place + (start if kind in _NESTED else size), number + 1
    return claimed, fragments or number == _BOXES


class WebPFile(VideoFile):
    """An animated WebP, which ffmpeg cannot decode."""

    def __init__(self, window: Window, limits: VideoLimits, name: str) -> None:
        super().__init__(limits, name)
        if window.size > MAX_BYTES:
            raise MediaError(f"{name}: {window.size:,} bytes, at most {MAX_BYTES:,} are allowed; make the file smaller")
        self._data = window.read(window.size)
        self._image = PILImage.open(io.BytesIO(self._data), formats=("WEBP",))
        if not getattr(self._image, "is_animated", False):
            raise MediaError(f"{name}: is a WEBP image, not a video; give a video file")
        self.size = (self._image.height, self._image.width)
        self.check_size(*self.size)
        window.file.close()

    def scan(self) -> FrameTable:
        """Read the durations from the chunks of the frames, which decodes none."""
        times, now, place = [], 0, 12
        while place + 24 <= len(self._data):
            size = int.from_bytes(self._data[place + 4 : place + 8], "little")
            if self._data[place : place + 4] == b"ANMF":
                times.append(now)
                self.check_packets(len(times))
                now += int.from_bytes(self._data[place + 20 : place + 23], "little")
            place += 8 + size + size % 2
        keys = np.arange(len(times)) == 0
        return FrameTable(np.array(times, np.float64) / 1000, keys, now / 1000)

    def decode(self, wanted: list[int]) -> Iterator[tuple[int, int, np.ndarray]]:
        """Decode from the start on: each frame is drawn over the one before."""
        last = None
        for number in range(wanted[-1] + 1):
            self.spend(self.size[0] * self.size[1])
            try:
                self._image.seek(number)
                self._image.load()
            except Exception:  # a decoder that is fed damaged bytes may raise anything
                break
            if number in wanted:
                last = (number, np.asarray(to_rgb(self._image, WHITE)))
                yield number, *last
        if last is not None:
            yield from ((number, *last) for number in wanted if number > last[0])


def not_a_video(head: bytes) -> str | None:
    """Say what a file is, where its first bytes leave no doubt that it is something else."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(_LISTS) or (text.startswith(b"<?xml") and b"<mpd" in text):
        return "is a playlist, which names other files; give the video file itself"
    if head.startswith((b"ID3", b"fLaC", b"\xff\xfb")) or (head[:4] == b"RIFF" and head[8:12] == b"WAVE"):
        return "has sound but no video; give a file with frames"
    said = what_is_it(head, "a video")
    return said if "image" in said or "document" in said or "page" in said or "pointer" in said else None


def what_instead(window: Window, head: bytes, error: Exception) -> str:
    """Say what a file is that ffmpeg does not open."""
    with suppress(Exception):
        window.seek(0)
        with PILImage.open(io.BytesIO(window.read(2**20)), formats=IMAGES) as image:
            return f"is a {image.format} image, not a video; give a video file"
    if head[4:8] == b"ftyp" or head[:4] == b"\x1aE\xdf\xa3" or head[8:12] == b"AVI ":
        return f"is damaged or cut off ({reason(error)}); give a whole file"
    return f"is not a video that can be read ({reason(error)}); convert it to MP4"
