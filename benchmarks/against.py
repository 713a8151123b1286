"""Compares the speed of this tree with that of another commit, on one machine, interleaved.

    make bench BENCH_ARGS='--against COMMIT'            about a quarter of an hour
    make bench BENCH_ARGS='--against COMMIT --quick'    two or three minutes: shows that it works only

Five rounds, each with every scenario for both commits; which one is first alternates. Every round starts
new processes, because processes of the same code differ in speed as well (hash seed, memory layout).
The servers run on core 0, one at a time, the load generator on core 1. Both commits get the same environment,
server scripts, load generator, texts and seeds: those of this tree. Only `serving_kit` itself differs.

Prints a table and saves it as `.out/against-COMMIT.md`, with every figure in `.out/against-COMMIT.json`.
The exit status is 1 if the interval of a throughput ratio lies wholly below 0.97; see `compare.py`.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import models
from compare import P99, ROUNDS, THROUGHPUT, Compared, order, report
from kinds import KINDS, same
from processes import CLOSED_LOOP_TIMEOUT_MS, OUT, ServerProcess, Workload
from programs import NOOP, OURS, PROGRAMS, ROOT, Program

_OPEN_LOOP_LOAD = 0.5  # of the throughput with 16 clients, in the first run of all
_CHECKED_TEXTS = 6


@dataclass(frozen=True)
class Durations:
    """Of each run."""

    seconds: float
    warmup: float


FULL, QUICK = Durations(15.0, 2.0), Durations(1.0, 0.3)


@dataclass
class Scenario:
    """A load, and what was measured under it: a figure for each round, by commit ("new", "old")."""

    name: str
    clients: int = 0  # closed loop; 0: open loop
    throughput: dict[str, list[float]] = field(default_factory=lambda: {"new": [], "old": []})  # answers/s
    p99_ms: dict[str, list[float]] = field(default_factory=lambda: {"new": [], "old": []})
    void: int = 0  # runs in which the load generator lagged


class Comparison:
    """The runs of both commits. `trees`: the folder of each, by "new" and "old"."""

    def __init__(self, trees: Mapping[str, Path], durations: Durations) -> None:
        self.trees = trees
        self.durations = durations
        self.noop = [Scenario("no-op function, 32 clients", clients=32)]
        self.demo = [
            Scenario("demo model, 16 clients", clients=16),
            Scenario("demo model, 64 clients", clients=64),
            Scenario("demo model, open loop"),
        ]
        self.open_loop_rate: float | None = None  # the same for all runs
        self._answers: list[object] | None = None

    def run(self) -> list[Scenario]:
        """Measure all rounds."""
        texts = models.demo_texts()
        demo = Workload(texts, KINDS["fill-mask"], "fill-mask", models.DEMO_MODEL)
        for index in range(ROUNDS):
            for program, workload, scenarios in (
                (NOOP, Workload(texts), self.noop),
                (PROGRAMS["ours"], demo, self.demo),
            ):
                for side in order(index):
                    print(f"round {index + 1} of {ROUNDS}, {side}", flush=True)
                    self._measure(program, workload, scenarios, side, seed=index + 1)
        return [*self.noop, *self.demo]

    def _measure(
        self, program: Program, workload: Workload, scenarios: Sequence[Scenario], side: str, seed: int
    ) -> None:
        """One process of one commit, and all of its scenarios."""
        tree, timeout_ms = self.trees[side], CLOSED_LOOP_TIMEOUT_MS
        with ServerProcess(program, workload, timeout_ms=timeout_ms, tree=tree) as server:
            if workload.task and seed == 1:
                self._check_answers(server)
            for scenario in scenarios:
                load = {"clients": scenario.clients} if scenario.clients else {"rate": self.open_loop_rate}
                result = server.load(self.durations.seconds, self.durations.warmup, seed=seed, **load)
                if not result["answers_per_s"]:
                    raise SystemExit(f"{scenario.name}: the {side} commit answered nothing")
                scenario.throughput[side].append(result["answers_per_s"])
                scenario.p99_ms[side].append(result["p99_ms"])
                scenario.void += result["void"]
                if workload.task and self.open_loop_rate is None:
                    self.open_loop_rate = _OPEN_LOOP_LOAD * result["answers_per_s"]

    def _check_answers(self, server: ServerProcess) -> None:
        """SystemExit unless both commits answer alike: speed is not compared between different answers."""
        texts = json.loads(server.workload.texts.read_text())[:_CHECKED_TEXTS]
        answers = [server.ask(text) for text, _ in texts]
        if None in answers or not same(answers, self._answers or answers):
            raise SystemExit("the two commits do not give the same answers")
        self._answers = answers


def check_out(commit: str, folder: Path) -> Path:
    """Put the `serving_kit` of a commit into `folder`. SystemExit if git does not know the commit."""
    archive = subprocess.run(
        ["git", "archive", "--format=tar", commit, "serving_kit"], cwd=ROOT, capture_output=True, check=False
    )
    if archive.returncode:
        raise SystemExit(f"git archive {commit}: {archive.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    return folder


def check_import(tree: Path) -> None:
    """SystemExit unless a server of `tree` imports the `serving_kit` that is in it."""
    done = subprocess.run(
        [str(OURS), "-P", "-c", "import serving_kit; print(serving_kit.__file__)"],
        env={**os.environ, "PYTHONPATH": str(tree)},
        cwd=OUT,
        capture_output=True,
        text=True,
        check=True,
    )
    if not Path(done.stdout.strip()).is_relative_to(tree):
        raise SystemExit(f"serving_kit is imported from {done.stdout.strip()}, not from {tree}")


def compared(scenarios: Sequence[Scenario]) -> list[Compared]:
    """The figures of all scenarios."""
    return [
        Compared(scenario.name, figure, values["new"], values["old"])
        for scenario in scenarios
        for figure, values in ((THROUGHPUT, scenario.throughput), (P99, scenario.p99_ms))
    ]


def git(*arguments: str) -> str:
    """What git prints."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def main(commit: str, *, quick: bool) -> int:
    """Compare this tree with a commit. 1 if it is slower."""
    began = time.monotonic()
    OUT.mkdir(exist_ok=True)
    durations = QUICK if quick else FULL
    with tempfile.TemporaryDirectory(prefix="against-", dir=OUT) as folder:
        trees = {"new": ROOT, "old": check_out(commit, Path(folder))}
        for tree in trees.values():
            check_import(tree)
        comparison = Comparison(trees, durations)
        scenarios = comparison.run()
    short = git("rev-parse", "--short", commit) or commit
    minutes = (time.monotonic() - began) / 60
    title = (
        f"New: {git('describe', '--always', '--dirty')}; old: {short}. {ROUNDS} rounds, runs of "
        f"{durations.seconds:g} s, open loop at {comparison.open_loop_rate:.0f}/s, {minutes:.1f} minutes."
    )
    figures = compared(scenarios)
    void = sum(scenario.void for scenario in scenarios)
    note = f" Runs in which the load generator lagged: {void}." if void else ""
    text = f"{title}\n\n{report(figures)}{note}\n"
    (OUT / f"against-{short}.json").write_text(json.dumps([vars(each) for each in figures], indent=1) + "\n")
    (OUT / f"against-{short}.md").write_text(text)
    print(f"\n{text}")
    return int(any(each.slower for each in figures))
