"""Runs every server on the same model, texts and core, and writes down what clients measured.

    make bench                                        everything: benchmarks/results.json and README.md
    make bench BENCH_ARGS='--against COMMIT'          this tree and another commit; see against.py
    .venv/bin/python benchmarks/run.py --quick        in short, into .out/bench-quick
    .venv/bin/python benchmarks/run.py --task fill-mask --servers guide mosec ours --part closed --rounds 5

Parts: closed (closed loops, and the model of ours without a server), open (open loops, and the knee: the
highest load of which 99 % is answered within the SLO), overload (ours at multiples of its knee), one-client
(one client, beside a loop that calls the pipeline), memory, noop (a model that does nothing).

Every round measures every server, with processes of its own; the server that is first rotates. So what
changes slowly on the machine affects both sides of a ratio alike. Before the first round every peer is tuned
(`tuning.py`). Servers that have a timeout (LitServe, mosec, ours) get 10 s in closed loops, which measure
throughput alone, and the SLO in open loops.

Servers are pinned to core 0 and run with one torch thread; the load generator is pinned to core 1.
Not here: what the results mean (`targets.py`, `report.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import against
import models
from kinds import KINDS, Kind
from machine import machine
from processes import (
    CLOSED_LOOP_TIMEOUT_MS,
    ENVIRONMENT,
    HERE,
    OUT,
    SERVER_CORE,
    SLO_MS,
    Result,
    ServerProcess,
    Workload,
)
from programs import ECHO, ENVIRONMENTS, NOOP, OURS, PROGRAMS, Options, Program
from tuning import tuned

PARTS = ("closed", "open", "overload", "one-client", "memory", "noop")
_NOOP_CLIENTS, _MEMORY_CLIENTS = 32, 16
_KNEE_ATTAINMENT = 0.99


@dataclass(frozen=True)
class Plan:
    """Which runs, and how long each is."""

    seconds: float = 4.0
    warmup: float = 1.0
    closed_seconds: float = 4.0
    tuning_seconds: float = 2.0
    closed: tuple[int, ...] = (1, 4, 16, 64)
    open: tuple[float, ...] = (0.5, 1, 2, 4, 10)
    knee_steps: int = 6
    overload: tuple[float, ...] = (1, 2, 5, 10)  # times the knee


QUICK = Plan(2.0, 0.5, 2.0, 1.0, closed=(1, 16), open=(1, 4), knee_steps=3, overload=(1, 2))


@dataclass
class Bench:
    """The rounds of one kind of work, into `result`. A list in `result` has one element for each round."""

    kind: Kind
    programs: Sequence[Program]
    parts: Sequence[str]
    plan: Plan
    result: Result = dataclasses.field(default_factory=lambda: {"tuned": {}, "not_measured": {}})
    ready: list[Program] = dataclasses.field(default_factory=list)

    def prepare(self) -> None:
        """Tune the peers, leave out what does not run, and find the rate that is called 1x."""
        print(self.kind.name, flush=True)
        for program in self.programs:
            if self.kind.name in program.routes:
                self._prepare(program)
        if "open" in self.parts:
            with self._server(PROGRAMS["guide"]) as guide:
                run = guide.load(self.plan.seconds, self.plan.warmup, clients=1)
            self.result["unit_per_s"] = run["answers_per_s"]

    def _prepare(self, program: Program) -> None:
        try:
            if not program.python.exists():
                raise SystemExit(f"{program.name} is not installed (benchmarks/setup.sh {program.group})")
            if len(program.options) > 1:
                found = tuned(program, Workload.of_kind(self.kind), self.plan.tuning_seconds)
                self.result["tuned"][program.name] = found
            self.ready.append(program)
        except SystemExit as error:
            if not program.group:
                raise  # ours has to run
            print(f"  not measured: {error}", flush=True)
            self.result["not_measured"][program.name] = str(error)

    def round(self, index: int) -> None:
        """Measure every part once."""
        turn = index % max(1, len(self.ready))
        order = [*self.ready[turn:], *self.ready[:turn]]
        if "closed" in self.parts:
            self._append(["raw_per_s"], raw_limit(self.kind))
        for program in order:
            self._closed_loops(program)
            self._open_loops(program)
        if "open" in self.parts:
            for name in self._knees_wanted():
                self._knee(PROGRAMS[name])
        if PROGRAMS["ours"] in self.ready:
            self._ours_alone()

    def _ours_alone(self) -> None:
        if {"one-client", "memory"} & set(self.parts):
            self._pipe()
        if "memory" in self.parts:
            self._memory()
        if "overload" in self.parts:
            self._overload()

    def _closed_loops(self, program: Program) -> None:
        clients = self.plan.closed if "closed" in self.parts else ()
        if "one-client" in self.parts and not program.group and 1 not in clients:
            clients = (1, *clients)
        if not clients:
            return
        with self._server(program, timeout_ms=CLOSED_LOOP_TIMEOUT_MS) as server:
            for number in clients:
                run = server.load(self.plan.closed_seconds, self.plan.warmup, clients=number)
                self._append(["closed", program.name, str(number)], run)

    def _open_loops(self, program: Program) -> None:
        if "open" not in self.parts:
            return
        with self._server(program) as server:
            for multiple in self.plan.open:
                rate = multiple * self.result["unit_per_s"]
                run = server.load(self.plan.seconds, self.plan.warmup, rate=rate)
                self._append(["open", program.name, f"{multiple:g}"], run)

    def _knee(self, program: Program) -> None:
        with self._server(program) as server:
            peak = max(runs[-1]["goodput_per_s"] for runs in self.result["open"][program.name].values())
            self._append(["knee_per_s", program.name], find_knee(server, self.plan, peak))

    def _knees_wanted(self) -> list[str]:
        """Ours and the peer with the highest goodput in this round."""
        loads = self.result["open"]
        peaks = {
            name: max(runs[-1]["goodput_per_s"] for runs in each.values()) for name, each in loads.items()
        }
        peers = sorted((name for name in peaks if name != "ours"), key=lambda name: peaks[name])
        return [*(["ours"] if "ours" in peaks else []), *peers[-1:]]

    def _overload(self) -> None:
        with self._server(PROGRAMS["ours"]) as server:
            knees = self.result.get("knee_per_s", {}).get("ours") if "open" in self.parts else None
            knee = knees[-1] if knees else self._own_knee(server)
            for multiple in self.plan.overload:
                run = server.load(self.plan.seconds, self.plan.warmup, rate=multiple * max(knee, 1.0))
                self._append(["overload", f"{multiple:g}"], run)

    def _own_knee(self, server: ServerProcess) -> float:
        """The knee, where no open loop has shown the peak before."""
        run = server.load(self.plan.seconds, self.plan.warmup, clients=_MEMORY_CLIENTS)
        knee = find_knee(server, self.plan, run["answers_per_s"])
        self._append(["knee_per_s", "ours"], knee)
        return knee

    def _pipe(self) -> None:
        """The pipeline in a loop, without a server."""
        workload = Workload.of_kind(self.kind)
        done = run_on_server_core(
            [
                *("servers/bare_pipe.py", str(self.plan.closed_seconds), "--port", "0"),
                *("--model", str(workload.model), "--task", self.kind.task, "--kind", self.kind.name),
            ]
        )
        measured = json.loads(done)
        print(f"  pipe(text): {measured}", flush=True)
        if "memory" in self.parts:
            self._append(["memory_mb", "pipe"], measured["memory_mb"])
        for figure in ("answers_per_s", "p50_ms", "p99_ms"):
            self._append(["pipe", figure], measured[figure])

    def _memory(self) -> None:
        """Of ours, after a load."""
        with self._server(PROGRAMS["ours"], timeout_ms=CLOSED_LOOP_TIMEOUT_MS) as server:
            server.load(self.plan.closed_seconds, self.plan.warmup, clients=_MEMORY_CLIENTS)
            self._append(["memory_mb", "ours"], server.memory_mb())

    def _server(self, program: Program, timeout_ms: float = SLO_MS) -> ServerProcess:
        options: Options = tuple(self.result["tuned"].get(program.name, {}).get("best", ()))
        return ServerProcess(program, Workload.of_kind(self.kind), options=options, timeout_ms=timeout_ms)

    def _append(self, path: Sequence[str], value: object) -> None:
        into = self.result
        for key in path[:-1]:
            into = into.setdefault(key, {})
        into.setdefault(path[-1], []).append(value)


def raw_limit(kind: Kind) -> float:
    """Texts per second of the model alone, on the servers' core."""
    rate = float(run_on_server_core(["raw_limit.py", kind.name]))
    print(f"  no server: {rate:.1f}/s", flush=True)
    return rate


