"""Rows 37 to 45 of bad inputs: what is fetched and opened, and that nothing else is even tried.

Hosts' names are looked up in a table here, and every connection is noted; public addresses lead to a server here.
"""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from polymodal.errors import ConfigError
from polymodal.media.source import NamedBytes
from polymodal.serving import fetching
from polymodal.serving.errors import RequestError
from polymodal.serving.fetching import Sources, is_public

PUBLIC, OTHER = "93.184.216.34", "2606:4700::1111"
FORBIDDEN = [
    "127.0.0.1", "::1", "0.0.0.0", "169.254.169.254", "10.1.2.3", "172.16.0.1", "192.168.1.1", "fd00::1", "fe80::1%lo",
    "100.64.0.1", "224.0.0.1", "ff02::1", "240.0.0.1", "255.255.255.255", "::ffff:127.0.0.1", "::ffff:93.184.216.34",
    "64:ff9b::7f00:1", "64:ff9b:1::1", "2002:7f00:1::", "2001::1", "2001:db8::1", "::127.0.0.1", "192.88.99.1",
    "192.0.2.1", "198.18.0.1", "0177.0.0.1", "localhost",
]  # fmt: skip


class Web:
    """A server that answers each connection with the bytes of the path that it asks for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: dict[str, list[str]] = {"a.com": [PUBLIC], "b.org": [PUBLIC], "x.b.org": [OTHER]}
        self.pages: dict[str, bytes | Callable[[socket.socket], None]] = {}
        self.dialled: list[tuple[str, int]] = []
        self.looked: list[str] = []
        self.heads: list[str] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        monkeypatch.setattr(fetching, "look_up", self.look_up)
        monkeypatch.setattr(fetching, "dial", self.dial)
        threading.Thread(target=self.serve, daemon=True).start()

    def look_up(self, host: str, port: int) -> list[Any]:
        self.looked.append(host)
        if host not in self.names:
            raise socket.gaierror("no such name")
        return [(2, 1, 6, "", (address, port)) for address in self.names[host]]

    def dial(self, address: str, port: int, seconds: float) -> socket.socket:
        self.dialled.append((address, port))
        return socket.create_connection(self.listener.getsockname(), seconds)

    def serve(self) -> None:
        while True:
            try:
                line, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.answer, args=(line,), daemon=True).start()

    def answer(self, line: socket.socket) -> None:
        with line:
            try:
                head = line.recv(65536).decode()
                self.heads.append(head)
                page = self.pages[head.split(" ")[1]]
                if callable(page):
                    page(line)
                else:
                    line.sendall(page)
            except (OSError, KeyError, IndexError, UnicodeDecodeError):
                pass


def page(body: bytes, *headers: str, status: str = "200 OK", length: int | None = None) -> bytes:
    told = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers]
    return "\r\n".join(told).encode() + b"\r\n\r\n" + body


def moved(where: str) -> bytes:
    return page(b"", f"Location: {where}", status="302 Found")


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    found = Web(monkeypatch)
    yield found
    found.listener.close()


SOURCES = Sources(domains=("a.com", "*.b.org", "c.net:8080"))


def read(source: str, sources: Sources = SOURCES, limit: int = 1000) -> NamedBytes:
    return sources.read(source, limit, "place")


def refused(source: str, sources: Sources = SOURCES, limit: int = 1000) -> str:
    with pytest.raises(RequestError) as caught:
        read(source, sources, limit)
    assert caught.value.status == 400 and caught.value.param == "place" and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_is_fetched_from_a_host_that_is_allowed(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # which nobody asks
    web.pages["/i.png?x=1"] = page(b"bytes", "Content-Type: text/html")
    found = read("http://A.com/i.png?x=1#part")
    assert found == b"bytes" and found.name == "place"
    assert web.dialled == [(PUBLIC, 80)] and web.looked == ["a.com"]
    assert "\r\nHost: a.com\r\n" in web.heads[0] and "Accept-Encoding: identity" in web.heads[0]
    web.names["c.net"], web.pages["/"] = [PUBLIC], page(b"port")
    assert read("http://c.net:8080") == b"port" and web.dialled[-1] == (PUBLIC, 8080)
    assert "\r\nHost: c.net:8080\r\n" in web.heads[-1]
    assert read("http://x.b.org/") == b"port" and web.dialled[-1] == (OTHER, 80)


def test_tls_is_spoken_with_the_name_and_to_the_address(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    greeted: list[bytes] = []

    def answer(line: socket.socket) -> None:
        greeted.append(line.recv(4096))
        line.close()

    monkeypatch.setattr(web, "answer", answer)
    assert "gave no file" in refused("https://a.com/")
    assert b"a.com" in greeted[0] and web.dialled == [(PUBLIC, 443)]  # SNI, in the clear
    assert ssl.create_default_context().check_hostname


def test_without_the_options_nothing_is_asked_and_nothing_opened(web: Web, tmp_path: Path) -> None:
    """Rows 37 and 45."""
    (tmp_path / "a").write_bytes(b"secret")
    assert "--allowed-media-domains" in refused("http://a.com/", Sources())
    for source in (str(tmp_path / "a"), f"file://{tmp_path}/a"):
        assert "--allowed-local-media-path" in refused(source, Sources()) and "secret" not in refused(source, Sources())
    assert not web.looked and not web.dialled


@pytest.mark.parametrize("address", FORBIDDEN)
def test_an_address_that_is_not_public_is_never_dialled(address: str, web: Web) -> None:
    """Rows 38 and 41: alone, and beside a public one."""
    assert not is_public(address)
    for answer in ([address], [PUBLIC, address], [address, PUBLIC]):
        web.names["a.com"] = answer
        assert "not a public one" in refused("http://a.com/")
    assert not web.dialled


@pytest.mark.parametrize(
    "url",
    [f"http://{host}/" for host in ("127.0.0.1", "2130706433", "0x7f.1", "0177.1", "[::1]", "a.com.", "a.com.evil.io",
                                    "evil.io", "user@a.com", "a.com@evil.io", "a.com:80@evil.io", "evil.io\\@a.com",
                                    "a.com\\@evil.io", "a%2ecom", "a.com%00.evil.io", "ä.com", "b.org", "xb.org",
                                    "a.com:81", "a.com:99999", "c.net", "", " a.com", "a.com\t", "a..com", "-a.com")]
    + ["http:a.com", "http:///a.com", "http:\\\\a.com/", "http://a.com/\n", "http://a.com/ x", "http://a.com/\\..\\",
       "http://a.com/é", "ftp://a.com/", "gopher://a.com/", "jar:http://a.com/", "ws://a.com/", "//a.com/", "C:\\x",
       "HTTP\n://a.com/", "http://a.com/" + "x" * 5000],
)  # fmt: skip
def test_an_address_of_another_form_or_host_is_refused(url: str, web: Web) -> None:
    """Rows 39 and 43."""
    refused(url)
    assert not web.dialled and not web.looked


def test_redirects_are_checked_as_addresses_are(web: Web) -> None:
    """Row 40."""
    web.names["private.b.org"] = ["10.0.0.1"]
    web.pages |= {"/1": moved("/2"), "/2": moved("http://x.b.org/3"), "/3": page(b"there"), "/loop": moved("/loop")}
    assert read("http://a.com/1") == b"there"
    assert web.dialled == [(PUBLIC, 80), (PUBLIC, 80), (OTHER, 80)]
    for where in ("http://private.b.org/", "http://127.0.0.1/", "file:///etc/passwd", "gopher://a.com/", "//evil.io/",
                  "/\\evil.io/", "http://evil.io/", "", "data:,x"):  # fmt: skip
        web.pages["/away"], before = moved(where), len(web.dialled)
        refused("http://a.com/away")
        assert len(web.dialled) == before + 1
    before = len(web.dialled)
    assert "redirects more than 3" in refused("http://a.com/loop") and len(web.dialled) == before + 4


def test_a_name_is_looked_up_once_and_its_address_kept(web: Web) -> None:
    """Row 41: an answer that changes between the check and the connection changes nothing."""
    answers = iter([[PUBLIC], ["127.0.0.1"]])
    original = web.look_up

    def once(host: str, port: int) -> list[Any]:
        web.names["a.com"] = next(answers)
        return original(host, port)

    web.pages["/"] = page(b"x")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fetching, "look_up", once)
        assert read("http://a.com/") == b"x"
    assert web.dialled == [(PUBLIC, 80)]


def test_what_is_too_much_or_never_ends_is_left(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 42."""
    monkeypatch.setattr(fetching, "FETCH_S", 0.6)

    def drip(head: bytes) -> Callable[[socket.socket], None]:
        def answer(line: socket.socket) -> None:
            line.sendall(head)
            for _ in range(100):
                line.sendall(b"x")
                time.sleep(0.1)

        return answer

    def flood(line: socket.socket) -> None:
        line.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            line.sendall(bytes(2**20))

    start = b"HTTP/1.1 200 OK\r\n"
    web.pages |= {
        "/large": page(b"x" * 1001), "/claims": page(b"x", length=10**9), "/flood": flood,
        "/short": page(b"x", length=9), "/packed": page(b"x", "Content-Encoding: gzip"),
        "/gone": page(b"x", status="404 Not Found"),
        "/empty": page(b""), "/head": drip(start), "/body": drip(start + b"\r\n"), "/none": lambda line: time.sleep(5),
        "/odd": b"banana\r\n\r\n", "/many": start + b"".join(b"X: y\r\n" for _ in range(500)) + b"\r\n",
    }  # fmt: skip
    for path, told in (("large", "1,000"), ("claims", "1,000"), ("flood", "1,000"), ("short", "gave no file"),
                       ("packed", "packed"), ("gone", "404"), ("empty", "empty"), ("head", "gave no file"),
                       ("body", "gave no file"), ("none", "gave no file"), ("odd", "gave"),
                       ("many", "gave")):  # fmt: skip
        begin = time.monotonic()
        assert told in refused(f"http://a.com/{path}")
        assert time.monotonic() - begin < 3


