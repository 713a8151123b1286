"""Routes by method and path."""

import pytest

from serving_kit.http.access import Level
from serving_kit.http.app import all_endpoints
from serving_kit.http.endpoints import RouteTable

pytestmark = pytest.mark.light
TABLE = RouteTable(all_endpoints())


@pytest.mark.parametrize(
    ("method", "path", "level"),
    [
        ("POST", "/", Level.CLIENT),
        ("GET", "/live", Level.OPEN),
        ("HEAD", "/health", Level.OPEN),
        ("POST", "/health", Level.OPEN),  # there is no such route: 405 for every client
        ("GET", "/settings", Level.CLIENT),
        ("PATCH", "/settings", Level.OWNER),
        ("GET", "/errors", Level.OWNER),
        ("HEAD", "/errors", Level.OWNER),
        ("GET", "/nothing", Level.CLIENT),
    ],
)
def test_levels(method: str, path: str, level: Level) -> None:
    assert TABLE.level(method, path) is level


def test_every_owner_route_names_its_purpose() -> None:
    for endpoint in TABLE.endpoints:
        assert bool(endpoint.purpose) == (endpoint.level is Level.OWNER)


def test_no_route_twice() -> None:
    routes = [(endpoint.method, endpoint.path) for endpoint in TABLE.endpoints]
    assert len(routes) == len(set(routes))
