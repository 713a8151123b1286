"""Turns results.json into the tables of README.md and the two plots beside it.

.venv-bench/bin/python benchmarks/report.py [folder]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from text_table import ms, table

HERE = Path(__file__).parent
BEGIN, END = "<!-- results: written by report.py -->", "<!-- end of results -->"
OURS = "ours"
COLOURS = {
    "guide": "#999999",
    "guide-batching": "#c49a6c",
    "litserve": "#7b61c4",
    "mosec": "#3d9970",
    "batched": "#4f8fd0",
    OURS: "#d1495b",
}
_PEERS_TO_BEAT, _EQUAL_LENGTHS = 1.3, 0.98

Run = Mapping[str, Any]
Task = Mapping[str, Any]


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    results = json.loads((out / "results.json").read_text())
    plot(results, "goodput_per_s", "answers within the SLO, 1/s", out / "goodput.svg")
    plot(results, "p99_ms", "p99 of answers, ms", out / "p99.svg")
    template = (HERE / "README.md").read_text()
    head, _, rest = template.partition(BEGIN)
    _, _, tail = rest.partition(END)
    (out / "README.md").write_text(f"{head}{BEGIN}\n\n{text(results)}\n{END}{tail}")


# -- text and tables ------------------------------------------------------------------------------


def text(results: Mapping[str, Any]) -> str:
    """Everything between the markers."""
    where = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    parts = [
        f"`{results['command']}`, {results['date']}, {results.get('minutes', '?')} minutes. "
        f"{where['cpu']}, {where['cores']} cores; {where['system']}, Python {where['python']}; {versions}. "
        f"SLO {results['slo_ms']:.0f} ms.",
        "### Targets",
        table(["what", "target", "measured", ""], targets(results)),
        "![goodput against offered load](goodput.svg)",
        "![p99 against offered load](p99.svg)",
    ]
    for name, task in results["tasks"].items():
        parts += [
            f"### {name}",
            f"1x is {task['unit_per_s']:.1f}/s, the throughput of the guide's server with one client. "
            f"Tuned batch sizes: {pairs(task['batch_sizes'])}. {knees(task)}",
            "Closed loop: answers per second (p50 / p99 in ms).",
            closed_table(task),
            "Open loop: answers within the SLO per second (p99 of answers in ms).",
            open_table(task),
        ]
    parts += ["### A model that does nothing", noop_table(results["noop"])]
    return "\n\n".join(parts) + "\n"


def knees(task: Task) -> str:
    knee = task["knee_per_s"]
    useful = task["useful_tokens"]
    raw = task["raw_per_s"]
    words = f"Knee: {pairs({name: f'{rate:.0f}/s' for name, rate in knee.items()})}. " if knee else ""
    if task["equal_lengths_per_s"]:
        equal = {name: f"{rate:.0f}/s" for name, rate in task["equal_lengths_per_s"].items()}
        words += f"On texts of one length: {pairs(equal)}. "
    words += f"Ours without a server, in ideal batches: {raw:.0f}/s. " if raw else ""
    return words + (f"Of the tokens that ours computes, {useful:.0%} are useful." if useful else "")


def closed_table(task: Task) -> str:
    clients = list(next(iter(task["closed"].values())))
    return table(
        ["server", *(f"{n} clients" if n != "1" else "1 client" for n in clients)],
        (
            [
                name,
                *(f"{r['answers_per_s']:.0f} ({ms(r['p50_ms'])} / {ms(r['p99_ms'])})" for r in runs.values()),
            ]
            for name, runs in task["closed"].items()
        ),
    )


def open_table(task: Task) -> str:
    multiples = list(next(iter(task["open"].values())))
    return table(
        ["server", *(f"{m}x" for m in multiples)],
        (
            [name, *(f"{r['goodput_per_s']:.0f} ({ms(r['p99_ms'])}){void(r)}" for r in runs.values())]
            for name, runs in task["open"].items()
        ),
    )


def noop_table(runs: Mapping[str, Run]) -> str:
    rows = [[name, f"{r['answers_per_s']:.0f}", ms(r["p50_ms"]), ms(r["p99_ms"])] for name, r in runs.items()]
    return table(["server", "answers/s, 32 clients", "p50 ms", "p99 ms"], rows)


def pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def void(run: Run) -> str:
    return " void" if run["void"] else ""


# -- targets --------------------------------------------------------------------------------------


def targets(results: Mapping[str, Any]) -> list[list[str]]:
    """One row for each target that this run has measured."""
    rows = []
    for name, task in results["tasks"].items():
        if OURS in task["open"]:
            rows += throughput(name, task) + overload(name, task)
    noop = results["noop"]
    ratio = noop["ours-noop"]["answers_per_s"] / noop["starlette-echo"]["answers_per_s"]
    return [*rows, at_least("no-op model / bare Starlette echo", 0.8, ratio)]


def throughput(name: str, task: Task) -> list[list[str]]:
    """Ours and the best peer."""
    rows = []
    peers = [peer for peer in task["open"] if peer != OURS]
    if peers and name == "fill-mask":
        closed = {each: task["closed"][each]["16"]["answers_per_s"] for each in (*peers, OURS)}
        faster = ratio(closed[OURS], max(closed[peer] for peer in peers))
        better = ratio(peak(task, OURS), max(peak(task, peer) for peer in peers))
        rows.append(at_least("fill-mask: 16 clients / best peer", 3.3, faster))
        rows.append(at_least("fill-mask: best goodput / best peer's", 4.5, better))
    others = [rate for peer, rate in task["knee_per_s"].items() if peer != OURS]
    if others and OURS in task["knee_per_s"]:
        measured = ratio(task["knee_per_s"][OURS], max(others))
        rows.append(at_least(f"{name}: knee / best peer's", _PEERS_TO_BEAT, measured))
        equal = task["equal_lengths_per_s"]
        measured = ratio(equal[OURS], max(rate for peer, rate in equal.items() if peer != OURS))
        rows.append(at_least(f"{name}: the same on texts of one length", _EQUAL_LENGTHS, measured))
    served = max(run["answers_per_s"] for run in task["closed"][OURS].values())
    rows.append(at_least(f"{name}: served / no server, ideal batches", 0.9, served / task["raw_per_s"]))
    return rows


def overload(name: str, task: Task) -> list[list[str]]:
    """Ours under overload."""
    rows = []
    beyond = task["beyond_knee"]
    for multiple, target in (("2", 0.95), ("5", 0.90), ("10", 0.85)):
        if multiple in beyond:
            kept = ratio(beyond[multiple]["goodput_per_s"], peak(task, OURS))
            rows.append(at_least(f"{name}: goodput at {multiple}x the knee / peak", target, kept))
    runs = [*task["open"][OURS].values(), *beyond.values()]
    slow = max((run["p99_ms"] or 0.0 for run in runs), default=0.0)
    rows.append(at_most(f"{name}: p99 of answers at every load, ms", 500, slow))
    late = max((run["late_share"] or 0.0 for run in runs), default=0.0)
    rows.append(at_most(f"{name}: late answers, %", 1.0, 100 * late))
    fair = [run["long_ratio"] for run in runs if run["long_ratio"] is not None]
    rows.append(at_least(f"{name}: success of the longest tenth / average", 0.7, min(fair, default=0.0)))
    refused = [run["reject_p99_ms"] for run in runs if run["reject_p99_ms"] is not None]
    if refused:
        rows.append(at_most(f"{name}: p99 of refusals, ms", 20, max(refused)))
    return rows


def peak(task: Task, name: str) -> float:
    runs = list(task["open"][name].values())
    if name == OURS:
        runs += task["beyond_knee"].values()
    return max(float(run["goodput_per_s"]) for run in runs)


def ratio(mine: float, theirs: float) -> float:
    return mine / theirs if theirs else float("inf")


def at_least(what: str, target: float, measured: float) -> list[str]:
    return [what, f">= {target:g}", f"{measured:.2f}", "met" if measured >= target else "**missed**"]


def at_most(what: str, target: float, measured: float) -> list[str]:
    return [what, f"<= {target:g}", f"{measured:.3g}", "met" if measured <= target else "**missed**"]


# -- plots -----------------------------------------------------------------------------------------


def plot(results: Mapping[str, Any], what: str, label: str, path: Path) -> None:
    """One panel for each task: `what` against the offered load."""
    tasks = results["tasks"]
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(4.2 * len(tasks), 3.6), squeeze=False)
    for panel, (name, task) in zip(axes[0], tasks.items(), strict=True):
        for server, runs in task["open"].items():
            points = [(run["offered_per_s"], run[what]) for run in runs.values() if run[what] is not None]
            xs, ys = [x for x, _ in points], [y for _, y in points]
            panel.plot(xs, ys, marker="o", markersize=3, label=server, color=COLOURS[server])
        panel.set_xscale("log")
        offered = [float(multiple) * task["unit_per_s"] for multiple in next(iter(task["open"].values()))]
        panel.set_xticks(offered, [f"{rate:.0f}" for rate in offered])
        panel.set_xticks([], minor=True)
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


if __name__ == "__main__":
    main()
