"""Who may ask: this machine by its own name, pages from here, and clients with the token."""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from serving_kit import create_app
from serving_kit.http.access import Access, Denied, Level, Login, RequestHead, access
from serving_kit.http.app import all_endpoints
from serving_kit.http.endpoints import RouteTable

pytestmark = pytest.mark.light
Serve = Callable[..., Any]
HERE, OUTSIDE = ("127.0.0.1", 8000), ("192.168.1.7", 8000)
LOCAL = Access("secret")
TABLE = RouteTable(all_endpoints())
EVERY_ROUTE = [
    *((each.method, each.path) for each in TABLE.endpoints if each.level is not Level.OPEN),
    ("GET", "/nothing"),
]


def status(
    rule: Access, method: str = "POST", path: str = "/", server: Any = HERE, **headers: str
) -> int | None:
    given = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
    decision = rule.authorise(RequestHead(method, path, b"", server, given), TABLE.level(method, path))
    assert not isinstance(decision, Login)
    return decision and decision.status


def cookie_for(rule: Access, query: bytes, server: Any) -> str | None:
    """What a browser gets that opens the page with this query."""
    decision = rule.authorise(RequestHead("GET", "/", query, server, {b"host": b"x"}), Level.CLIENT)
    return decision.cookie if isinstance(decision, Login) else None


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:8000",
        "localhost",
        "LOCALHOST:8000",
        "localhost.",
        "a.localhost:1",
        "[::1]:8000",
        "127.9.9.9",
    ],
)
def test_names_of_this_machine(host: str) -> None:
    assert status(LOCAL, host=host) is None


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:8000",
        "localhost.evil.example",
        "192.168.1.7",
        "0.0.0.0:8000",
        "",
        "[::2]",
        "127.0.0.1.x",
    ],
)
def test_rebound_names(host: str) -> None:
    assert status(LOCAL, host=host) == 403
    assert status(LOCAL, host=host, authorization="Bearer secret") is None
    assert status(LOCAL, "GET", "/live", host=host) is None


def test_allowed_name() -> None:
    rule = access("secret", allowed_hosts=["Models.example"])
    assert status(rule, host="models.example:443") is None
    assert status(rule, host="other.example") == 403


@pytest.mark.parametrize("variable", ["JUPYTERHUB_SERVICE_PREFIX", "COLAB_RELEASE_TAG", "VSCODE_PROXY_URI"])
def test_proxy_without_a_known_name(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "x")
    assert status(access("secret"), host="hub.example") is None
    assert status(access("secret"), host=f"hub.example:{HERE[1]}") == 403
    assert status(access("secret"), server=("127.0.0.1", 80), host="hub.example") == 403
    assert status(access("secret"), host="hub.example", origin="https://evil.example") == 403


OTHER_SITES = [
    {"origin": "https://evil.example"},
    {"origin": "http://localhost:3000"},
    {"origin": "null"},
    {"origin": "http://localhost:8000", "sec_fetch_site": "same-site"},
    {"sec_fetch_site": "cross-site"},
]
OURS = [
    {},
    {"origin": "http://localhost:8000"},
    {"origin": "https://hub.example", "sec_fetch_site": "same-origin"},  # a proxy that rewrites Host
    {"origin": "https://hub.example", "x_forwarded_host": "hub.example"},
    {"sec_fetch_site": "none"},
]


@pytest.mark.parametrize("headers", OTHER_SITES)
def test_pages_of_other_sites(headers: dict[str, str]) -> None:
    host = "localhost:8000"
    assert status(LOCAL, host=host, **headers) == 403
    assert status(LOCAL, host=host, authorization="Bearer secret", **headers) is None
    assert status(LOCAL, host=host, authorization="Bearer wrong", **headers) == 403
    cookie = (cookie_for(LOCAL, b"token=secret", HERE) or "").partition(";")[0]
    assert status(LOCAL, host=host, cookie=cookie, **headers) == 403
    assert status(Access("secret", public=True), host=host, **headers) is None


@pytest.mark.parametrize("headers", OURS)
def test_own_page(headers: dict[str, str]) -> None:
    assert status(LOCAL, host="localhost:8000", **headers) is None


