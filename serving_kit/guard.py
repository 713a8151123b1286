"""Who may ask. A port on a laptop is open to every page that its owner visits.

    from this machine        the name it was asked by must be this machine's (DNS rebinding), and a page
                             must come from this server itself (a drive-by POST needs no CORS)
    from any other           the token, on every route but /live and /health

Where a request comes from is where its connection arrived: the loopback interface, or another address
of this machine. So the same rule holds in a notebook and under plain `uvicorn`, which does not tell an
app what it listens on. The token, as a bearer, overrides all of it; a browser gets in by opening
`/?token=...` once, which gives it a cookie for looking and asking. Changing settings takes the token.

Pages are told apart as in Go's http.CrossOriginProtection: `Sec-Fetch-Site`, which no page can forge,
before `Origin` against `Host`. Proxies may rewrite either, so the name in X-Forwarded-Host counts for
that comparison: only a page from here, or a program, can send that header.

Pure: everything here is a function of one request's head. Not here: answering (`app.py`).
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import ipaddress
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes

Headers = Mapping[bytes, bytes]  # by name in lower case
_OPEN = ("/live", "/health")  # for probes, which cannot send a token; they say one word and a reason
_READING = ("GET", "HEAD")
# Where notebooks run on one machine and browsers on another, behind a proxy whose name nobody here knows.
# A page cannot reach that machine's loopback by any name, so there is nothing to rebind.
_ELSEWHERE = ("JUPYTERHUB_SERVICE_PREFIX", "CODESPACE_NAME", "VSCODE_PROXY_URI", "COLAB_RELEASE_TAG")


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request may not pass."""

    status: int
    text: str
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Access:
    """The rule of one server.

    Attributes:
        token: The bearer token; None: nobody has one, so nobody can change settings or ask from outside.
        private: Every request needs the token, also from this machine: it listens to the network.
        public: Nobody is checked: something in front of the server decides who may ask.
        hosts: Names besides this machine's own by which it may be asked; None: any.
        origins: Pages that may ask though they come from elsewhere: "https://example.org".
    """

    token: str | None = None
    private: bool = False
    public: bool = False
    hosts: frozenset[str] | None = frozenset()
    origins: frozenset[str] = frozenset()

    def refusal(
        self, method: str, path: str, server: tuple[str, int | None] | None, headers: Headers
    ) -> Refusal | None:
        """Why this request may not pass, or None if it may.

        Args:
            method: In upper case.
            path: Without the prefix under which the app is mounted.
            server: Address and port at which the connection arrived; the port is None for a Unix socket.
            headers: All of them.
        """
        if self.public:
            return None
        here = not self.private and _arrived_here(server)
        named = not here or self._knows(headers.get(b"host"))
        if here and named and b"origin" not in headers and b"sec-fetch-site" not in headers:
            return None  # curl, requests and their like, on this machine
        if self.holds_token(headers):
            return None
        if self._is_foreign(method, headers):
            return Refusal(403, "a page from another site may not ask this server; see allowed_origins")
        if (here and named) or path in _OPEN or self._has_cookie(server, headers):
            return None
        if here:
            return Refusal(
                403,
                "this server does not know the name that it is asked by; ask 127.0.0.1 or localhost, open "
                "/?token=... in the browser with server.token, or name it in allowed_hosts",
            )
        if self.token is None:
            return Refusal(
                403,
                "this server has no token, so only this machine may ask it; give it one with "
                "SERVING_KIT_TOKEN or create_app(token=...), or say create_app(public=True)",
            )
        return Refusal(
            401,
            "this server wants its token: Authorization: Bearer <token>, or /?token=<token> in a browser",
            {"www-authenticate": "Bearer"},
        )

    def holds_token(self, headers: Headers) -> bool:
        """Whether the request carries the token itself (`Authorization: Bearer`)."""
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and self._is_token(given.strip())

    def pass_for(self, query: bytes, server: tuple[str, int | None] | None) -> str | None:
        """The cookie for a browser that opened `/?token=...` with the right token, else None."""
        given = [part[6:] for part in query.split(b"&") if part.startswith(b"token=")]
        if not given or not self._is_token(unquote_to_bytes(given[-1])):
            return None
        # Without a path, so that it belongs to the prefix that a proxy may put before ours; Lax and not
        # Strict, so that it is there when a link in a notebook is followed. Of the token only a digest:
        # cookies are sent to all ports of a host.
        return f"{self._cookie_name(server)}={self._cookie()}; HttpOnly; SameSite=Lax"

    def _is_token(self, given: bytes) -> bool:
        return self.token is not None and hmac.compare_digest(given, self.token.encode())

    def _knows(self, host: bytes | None) -> bool:
        """Whether `Host` is a name of this machine. No browser leaves it out."""
        if host is None or self.hosts is None:
            return True
        name = _name(host)
        return _is_ours(name) or name in self.hosts

    def _is_foreign(self, method: str, headers: Headers) -> bool:
        """Whether a browser sends this for a page that is not ours."""
        origin, site = headers.get(b"origin"), headers.get(b"sec-fetch-site")
        if origin is not None and origin.decode("latin-1") in self.origins:
            return False
        if site is not None:
            # A cross-site GET without an origin is a link that somebody follows: its page cannot read it.
            return site not in (b"same-origin", b"none") and (origin is not None or method not in _READING)
        if origin is None:
            return False
        hosts = (headers.get(b"host"), headers.get(b"x-forwarded-host"))
        return origin.partition(b"://")[2].lower() not in [each.lower() for each in hosts if each]

    def _has_cookie(self, server: tuple[str, int | None] | None, headers: Headers) -> bool:
        if self.token is None:
            return False
        name, right = self._cookie_name(server).encode(), self._cookie().encode()
        for each in headers.get(b"cookie", b"").split(b";"):
            key, _, value = each.strip().partition(b"=")
            if key == name and hmac.compare_digest(value, right):
                return True
        return False

    def _cookie(self) -> str:
        return hmac.new((self.token or "").encode(), b"serving-kit cookie", hashlib.sha256).hexdigest()

    @staticmethod
    def _cookie_name(server: tuple[str, int | None] | None) -> str:
        return f"serving_kit_{server[1] if server else None}"


def access(
    token: str | None,
    host: str = "127.0.0.1",
    *,
    allowed_hosts: Iterable[str] = (),
    allowed_origins: Iterable[str] = (),
    public: bool = False,
) -> Access:
    """The rule for a server that listens on `host`: with the token for everything unless that is loopback."""
    return Access(
        token,
        private=not is_loopback(host),
        public=public,
        hosts=None if _browsers_are_elsewhere() else frozenset(each.lower() for each in allowed_hosts),
        origins=frozenset(allowed_origins),
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    return _is_ours(host)


@functools.lru_cache(maxsize=256)
def _is_ours(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


@functools.lru_cache(maxsize=256)
def _name(host: bytes) -> str:
    """The name in a `Host` header: without the port, in lower case."""
    text = host.decode("latin-1").lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0].rstrip(".")


def _arrived_here(server: tuple[str, int | None] | None) -> bool:
    if server is None:
        return False
    name, port = server
    return name.startswith("/") if port is None else _is_ours(name)  # a Unix socket has a path, and no port


def _browsers_are_elsewhere() -> bool:
    return "google.colab" in sys.modules or any(name in os.environ for name in _ELSEWHERE)
