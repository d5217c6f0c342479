"""The frames of a video file, by number: opened without trust, counted without decoding, decoded by seeking.

ffmpeg reads through a file object of ours and may open nothing else: containers that name other files (playlists,
concat lists, references inside a MOV) are not on the list of formats, and no protocol is allowed. Everything it does is
bounded: bytes read, pixels of a frame, pixels decoded in all.

Frames are numbered in the order in which they are shown. The index of an MP4 says which packets lie between two key
frames, so that only those around a wanted frame are read; other files are read through once. Neither decodes anything,
and both give the time at which a frame is shown. By it the frame is found: seek to the last key frame from which it can
be decoded, decode until it comes out. Where packets have no times of their own (a bare H.264 stream) the file is
decoded from its start and counted.
"""

import bisect
import contextlib
import itertools
import math
import os
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image as PILImage

from polymodal.errors import MediaError
from polymodal.media.image import to_rgb
from polymodal.media.source import MAX_BYTES, describe
from polymodal.media.video_file import (
    GUARD,
    WHITE,
    FrameTable,
    VideoFile,
    VideoLimits,
    WebPFile,
    not_a_video,
    read_boxes,
    what_instead,
)
from polymodal.media.window import Window, guarded, open_window
from polymodal.messages import Source

CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,av1,obu,ivf,flv,ogg,asf,gif,apng"
)
"""What ffmpeg opens, by its own names; none of them names other files."""

_READ = 2**16  # bytes that ffmpeg asks for at once
_SKIPPING = ("h264", "hevc", "mpeg4", "mpeg2video")  # decoders that skip frame by frame what no other refers to
_PEEK = 500  # packets until the first frame has to come out
_UPRIGHT = (1, 0, 0, 1)


@dataclass
class _Start:
    """A place where decoding can start."""

    number: int  # Packets before it
    pts: int  # When it is shown
    dts: int | None  # Where it stands among the packets


def open_video(source: Source, limits: VideoLimits) -> VideoFile:
    """Open a video from a path, bytes, a `data:` URL or a place in an archive."""
    name = describe(source, "video")
    if isinstance(source, PILImage.Image):
        raise MediaError(f"{name}: is an image, not a video; give a video file")
    with guarded(name, *GUARD):
        window = open_window(source, limits.bytes, name, MAX_BYTES)
        try:
            head = window.read(4096)
            window.seek(0)
            if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
                return WebPFile(window, limits, name)
            return _Container(window, head, limits, name)
        except BaseException:
            window.file.close()
            raise


