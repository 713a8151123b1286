"""In a kernel `serve()` gives no advice for scripts, and `wait()` leaves the signals alone."""

from __future__ import annotations

import pytest

from tests.support_kernel import SERVE, Kernel

pytestmark = pytest.mark.kernel


def test_wait_in_a_kernel() -> None:
    kernel = Kernel()
    try:
        printed = kernel.run(SERVE, prints=True, timeout=60).printed
        assert "serving double" in printed
        assert "wait()" not in printed
        seen = kernel.run(
            """
            import signal, threading
            before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)]
            seen = []
            def look():
                seen.append([signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)] == before)
                server.stop()
            threading.Timer(0.5, look).start()
            server.wait()
            print(seen)
            """,
            prints=True,
        ).printed
        assert seen == "[True]\n"
    finally:
        kernel.close()
