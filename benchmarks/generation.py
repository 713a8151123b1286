"""Streams of generated text: tokens per second, time to first token, time between tokens; beside peers.

    .venv/bin/python benchmarks/generation.py                            ours, vllm, transformers; a table
    .venv/bin/python benchmarks/generation.py --servers ours vllm --clients 16 --rounds 3

A Llama of 38 million parameters with random weights in fp32, greedy, no end token: every answer has exactly
the tokens that were asked for, 16 to 128. Closed loop, streamed by `POST /v1/completions`. The server has
core 0 and one torch thread, the clients core 1. In every round each server is a new process, and a different
one is first; ratios are of one round, and their median is shown.

"short beside long": the time of an answer of 8 tokens, of two clients beside eight that ask for 512, over the
same alone (p50).

Not here: tasks with one answer (`run.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import models
from processes import ENVIRONMENT, GENERATOR_CORE, OUT, SERVER_CORE
from programs import ENVIRONMENTS, OURS, ROOT

_VLLM_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
_START_S, _LIFETIME_S = 300.0, 900
_LONG, _SHORT = 512, 8  # tokens
_FEWEST, _MOST = 16, 128
_MOST_POSITIONS = 1024
_WARMUP_S = 2.0


@dataclass
class Stream:
    """One answer: when it was asked for, and when each piece came."""

    asked: float
    tokens: int
    pieces: list[float] = field(default_factory=list)
    ended: float | None = None

    @property
    def first_s(self) -> float:
        return self.pieces[0] - self.asked


@dataclass(frozen=True)
class Request:
    prompt: str
    tokens: int


def model_folder() -> Path:
    """The model and its tokenizer; built if they are not there."""
    home = models.CACHE / "generation"
    if (home / "done").exists():
        return home
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(models.minilm())
    torch.manual_seed(models.SEED)
    config = LlamaConfig(
        vocab_size=30_522,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=_MOST_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    model.save_pretrained(home)
    tokenizer.save_pretrained(home)
    texts = models.make_texts("text", tokenizer.get_vocab(), random.Random(models.SEED))
    (home / models.TEXTS_FILE).write_text(json.dumps(texts))
    (home / "done").touch()
    return home


def command(name: str, home: Path, port: int) -> tuple[list[str], dict[str, str]]:
    """The command line of a server, and its environment variables."""
    if name == "ours":
        serve = [
            "-m",
            "serving_kit.cli",
            "serve",
            str(home),
            "--task",
            "text-generation",
            "--port",
            str(port),
        ]
        return [str(OURS), *serve, "--timeout-ms", "60000"], {"PYTHONPATH": str(ROOT)}
    if name == "vllm":
        program = ENVIRONMENTS / "vllm" / "bin" / "vllm"
        served = ["--served-model-name", "bench", "--dtype", "float32", "--host", "127.0.0.1"]
        bounds = ["--port", str(port), "--max-model-len", str(_MOST_POSITIONS), "--max-num-seqs", "32"]
        return [str(program), "serve", str(home), *served, *bounds], _VLLM_ENVIRONMENT
    program = ENVIRONMENTS / "transformers" / "bin" / "transformers"
    options = ["--continuous-batching", "--dtype", "float32", "--device", "cpu", "--host", "127.0.0.1"]
    return [str(program), "serve", str(home), *options, "--port", str(port)], {}


@contextmanager
def served(name: str, home: Path) -> Iterator[int]:
    """A server process on its core; yields its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    line, more = command(name, home, port)
    OUT.mkdir(exist_ok=True)
    with (OUT / f"generation-{name}.log").open("wb") as log:
        process = subprocess.Popen(
            ["timeout", str(_LIFETIME_S), "taskset", "-c", SERVER_CORE, *line],
            env={**os.environ, **ENVIRONMENT, **more},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        until = time.monotonic() + _START_S
        while True:
            try:
                asyncio.run(stream(port, model_name(name, home), Request("hello", 2)))
                break
            except (OSError, ValueError, asyncio.IncompleteReadError):
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"{name} does not start: see {OUT}/generation-{name}.log") from None
                time.sleep(0.5)
        yield port
    finally:
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, sign)
                process.wait(5)
                break
            except subprocess.TimeoutExpired:
                continue
            except ProcessLookupError:
                break


def model_name(server: str, home: Path) -> str:
    return str(home) if server == "transformers" else "bench"


