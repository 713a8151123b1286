"""What the browser may ask for."""

import pytest

from serving_kit.errors import SettingError
from serving_kit.notebook.messages import answer
from serving_kit.settings import Settings

pytestmark = pytest.mark.light


class Server:
    url, token, running = "http://127.0.0.1:1", "secret", True

    def _tune(self, by, knobs):
        if "bad" in knobs:
            raise SettingError("no setting named 'bad'")
        return Settings().replace(**knobs)

    def errors(self):
        return []


def ignore(view, visible):
    pass


@pytest.mark.parametrize(("server", "token"), [(Server(), "secret"), (None, None)])
def test_hello(server, token):
    assert answer({"id": 1, "kind": "hello"}, server, ignore) == {"id": 1, "token": token}


def test_seen():
    seen = []
    message = {"id": 1, "kind": "seen", "view": "v", "seen": True}
    assert answer(message, None, lambda view, visible: seen.append((view, visible))) == {"id": 1}
    assert seen == [("v", True)]


def test_errors_of_a_server_that_is_gone():
    assert answer({"id": 1, "kind": "errors"}, None, ignore) == {"id": 1, "errors": []}


def test_tune():
    changed = answer({"id": 1, "kind": "tune", "knobs": {"max_batch_size": 3}}, Server(), ignore)
    assert changed["settings"]["max_batch_size"] == 3
    rejected = answer({"id": 1, "kind": "tune", "knobs": {"bad": 1}}, Server(), ignore)
    assert rejected == {"id": 1, "error": "no setting named 'bad'"}


def test_tune_after_the_end():
    for server in (None, type("Stopped", (Server,), {"running": False})()):
        message = {"id": 1, "kind": "tune", "knobs": {}}
        assert answer(message, server, ignore) == {"id": 1, "error": "the server has stopped"}
