"""The two plots beside README.md: one panel for each kind of work, against the offered load.

Not here: tables (`report.py`).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

COLOURS = {
    "guide": "#999999",
    "guide-batching": "#c49a6c",
    "litserve": "#7b61c4",
    "mosec": "#3d9970",
    "batched": "#4f8fd0",
    "vllm": "#e0a526",
    "infinity": "#8c564b",
    "onnxruntime": "#17a2b8",
    "openvino": "#2f4b7c",
    "ours": "#d1495b",
}


def plot(results: Mapping[str, Any], what: str, label: str, path: Path) -> None:
    """One panel for each kind of work with open loops: the median of `what` against the offered load."""
    kinds = {name: each for name, each in results["kinds"].items() if each.get("open")}
    if not kinds:
        return
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(4.2 * len(kinds), 3.6), squeeze=False)
    for panel, (name, kind) in zip(axes[0], kinds.items(), strict=True):
        for server, loads in kind["open"].items():
            points = [(_median(runs, "offered_per_s"), _median(runs, what)) for runs in loads.values()]
            shown = [(x, y) for x, y in points if y is not None]
            panel.plot(
                [x for x, _ in shown],
                [y for _, y in shown],
                marker="o",
                markersize=3,
                label=server,
                color=COLOURS[server],
            )
        panel.set_xscale("log")
        panel.set_title(name)
        panel.set_xlabel("offered, 1/s")
        panel.grid(alpha=0.3)
        if what == "p99_ms":
            panel.set_yscale("log")
            panel.axhline(results["slo_ms"], color="black", linewidth=0.8, linestyle="--")
    axes[0][0].set_ylabel(label)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _median(runs: list[dict[str, Any]], figure: str) -> float | None:
    values = [run[figure] for run in runs if run[figure] is not None]
    return statistics.median(values) if values else None
