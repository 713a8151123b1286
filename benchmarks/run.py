"""Runs every server on the same model, texts and core, and writes down what clients saw.

    make bench                                        everything: benchmarks/results.json and README.md
    .venv/bin/python benchmarks/run.py --quick        in short, into .out/bench-quick
    .venv/bin/python benchmarks/run.py --tasks fill-mask --servers guide mosec ours

For each task: the guide's server answers one client at a time, and that rate is 1x. Then, for every
server, closed loops and open loops; every peer has had its batch size tuned before. For ours and the
best peer the knee: the highest load of which 99 % is answered within the SLO, on the texts and on texts
of one length. And what the core could answer if there were no server (`raw_limit.py`).

Servers that have a timeout (LitServe, mosec, ours) get 10 s in closed loops, which ask for throughput
alone, and the SLO in open loops. It is given to all of them alike.

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
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import load
import models

HERE = Path(__file__).parent
ROOT = HERE.parent
OURS, PEERS = ROOT / ".venv" / "bin" / "python", ROOT / ".venv-bench" / "bin" / "python"
SERVER_CORE, GENERATOR_CORE = "0", "1"
ALONE = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
SLO_MS = 500.0
PATIENT_MS = 10_000.0
_START_S, _LIFETIME_S, _DRAIN_S = 60.0, 600, 2.5
_TUNING_CLIENTS, _NOOP_CLIENTS = 16, 32
_KNEE = 0.99
_HELLO = '"hello [MASK]"'  # JSON, so that the echo of it is JSON too

Result = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A server program and how to talk to it."""

    name: str
    script: str
    python: Path = PEERS
    path: str = "/"
    content_type: str = "text/plain"
    batches: bool = True  # whether there is a batch size to tune


KINDS = {
    kind.name: kind
    for kind in (
        Kind("guide", "guide.py", batches=False),
        Kind("guide-batching", "guide_batching.py"),
        Kind("litserve", "litserve_server.py", path="/predict", content_type="application/json"),
        Kind("mosec", "mosec_server.py", path="/inference", content_type="application/json"),
        Kind("batched", "batched_server.py"),
        Kind("ours", "ours.py", python=OURS, batches=False),  # its defaults are what is measured
    )
}
ECHO = Kind("starlette-echo", "echo.py", python=OURS)
NOOP = Kind("ours-noop", "ours_noop.py", python=OURS)


@dataclass(frozen=True)
class Plan:
    """How long and how much."""

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


