"""Who may send requests. Any page in a browser on this machine can send them to a port of it.

    from this machine        the name in `Host` must be this machine's (DNS rebinding), and a page must
                             come from this server itself (a cross-site POST needs no CORS)
    from any other           the token, on every route but those of the level OPEN

Where a request comes from is where its connection arrived: the loopback interface, or another address
of this machine. So the same rule holds in a notebook and under plain `uvicorn`, which does not tell an
app what it listens on. The token, as a bearer, overrides all of it. A browser that opens `/?token=...`
once gets a cookie, which stands for the token on routes of the level CLIENT.

Pages are compared as in Go's http.CrossOriginProtection: `Sec-Fetch-Site`, which no page can forge,
before `Origin` against `Host`. Proxies may rewrite either, so the name in X-Forwarded-Host counts for
that comparison: only a page from here, or a program, can send that header.

Pure: everything here is a function of one request's head, and `Access.authorise` is the only decision.
Which level a route has stands beside it (`endpoints.py`). Not here: answering (`middleware.py`).
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
from enum import Enum
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from serving_kit.errors import SettingError

Headers = Mapping[bytes, bytes]  # by name in lower case
Address = tuple[str, int | None] | None  # the port is None for a Unix socket, all of it where it is unknown
# Of a response with secrets.
PRIVATE_HEADERS = {"cache-control": "no-store", "referrer-policy": "no-referrer"}
_TOKEN_SOURCES = "server.token in a notebook, what the command printed, or SERVING_KIT_TOKEN"
_BEARER = {"www-authenticate": "Bearer"}
_READING = ("GET", "HEAD")


class Level(Enum):
    """Who may ask a route."""

    OPEN = "open"  # every program: probes cannot send a token. Pages of other sites may not
    CLIENT = "client"  # a client that the rule of the server admits
    OWNER = "owner"  # a client that sends the token itself; a cookie is not enough


class RequestHead(NamedTuple):
    """What the decision is about.

    Attributes:
        method: In upper case.
        path: Without the prefix under which the app is mounted.
        query: What follows the question mark.
        server: Where the connection arrived.
        headers: All of them.
    """

    method: str
    path: str
    query: bytes
    server: Address
    headers: Headers


@dataclass(frozen=True, slots=True)
class Denied:
    """Why a request may not ask, and the response to it."""

    status: int
    text: str
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Login:
    """A browser has opened `/?token=...`: it gets the cookie, and the page without the token in its URL."""

    cookie: str  # the value of Set-Cookie


@dataclass(frozen=True, slots=True)
class Access:
    """The rule of one server.

    Attributes:
        token: The bearer token; None: settings cannot be changed, and only this machine may ask.
        private: Every request needs the token, also from this machine: it listens to the network.
        public: Every client may ask: something in front of the server decides who.
        hosts: Names besides this machine's own by which it may be asked; "{port}" in one stands for the
            port at which the connection arrived.
        proxied: A proxy whose name is not known stands in front: any name is taken if the port beside it
            in `Host` is not the one at which the connection arrived. A page whose name was rebound to
            this machine connects to that port itself, and its browser names it.
        origins: Pages of other sites that may ask: "https://example.org".
    """

    token: str | None = None
    private: bool = False
    public: bool = False
    hosts: frozenset[str] = frozenset()
    proxied: bool = False
    origins: frozenset[str] = frozenset()

    def authorise(self, head: RequestHead, level: Level, purpose: str = "") -> Denied | Login | None:
        """Decide one request. Any thread.

        Args:
            head: The request.
            level: Who may ask its route.
            purpose: What the route of the level OWNER does, for the text of a denial.

        Returns:
            None: it may ask.
        """
        if head.path == "/" and head.method == "GET" and (cookie := self._login_cookie(head)) is not None:
            return Login(cookie)
        denied = None if self.public else self._deny_client(head, level)
        if denied is None and level is Level.OWNER:
            denied = self._deny_owner(head.headers, purpose)
        return denied

    def _deny_client(self, head: RequestHead, level: Level) -> Denied | None:
        headers = head.headers
        here = not self.private and _arrived_here(head.server)
        named = not here or self._knows(headers.get(b"host"), head.server)
        if here and named and b"origin" not in headers and b"sec-fetch-site" not in headers:
            return None  # curl, requests and their like, on this machine
        if self._holds_token(headers):
            return None
        if self._is_foreign(head.method, headers):
            return Denied(403, "a page from another site may not ask this server; see allowed_origins")
        if (here and named) or level is Level.OPEN or self._has_cookie(head.server, headers):
            return None
        return self._deny_unknown(here)

    def _deny_unknown(self, here: bool) -> Denied:
        """For a client with an unknown name for this machine (`here`), or from another machine."""
        if here:
            return Denied(
                403,
                "this server does not know the name that it is asked by; ask 127.0.0.1 or localhost, open "
                f"/?token=<token> in the browser ({_TOKEN_SOURCES}), or name it in allowed_hosts",
            )
        if self.token is None:
            return Denied(
                403,
                "this server has no token, so only this machine may ask it; give it one with "
                "SERVING_KIT_TOKEN or create_app(token=...), or say create_app(public=True)",
            )
        return Denied(
            401,
            f"this server needs its token ({_TOKEN_SOURCES}): Authorization: Bearer <token>, or "
            "/?token=<token> in a browser",
            _BEARER,
        )

    def _deny_owner(self, headers: Headers, purpose: str) -> Denied | None:
        if self.token is None:
            return Denied(
                403,
                f"this server was started without a token, and {purpose} needs one: set SERVING_KIT_TOKEN, "
                "or pass create_app(token=...)",
            )
        if not self._holds_token(headers):
            return Denied(
                401, f"{purpose} needs the token ({_TOKEN_SOURCES}): Authorization: Bearer <token>", _BEARER
            )
        return None

    def _holds_token(self, headers: Headers) -> bool:
        """Whether the request carries the token itself (`Authorization: Bearer`)."""
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and self._is_token(given.strip())

    def _login_cookie(self, head: RequestHead) -> str | None:
        """The cookie for a browser that opened `/?token=...` with the right token, else None."""
        given = [part[6:] for part in head.query.split(b"&") if part.startswith(b"token=")]
        if not given or not self._is_token(unquote_to_bytes(given[-1])):
            return None
        # Without a path, so that it belongs to the prefix that a proxy may put before ours; Lax and not
        # Strict, so that it is there when a link in a notebook is followed. Of the token only a digest:
        # cookies are sent to all ports of a host.
        return f"{self._cookie_name(head.server)}={self._cookie()}; HttpOnly; SameSite=Lax"

    def _is_token(self, given: bytes) -> bool:
        return self.token is not None and hmac.compare_digest(given, self.token.encode())

    def _knows(self, host: bytes | None, server: Address) -> bool:
        """Whether `Host` is a name of this machine or of a proxy in front. Every browser sends it."""
        if host is None:
            return True
        name, port = _name(host), server[1] if server else None
        if _is_ours(name) or name in {each.replace("{port}", str(port)) for each in self.hosts}:
            return True
        return self.proxied and bool(name) and _port(host) != port

    def _is_foreign(self, method: str, headers: Headers) -> bool:
        """Whether a browser sends this for a page that is not ours."""
        origin, site = headers.get(b"origin"), headers.get(b"sec-fetch-site")
        if origin is not None and origin.decode("latin-1") in self.origins:
            return False
        if site is not None:
            # A cross-site GET without an origin is a link that was followed: its page cannot read the answer.
            return site not in (b"same-origin", b"none") and (origin is not None or method not in _READING)
        if origin is None:
            return False
        hosts = (headers.get(b"host"), headers.get(b"x-forwarded-host"))
        return origin.partition(b"://")[2].lower() not in [each.lower() for each in hosts if each]

    def _has_cookie(self, server: Address, headers: Headers) -> bool:
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
    def _cookie_name(server: Address) -> str:
        return f"serving_kit_{server[1] if server else None}"


def access(
    token: str | None,
    host: str = "127.0.0.1",
    *,
    allowed_hosts: str | Iterable[str] | None = (),
    allowed_origins: str | Iterable[str] | None = (),
    public: bool = False,
    require_token: bool = False,
) -> Access:
    """The rule for a server that listens on `host`.

    Args:
        token: As in `Access`.
        host: What it listens on; unless that is loopback, every request needs the token.
        allowed_hosts: Names by which it may be asked besides localhost; one may be given as a string.
        allowed_origins: Pages that may ask it; one may be given as a string.
        public: As in `Access`.
        require_token: Every request needs the token, wherever it comes from.

    Raises:
        SettingError: a token is required, but there is none or the server is public.
    """
    if require_token and public:
        raise SettingError("require_token and public exclude each other")
    if require_token and not token:
        raise SettingError("require_token needs a token: token=..., or the variable SERVING_KIT_TOKEN")
    names, proxied = _proxy_names()
    return Access(
        token,
        private=require_token or not is_loopback(host),
        public=public,
        hosts=names | {_allowed(each) for each in _each(allowed_hosts)},
        proxied=proxied,
        origins=frozenset(_each(allowed_origins)),
    )


def _proxy_names() -> tuple[frozenset[str], bool]:
    """By which names a browser asks for a port of this machine, where a hosted notebook forwards it.

    Returns:
        The names that the environment says, with "{port}" for the port; and whether it says that there is
        a proxy but not by which name.
    """
    environ = os.environ
    names: set[str] = set()
    unknown = "COLAB_RELEASE_TAG" in environ or "google.colab" in sys.modules
    if "CODESPACE_NAME" in environ:
        domain = environ.get("GITHUB_CODESPACES_PORT_FORWARDING_DOMAIN") or "app.github.dev"
        names.add(f"{environ['CODESPACE_NAME']}-{{port}}.{domain}".lower())
    addresses = [environ["VSCODE_PROXY_URI"]] if "VSCODE_PROXY_URI" in environ else []
    if "JUPYTERHUB_SERVICE_PREFIX" in environ:
        addresses.append(environ.get("JUPYTERHUB_PUBLIC_URL", ""))
    for address in addresses:
        host = address.replace("{{port}}", "{port}").partition("://")[2].partition("/")[0]
        if host:
            names.add(_name(host.encode()))
        else:  # a path below the notebook's own address
            unknown = True
    return frozenset(names), unknown


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


def _allowed(host: str) -> str:
    """The name in what an owner writes: with or without a port, an IPv6 address also without brackets."""
    return host.lower() if host.count(":") > 1 and "[" not in host else _name(host.encode())


def _each(names: str | Iterable[str] | None) -> Iterable[str]:
    return (names,) if isinstance(names, str) else names or ()


@functools.lru_cache(maxsize=256)
def _name(host: bytes) -> str:
    """The name in a `Host` header: without the port, in lower case."""
    text = host.decode("latin-1").lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0].rstrip(".")


def _port(host: bytes) -> int | None:
    """The port in a `Host` header; without one that of http."""
    digits = host.rpartition(b"]")[2].partition(b":")[2]
    return int(digits[:6]) if digits.isdigit() else 80


def _arrived_here(server: Address) -> bool:
    if server is None:
        return False
    name, port = server
    return name.startswith("/") if port is None else _is_ours(name)  # a Unix socket has a path, and no port
