"""Processes in which media of strangers are decoded: Pillow and ffmpeg run there with an end to memory and time.

A source that carries `Decoders` (`NamedBytes.decoders`) is opened in one of them by every function of `media` that is
`isolated`; what comes back is numbers and pixels, never an object of the other process's making. A process has no
secrets of this one's environment, writes no file, and is replaced where it fails, hangs or has done enough.
"""

import contextlib
import json
import math
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from PIL import Image as PILImage

from polymodal import errors
from polymodal.errors import MediaError, PolymodalError, first_line
from polymodal.media.source import NamedBytes, describe

MAX_SECONDS = 60.0
"""Seconds that a file may take."""
MAX_MEMORY = 3 * 2**30
"""Bytes of address space of a process."""
MOST_JOBS = 500
"""Files after which a process is replaced, since libraries leak."""
MOST_SIDE, MOST_ASPECT = 16_384, 200
"""Pixels of a side, and times that one is longer than the other: preprocessors of published models know no more."""
_KEPT = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "SYSTEMROOT", "POLYMODAL_MAX_PIXELS")
_CHILD = "from polymodal.media.decoders import main; main()"
_ARRAYS = ("uint8", "float32", "float64")


class Decoders:
    """Up to `workers` processes, of which one is kept ready; files beyond them wait."""

    def __init__(self, workers: int = 2, seconds: float = MAX_SECONDS, memory: int = MAX_MEMORY) -> None:
        self.seconds, self.memory = seconds, memory
        self._idle: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        for number in range(workers):
            self._idle.put(_Process(seconds, memory) if number == workers - 1 else None)

    def run(self, function: str, source: NamedBytes, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a function of `media` makes of a source, made by one of the processes."""
        plain = NamedBytes(source)
        plain.name = describe(source)
        process = self._idle.get()
        try:
            process = process or _Process(self.seconds, self.memory)
            return process.run(function, (plain, *args), dict(kwargs), plain.name)
        finally:
            if process is not None and process.done:
                process.close()
                process = _Process(self.seconds, self.memory)  # which gets ready meanwhile
            self._idle.put(process)

    def close(self) -> None:
        """End the processes that nobody uses."""
        with contextlib.suppress(queue.Empty):
            while True:
                if (process := self._idle.get_nowait()) is not None:
                    process.close()


class _Process:
    """One of the processes, as this one sees it."""

    def __init__(self, seconds: float, memory: int) -> None:
        self.seconds, self.jobs, self.done = seconds, 0, False
        # Found as this process found it, and never in the folder that somebody works in.
        env = {key: os.environ[key] for key in _KEPT if key in os.environ}
        env |= {"PYTHONPATH": os.pathsep.join(place for place in sys.path if place), "OPENBLAS_NUM_THREADS": "1"}
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-c", _CHILD, str(memory), str(seconds)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env,
        )  # fmt: skip

    def run(self, function: str, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
        assert self._child.stdin is not None and self._child.stdout is not None
        job, late = pickle.dumps((function, args, kwargs), protocol=5), threading.Event()
        self.jobs += 1

        def stop() -> None:
            late.set()
            self._child.kill()

        timer = threading.Timer(self.seconds, stop)
        timer.start()
        said = None
        try:
            with contextlib.suppress(BrokenPipeError):
                self._child.stdin.write(len(job).to_bytes(8))
                self._child.stdin.write(job)
                self._child.stdin.flush()
            line = self._child.stdout.readline(2**26)
            said = json.loads(line) if line.endswith(b"\n") else None
            found = None if said is None or "error" in said else _unpacked(said, self._child.stdout)
        except (ValueError, TypeError, KeyError, EOFError):
            said = None
        except BaseException:  # such as no memory for the pixels, of which a part is left in the pipe
            self.jobs = MOST_JOBS
            raise
        finally:
            timer.cancel()
            self.done = said is None or self.jobs >= MOST_JOBS or bool(said.get("full"))
        if said is None:
            why = f"takes longer than {self.seconds:g} seconds" if late.is_set() else "crashed the decoder"
            raise MediaError(f"{name}: decoding it {why}, or needs too much memory; give another file")
        for told in said["warnings"]:
            warnings.warn(told, stacklevel=4)
        if "error" in said:
            kind = getattr(errors, said["kind"], MediaError)
            raise kind(said["error"], said["code"])
        return found

    def close(self) -> None:
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.kill()
        self._child.wait()
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        self._child.stdout.close()


def main() -> None:
    """Decode what standard input asks for, until it ends."""
    memory, seconds = int(sys.argv[1]), float(sys.argv[2])
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C lets the server end what is under way
    functions = _functions()
    _limit(memory)
    while len(head := sys.stdin.buffer.read(8)) == 8:
        getattr(signal, "alarm", int)(math.ceil(seconds) + 2)  # an end also where the server has died
        function, args, kwargs = pickle.loads(sys.stdin.buffer.read(int.from_bytes(head)))
        arrays: list[np.ndarray] = []
        said: dict[str, Any]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                found = functions[function](*args, **kwargs)
                if isinstance(found, PILImage.Image):
                    _check_sides(*found.size, args[0].name)
                said, arrays = _packed(found)
                del found
            except MemoryError:
                said = {"error": f"{args[0].name}: needs more memory than a file may take; scale it down", "full": True}
            except PolymodalError as error:
                said = {"error": str(error), "code": error.code, "kind": type(error).__name__}
            except Exception as error:  # a decoder that is fed damaged bytes may raise anything
                said = {
                    "error": f"{args[0].name}: is damaged or cut off ({first_line(error)[:120]}); give a whole file"
                }
        del args, kwargs
        own = [str(told.message) for told in caught if issubclass(told.category, UserWarning)]
        said = {"code": "", "kind": "MediaError", "warnings": own[:20], **said}
        out.write(json.dumps(said).encode() + b"\n")
        for array in arrays:
            out.write(array.data if array.size else b"")
        out.flush()
        getattr(signal, "alarm", int)(0)


def _check_sides(width: int, height: int, name: str) -> None:
    if max(width, height) > min(MOST_SIDE, MOST_ASPECT * min(width, height)):
        told = f"{width}x{height} pixels (width x height); a side may have {MOST_SIDE:,} at most, and be {MOST_ASPECT}"
        raise MediaError(f"{name}: {told} times as long as the other; cut it", "too-many-pixels")


def _functions() -> dict[str, Any]:
    from polymodal.media import audio, image, video

    every = (image.open_image, audio.open_audio, video.probe, video.plan_frames, video.read_frames, video.sample_frames)
    return {each.__name__: each for each in every}


def _limit(memory: int) -> None:
    """Bound this process; Windows has no such limits."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def _packed(value: Any) -> tuple[dict[str, Any], list[np.ndarray]]:
    """An image, or one of the dataclasses of `media`, as JSON and arrays."""
    if isinstance(value, PILImage.Image):
        found = {"array": np.asarray(value)}
    else:
        found = {field.name: getattr(value, field.name) for field in fields(value)}
    arrays = [np.ascontiguousarray(each) for each in found.values() if isinstance(each, np.ndarray)]
    shown = {key: [each.dtype.name, each.shape] for key, each in found.items() if isinstance(each, np.ndarray)}
    return {"type": type(value).__name__, "fields": {**found, **shown}, "arrays": list(shown)}, arrays


def _unpacked(said: dict[str, Any], stream: Any) -> Any:
    """The same from JSON and a stream of bytes, of which nothing is believed."""
    from polymodal.media import audio, video

    found: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in said["fields"].items()
    }
    for key in said["arrays"]:
        dtype, shape = found[key]
        if dtype not in _ARRAYS or min(shape, default=0) < 0 or math.prod(shape) > MAX_MEMORY:
            raise ValueError(dtype)
        found[key] = np.empty(shape, dtype)
        if found[key].size and stream.readinto(memoryview(found[key]).cast("B")) != found[key].nbytes:
            raise EOFError
    kinds: tuple[Any, ...] = (audio.Sound, video.Frames, video.FramePlan, video.VideoInfo)
    kind = {each.__name__: each for each in kinds}.get(said["type"])
    return PILImage.fromarray(found["array"]) if kind is None else kind(**found)