class Running:
    """One server process on its core, ended with everything that it has started."""

    def __init__(self, kind: Kind, task: str = "", batch_size: int = 1, timeout_ms: float = SLO_MS) -> None:
        self.kind, self.task, self.batch_size, self.timeout_ms = kind, task, batch_size, timeout_ms
        self._collapsed = self._checked = False
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it and wait until it answers, and answers right."""
        self.port = _free_port()
        model = ["--model", str(models.folder(self.task)), "--task", self.task] if self.task else []
        command = [
            *("timeout", str(_LIFETIME_S), "taskset", "-c", SERVER_CORE),
            *(str(self.kind.python), str(HERE / "servers" / self.kind.script)),
            *("--port", str(self.port), "--batch-size", str(self.batch_size)),
            *("--timeout-ms", str(self.timeout_ms), *model),
        ]
        log = (ROOT / ".out" / f"bench-{self.kind.name}.log").open("wb")
        self._process = subprocess.Popen(
            command, env={**os.environ, **ALONE}, stdout=log, stderr=log, start_new_session=True
        )
        log.close()
        give_up = time.monotonic() + _START_S
        while self.ask(_HELLO, timeout=_START_S) is None:
            if self._process.poll() is not None or time.monotonic() > give_up:
                self.stop()
                raise SystemExit(f"{self.kind.name} does not start; see .out/bench-{self.kind.name}.log")
            time.sleep(0.1)
        if self.task and not self._checked:
            self._check()
            self._checked = True

    def stop(self) -> None:
        """End the whole process group: politely, unless it would first work off a lost queue."""
        if self._process is None:
            return
        signals = ((signal.SIGTERM, 3.0), (signal.SIGKILL, 3.0))
        for sign, patience in signals[1:] if self._collapsed else signals:
            try:
                os.killpg(self._process.pid, sign)
                self._process.wait(patience)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        self._process = None

    def ask(self, text: str, timeout: float) -> Any:
        """One answer, or None if it was refused or did not come."""
        body = json.dumps(text) if self.kind.content_type == "application/json" else text
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request("POST", self.kind.path, body, {"Content-Type": self.kind.content_type})
            response = connection.getresponse()
            content = response.read()
            return json.loads(content) if response.status == 200 else None
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def load(self, plan: Plan, **job: Any) -> Result:
        """Put load on it; see `load.Job`. A server that is still busy with the last run is restarted."""
        if self._collapsed or self.ask(_HELLO, timeout=_DRAIN_S) is None:
            self.stop()
            self._collapsed = False
            self.start()
        everything = {
            "port": self.port,
            "path": self.kind.path,
            "content_type": self.kind.content_type,
            "texts": str(models.folder(self.task or "text-classification") / models.TEXTS_FILE),
            "seconds": plan.seconds,
            "warmup": plan.warmup,
            "slo_ms": SLO_MS,
            **job,
        }
        done = subprocess.run(
            ["taskset", "-c", GENERATOR_CORE, str(OURS), str(HERE / "load.py")],
            input=json.dumps(everything).encode(),
            stdout=subprocess.PIPE,
            timeout=120,
            check=True,
        )
        result: Result = json.loads(done.stdout)
        self._collapsed = "rate" in job and load.UNANSWERED in result["statuses"]
        void = "  VOID: the generator lagged" if result["void"] else ""
        label = f"{job.get('clients', 0)} clients" if "clients" in job else f"{job['rate']:.0f}/s"
        print(
            f"  {self.kind.name:15} {label:>11}: {result['goodput_per_s']:8.1f}/s in time, "
            f"p99 {result['p99_ms']} ms, {result['statuses']}{void}",
            flush=True,
        )
        return result

    def _check(self) -> None:
        """Whoever is measured gives what the pipeline gives, alone and in a batch with others."""
        expected = json.loads((models.folder(self.task) / "answers.json").read_text())
        texts = [text for text, _ in expected]
        with ThreadPoolExecutor(len(texts)) as clients:
            together = list(clients.map(lambda text: self.ask(text, _START_S), texts))
        # With a short timeout somebody in the batch may have been given up: ask again, alone.
        answers = [self.ask(t, _START_S) if a is None else a for t, a in zip(texts, together, strict=True)]
        for (text, right), given in zip(expected, answers, strict=True):
            if not same(given, right):
                self.stop()
                raise SystemExit(f"{self.kind.name} answers {self.task} wrongly for {text[:60]!r}")


def same(given: Any, right: Any) -> bool:
    """Equal, up to what a different batch does to the last digits."""
    if isinstance(right, dict):
        return (
            isinstance(given, dict)
            and given.keys() == right.keys()
            and all(same(given[key], right[key]) for key in right)
        )
    if isinstance(right, list):
        return (
            isinstance(given, list)
            and len(given) == len(right)
            and all(same(a, b) for a, b in zip(given, right, strict=True))
        )
    if isinstance(right, float):
        return isinstance(given, float) and abs(given - right) <= 1e-4 * max(1.0, abs(right))
    return bool(given == right)


def measure(task: str, kinds: Sequence[Kind], plan: Plan) -> Result:
    """Everything about one task."""
    print(f"{task}", flush=True)
    with Running(KINDS["guide"], task) as guide:
        unit = guide.load(plan, clients=1)["answers_per_s"]
    print(f"  1x is {unit:.1f}/s", flush=True)
    sizes = {kind.name: tune(kind, task, plan) for kind in kinds if kind.batches}
    result: Result = {
        "unit_per_s": unit,
        "batch_sizes": {name: sizes[name]["best"] for name in sizes},
        "tuning": {name: sizes[name]["answers_per_s"] for name in sizes},
        "closed": {},
        "open": {},
        "useful_tokens": None,
        "raw_per_s": raw_limit(task) if any(kind.name == "ours" for kind in kinds) else None,
        "knee_per_s": {},
        "equal_lengths_per_s": {},
        "beyond_knee": {},
    }
    for kind in kinds:
        size = sizes[kind.name]["best"] if kind.batches else 1
        with Running(kind, task, size, PATIENT_MS) as server:
            short = dataclasses.replace(plan, seconds=plan.closed_seconds)
            result["closed"][kind.name] = {n: server.load(short, clients=n) for n in plan.closed}
            if kind.name == "ours":
                result["useful_tokens"] = useful_tokens(server)
        with Running(kind, task, size) as server:
            result["open"][kind.name] = {
                multiple: server.load(plan, rate=multiple * unit) for multiple in plan.open
            }
    if plan.knee_steps:
        for name in knees_wanted(result["open"]):
            with Running(KINDS[name], task, result["batch_sizes"].get(name, 1)) as server:
                peak = max(run["goodput_per_s"] for run in result["open"][name].values())
                knee = result["knee_per_s"][name] = find_knee(server, plan, peak)
                if name == "ours" and knee:
                    result["beyond_knee"] = {
                        k: server.load(plan, rate=k * knee) for k in (1.0, *plan.knee_multiples)
                    }
                equal = str(models.folder(task) / models.EQUAL_TEXTS_FILE)
                short = dataclasses.replace(plan, seconds=plan.closed_seconds)
                run = server.load(short, clients=_TUNING_CLIENTS, texts=equal)
                print(f"  {name}: texts of one length", flush=True)
                result["equal_lengths_per_s"][name] = find_knee(
                    server, plan, run["answers_per_s"], texts=equal
                )
    return result


def raw_limit(task: str) -> float:
    """Texts per second of the model alone, on the servers' core."""
    done = subprocess.run(
        ["taskset", "-c", SERVER_CORE, str(OURS), str(HERE / "raw_limit.py"), task],
        env={**os.environ, **ALONE},
        capture_output=True,
        check=True,
        timeout=120,
    )
    print(f"  no server, ideal batches: {float(done.stdout):.1f}/s", flush=True)
    return float(done.stdout)


