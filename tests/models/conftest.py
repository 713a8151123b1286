"""What the tests of several modules of `models/` use."""

import http.server
import threading
from collections.abc import Iterator

import pytest

from tests.support_models import image_file


@pytest.fixture
def fetched() -> Iterator[tuple[str, list[str]]]:
    """An address on this machine with an image, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(image_file())

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/image.png", asked
        server.shutdown()
        thread.join()


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every packed step that gives the right numbers counts as the faster one."""
    monkeypatch.setattr("serving_kit.models.packing_trial._gain", lambda *_: 2.0)


@pytest.fixture
def pads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every packed step counts as the slower one."""
    monkeypatch.setattr("serving_kit.models.packing_trial._gain", lambda *_: 0.5)
