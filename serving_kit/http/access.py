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

from serving_kit.errors import SettingError

Headers = Mapping[bytes, bytes]  # by name in lower case
_OPEN = ("/live", "/health")  # for probes, which cannot send a token; they say one word and a reason
WHERE_THE_TOKEN_IS = "server.token in a notebook, what the command printed, or SERVING_KIT_TOKEN"
_READING = ("GET", "HEAD")


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
        hosts: Names besides this machine's own by which it may be asked; "{port}" in one stands for the
            port at which the connection arrived.
        proxied: A proxy whose name is not known stands in front: any name is taken if the port beside it
            in `Host` is not the one at which the connection arrived. A page whose name was rebound to
            this machine connects to that port itself, and its browser names it.
        origins: Pages that may ask though they come from elsewhere: "https://example.org".
    """

    token: str | None = None
    private: bool = False
    public: bool = False
    hosts: frozenset[str] = frozenset()
    proxied: bool = False
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
        named = not here or self._knows(headers.get(b"host"), server)
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
                f"/?token=<token> in the browser ({WHERE_THE_TOKEN_IS}), or name it in allowed_hosts",
            )
        if self.token is None:
            return Refusal(
                403,
                "this server has no token, so only this machine may ask it; give it one with "
                "SERVING_KIT_TOKEN or create_app(token=...), or say create_app(public=True)",
            )
        return Refusal(
            401,
            f"this server needs its token ({WHERE_THE_TOKEN_IS}): Authorization: Bearer <token>, or "
            "/?token=<token> in a browser",
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

    def _knows(self, host: bytes | None, server: tuple[str, int | None] | None) -> bool:
        """Whether `Host` is a name of this machine or of a proxy in front. No browser leaves it out."""
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
    """By which names a browser asks for a port of this machine, where a hosted notebook passes it through.

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


def _arrived_here(server: tuple[str, int | None] | None) -> bool:
    if server is None:
        return False
    name, port = server
    return name.startswith("/") if port is None else _is_ours(name)  # a Unix socket has a path, and no port