def tune(kind: Kind, task: str, plan: Plan) -> Result:
    """The batch size with which a peer answers most, in a closed loop that could fill any of them."""
    short = dataclasses.replace(plan, seconds=plan.tuning_seconds, warmup=0.5)
    rates = {}
    for size in plan.batch_sizes:
        with Running(kind, task, size, PATIENT_MS) as server:
            rates[size] = server.load(short, clients=_TUNING_CLIENTS)["answers_per_s"]
    best = max(rates, key=lambda size: rates[size])
    print(f"  {kind.name}: batch size {best}", flush=True)
    return {"best": best, "answers_per_s": rates}


def knees_wanted(runs: Mapping[str, Mapping[float, Result]]) -> list[str]:
    """Ours and the peer with the highest goodput at any load."""

    def peak(name: str) -> float:
        return max(float(run["goodput_per_s"]) for run in runs[name].values())

    peers = sorted((name for name in runs if name != "ours"), key=peak)
    return [*(["ours"] if "ours" in runs else []), *peers[-1:]]


def find_knee(server: Running, plan: Plan, peak: float, **job: Any) -> float:
    """The highest offered rate of which 99 % is answered within the SLO, by bisection."""
    low, high = 0.0, 1.5 * peak
    for _ in range(plan.knee_steps):
        rate = (low + high) / 2
        run = server.load(plan, rate=rate, **job)
        if run["attainment"] is not None and run["attainment"] >= _KNEE:
            low = rate
        else:
            high = rate
    print(f"  {server.kind.name}: knee at {low:.1f}/s", flush=True)
    return low


def useful_tokens(server: Running) -> float | None:
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
        with Running(kind, timeout_ms=PATIENT_MS) as server:
            rates[kind.name] = server.load(plan, clients=_NOOP_CLIENTS)
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few points of two seconds each, no knee")
    parser.add_argument("--tasks", nargs="+", default=models.TASKS, choices=models.TASKS)
    parser.add_argument("--servers", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--out", type=Path, help="folder for results.json, README.md and the plots")
    options = parser.parse_args()
    if (os.cpu_count() or 1) < 2:
        raise SystemExit("the servers and the load generator need a core each")
    plan = QUICK if options.quick else Plan()
    out = options.out or (ROOT / ".out" / "bench-quick" if options.quick else HERE)
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
        # After every task, so that a run that is cut short has not been in vain.
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    subprocess.run([str(PEERS), str(HERE / "report.py"), str(out)], check=True, timeout=120)
    print(f"{results['minutes']} minutes; see {out / 'README.md'}")


if __name__ == "__main__":
    main()
