"""In a kernel `serve()` gives no advice for scripts, and `wait()` leaves the signals alone."""

from __future__ import annotations

import pytest

from tests.notebook.test_kernel import SERVE, Kernel

pytestmark = pytest.mark.kernel


def test_a_kernel_is_not_told_to_wait_and_keeps_its_signal_handlers() -> None:
    kernel = Kernel()
    try:
        told = kernel.run(SERVE, prints=True, timeout=60).printed
        assert "serving double" in told
        assert "wait()" not in told
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
