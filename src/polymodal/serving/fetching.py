"""Where media of requests come from: `data:` URLs, and where the server was told so, named hosts and one folder.

A URL has one reader, the pattern `_URL`: what it does not match is no address. A host's name is looked up once, every
address of the answer has to be public, and the connection goes to one of these very addresses with the name kept for
TLS and `Host`. A redirect is checked as the first address was. A file is opened from the folder down, a part of its
path at a time, and never through a link.
"""

import contextlib
import http.client
import ipaddress
import os
import re
import socket
import ssl
import stat
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from polymodal.errors import ConfigError, MediaError
from polymodal.media.decoders import Decoders
from polymodal.media.source import NamedBytes, read_bytes
from polymodal.serving.errors import RequestError

FETCH_S = 10.0
"""Seconds in which a file has to be fetched, redirects included."""
REDIRECTS = 3
PORTS = {"http": 80, "https": 443}
# Printable ASCII without white space and backslash; a host of letters, digits and hyphens, so no user name before it.
_URL = re.compile(r"(https?)://([a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?)(?::([0-9]{1,5}))?([/?#][!-\[\]-~]*)?", re.I)
_DOMAIN = re.compile(r"(\*\.)?([a-z0-9-]{1,63}\.)*[a-z0-9-]*[a-z-][a-z0-9-]*(:[0-9]{1,5})?")  # its end is no number
_PUBLIC_V6 = ipaddress.ip_network("2000::/3")
_TUNNELS = [ipaddress.ip_network(each) for each in ("2002::/16", "2001::/23", "192.88.99.0/24")]


@dataclass(frozen=True)
class Sources:
    """What a server reads besides `data:` URLs, and who decodes it."""

    domains: tuple[str, ...] = ()  # "a.com" that host alone, "*.a.com" those below it; with ":8080" on that port
    folder: Path | None = None  # Whose files may be read
    decoders: Decoders | None = None  # None for this process

    def __post_init__(self) -> None:
        for domain in self.domains:
            if not _DOMAIN.fullmatch(domain):
                raise ConfigError(f"{domain!r:.80} is no host; write a.com, or *.a.com for the hosts below it")
        if self.folder is not None and not (self.folder.is_dir() and os.open in os.supports_dir_fd):
            raise ConfigError(f"{self.folder}: is no folder, or files cannot be opened safely on this system")

    def read(self, source: str, limit: int, place: str) -> NamedBytes:
        """The bytes that a request gives or names; error lines call them by their place in the request."""
        try:
            if source[:5].lower() == "data:":
                data = read_bytes(source, limit=limit, name=place)
            elif re.match(r"https?:", source, re.I):
                data = self._fetched(source, limit, place)
            elif source.startswith("/") or source[:7].lower() == "file://":
                data = self._file(source, limit, place)
            else:
                raise _refused(place, "only data: URLs are read, such as data:image/png;base64,...")
        except MediaError as error:
            raise RequestError(str(error), place, code="invalid_media") from None
        return self.hold(data, limit, place)

    def hold(self, data: bytes, limit: int, place: str) -> NamedBytes:
        """Bytes of a request, to be decoded where the server decodes what strangers give."""
        if len(data) > limit:
            raise _too_large(place, limit)
        found = NamedBytes(data)
        found.name, found.decoders = place, self.decoders
        return found

    def close(self) -> None:
        """End the processes that decode."""
        if self.decoders is not None:
            self.decoders.close()

    def _fetched(self, url: str, limit: int, place: str) -> bytes:
        if not self.domains:
            told = "only data: URLs are read; this server fetches nothing unless --allowed-media-domains names the host"
            raise _refused(place, told)
        deadline = time.monotonic() + FETCH_S
        for _ in range(REDIRECTS + 1):
            scheme, host, port, target = self._checked(url, place)
            found, data = _get(scheme, host, port, target, limit, deadline, place)
            if found is None:
                return data
            if found.startswith("/") and found[1:2] not in ("/", "\\"):
                found = f"{scheme}://{host}:{port}{found}"
            if scheme == "https" and not found.lower().startswith("https:"):
                raise _refused(place, "it redirects to where no TLS is")
            url = found
        raise _refused(place, f"it redirects more than {REDIRECTS} times")

    def _checked(self, url: str, place: str) -> tuple[str, str, int, str]:
        """Scheme, host, port and path of an address that may be asked."""
        match = _URL.fullmatch(url) if len(url) <= 4096 else None
        if match is None:
            raise _refused(place, "is no address of a file; write https://host/path, escaped where it has to be")
        scheme, host = match[1].lower(), match[2].lower()
        port, usual = int(match[3] or PORTS[scheme]), PORTS[scheme]
        names = [host, *(f"*.{host[at + 1 :]}" for at in range(len(host)) if host[at] == ".")]
        allowed = {domain if ":" in domain else f"{domain}:{usual}" for domain in self.domains}
        if not any(f"{name}:{port}" in allowed for name in names):
            raise _refused(place, "its host is none of --allowed-media-domains")
        target = (match[4] or "/").partition("#")[0]
        return scheme, host, port, target if target.startswith("/") else f"/{target}"

    def _file(self, source: str, limit: int, place: str) -> bytes:
        if self.folder is None:
            told = "only data: URLs are read; this server opens no file unless --allowed-local-media-path has it"
            raise _refused(place, told)
        missing = _refused(place, "is no regular file inside --allowed-local-media-path; links are not followed")
        if not source.startswith("/"):
            host, _, rest = source[7:].partition("/")
            source = unquote(f"/{rest}") if host.lower() in ("", "localhost") else ""
        root = next((root for root in (self.folder, self.folder.resolve()) if source.startswith(f"{root}/")), None)
        parts = source[len(f"{root}/") :].split("/") if root else []
        if not parts or "\0" in source or any(part in ("", ".", "..") for part in parts):
            raise missing
        try:
            with contextlib.ExitStack() as stack:
                at = _open(str(self.folder.resolve()), os.O_DIRECTORY, None, stack)
                for part in parts[:-1]:
                    at = _open(part, os.O_DIRECTORY | os.O_NOFOLLOW, at, stack)
                at = _open(parts[-1], os.O_NOFOLLOW | os.O_NONBLOCK, at, stack)
                info = os.fstat(at)
                if not stat.S_ISREG(info.st_mode):
                    raise missing
                if info.st_size > limit:
                    raise _too_large(place, limit)
                with open(at, "rb", closefd=False) as file:
                    data = file.read(limit + 1)
        except (OSError, ValueError):
            raise missing from None
        return read_bytes(data, limit=limit, name=place)