def test_links_and_allowed_origins() -> None:
    assert status(LOCAL, "GET", host="localhost", sec_fetch_site="cross-site") is None
    rule = access("secret", allowed_origins=["https://app.example"])
    origin = {"origin": "https://app.example", "sec_fetch_site": "cross-site"}
    assert status(rule, host="localhost", **origin) is None
    assert status(rule, host="localhost", origin="https://other.example") == 403


@pytest.mark.parametrize(
    ("rule", "server"),
    [(LOCAL, OUTSIDE), (access("secret", "0.0.0.0"), HERE), (access("secret", "192.168.1.7"), OUTSIDE)],
)
def test_other_machines_need_the_token(rule: Access, server: Any) -> None:
    for method, path in EVERY_ROUTE:
        assert status(rule, method, path, server, host="localhost") == 401
        assert status(rule, method, path, server, host="any", authorization="bearer secret") is None
        for wrong in ("Bearer", "Bearer x", "Basic secret", "secret", "Bearer secretx", "Bearer é"):
            assert status(rule, method, path, server, authorization=wrong) == 401
    for path in ("/live", "/health"):
        assert status(rule, "GET", path, server, host="any") is None


def test_no_token() -> None:
    assert status(Access(), server=HERE, host="localhost") is None
    assert status(Access(), server=("/run/x.sock", None), host="localhost") is None
    for server in (OUTSIDE, None, ("testserver", 80), ("testserver", None)):
        assert status(Access(), server=server, host="localhost") == 403
    assert status(Access(), server=HERE, host="evil", authorization="Bearer ") == 403
    assert cookie_for(Access(), b"token=", HERE) is None


def test_cookie() -> None:
    cookie = cookie_for(LOCAL, b"a=b&token=secret", OUTSIDE)
    assert cookie is not None
    assert "secret" not in cookie
    assert "HttpOnly; SameSite=Lax" in cookie
    pair = cookie.partition(";")[0]
    assert status(LOCAL, "GET", "/stats", OUTSIDE, cookie=f"other=1; {pair}") is None
    assert status(Access("changed"), "GET", "/stats", OUTSIDE, cookie=pair) == 401
    for wrong in (b"", b"token=", b"token=wrong", b"xtoken=secret", b"token=secret&token=no"):
        assert cookie_for(LOCAL, wrong, OUTSIDE) is None


@pytest.mark.parametrize("rule", [LOCAL, access("secret", "0.0.0.0"), Access("secret", public=True)])
def test_owner_routes_need_the_token_itself(rule: Access) -> None:
    cookie = (cookie_for(rule, b"token=secret", HERE) or "").partition(";")[0]
    for method, path in (("PATCH", "/settings"), ("GET", "/errors"), ("HEAD", "/errors")):
        assert status(rule, method, path, host="localhost") == 401
        assert status(rule, method, path, host="localhost", cookie=cookie) == 401
        assert status(rule, method, path, host="localhost", authorization="Bearer secret") is None
    assert status(Access(), "GET", "/errors", host="localhost") == 403


def test_denial_names_the_purpose() -> None:
    head = RequestHead("GET", "/errors", b"", HERE, {b"host": b"localhost"})
    denied = LOCAL.authorise(head, Level.OWNER, "the list of failures")
    assert isinstance(denied, Denied)
    assert denied.text.startswith("the list of failures needs the token")
    assert denied.headers == {"www-authenticate": "Bearer"}


# -- over HTTP -------------------------------------------------------------------------------------


def shout(texts: list[str]) -> list[str]:
    return [text.upper() for text in texts]


@pytest.fixture
def outside(serve: Serve) -> Any:
    return serve(shout, host="0.0.0.0")


