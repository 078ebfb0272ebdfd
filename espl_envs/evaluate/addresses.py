"""Where a server is: from what a person types as `--base-url` to the address that requests go to."""

from __future__ import annotations

import ipaddress
import re
import urllib.request
from urllib.parse import SplitResult, urlsplit, urlunsplit

from espl_envs.core.errors import EsplError

_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_ROUTE = re.compile(r"/(?:chat/completions|completions|responses|models)$")       # what follows a base URL
EXAMPLE = "http://localhost:8000/v1"


def checked_url(given: str) -> str:
    """The base URL that is meant, without a slash at its end. `/v1` is added where there is no path, as every server
    has it; the address of a route below (`…/v1/chat/completions`) is cut back to it. Raises EsplError for what is no
    URL, and for one with credentials: keys belong into the environment."""
    parts = _parts(given.strip())
    path = re.sub("/{2,}", "/", parts.path).rstrip("/")
    cut = _ROUTE.sub("", path)
    return urlunsplit((parts.scheme, parts.netloc, cut if cut or path else "/v1", "", ""))


def note(given: str) -> str:
    """What is worth a word about how an address is read; mostly nothing. Raises EsplError as `checked_url`."""
    route = _ROUTE.search(given.strip().rstrip("/"))
    return f"--base-url is read as {checked_url(given)}; {route.group()} is added to it" if route else ""


def proxy_for(url: str) -> str | None:
    """The proxy that the environment names (HTTP_PROXY, NO_PROXY …); never for this machine itself."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if _is_here(host) or urllib.request.proxy_bypass(host):
        return None
    return urllib.request.getproxies().get(parts.scheme)


def _parts(given: str) -> SplitResult:
    if any(mark in given for mark in "@?#"):
        raise EsplError("--base-url holds more than an address: keys come from an environment variable (--api-key-env)")
    expected = f"--base-url is {given!r}, expected a URL such as {EXAMPLE}"
    try:
        if not _PROTOCOL.match(given):
            parts = urlsplit(f"http://{given}")
            scheme = "http" if _is_here(parts.hostname or "") or parts.port else "https"
            meant = checked_url(f"{scheme}://{given}")
            raise EsplError(f"{expected}: it has neither http:// nor https:// in front; did you mean {meant}?")
        parts = urlsplit(given)
        _ = parts.port, (parts.hostname or "").encode("idna")
    except ValueError:
        raise EsplError(expected) from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise EsplError(expected)
    return parts


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
