"""Server processes under test: started on their core, asked, put under load, ended."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import load
import models

HERE = Path(__file__).parent
ROOT = HERE.parent
OUT = ROOT / ".out"
OURS, PEERS = ROOT / ".venv" / "bin" / "python", ROOT / ".venv-bench" / "bin" / "python"
SERVER_CORE, GENERATOR_CORE = "0", "1"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
SLO_MS = 500.0
CLOSED_LOOP_TIMEOUT_MS = 10_000.0
_START_TIMEOUT_S, _LIFETIME_S, _IDLE_TIMEOUT_S = 60.0, 600, 2.5
_HELLO = '"hello [MASK]"'  # JSON, so that its echo is JSON too

Result = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A server program and its protocol."""

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
        Kind("ours", "ours.py", python=OURS, batches=False),  # measured with its defaults
    )
}
ECHO = Kind("starlette-echo", "echo.py", python=OURS)
NOOP = Kind("ours-noop", "ours_noop.py", python=OURS)


@dataclass(frozen=True)
class Workload:
    """A model to serve, and the texts that are sent to it."""

    texts: Path  # JSON: [[text, tokens], ...]
    task: str = ""  # empty: the server needs no model
    model: Path | None = None
    answers: Path | None = None  # JSON: [[text, what the pipeline answers], ...]

    @classmethod
    def of_task(cls, task: str) -> Self:
        """The MiniLM-sized model of a task; without a task only the texts."""
        home = models.folder(task or "text-classification")
        texts = home / models.TEXTS_FILE
        return cls(texts, task, home, home / "answers.json") if task else cls(texts)


class ServerProcess:
    """One server process on its core, with everything that it starts.

    A context manager: starts on entry, ends on exit. `serving_kit` is imported from `tree`.
    """

    def __init__(
        self,
        kind: Kind,
        workload: Workload,
        *,
        batch_size: int = 1,
        timeout_ms: float = SLO_MS,
        tree: Path = ROOT,
    ) -> None:
        self.kind = kind
        self.workload = workload
        self.batch_size = batch_size
        self.timeout_ms = timeout_ms
        self.tree = tree
        self.port = 0
        self._overloaded = False  # by the last run: it must not work off that queue in the next one
        self._checked = False
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it and wait until it answers. SystemExit if it does not, or if an answer is wrong."""
        self.port = _free_port()
        OUT.mkdir(exist_ok=True)
        log_file = OUT / f"bench-{self.kind.name}.log"
        with log_file.open("wb") as log:
            self._process = subprocess.Popen(
                self._command(),
                env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(self.tree)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while self.ask(_HELLO, timeout_s=_START_TIMEOUT_S) is None:
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise SystemExit(f"{self.kind.name} does not start; see {log_file.relative_to(ROOT)}")
            time.sleep(0.1)
        if not self._checked:
            self._check_answers()
            self._checked = True

    def _command(self) -> list[str]:
        script = HERE / "servers" / self.kind.script
        command = [
            *("timeout", str(_LIFETIME_S), "taskset", "-c", SERVER_CORE),
            *(str(self.kind.python), str(script), "--port", str(self.port)),
            *("--batch-size", str(self.batch_size), "--timeout-ms", str(self.timeout_ms)),
        ]
        if self.workload.model is not None:
            command += ["--model", str(self.workload.model), "--task", self.workload.task]
        return command

    def stop(self) -> None:
        """End the whole process group: with SIGTERM first, unless the queue of an overload is left."""
        if self._process is None:
            return
        for sign in (signal.SIGKILL,) if self._overloaded else (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, sign)
                self._process.wait(3.0)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        self._process = None

    def ask(self, text: str, timeout_s: float = _START_TIMEOUT_S) -> Any:
        """One answer, or None if the request was refused or timed out."""
        body = json.dumps(text) if self.kind.content_type == "application/json" else text
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            connection.request("POST", self.kind.path, body, {"Content-Type": self.kind.content_type})
            response = connection.getresponse()
            content = response.read()
            return json.loads(content) if response.status == 200 else None
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def load(self, seconds: float, warmup: float, **job: Any) -> Result:
        """Put it under load; `job` has more fields of `load.Job`. Restarted first if it is still busy."""
        if self._overloaded or self.ask(_HELLO, timeout_s=_IDLE_TIMEOUT_S) is None:
            self.stop()
            self._overloaded = False
            self.start()
        fields = {
            "port": self.port,
            "path": self.kind.path,
            "content_type": self.kind.content_type,
            "texts": str(self.workload.texts),
            "seconds": seconds,
            "warmup": warmup,
            "slo_ms": SLO_MS,
            **job,
        }
        done = subprocess.run(
            ["taskset", "-c", GENERATOR_CORE, str(OURS), str(HERE / "load.py")],
            input=json.dumps(fields).encode(),
            stdout=subprocess.PIPE,
            timeout=120,
            check=True,
        )
        result: Result = json.loads(done.stdout)
        self._overloaded = "rate" in job and load.UNANSWERED in result["statuses"]
        self._print(job, result)
        return result

    def _print(self, job: Result, result: Result) -> None:
        label = f"{job['clients']} clients" if "clients" in job else f"{job['rate']:.0f}/s"
        void = "  VOID: the generator lagged" if result["void"] else ""
        print(
            f"  {self.kind.name:15} {label:>11}: {result['answers_per_s']:8.1f} answers/s, "
            f"{result['goodput_per_s']:.1f} within the SLO, "
            f"p99 {result['p99_ms']} ms, {result['statuses']}{void}",
            flush=True,
        )

    def _check_answers(self) -> None:
        """SystemExit unless it answers as the pipeline does, to several requests at once."""
        if self.workload.answers is None:
            return
        expected = json.loads(self.workload.answers.read_text())
        texts = [text for text, _ in expected]
        with ThreadPoolExecutor(len(texts)) as clients:
            together = list(clients.map(self.ask, texts))
        # With a short timeout a request in the batch may have expired: ask again, alone.
        answers = [self.ask(t) if a is None else a for t, a in zip(texts, together, strict=True)]
        for (text, right), given in zip(expected, answers, strict=True):
            if not same(given, right):
                self.stop()
                raise SystemExit(f"{self.kind.name} answers {self.workload.task} wrongly for {text[:60]!r}")


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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
