"""Turns results.json into the tables of README.md, and asks `plots.py` for the two plots beside it.

    .venv-bench/peers/bin/python benchmarks/report.py [folder]

Pure, except for `main`. Every table shows the p99 beside the throughput. A cell is the median of the rounds.
Not here: the bars (`targets.py`).
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from targets import Reading, readings
from text_table import ms, table

HERE = Path(__file__).parent
BEGIN, END = "<!-- results: written by report.py -->", "<!-- end of results -->"

Run = Mapping[str, Any]
Kind = Mapping[str, Any]
Loops = Mapping[str, Mapping[str, Sequence[Run]]]


def main() -> None:
    from plots import plot

    out = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    results = json.loads((out / "results.json").read_text())
    plot(results, "goodput_per_s", "answers within the SLO, 1/s", out / "goodput.svg")
    plot(results, "p99_ms", "p99 of answers, ms", out / "p99.svg")
    template = (HERE / "README.md").read_text()
    (out / "README.md").write_text(between_markers(template, text(results)))


def between_markers(template: str, results: str) -> str:
    """The template with these results in place of the former ones."""
    head, _, rest = template.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{results}\n{END}{tail}"


def text(results: Mapping[str, Any]) -> str:
    """Everything between the markers."""
    where = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    parts = [
        f"`{results['command']}`, {results['date']}, {results.get('minutes', '?')} minutes, "
        f"rounds: {results['rounds']}. {where['cpu']}, {where['cores']} cores; {where['system']}, "
        f"Python {where['python']}; {versions}. SLO {results['slo_ms']:.0f} ms.",
        "### Targets",
        targets_table(readings(results)),
    ]
    if any(kind.get("open") for kind in results["kinds"].values()):
        parts += ["![goodput against offered load](goodput.svg)", "![p99 against offered load](p99.svg)"]
    for name, kind in results["kinds"].items():
        parts += [f"### {name}", *kind_parts(kind)]
    if results.get("noop"):
        parts += ["### A model that does nothing", noop_table(results["noop"])]
    return "\n\n".join(parts) + "\n"


def targets_table(every: Sequence[Reading]) -> str:
    """One row for each bar that was measured."""
    return table(["what", "target", "measured", ""], map(_target_row, every))


def _target_row(reading: Reading) -> list[str]:
    sign = "<=" if reading.bar.at_most else ">="
    measured = "-" if reading.measured is None else f"{reading.measured:.3g}"
    return [
        reading.bar.what,
        f"{sign} {reading.bar.bound:g}",
        measured,
        "met" if reading.met else "**missed**",
    ]


def kind_parts(kind: Kind) -> list[str]:
    """The paragraphs and tables of one kind of work."""
    parts = [words] if (words := " ".join(_sentences(kind))) else []
    if kind.get("closed"):
        parts += ["Closed loop: answers per second (p50 / p99 in ms).", closed_table(kind["closed"])]
    if kind.get("open"):
        unit = f"1x is {kind['unit_per_s']:.1f}/s, the guide's server with one client."
        parts += [
            f"Open loop: answers within the SLO per second (p99 of answers in ms). {unit}",
            goodput_table(kind["open"]),
        ]
    if kind.get("overload"):
        parts += ["Ours beyond its knee: the same.", goodput_table({"ours": kind["overload"]})]
    return parts


def _sentences(kind: Kind) -> list[str]:
    said = []
    if tuned := {name: " ".join(each["best"]) for name, each in kind.get("tuned", {}).items()}:
        said.append(f"Tuned: {_pairs(tuned)}.")
    if missing := kind.get("not_measured"):
        said.append(f"Not measured: {'; '.join(missing.values())}.")
    if knees := kind.get("knee_per_s"):
        said.append(f"Knee: {_pairs({name: f'{_median(rates):.0f}/s' for name, rates in knees.items()})}.")
    if raw := kind.get("raw_per_s"):
        said.append(f"The model of ours without a server: {_median(raw):.0f}/s.")
    if pipe := kind.get("pipe"):
        alone = f"p50 {ms(_median(pipe['p50_ms']))} ms, p99 {ms(_median(pipe['p99_ms']))} ms"
        said.append(f"A loop of `pipe(text)`: {_median(pipe['answers_per_s']):.0f}/s, {alone}.")
    if memory := kind.get("memory_mb"):
        said.append(f"Memory: {_pairs({name: f'{_median(each):.0f} MB' for name, each in memory.items()})}.")
    return said


def closed_table(loops: Loops) -> str:
    """Answers per second and latency, by server and number of clients."""
    return _loops_table(loops, lambda n: "1 client" if n == "1" else f"{n} clients", closed_cell)


def goodput_table(loops: Loops) -> str:
    """Goodput and p99, by server and multiple of a rate."""
    return _loops_table(loops, lambda multiple: f"{multiple}x", goodput_cell)


def _loops_table(loops: Loops, title: Any, cell: Any) -> str:
    conditions = list(dict.fromkeys(each for runs in loops.values() for each in runs))
    rows = [[name, *(cell(runs.get(each, ())) for each in conditions)] for name, runs in loops.items()]
    return table(["server", *map(title, conditions)], rows)


def closed_cell(runs: Sequence[Run]) -> str:
    """Answers per second (p50 / p99)."""
    if not runs:
        return "-"
    p50, p99 = (ms(_middle(runs, figure)) for figure in ("p50_ms", "p99_ms"))
    return f"{_middle(runs, 'answers_per_s'):.0f} ({p50} / {p99}){_void(runs)}"


def goodput_cell(runs: Sequence[Run]) -> str:
    """Goodput (p99)."""
    if not runs:
        return "-"
    return f"{_middle(runs, 'goodput_per_s'):.0f} ({ms(_middle(runs, 'p99_ms'))}){_void(runs)}"


def noop_table(servers: Mapping[str, Sequence[Run]]) -> str:
    """Answers per second and latency of the models that do nothing."""
    rows = [
        [name, *(ms(_middle(runs, each)) for each in ("answers_per_s", "p50_ms", "p99_ms"))]
        for name, runs in servers.items()
    ]
    return table(["server", "answers/s, 32 clients", "p50 ms", "p99 ms"], rows)


def _void(runs: Sequence[Run]) -> str:
    return " void" if any(run["void"] for run in runs) else ""


def _middle(runs: Sequence[Run], figure: str) -> float | None:
    values = [run[figure] for run in runs if run[figure] is not None]
    return statistics.median(values) if values else None


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def _pairs(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


if __name__ == "__main__":
    main()
