"""Bytes from paths, data: URLs and memory; everything else is refused with one clear line."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymodal.errors import MediaError
from polymodal.media.source import describe, read_bytes


def test_paths(tmp_path: Path) -> None:
    file = tmp_path / "a b.bin"
    file.write_bytes(b"content")
    assert read_bytes(file, limit=100) == b"content"
    assert read_bytes(str(file), limit=7) == b"content"
    assert read_bytes(file.as_uri(), limit=100) == b"content"
    quoted = str(file).replace(" ", "%20")
    for url in (f"file://localhost{quoted}", f"FILE://LOCALHOST{quoted}", f"file:{quoted}", f"file://{file}"):
        assert read_bytes(url, limit=100) == b"content"


@given(st.binary(min_size=1, max_size=200))
def test_data_urls(data: bytes) -> None:
    plain = base64.b64encode(data).decode()
    assert read_bytes(f"data:image/png;base64,{plain}", limit=200) == data
    assert read_bytes(f"DATA:;BASE64,{plain.rstrip('=')}", limit=200) == data
    assert read_bytes(f"data:image/png;base64,{base64.urlsafe_b64encode(data).decode()}", limit=200) == data
    assert read_bytes("data:," + "".join(f"%{byte:02x}" for byte in data), limit=200) == data


def test_data_url_with_line_breaks() -> None:
    assert read_bytes("data:image/png;base64,aGVs\n bG8%3D", limit=200) == b"hello"


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_memory(kind: type) -> None:
    assert read_bytes(kind(b"abc"), limit=3) == b"abc"


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("https://example.org/cat.jpg", "https://example.org/cat.jpg: remote fetch is off; download the file"),
        ("HTTP://example.org/cat.jpg", "remote fetch is off"),
        ("ftp://example.org/cat.jpg", "ftp: URLs cannot be read"),
        ("file://elsewhere/a.png", "a file: URL names a file of this machine"),
        ("file://", "a file: URL names a file of this machine"),
        ("~nouser-here/x.png", "~nouser-here/x.png: no such file"),
        ("/dev/zero", "/dev/zero: is not a regular file"),
        ("no/such/file.png", "no/such/file.png: no such file"),
        ("", "the path is empty"),
        ("a\0b.png", "a?b.png: cannot be read"),
        ("x" * 5000, "...: cannot be read|x: cannot be read|File name too long"),
        ("data:image/png;base64", "data: URL: has no comma"),
        ("data:image/png;base64,a", "data: URL: its base64 is damaged"),
        ("data:image/png;base64,????", "data: URL: its base64 is damaged"),
        ("data:image/png;base64,", "data: URL: the file is empty"),
        (b"", "image of 0 bytes: the file is empty"),
    ],
)
def test_refused(source: str | bytes, line: str) -> None:
    with pytest.raises(MediaError) as caught:
        read_bytes(source, limit=1000)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 400
    assert any(part in text for part in line.split("|"))


def test_refused_files(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="is a directory"):
        read_bytes(tmp_path, limit=10)
    (tmp_path / "empty").touch()
    with pytest.raises(MediaError, match=r"empty: the file is empty \(0 bytes\)"):
        read_bytes(tmp_path / "empty", limit=10)
    with pytest.raises(MediaError, match="expected a path, a data: URL or bytes, got int"):
        read_bytes(5, limit=10)  # type: ignore[arg-type]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MediaError, match="is not a regular file"):
        read_bytes(tmp_path / "pipe", limit=10)


def test_links_are_followed_and_circles_of_them_refused(tmp_path: Path) -> None:
    """Who made the folder made the link, so it may lead out of it; see the top of `media.source`."""
    (tmp_path / "elsewhere").write_bytes(b"content")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a.png").symlink_to(tmp_path / "elsewhere")
    assert read_bytes(tmp_path / "root" / "a.png", limit=10) == b"content"
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(MediaError, match=r"loop: cannot be read \(Too many levels of symbolic links\); check the path"):
        read_bytes(tmp_path / "loop", limit=10)


def test_limits(tmp_path: Path) -> None:
    file = tmp_path / "big"
    file.write_bytes(bytes(11))
    url = "data:;base64," + base64.b64encode(bytes(11)).decode()
    for source in (file, bytes(11), url, "data:," + "a" * 11, "data:;base64," + "A" * 5000, "data:," + "a" * 500):
        with pytest.raises(MediaError, match=r"bytes, at most 10 are allowed"):
            read_bytes(source, limit=10)


def test_the_name_of_the_caller_is_used() -> None:
    with pytest.raises(MediaError, match=r"^image 2: the file is empty"):
        read_bytes(b"", limit=10, name="image 2")


def test_describe_is_printable() -> None:
    assert describe("a\x1b[31m\nb.png") == "a?[31m?b.png"
    assert describe("data:image/png;base64,AAAA") == "data: URL"
    assert describe(Path("x/y.png")) == "x/y.png"