def test_output_of_serve_on_the_network(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    outside = serve(shout, host="0.0.0.0")
    said = capsys.readouterr().out
    assert said.count("other machines can reach it") == 1
    assert outside.token not in said
    assert outside("a") == "A"


def test_routes_on_the_network(outside: Any) -> None:
    token = {"authorization": f"Bearer {outside.token}"}
    with httpx.Client(base_url=outside.url) as client:
        for method, path in EVERY_ROUTE:
            refused = client.request(method, path, content="x")
            assert (refused.status_code, "error" in refused.json()) == (401, True)
            assert refused.headers["www-authenticate"] == "Bearer"
            assert outside.token not in refused.text
            assert client.request(method, path, content="x", headers=token).status_code != 401
        assert client.post("/", content="a", headers=token).json() == "A"
        assert client.get("/health").status_code == client.get("/live").status_code == 200


def test_browser_on_the_network(outside: Any) -> None:
    with httpx.Client(base_url=outside.url, follow_redirects=True) as browser:
        assert browser.get("/?token=wrong").status_code == 401
        page = browser.get(f"/?token={outside.token}")
        assert page.status_code == 200
        assert page.url == f"{outside.url}/", "the token is not in the address any more"
        assert page.history[0].headers["cache-control"] == "no-store"
        assert browser.get("/stats").status_code == 200
        assert browser.post("/", content="a").json() == "A"
        assert browser.patch("/settings", json={"max_batch_size": 2}).status_code == 401
        cross_site = browser.post("/", content="a", headers={"origin": "http://localhost:1"})
        assert cross_site.status_code == 403


def test_cross_site_post(serve: Serve) -> None:
    server = serve(shout)
    host, port = "127.0.0.1", int(server.url.rpartition(":")[2])
    for header in (b"host: evil.example", b"host: localhost\r\norigin: https://evil.example"):
        with socket.create_connection((host, port), timeout=10) as sock:
            post = (
                b"POST / HTTP/1.1\r\n"
                + header
                + b"\r\ncontent-type: text/plain\r\ncontent-length: 1\r\n\r\na"
            )
            sock.sendall(post)
            answer = sock.recv(2000).lower()
        assert answer.startswith(b"http/1.1 403")
        assert b"access-control" not in answer
    assert sum(server.stats()["requests"].values()) == 0


def test_rerun_with_other_rules(serve: Serve) -> None:
    first = serve(shout)
    token, ask = first.token, {"host": "models.example"}
    assert httpx.post(first.url, content="a", headers=ask).status_code == 403
    second = serve(shout, allowed_hosts=["models.example"])
    assert (second.url, second.token) == (first.url, token)
    assert httpx.post(second.url, content="a", headers=ask).json() == "A"


def test_cors(serve: Serve) -> None:
    origin = "https://app.example"
    server = serve(shout, allowed_origins=[origin])
    ask = {"origin": origin, "sec-fetch-site": "cross-site"}
    preflight = {**ask, "access-control-request-method": "POST"}
    assert httpx.options(server.url, headers=preflight).headers["access-control-allow-origin"] == origin
    answer = httpx.post(server.url, content="a", headers=ask)
    assert (answer.json(), answer.headers["access-control-allow-origin"]) == ("A", origin)
    assert "access-control-allow-origin" in httpx.post(server.url, headers=ask).headers, "refusals, too"
    other = httpx.post(server.url, content="a", headers={"origin": "https://evil.example"})
    assert other.status_code == 403
    assert "access-control-allow-origin" not in other.headers


def posted(app: Any, url: str, root_path: str = "", **headers: str) -> int:
    """The status of one POST to an app without a server, as if its connection had arrived at that host."""

    async def post() -> int:
        transport = httpx.ASGITransport(app, root_path=root_path)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport) as client:
            return (await client.post(url, content="a", headers=headers)).status_code

    return asyncio.run(post())


def test_app_without_a_server() -> None:
    assert posted(create_app(shout), "http://127.0.0.1:1/") == 200
    assert posted(create_app(shout), "http://models.example:1/") == 403
    assert posted(create_app(shout, public=True), "http://models.example:1/") == 200
    assert posted(create_app(shout, token="t"), "http://models.example:1/") == 401
    assert posted(create_app(shout, token="t"), "http://models.example:1/", authorization="Bearer t") == 200


def test_prefix() -> None:
    url = "http://127.0.0.1:1/model/"
    assert posted(create_app(shout), url, "/model") == 200
    assert posted(create_app(shout), url, "/model", origin="http://evil.example") == 403
