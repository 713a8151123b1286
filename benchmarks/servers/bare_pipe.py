"""No server: a loop that calls the pipeline, one text after the other. Prints p50, p99 and memory as JSON."""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from pathlib import Path

from common import arguments, load

_SECONDS, _WARMUP_S = float(sys.argv.pop(1)), 1.0


def main() -> None:
    args = arguments()
    pipe = load(args)
    texts = [text for text, _ in json.loads((Path(args.model) / "texts.json").read_text())]
    random.Random(1).shuffle(texts)  # the order in which clients send them
    start, took = time.perf_counter(), []
    while (began := time.perf_counter()) < start + _WARMUP_S + _SECONDS:
        pipe(texts[(len(took) + 1) % len(texts)])
        took.append((began, time.perf_counter() - began))
    counted = sorted(seconds for began, seconds in took if began >= start + _WARMUP_S)
    result = {
        "answers_per_s": len(counted) / sum(counted),
        "p50_ms": 1e3 * counted[(len(counted) - 1) // 2],
        "p99_ms": 1e3 * counted[(len(counted) - 1) * 99 // 100],
        "memory_mb": _resident_mb(),
    }
    print(json.dumps(result))


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


if __name__ == "__main__":
    main()
