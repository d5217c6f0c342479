"""Bad videos, sounds and documents as conversations: one clear line or a stated limit, in bounded time and memory."""

from __future__ import annotations

import io
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from polymodal.backends import load
from polymodal.errors import PolymodalError
from polymodal.generation.params import GenerationParams
from polymodal.messages import Audio, Document, Video, user
from polymodal.processing.processor import Processor
from tests.media.makers import encoded, encrypted, many_pages, opus, wav

SECONDS = 60
MEBIBYTES = 900
NOISE = (np.random.default_rng(0).standard_normal(8_000) * 3000).astype("<i2")


def large(height: int, width: int) -> bytes:
    """Two grey frames."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.full((height * 3 // 2, width), 128, np.uint8), format="yuv420p")
        for number in range(2):
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


def no_frames() -> bytes:
    data = encoded(muxer={"movflags": "frag_keyframe+empty_moov"})
    return data[: data.index(b"moof") - 4]


HLS = b"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n/etc/passwd\n#EXT-X-ENDLIST\n"
CONCAT = b"ffconcat version 1.0\nfile /etc/passwd\n"
BAD: dict[str, tuple[Any, Callable[[], bytes], str]] = {  # what is said; "" where it is taken
    "video-cut-in-its-head": (Video, lambda: encoded()[:300], "damaged or cut off"),
    "video-cut-in-the-middle": (Video, lambda: (data := encoded(format="matroska"))[: len(data) * 6 // 10], ""),
    "video-without-frames": (Video, no_frames, "no frame"),
    "video-of-ten-hours": (
        Video,
        lambda: encoded(frames=3, times=(0, 18_000_000, 35_999_960)),
        "lasts 36,000 seconds, at most 21,600 are allowed",
    ),
    "video-of-8k": (Video, lambda: large(4320, 7680), ""),
    "video-beyond-8k": (Video, lambda: large(6144, 8176), "no frame of at most 33,554,432 pixels"),
    "video-hls": (Video, lambda: HLS, "names other files"),
    "video-concat": (Video, lambda: CONCAT, "names other files"),
    "sound-hls": (Audio, lambda: HLS, "is a playlist"),
    "sound-concat": (Audio, lambda: CONCAT, "is a playlist"),
    "sound-without-samples": (Audio, lambda: wav(NOISE[:0]), "has no samples"),
    "sound-of-1-hertz": (Audio, lambda: wav(NOISE, 1), "has 1 samples a second, from 1,000 to 768,000 are read"),
    "sound-of-768-kilohertz": (Audio, lambda: wav(np.tile(NOISE, 48), 768_000), ""),
    "sound-of-64-channels": (Audio, lambda: wav(np.tile(NOISE, 64), channels=64), ""),
    "sound-of-nan": (Audio, lambda: wav(np.full(900, np.nan, "<f4"), kind=3), "NaN or infinite"),
    "sound-that-claims-4-gigabytes": (Audio, lambda: wav(NOISE, claim=4_000_000_000), ""),
    "sound-that-inflates": (Audio, lambda: opus(1200), "lasts longer than 600 seconds, which is the most allowed"),
    "silence": (Audio, lambda: wav(np.zeros(16_000, "<i2")), ""),
    "document-encrypted": (Document, lambda: encrypted(b"secret"), "is encrypted; give its password"),
    "document-of-10000-pages": (Document, lambda: many_pages(10_000), "has 10,000 pages, at most 20 are"),
    "document-cut": (Document, lambda: many_pages(3)[:60], "damaged or cut off"),
}


@pytest.fixture(scope="module")
def backend(senses_folder: Path) -> Any:
    return load(senses_folder, "cpu")


@pytest.mark.parametrize("kind", BAD)
def test_each_gives_one_line_or_is_taken(kind: str, backend: Any, tmp_path: Path) -> None:
    make, data, expected = BAD[kind]
    path = tmp_path / f"{kind}.bin"
    path.write_bytes(data())
    processor: Processor = backend.processor
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    if expected:
        with pytest.raises(PolymodalError, match=expected) as caught:
            processor([user("A", make(path), "?")])
        assert "\n" not in str(caught.value) and path.name in str(caught.value) and len(str(caught.value)) < 400
    else:
        sample = processor([user("A", make(path), "?")])
        made = [*(sample.pixels or ()), *(sample.sounds or ())]
        assert made and all(tensor.isfinite().all() for tensor in made)
        assert int((sample.input_ids == processor.image_token_id).sum()) == sum(p.num_tokens for p in sample.plans) > 0
    assert time.monotonic() - began < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEBIBYTES * 1024


def test_a_bad_one_among_others_costs_them_nothing(backend: Any, tmp_path: Path) -> None:
    asked, wanted = [], []
    for kind in ("silence", "sound-of-nan", "video-hls", "document-cut", "sound-of-64-channels"):
        make, data, expected = BAD[kind]
        (tmp_path / kind).write_bytes(data())
        asked.append([user(make(tmp_path / kind), "?")])
        wanted.append(bool(expected))
    answers = backend.generate_batch(asked, GenerationParams(max_new_tokens=2))
    assert [isinstance(answer, PolymodalError) for answer in answers] == wanted


def test_a_film_that_names_another_file_is_read_alone(backend: Any, tmp_path: Path) -> None:
    """Its data reference says that they lie elsewhere; whatever comes of it, no other file is opened."""
    data = encoded()
    place = data.index(b"url \x00\x00\x00\x01")
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(data)
    path = tmp_path / "film.mp4"
    path.write_bytes(data[:place] + b"alis\x00\x00\x00\x00" + data[place + 8 :])
    opened: list[str] = []
    watching = [True]
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if watching and event == "open" else None)
    try:
        backend.processor([user(Video(path), "?")])
    except PolymodalError as error:
        assert "\n" not in str(error)
    finally:
        watching.clear()
    assert str(path) in opened and str(secret) not in opened
