"""Runs every server on the same model, texts and core, and writes down what clients measured.

    make bench                                        everything: benchmarks/results.json and README.md
    make bench BENCH_ARGS='--against COMMIT'          this tree and another commit; see against.py
    .venv/bin/python benchmarks/run.py --quick        in short, into .out/bench-quick
    .venv/bin/python benchmarks/run.py --tasks fill-mask --servers guide mosec ours

For each task: the guide's server answers one client at a time, and that rate is 1x. Then, for every
server, closed loops and open loops; the batch size of every peer is tuned before. For ours and the best
peer the knee: the highest load of which 99 % is answered within the SLO, on the texts and on texts of one
length. And what the core could answer without a server (`raw_limit.py`).

Servers that have a timeout (LitServe, mosec, ours) get 10 s in closed loops, which measure throughput
alone, and the SLO in open loops.

Servers are pinned to core 0 and run with one torch thread; the load generator is pinned to core 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import http.client
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import against
import models
from processes import (
    CLOSED_LOOP_TIMEOUT_MS,
    ECHO,
    ENVIRONMENT,
    HERE,
    KINDS,
    NOOP,
    OURS,
    OUT,
    PEERS,
    SERVER_CORE,
    SLO_MS,
    Kind,
    Result,
    ServerProcess,
    Workload,
)

_TUNING_CLIENTS, _NOOP_CLIENTS = 16, 32
_KNEE_ATTAINMENT = 0.99


@dataclass(frozen=True)
class Plan:
    """Which runs, and how long each is."""

    seconds: float = 4.0
    warmup: float = 1.0
    closed_seconds: float = 3.0
    tuning_seconds: float = 1.5
    closed: tuple[int, ...] = (1, 4, 16, 64)
    open: tuple[float, ...] = (0.5, 1, 2, 4, 10)
    batch_sizes: tuple[int, ...] = (1, 4, 8, 16)
    knee_steps: int = 5
    knee_multiples: tuple[float, ...] = (2, 5, 10)


QUICK = Plan(2.0, 0.5, 2.0, 1.5, closed=(1, 16), open=(1, 3, 10), batch_sizes=(1, 8), knee_steps=0)


def measure(task: str, kinds: Sequence[Kind], plan: Plan) -> Result:
    """Everything about one task."""
    print(f"{task}", flush=True)
    with ServerProcess(KINDS["guide"], Workload.of_task(task)) as guide:
        unit = guide.load(plan.seconds, plan.warmup, clients=1)["answers_per_s"]
    print(f"  1x is {unit:.1f}/s", flush=True)
    tuned = {kind.name: tune(kind, task, plan) for kind in kinds if kind.batches}
    result: Result = {
        "unit_per_s": unit,
        "batch_sizes": {name: each["best"] for name, each in tuned.items()},
        "tuning": {name: each["answers_per_s"] for name, each in tuned.items()},
        "closed": {},
        "open": {},
        "useful_tokens": None,
        "raw_per_s": raw_limit(task) if any(kind.name == "ours" for kind in kinds) else None,
        "knee_per_s": {},
        "equal_lengths_per_s": {},
        "beyond_knee": {},
    }
    for kind in kinds:
        measure_loops(kind, task, plan, result)
    if plan.knee_steps:
        for name in knees_wanted(result["open"]):
            measure_knee(KINDS[name], task, plan, result)
    return result


def measure_loops(kind: Kind, task: str, plan: Plan, result: Result) -> None:
    """The closed and open loops of one server, into `result`."""
    size = result["batch_sizes"].get(kind.name, 1)
    workload = Workload.of_task(task)
    with ServerProcess(kind, workload, batch_size=size, timeout_ms=CLOSED_LOOP_TIMEOUT_MS) as server:
        result["closed"][kind.name] = {
            clients: server.load(plan.closed_seconds, plan.warmup, clients=clients) for clients in plan.closed
        }
        if kind.name == "ours":
            result["useful_tokens"] = useful_tokens(server)
    with ServerProcess(kind, workload, batch_size=size) as server:
        result["open"][kind.name] = {
            multiple: server.load(plan.seconds, plan.warmup, rate=multiple * result["unit_per_s"])
            for multiple in plan.open
        }


def measure_knee(kind: Kind, task: str, plan: Plan, result: Result) -> None:
    """The knees of one server, and for ours the loads beyond it, into `result`."""
    name, size = kind.name, result["batch_sizes"].get(kind.name, 1)
    with ServerProcess(kind, Workload.of_task(task), batch_size=size) as server:
        peak = max(run["goodput_per_s"] for run in result["open"][name].values())
        knee = result["knee_per_s"][name] = find_knee(server, plan, peak)
        if name == "ours" and knee:
            result["beyond_knee"] = {
                multiple: server.load(plan.seconds, plan.warmup, rate=multiple * knee)
                for multiple in (1.0, *plan.knee_multiples)
            }
        equal = str(models.folder(task) / models.EQUAL_TEXTS_FILE)
        run = server.load(plan.closed_seconds, plan.warmup, clients=_TUNING_CLIENTS, texts=equal)
        print(f"  {name}: texts of one length", flush=True)
        result["equal_lengths_per_s"][name] = find_knee(server, plan, run["answers_per_s"], texts=equal)


def raw_limit(task: str) -> float:
    """Texts per second of the model alone, on the servers' core."""
    done = subprocess.run(
        ["taskset", "-c", SERVER_CORE, str(OURS), str(HERE / "raw_limit.py"), task],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        check=True,
        timeout=120,
    )
    print(f"  no server, ideal batches: {float(done.stdout):.1f}/s", flush=True)
    return float(done.stdout)