def run_on_server_core(arguments: Sequence[str]) -> str:
    """What a program of this folder prints, in our environment, on the servers' core."""
    script, *rest = arguments
    done = subprocess.run(
        ["taskset", "-c", SERVER_CORE, str(OURS), str(HERE / script), *rest],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(HERE.parent)},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        timeout=300,
    )
    return done.stdout.splitlines()[-1]


def find_knee(server: ServerProcess, plan: Plan, peak: float) -> float:
    """The highest offered rate of which 99 % is answered within the SLO, by bisection."""
    low, high = 0.0, 1.5 * peak
    for _ in range(plan.knee_steps):
        rate = (low + high) / 2
        run = server.load(plan.seconds, plan.warmup, rate=rate)
        if run["attainment"] is not None and run["attainment"] >= _KNEE_ATTAINMENT:
            low = rate
        else:
            high = rate
    print(f"  {server.program.name}: knee at {low:.1f}/s", flush=True)
    return low


def measure_noop(plan: Plan, round_index: int, results: Result) -> None:
    """What the kit itself costs: a model that does nothing, beside a route that does nothing."""
    print("no-op", flush=True)
    workload = Workload(models.demo_texts())
    for program in (ECHO, NOOP) if round_index % 2 == 0 else (NOOP, ECHO):
        with ServerProcess(program, workload, timeout_ms=CLOSED_LOOP_TIMEOUT_MS) as server:
            run = server.load(plan.seconds, plan.warmup, clients=_NOOP_CLIENTS)
        results["noop"].setdefault(program.name, []).append(run)