class _Container(VideoFile):
    """A video that ffmpeg opens."""

    container: Any = None

    def __init__(self, window: Window, head: bytes, limits: VideoLimits, name: str) -> None:
        super().__init__(limits, name)
        self.window = window
        self._starts: list[_Start] = []
        self._order: dict[int, tuple[int, int]] = {}  # (pts, number of its packet) of frames, by number
        self._index: list[int] | None = None  # how many frames are shown of the packets before each
        self._delay = 0  # of showing after decoding, in an MP4, which is sought by the time of showing
        claimed, self._fragments = read_boxes(window)
        self._timeless = False  # whether frames are told apart by counting, for want of times
        if (other := not_a_video(head)) is not None:
            raise MediaError(f"{name}: {other}")
        try:
            self.check_packets(claimed)
            self._open(head)
            self._look()
        except BaseException:
            self.close()
            raise

    def _open(self, head: bytes = b"") -> None:
        """Open the container at its start, anew where it is open."""
        import av

        if self.container is not None:
            self.container.close()
        self.window.seek(0)
        limits = {"max_pixels": str(self.pixels)}
        try:
            self.container = av.open(
                self.window,
                mode="r",
                options=limits,
                container_options={"format_whitelist": CONTAINERS, "protocol_whitelist": "none"},
                metadata_errors="ignore",
                buffer_size=_READ,
            )
        except av.FFmpegError as error:
            raise MediaError(f"{self.name}: {what_instead(self.window, head, error)}") from None
        cover = av.stream.Disposition.attached_pic
        streams = [stream for stream in self.container.streams.video if not stream.disposition & cover]
        if not streams:
            kinds = {stream.type for stream in self.container.streams}
            has = "sound but no video" if "audio" in kinds else "no video"
            raise MediaError(f"{self.name}: has {has}; give a file with frames")
        self.stream = streams[0]
        if self.stream.codec_context is None:
            raise MediaError(f"{self.name}: its codec is unknown to ffmpeg here; convert it to H.264")
        self.stream.codec_context.options = limits
        self.stream.codec_context.thread_type = "AUTO"
        self.stream.codec_context.thread_count = min(4, os.cpu_count() or 1)

    def close(self) -> None:
        """Let go of the file."""
        if self.container is not None:
            self.container.close()
        self.window.file.close()

    def _look(self) -> None:
        """Learn from the headers what the video is, and from its first frame how large and how turned they are."""
        stream, codec = self.stream, self.stream.codec_context
        self.audio = any(other.type == "audio" for other in self.container.streams)
        self.claimed = stream.frames if stream.frames > 0 else None
        if stream.duration and stream.time_base:
            self.duration = float(stream.duration * stream.time_base)
        elif self.container.duration:
            self.duration = self.container.duration / 1e6
        self.check_duration(self.duration)
        self.rate = float(stream.average_rate or stream.guessed_rate or 0) or None
        if self.container.format.name.startswith("mov") and not self._fragments and codec.name != "vp8":
            self.check_packets(len(stream.index_entries))
            entries = list(stream.index_entries)
            if entries and entries[0].is_keyframe and all(entry.size for entry in entries):
                self._index = [0, *itertools.accumulate(not entry.is_discard for entry in entries)]
                self.claimed = self._index[-1] or None
                keys = [(number, entry.timestamp) for number, entry in enumerate(entries) if entry.is_keyframe]
                self._starts = [_Start(number, dts, dts) for number, dts in keys]
        height, width = codec.height, codec.width
        if height and width:
            self.check_size(height, width)
        self._matrix = _UPRIGHT
        for frame in itertools.islice(self._decode(self._packets()), 1):
            height, width, self._matrix = frame.height, frame.width, _matrix(frame)
        if height < 1 or width < 1:
            raise MediaError(
                f"{self.name}: has no frame of at most {self.pixels:,} pixels that can be decoded; give a whole one"
            )
        self.check_size(height, width)
        ratio = float(self.stream.sample_aspect_ratio or 1)
        ratio = ratio if 0.1 < ratio < 10 else 1.0
        # Pixels that are not square are stretched, never shrunk, until they are.
        square = (round(height * max(1 / ratio, 1)), round(width * max(ratio, 1)))
        self.check_size(*square)
        a, b, _, d = self._matrix
        self.size = square if a or d else square[::-1]
        self.rotation = round(math.degrees(math.atan2(b, a))) % 360

    def _packets(self) -> Iterator[Any]:
        """The stream's packets from where the container stands, until its end or the first damage."""
        import av

        try:
            yield from self.container.demux(self.stream)
        except av.FFmpegError:
            return

    def _decode(self, packets: Iterator[Any], wanted: Container[int] | None = None) -> Iterator[Any]:
        """Decode packets; what is damaged gives no frame, nor what is neither wanted (by pts) nor referred to."""
        import av

        codec = self.stream.codec_context
        for number, packet in enumerate(packets):
            self.spend(codec.height * codec.width)
            if not self._order and number > _PEEK:
                return
            if codec.name in _SKIPPING:
                codec.skip_frame = "DEFAULT" if wanted is None or packet.pts in wanted else "NONREF"
            try:
                frames = packet.decode()
            except av.FFmpegError:
                continue
            yield from frames

    def locate(self, wanted: Sequence[int]) -> bool:
        """Learn the times of frames from the packets around them; False where that cannot be relied on."""
        if self._index is None or self._table is not None:
            return False
        before = [self._index[start.number] for start in self._starts]
        return all(self._learn(group) for group in sorted({bisect.bisect_right(before, n) - 1 for n in (0, *wanted)}))

    def _learn(self, group: int) -> bool:
        """Read the packets from a key frame to the next, and those before where some are shown before the key frame."""
        import av

        assert self._index is not None
        start, number = self._starts[group], self._starts[group].number
        goal = start.dts or 0
        after = self._starts[group + 1].number if group + 1 < len(self._starts) else len(self._index) - 1
        with contextlib.suppress(av.FFmpegError):
            self.container.seek(goal + self._delay, stream=self.stream)
        there = itertools.dropwhile(lambda packet: (packet.dts or 0) < goal, self._packets())
        found = [(packet.pts, packet.dts, packet.is_discard) for packet in itertools.islice(there, after - number)]
        times = {pts for pts, _, _ in found}
        if None in times or len(times) < after - number or found[0][1] != goal:
            return False
        start.pts, self._delay = found[0][0], found[0][0] - goal
        shown = sorted((pts, place) for place, (pts, _, discard) in enumerate(found, number) if not discard)
        self._order |= dict(enumerate(shown, self._index[number]))
        return min(times) >= start.pts or group == 0 or self._learn(group - 1)

    def scan(self) -> FrameTable:
        """Read the packets' times."""
        self._open()
        stream = self.stream
        vp8 = stream.codec_context.name in ("vp8", "libvpx")
        found, starts, last = [], [], 0
        for number, packet in enumerate(self._packets()):
            self.check_packets(number)
            if not packet.size or (vp8 and not bytes(packet)[0] & 16):  # VP8 has frames that are never shown
                continue
            if packet.is_keyframe:
                starts.append(_Start(number, packet.pts, packet.dts))
            if not packet.is_discard:
                found.append((packet.pts, number))
                last = packet.duration or last
        times = [pts for pts, _ in found]
        self._timeless = None in times or len(set(times)) < len(times) or any(start.pts is None for start in starts)
        if not self._timeless and self.container.format.name == "avi" and stream.codec_context.has_b_frames:
            self._timeless = times == sorted(times)  # AVI has no place for times: these are in order of decoding
        tick = float(stream.time_base or 0) or 0.001
        if self._timeless:
            if None in times:
                tick = 1 / (self.rate or 25.0)
                found = [(place, number) for place, (_, number) in enumerate(found)]
            pts, numbers = [time for time, _ in sorted(found)], {start.number for start in starts}
            keys = [number in numbers for _, number in sorted(found)]
            self._order = {place: (place, number) for place, (_, number) in enumerate(sorted(found))}
            self._starts = [_Start(0, 0, None)]
        else:
            # What lies before the first key frame cannot be decoded.
            self._starts = starts or [_Start(0, min(times, default=0), None)]
            first, numbers = self._starts[0], {start.pts for start in starts}
            shown = sorted(item for item in found if item[0] >= first.pts and item[1] >= first.number)
            self._order = dict(enumerate(shown))
            pts = [time for time, _ in shown]
            keys = [time in numbers for time in pts]
        seconds = (np.array(pts, np.float64) - (pts[0] if pts else 0)) * tick
        gap = last * float(stream.time_base or 0)
        gap = gap or (float(np.median(np.diff(seconds))) if len(seconds) > 1 else 1 / (self.rate or 25.0))
        return FrameTable(seconds, np.array(keys, bool), float(seconds[-1]) + gap if len(seconds) else 0.0, tick)

    def seconds(self, number: int) -> float:
        """When a frame is shown."""
        if self._table is not None:
            return super().seconds(number)
        return (self._order[number][0] - self._order[0][0]) * float(self.stream.time_base)

    def decode(self, wanted: list[int]) -> Iterator[tuple[int, int, np.ndarray]]:
        """Decode group by group: what needs the same key frame is decoded together."""
        for start, group in itertools.groupby(wanted, self._start_of):
            for number, out, frame in self._run(start, list(group)):
                yield number, out, self._upright(frame)

    def _start_of(self, number: int) -> int:
        """The last start from which a frame can be decoded."""
        pts, packet = self._order[number]
        start = bisect.bisect_right(self._starts, packet, key=lambda item: item.number) - 1
        while start > 0 and self._starts[start].pts > pts:  # shown before the key frame: it needs the one before too
            start -= 1
        return max(start, 0)

    def _run(self, start: int, wanted: list[int], again: bool = False) -> Iterator[tuple[int, int, Any]]:
        """Decode frames from a start; those that do not come out are tried from one start earlier, then replaced."""
        times = None if again or self._timeless else {self._order[number][0] for number in wanted}
        left: list[int] = [*wanted]
        missed: list[tuple[int, Any]] = []  # with the frame to show instead: its pts and pixels
        last = None
        for place, frame in enumerate(self._decode(self._from(start), times)):
            pts = place if self._timeless else frame.pts
            if pts is None:
                continue
            while left and self._order[left[0]][0] < pts:
                missed.append((left.pop(0), last or (pts, frame)))
            if left and self._order[left[0]][0] == pts:
                yield left[0], left.pop(0), frame
            last = (pts, frame)
            if not left:
                break
        missed += [(number, last) for number in left]
        if missed and not again:
            self.table()
            yield from self._run(max(start - 1, 0), [number for number, _ in missed], again=True)
            return
        for number, instead in missed:
            if instead is not None:
                yield number, self._number(instead[0]), instead[1]

    def _number(self, pts: int) -> int:
        """The number of the frame that is shown at a time."""
        return max(((time, number) for number, (time, _) in self._order.items() if time <= pts), default=(0, 0))[1]

    def _from(self, start: int) -> Iterator[Any]:
        """The packets from a start on; read from the file's beginning where seeking leads elsewhere."""
        import av

        goal = self._starts[start]
        # Some containers are sought by the time of showing, some by that of decoding, which is no later.
        for time in () if self._timeless else {goal.pts: None, goal.pts if goal.dts is None else goal.dts: None}:
            with contextlib.suppress(av.FFmpegError):
                self.container.seek(time, stream=self.stream)
                for packet in (packets := self._packets()):
                    if packet.pts == goal.pts and packet.is_keyframe:
                        yield packet
                        yield from packets
                        return
                    if packet.is_keyframe and packet.pts is not None and packet.pts > goal.pts:
                        break
        self._open()
        yield from itertools.islice(self._packets(), goal.number, None)

    def _upright(self, frame: Any) -> np.ndarray:
        """A decoded frame as RGB, turned as the file says, transparency on white."""
        self.check_size(frame.height, frame.width)
        clear = any(component.is_alpha for component in frame.format.components)
        pixels = frame.to_ndarray(format="rgba" if clear else "rgb24")
        if clear:
            pixels = np.asarray(to_rgb(PILImage.fromarray(pixels), WHITE))
        a, b, c, d = self._matrix
        if not (a or d):
            pixels, a, d = pixels.swapaxes(0, 1), c, b
        return pixels[::d, ::a]


def _matrix(frame: Any) -> tuple[int, int, int, int]:
    """How a frame is to be turned: x' = a x + c y, y' = b x + d y, to the nearest quarter turn."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX" and len(bytes(data)) == 36:
            a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
            if abs(a) >= abs(b):
                return (-1 if a < 0 else 1, 0, 0, -1 if d < 0 else 1)
            return (0, -1 if b < 0 else 1, -1 if c < 0 else 1, 0)
    return _UPRIGHT
