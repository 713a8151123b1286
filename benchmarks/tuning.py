"""Tuning: the options with which a peer answers most, and a file that remembers them.

The rates of two closed loops are added up, one with few and one with many clients, so that the choice is good
for both. `.out/bench-tuned.json` keeps what was found; without it, or with other options to try, peers are
tuned anew.
"""

from __future__ import annotations

import json
from typing import Any

from processes import CLOSED_LOOP_TIMEOUT_MS, OUT, ServerProcess, Workload
from programs import Options, Program

FILE = OUT / "bench-tuned.json"
_CLIENTS = (16, 64)
_WARMUP_S = 0.5


def tuned(program: Program, workload: Workload, seconds: float) -> dict[str, Any]:
    """The best options of a server for this workload, and the rates with all that were tried."""
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    key = f"{program.name} {workload.kind.name if workload.kind else ''}"
    tried = {" ".join(options) for options in program.options}
    if key not in known or set(known[key]["answers_per_s"]) != tried:
        rates = {" ".join(each): _rate(program, workload, each, seconds) for each in program.options}
        best = max(program.options, key=lambda each: rates[" ".join(each)])
        known[key] = {"best": list(best), "answers_per_s": rates}
        FILE.write_text(json.dumps(known, indent=1) + "\n")
    print(f"  {program.name}: {' '.join(known[key]['best'])}", flush=True)
    found: dict[str, Any] = known[key]
    return found


def _rate(program: Program, workload: Workload, options: Options, seconds: float) -> float:
    with ServerProcess(program, workload, options=options, timeout_ms=CLOSED_LOOP_TIMEOUT_MS) as server:
        runs = [server.load(seconds, _WARMUP_S, clients=clients) for clients in _CLIENTS]
    return float(sum(run["answers_per_s"] for run in runs))