async def stream(port: int, model: str, request: Request, into: Stream | None = None) -> Stream:
    """Ask for one answer, and note when its pieces come.

    Raises:
        ValueError: it was refused, or has not the tokens that were asked for.
    """
    seen = into or Stream(time.perf_counter(), request.tokens)
    body = json.dumps(
        {
            "model": model,
            "prompt": request.prompt,
            "max_tokens": request.tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    try:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            raise ValueError(f"{status!r} {(await reader.read(2000))!r}")
        usage = 0
        while line := await reader.readline():
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if event.get("usage"):
                usage = event["usage"]["completion_tokens"]
            if any(choice.get("text") for choice in event.get("choices", ())):
                seen.pieces.append(time.perf_counter())
        if usage and usage != request.tokens:
            raise ValueError(f"asked for {request.tokens} tokens, got {usage}")
        if not seen.pieces:
            raise ValueError("no text")
        seen.ended = time.perf_counter()
        return seen
    finally:
        writer.close()


class Requests:
    """Prompts in an order that depends on the seed, with numbers of new tokens."""

    def __init__(self, home: Path, seed: int) -> None:
        self._dice = random.Random(seed)
        self._texts = [text for text, _ in json.loads((home / models.TEXTS_FILE).read_text())]

    def next(self, tokens: int | None = None) -> Request:
        most = self._dice.randint(_FEWEST, _MOST) if tokens is None else tokens
        return Request(self._dice.choice(self._texts), most)


async def closed_loop(
    port: int, model: str, requests: Requests, clients: int, seconds: float
) -> dict[str, Any]:
    """`clients` streams at a time. Tokens are counted as they come."""
    streams: list[Stream] = []
    start = time.perf_counter()
    until = start + _WARMUP_S + seconds

    async def client() -> None:
        while time.perf_counter() < until:
            request = requests.next()
            seen = Stream(time.perf_counter(), request.tokens)
            streams.append(seen)
            await stream(port, model, request, seen)

    tasks = [asyncio.create_task(client()) for _ in range(clients)]
    await asyncio.sleep(until - time.perf_counter())
    begin = start + _WARMUP_S
    for task in tasks:
        if task.done() and task.exception() is not None:
            raise SystemExit(f"a client failed: {task.exception()}")
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    ended = [each for each in streams if each.ended]
    # A piece may be more than one token: of the streams that have ended it is known how many.
    pieces = sum(len(each.pieces) for each in ended)
    per_piece = sum(each.tokens for each in ended) / pieces if pieces else 1.0
    inside = sum(begin <= at < until for each in streams for at in each.pieces)
    firsts = [each.first_s for each in streams if each.pieces and each.asked >= begin]
    gaps = [
        later - earlier
        for each in streams
        for earlier, later in zip(each.pieces, each.pieces[1:], strict=False)
        if earlier >= begin
    ]
    return {
        "tokens_per_s": inside * per_piece / seconds,
        "first_p50_ms": 1e3 * quantile(firsts, 0.5),
        "first_p99_ms": 1e3 * quantile(firsts, 0.99),
        "gap_p50_ms": 1e3 * quantile(gaps, 0.5),
        "gap_p99_ms": 1e3 * quantile(gaps, 0.99),
        "answers": len(ended),
    }


async def short_beside_long(port: int, model: str, requests: Requests, seconds: float) -> float:
    """Median time of short answers beside long ones, over the median alone."""

    async def short(count: float, until: float) -> list[float]:
        times = []
        while len(times) < count and time.perf_counter() < until:
            began = time.perf_counter()
            await stream(port, model, requests.next(_SHORT))
            times.append(time.perf_counter() - began)
        return times

    async def long() -> None:
        while True:
            await stream(port, model, requests.next(_LONG))

    alone = await short(15, time.perf_counter() + seconds)
    others = [asyncio.create_task(long()) for _ in range(8)]
    await asyncio.sleep(_WARMUP_S)
    until = time.perf_counter() + seconds
    beside = await asyncio.gather(*(short(1e9, until) for _ in range(2)))
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    return statistics.median([each for times in beside for each in times]) / statistics.median(alone)


def quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else float("nan")


def measure(name: str, home: Path, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One server: all numbers of clients, and short answers beside long ones."""
    result: dict[str, Any] = {}
    with served(name, home) as port:
        model = model_name(name, home)
        for clients in options.clients:
            run = asyncio.run(closed_loop(port, model, Requests(home, seed), clients, options.seconds))
            result[str(clients)] = run
            print(
                f"  {name:13} {clients:3} clients: {run['tokens_per_s']:7.1f} tokens/s, first token "
                f"{run['first_p50_ms']:.0f} and {run['first_p99_ms']:.0f} ms (p50, p99), between tokens "
                f"{run['gap_p50_ms']:.0f} and {run['gap_p99_ms']:.0f} ms, {run['answers']} answers",
                flush=True,
            )
        if options.short:
            ratio = asyncio.run(short_beside_long(port, model, Requests(home, seed), options.seconds))
            result["short_beside_long"] = ratio
            print(f"  {name:13} short beside long: {ratio:.1f} times as long as alone", flush=True)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--servers", nargs="+", default=["ours", "vllm", "transformers"])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 16, 32])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--no-short", dest="short", action="store_false")
    parser.add_argument("--out", type=Path, default=OUT / "generation.json")
    options = parser.parse_args()
    os.sched_setaffinity(0, {int(GENERATOR_CORE)})
    home = model_folder()
    rounds = []
    for index in range(options.rounds):
        turn = index % len(options.servers)
        rounds.append({})
        for name in [*options.servers[turn:], *options.servers[:turn]]:
            try:
                rounds[-1][name] = measure(name, home, options, seed=index + 1)
            except SystemExit as error:
                print(f"  not measured: {error}", flush=True)
            options.out.write_text(json.dumps(rounds, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