def _open(name: str, flags: int, folder: int | None, stack: contextlib.ExitStack) -> int:
    found = os.open(name, os.O_RDONLY | os.O_CLOEXEC | flags, dir_fd=folder)
    stack.callback(os.close, found)
    return found


def _refused(place: str, told: str) -> RequestError:
    return RequestError(f"{place}: {told}", place, code="invalid_url")


def _too_large(place: str, limit: int) -> RequestError:
    return RequestError(f"{place}: more than {limit:,} bytes; give a smaller file", place, code="invalid_media")


def is_public(address: str) -> bool:
    """Whether an address is one of the open network, and leads to no other address inside it."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    plain = found.version == 4 or found in _PUBLIC_V6  # which leaves mapped, NAT64 and link-local ones out
    tunnel = any(found.version == each.version and found in each for each in _TUNNELS)
    return plain and not tunnel and found.is_global and not (found.is_multicast or found.is_reserved)


def look_up(host: str, port: int) -> Sequence[Any]:
    """The addresses of a host; the system's own limits of time hold."""
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)


def dial(address: str, port: int, seconds: float) -> socket.socket:
    """A connection to an address."""
    return socket.create_connection((address, port), seconds)


def _get(
    scheme: str, host: str, port: int, target: str, limit: int, deadline: float, place: str
) -> tuple[str | None, bytes]:
    """Where a host redirects to, or else the file that it gives."""
    # A client that is told of no refused port and no error of a connection learns nothing of the network behind here.
    failed = _refused(place, f"its host gave no file within {FETCH_S:g} seconds")
    try:
        addresses = [str(entry[4][0]) for entry in look_up(host, port)]
    except OSError:
        raise failed from None
    if not addresses or not all(map(is_public, addresses)):
        raise _refused(place, "its host has an address that is not a public one")
    with contextlib.ExitStack() as stack:
        try:
            line = stack.enter_context(dial(addresses[0], port, max(0.01, deadline - time.monotonic())))
            if scheme == "https":
                context = ssl.create_default_context()
                line = context.wrap_socket(line, server_hostname=host, do_handshake_on_connect=False)
                stack.callback(line.close)
            # Neither a greeting nor a head nor a body that comes a byte at a time goes on for longer than this.
            timer = threading.Timer(max(0.0, deadline - time.monotonic()), _hang_up, (line,))
            timer.start()
            stack.callback(timer.cancel)
            if isinstance(line, ssl.SSLSocket):
                line.do_handshake()
            connection = http.client.HTTPConnection(host, port)
            connection.default_port = PORTS[scheme]
            connection.sock = line
            connection.request("GET", target, headers={"Accept-Encoding": "identity", "User-Agent": "polymodal"})
            with connection.getresponse() as answer:
                if answer.status in (301, 302, 303, 307, 308):
                    return answer.headers.get("Location", ""), b""
                if answer.status != 200:
                    raise _refused(place, f"its host answered with status {answer.status}")
                if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
                    raise _refused(place, "its host packed it (Content-Encoding), which nobody asked for")
                data = b"" if (answer.length or 0) > limit else answer.read(limit + 1)
                if (answer.length or 0) > limit or len(data) > limit:
                    raise _too_large(place, limit)
                if answer.length:
                    raise failed
        except (OSError, ValueError, http.client.HTTPException):
            raise failed from None
    if time.monotonic() > deadline:  # a body without a length ends where the line does
        raise failed
    return None, read_bytes(data, limit=limit, name=place)


def _hang_up(line: socket.socket) -> None:
    with contextlib.suppress(OSError):
        socket.socket.shutdown(line, socket.SHUT_RDWR)  # below TLS too
