"""What the browser makes of a frame: the encoder in Python against the decoder in JavaScript."""

import json
import subprocess
from pathlib import Path

import pytest

from serving_kit.notebook import assets, frames

deno = pytest.importorskip("deno")

pytestmark = pytest.mark.light

SNAPSHOT_JS = Path(assets.__file__).parent / "frontend" / "snapshot.js"
PROGRAM = """
import { decodeFrame } from "%s";
const bytes = new Uint8Array(await new Response(Deno.stdin.readable).arrayBuffer());
console.log(JSON.stringify(decodeFrame(bytes).series));
"""
POINT = {
    **{name: 10 + index for index, name in enumerate(frames.COUNTS)},
    "latency_ms": {"p50": 1.5, "p95": 20.0, "p99": 300.0},
    "queue_wait_ms": {"p50": 0.5},
    "forward_ms": {"p50": 1.0},
    "sizes": {"1": 9, "4": 9},
    "reasons": {"full": 2, "idle": 16},
    "padding": 0.25,
    "tokens": {
        "generated_tokens_per_s": 12.5,
        "prompt_tokens_per_s": 40.0,
        "first_token_ms": {"p50": 80.0},
        "inter_token_ms": {"p50": 20.0, "p99": 35.0},
    },
}


def decode(frame, tmp_path):
    program = tmp_path / "decode.js"
    program.write_text(PROGRAM % SNAPSHOT_JS.as_uri())
    command = [deno.find_deno_bin(), "run", "--quiet", "--no-config", str(program)]
    result = subprocess.run(command, input=frame, stdout=subprocess.PIPE, check=True, timeout=60)
    return json.loads(result.stdout)


def test_series(tmp_path):
    batches = dict.fromkeys(frames.REASONS, 0)
    rows = [frames.encode_row(POINT), b"0"]
    point, empty = decode(frames.encode_frame({"batches": batches}, 7, rows), tmp_path)
    assert [point["second"], empty["second"]] == [7, 8]
    assert {name: point[name] for name in frames.COUNTS} == {name: POINT[name] for name in frames.COUNTS}
    for name in ("latency_ms", "queue_wait_ms", "forward_ms", "padding"):
        assert point[name] == POINT[name]
    assert point["reasons"] == {**batches, **POINT["reasons"]}
    assert point["sizes"] == {"1": 5, "4": 5}, "in ninths of all batches, rounded up"
    assert point["mean"] == 2.5
    assert point["tokens"] == POINT["tokens"]
    assert empty["arrivals"] == 0
