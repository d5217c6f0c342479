"""A server's address and key: what may be one, what of it is shown, and what counts as the same server."""

from __future__ import annotations

import ipaddress
from urllib.parse import SplitResult, urlsplit

from pydantic import SecretStr

from polymodal.backends.openai.responses import clean
from polymodal.errors import ConfigError


def split_url(url: str) -> SplitResult:
    """Take a base URL apart."""
    try:
        parts = urlsplit(url.strip())
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ConfigError("the base URL cannot be read; it must be like https://host/v1") from None
    if parts.scheme not in ("http", "https") or not host:
        raise ConfigError(f"base URL {shown_url(parts)!r}: must begin with https:// or http:// and a host")
    if parts.username is not None or parts.password is not None:
        raise ConfigError(f"base URL {shown_url(parts)}: holds a user name; give the key in OPENAI_API_KEY instead")
    return parts


def secret_of(key: str | None) -> SecretStr | None:
    """Wrap a key so that printing it shows stars."""
    key = (key or "").strip()
    if any(not "!" <= c <= "~" for c in key):
        raise ConfigError(
            "the key holds characters that no key has (white space, a text editor's quotes); copy it again"
        )
    return SecretStr(key) if key else None


def shown_url(parts: SplitResult) -> str:
    """An address for people: without user name, query and fragment, any of which may be secret."""
    host = parts.netloc.rpartition("@")[2]
    return clean(f"{parts.scheme}://{host}{parts.path}", 200)


def origin_of(parts: SplitResult) -> tuple[str, str, int | None]:
    """What makes two addresses the same server's: scheme, host and port."""
    return parts.scheme, parts.hostname or "", parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, by its name or number alone."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