def tune(kind: Kind, task: str, plan: Plan) -> Result:
    """The batch size with the highest throughput in a closed loop that could fill any of them."""
    rates = {}
    for size in plan.batch_sizes:
        timeout_ms = CLOSED_LOOP_TIMEOUT_MS
        with ServerProcess(kind, Workload.of_task(task), batch_size=size, timeout_ms=timeout_ms) as server:
            run = server.load(plan.tuning_seconds, 0.5, clients=_TUNING_CLIENTS)
            rates[size] = run["answers_per_s"]
    best = max(rates, key=lambda size: rates[size])
    print(f"  {kind.name}: batch size {best}", flush=True)
    return {"best": best, "answers_per_s": rates}


def knees_wanted(runs: Mapping[str, Mapping[float, Result]]) -> list[str]:
    """Ours and the peer with the highest goodput at any load."""

    def peak(name: str) -> float:
        return max(float(run["goodput_per_s"]) for run in runs[name].values())

    peers = sorted((name for name in runs if name != "ours"), key=peak)
    return [*(["ours"] if "ours" in runs else []), *peers[-1:]]


def find_knee(server: ServerProcess, plan: Plan, peak: float, **job: str) -> float:
    """The highest offered rate of which 99 % is answered within the SLO, by bisection."""
    low, high = 0.0, 1.5 * peak
    for _ in range(plan.knee_steps):
        rate = (low + high) / 2
        run = server.load(plan.seconds, plan.warmup, rate=rate, **job)
        if run["attainment"] is not None and run["attainment"] >= _KNEE_ATTAINMENT:
            low = rate
        else:
            high = rate
    print(f"  {server.kind.name}: knee at {low:.1f}/s", flush=True)
    return low


def useful_tokens(server: ServerProcess) -> float | None:
    """The share of computed tokens that belong to a text, as the server counts them."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    connection.request("GET", "/stats")
    padding = json.loads(connection.getresponse().read())["window"]["padding"]
    connection.close()
    return None if padding is None else 1 - float(padding)


def measure_noop(plan: Plan) -> Result:
    """What the kit itself costs: a model that does nothing, beside a route that does nothing."""
    print("no-op", flush=True)
    rates = {}
    for kind in (ECHO, NOOP):
        with ServerProcess(kind, Workload.of_task(""), timeout_ms=CLOSED_LOOP_TIMEOUT_MS) as server:
            rates[kind.name] = server.load(plan.seconds, plan.warmup, clients=_NOOP_CLIENTS)
    return rates


def machine() -> Result:
    """Where this was measured, and with what."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    script = (
        "import importlib.metadata as m, json;"
        "print(json.dumps({n: m.version(n) for n in ('litserve','mosec','batched','starlette','uvicorn',"
        "'torch','transformers')}))"
    )
    peers = subprocess.run([str(PEERS), "-c", script], capture_output=True, check=True, timeout=60)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {"serving-kit": importlib.metadata.version("serving-kit"), **json.loads(peers.stdout)},
    }


def measure_all(options: argparse.Namespace) -> None:
    """Every server on every task, then the report."""
    plan = QUICK if options.quick else Plan()
    out = options.out or (OUT / "bench-quick" if options.quick else HERE)
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    results: Result = {
        "command": "make bench" if sys.argv[1:] == [] else " ".join(["benchmarks/run.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "slo_ms": SLO_MS,
        "plan": dataclasses.asdict(plan),
        "machine": machine(),
        "noop": measure_noop(plan),
        "tasks": {},
    }
    for task in options.tasks:
        results["tasks"][task] = measure(task, [KINDS[name] for name in options.servers], plan)
        results["minutes"] = round((time.monotonic() - began) / 60, 1)
        # After every task, so that a run that is cut short leaves its results.
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    subprocess.run([str(PEERS), str(HERE / "report.py"), str(out)], check=True, timeout=120)
    print(f"{results['minutes']} minutes; see {out / 'README.md'}")


def main() -> int:
    """Measure as the command line says; 1 if this tree is slower than the commit of `--against`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT", help="compare this tree with a commit, no peers")
    parser.add_argument("--quick", action="store_true", help="shorter runs, and without --against fewer")
    parser.add_argument("--tasks", nargs="+", default=models.TASKS, choices=models.TASKS)
    parser.add_argument("--servers", nargs="+", default=list(KINDS), choices=list(KINDS))
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