def measure_all(options: argparse.Namespace) -> None:
    """Every server on every kind of work, then the report."""
    plan = QUICK if options.quick else Plan()
    out = options.out or (OUT / "bench-quick" if options.quick else HERE)
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    programs = [PROGRAMS[name] for name in options.servers]
    results: Result = {
        "command": "make bench" if sys.argv[1:] == [] else " ".join(["benchmarks/run.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "slo_ms": SLO_MS,
        "rounds": options.rounds,
        "plan": dataclasses.asdict(plan),
        "machine": machine(programs),
        "noop": {},
        "kinds": {},
    }

    def save() -> None:
        # After every round, so that a run that is cut short leaves its results.
        results["minutes"] = round((time.monotonic() - began) / 60, 1)
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")

    if "noop" in options.part:
        for index in range(options.rounds):
            measure_noop(plan, index, results)
        save()
    if options.part != ["noop"]:
        for name in options.task:
            bench = Bench(KINDS[name], programs, options.part, plan)
            results["kinds"][name] = bench.result
            bench.prepare()
            for index in range(options.rounds):
                print(f" round {index + 1} of {options.rounds}", flush=True)
                bench.round(index)
                save()
    report(out)
    print(f"{results['minutes']} minutes; see {out / 'README.md'}")


def report(out: Path) -> None:
    """The tables and plots."""
    python = ENVIRONMENTS / "peers" / "bin" / "python"  # it has what draws the plots
    subprocess.run([str(python), str(HERE / "report.py"), str(out)], check=True, timeout=120)


def main() -> int:
    """Measure as the command line says; 1 if this tree is slower than the commit of `--against`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT", help="compare this tree with a commit, no peers")
    parser.add_argument("--quick", action="store_true", help="shorter runs, and without --against fewer")
    parser.add_argument("--task", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--servers", nargs="+", default=list(PROGRAMS), choices=list(PROGRAMS))
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for results.json, README.md and the plots")
    options = parser.parse_args()
    if (os.cpu_count() or 1) < 2:
        raise SystemExit("the servers and the load generator need a core each")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers end, and temporary folders are removed
    if options.against:
        return against.main(options.against, quick=options.quick)
    measure_all(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