def test_files_of_one_folder_alone_are_opened(tmp_path: Path) -> None:
    """Row 44."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "in ner").mkdir(parents=True)
    outside.mkdir()
    (root / "a.png").write_bytes(b"a")
    (root / "in ner" / "b.png").write_bytes(b"b")
    (outside / "secret").write_bytes(b"secret")
    (tmp_path / "root2").write_bytes(b"secret")
    (root / "link").symlink_to(outside / "secret")
    (root / "folder").symlink_to(outside)
    (root / "own").symlink_to(root / "a.png")
    (root / "large").write_bytes(bytes(2000))
    (root / "empty").write_bytes(b"")
    os.mkfifo(root / "pipe")
    sources = Sources(folder=root)
    assert read(str(root / "a.png"), sources) == b"a"
    assert (
        read(f"file://{root}/in%20ner/b.png", sources) == read(f"file://localhost{root}/in ner/b.png", sources) == b"b"
    )
    told = {
        refused(source, sources)
        for source in (f"{root}/../outside/secret", f"file://{root}/%2e%2e/outside/secret", f"{root}/link",
                       f"{root}/folder/secret", f"{root}/own", f"{root}/pipe", f"{root}/in ner", f"{root}", f"{root}/",
                       f"{root}//a.png", f"{root}/./a.png", f"{root}/a.png\0", f"file://{root}/a.png%00", f"{root}2",
                       "/dev/zero", "/proc/self/environ", "/etc/passwd", f"file://evil.io{root}/a.png", "file:///",
                       f"{root}/{'x' * 5000}", f"{root}/nothing")
    }  # fmt: skip
    assert len(told) == 1 and "secret" not in told.pop()  # the same, whether it is there or not
    assert "1,000 bytes" in refused(f"{root}/large", sources) and "empty" in refused(f"{root}/empty", sources)
    for source in ("a.png", "../a.png", "~/a.png", "FILE:a.png"):
        assert "only data: URLs" in refused(source, sources)
    linked = tmp_path / "linked"
    linked.symlink_to(root)  # who started the server chose it
    assert read(f"{linked}/a.png", Sources(folder=linked)) == read(f"{root}/a.png", Sources(folder=linked)) == b"a"


def test_a_file_that_changes_into_a_link_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A race between a look and the opening: what is opened is looked at, and nothing before."""
    (tmp_path / "secret").write_bytes(b"secret")
    root = tmp_path / "root"
    (root / "in").mkdir(parents=True)
    (root / "in" / "a").write_bytes(b"a")
    original, sources = os.open, Sources(folder=root)

    def changing(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if path == "a":
            (root / "in" / "a").unlink()
            (root / "in" / "a").symlink_to(tmp_path / "secret")
        return original(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", changing)
    assert "no regular file" in refused(f"{root}/in/a", sources)


@pytest.mark.parametrize(
    "domain", ["", "*", "http://a.com", "a.com/", "127.0.0.1", "2130706433", "[::1]", "a b", "*.*.a"]
)
def test_a_wrong_host_is_told_when_the_server_starts(domain: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no host"):
        Sources(domains=(domain,))
    with pytest.raises(ConfigError, match="is no folder"):
        Sources(folder=tmp_path / "nothing")
