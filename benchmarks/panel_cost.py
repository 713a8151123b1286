"""What the live panel costs while it shows a loaded server: processor time, bytes, throughput.

    python benchmarks/panel_cost.py

Runs in a real kernel, where the frames are sent to the front end. Clients in that kernel keep the server
busy with a model that takes almost no time, which is the worst case for the panel. Runs with and without a
panel alternate, so that other load on the machine affects both.
"""

from __future__ import annotations

import json
import statistics
from typing import Any

import jupyter_client

ROUNDS, SECONDS = 16, 2

SET_UP = """
import json, threading, time
import serving_kit
from IPython.display import JSON, display

server = serving_kit.serve(lambda texts: texts, port=0, name="bench")
def client():
    while server.running:
        try:
            server("text")
        except Exception:
            return
for _ in range(8):
    threading.Thread(target=client, daemon=True).start()

def cpu_of(name):
    for thread in threading.enumerate():
        if thread.name == name:
            return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    return 0.0

def measure(seconds):
    panel = server._panel
    frames = []
    if panel is not None:
        panel.widget.observe(lambda change: frames.append(len(change.new)), "frame")
    cpu, io = cpu_of("serving-kit-panel"), cpu_of("IOPub")
    ok, began = server.stats()["requests"]["ok"], time.monotonic()
    time.sleep(seconds)
    took = time.monotonic() - began
    result = {
        "answers_per_s": (server.stats()["requests"]["ok"] - ok) / took,
        "panel_cpu": (cpu_of("serving-kit-panel") - cpu) / took,
        "iopub_cpu": (cpu_of("IOPub") - io) / took,
        "frames_per_s": len(frames) / took,
        "bytes_per_s": sum(frames) / took,
    }
    if panel is not None:
        panel.widget.unobserve_all()
    return result

def forget():
    server._panel.finish()
    server._panel = None
"""


def main() -> None:
    """Measure and print."""
    manager = jupyter_client.KernelManager(kernel_name="python3")
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)

    def run(code: str) -> dict[str, float]:
        shown: dict[str, float] = {}

        def on_output(message: dict[str, Any]) -> None:
            if message["msg_type"] == "error":
                raise RuntimeError(message["content"]["evalue"])
            if message["msg_type"] == "display_data":
                shown.update(message["content"]["data"].get("application/json", {}))

        client.execute_interactive(code, timeout=120, output_hook=on_output)
        return shown

    without, with_panel = [], []
    try:
        run(SET_UP)
        run("time.sleep(5)")
        for round_ in range(ROUNDS):
            for shown in (round_ % 2 == 0, round_ % 2 == 1):
                if shown:
                    run("display(server)")
                run("time.sleep(1)")
                (with_panel if shown else without).append(run(f"display(JSON(measure({SECONDS})))"))
                if shown:
                    run("forget()")
        run("server.stop()")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    ratios = [b["answers_per_s"] / a["answers_per_s"] for a, b in zip(without, with_panel, strict=True)]
    figures = {key: statistics.median(each[key] for each in with_panel) for key in with_panel[0]}
    figures["iopub_cpu_without"] = statistics.median(each["iopub_cpu"] for each in without)
    figures["throughput_with_to_without"] = statistics.median(ratios)
    quarters = statistics.quantiles(ratios, n=4)
    figures |= {"ratio_lower_quartile": quarters[0], "ratio_upper_quartile": quarters[2]}
    print(json.dumps({key: round(value, 4) for key, value in figures.items()}, indent=1))


if __name__ == "__main__":
    main()
