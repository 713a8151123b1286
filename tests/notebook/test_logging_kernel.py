"""The log in a real kernel: handlers of the user get it, cells do not."""

from pathlib import Path

import httpx
import pytest

from tests.support_kernel import Kernel

pytestmark = pytest.mark.kernel


def test_log_lines(kernel: Kernel, tmp_path: Path) -> None:
    path = tmp_path / "serving.log"
    url = kernel.serve(f"""
        import logging
        import serving_kit
        logging.basicConfig(level=logging.INFO, force=True)  # a StreamHandler on the cell's stderr
        file = logging.FileHandler({str(path)!r})
        logging.getLogger("serving_kit").addHandler(file)
        def broken(values):
            raise LookupError("deep inside")
        server = serving_kit.serve(broken, port=0)
    """)
    answer = httpx.post(url, content="hello", trust_env=False)
    assert answer.status_code == 500
    kernel.fail("server('hello')")
    kernel.run("server.tune(max_batch_size=7)")
    kernel.run("logging.basicConfig(level=logging.INFO, force=True)")
    kernel.run("server.tune(max_batch_size=6)")
    again = kernel.run("server = serving_kit.serve(broken, port=0)", prints=True)
    assert len(again.printed.splitlines()) == 1, "what serve() itself says, and no log line"
    kernel.run("server.stop()")
    written = path.read_text()
    assert answer.json()["incident"] in written
    assert "LookupError: deep inside" in written
    assert written.count("a setting changed") == 2
    assert "the server was replaced" in written
    assert kernel.value("[line for line in server.logs() if 'deep inside' in line]")
    kernel.run("logging.basicConfig(force=True); logging.getLogger('serving_kit').removeHandler(file)")
