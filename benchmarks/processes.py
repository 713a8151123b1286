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
from kinds import Kind
from programs import OURS, ROOT, Options, Program

HERE = Path(__file__).parent
OUT = ROOT / ".out"
SERVER_CORE, GENERATOR_CORE = "0", "1"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
SLO_MS = 500.0
CLOSED_LOOP_TIMEOUT_MS = 10_000.0
_START_TIMEOUT_S, _LIFETIME_S, _IDLE_TIMEOUT_S = 240.0, 900, 2.5
_HELLO = '"hello [MASK]"'  # JSON, so that its echo is JSON too

Result = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """A model to serve, and the texts that are sent to it."""

    texts: Path  # JSON: [[text, tokens], ...]
    kind: Kind | None = None  # None: the server needs no model
    task: str = ""  # of transformers.pipeline
    model: Path | None = None
    answers: Path | None = None  # JSON: [[text, what the pipeline answers], ...]

    @classmethod
    def of_kind(cls, kind: Kind) -> Self:
        """The MiniLM-sized model of a kind of work."""
        home = models.folder(kind)
        return cls(home / models.TEXTS_FILE, kind, kind.task, home, home / models.ANSWERS_FILE)


class ServerProcess:
    """One server process on its core, with everything that it starts.

    A context manager: starts on entry, ends on exit. `serving_kit` is imported from `tree`.
    """

    def __init__(
        self,
        program: Program,
        workload: Workload,
        *,
        options: Options = (),
        timeout_ms: float = SLO_MS,
        tree: Path = ROOT,
    ) -> None:
        self.program = program
        self.route = program.route(workload.kind.name if workload.kind else "")
        self.workload = workload
        self.options = options
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
        log_file = OUT / f"bench-{self.program.name}.log"
        with log_file.open("wb") as log:
            self._process = subprocess.Popen(
                self._command(),
                env={
                    **os.environ,
                    **ENVIRONMENT,
                    **dict(self.program.environment),
                    "PYTHONPATH": str(self.tree),
                },
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while self.ask(_HELLO, timeout_s=_START_TIMEOUT_S) is None:
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise SystemExit(f"{self.program.name} does not start; see {log_file.relative_to(ROOT)}")
            time.sleep(0.1)
        if not self._checked:
            self._check_answers()
            self._checked = True

    def _command(self) -> list[str]:
        script = HERE / "servers" / self.program.script
        command = [
            *("timeout", str(_LIFETIME_S), "taskset", "-c", SERVER_CORE),
            *(str(self.program.python), str(script), "--port", str(self.port)),
            *("--timeout-ms", str(self.timeout_ms), *self.options, *self.route.arguments),
        ]
        if self.workload.model is not None:
            command += ["--model", str(self.workload.model), "--task", self.workload.task]
        if self.workload.kind is not None:
            command += ["--kind", self.workload.kind.name]
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
        """One answer, in the form of the pipeline's, or None if the request was refused or timed out."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            body = load.body(self.route.template, text)
            connection.request("POST", self.route.path, body, {"Content-Type": self.route.content_type})
            response = connection.getresponse()
            content = response.read()
            return self.route.read(json.loads(content)) if response.status == 200 else None
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def memory_mb(self) -> float:
        """Resident memory of all its processes, added up."""
        assert self._process is not None
        pids, total_kb = [self._process.pid], 0
        for pid in pids:
            task = Path(f"/proc/{pid}/task/{pid}")
            pids += map(int, (task / "children").read_text().split())
            total_kb += next(
                (
                    int(line.split()[1])
                    for line in (task / "status").read_text().splitlines()
                    if line.startswith("VmRSS")
                ),
                0,
            )
        return total_kb / 1024

    def load(self, seconds: float, warmup: float, **job: Any) -> Result:
        """Put it under load; `job` has more fields of `load.Job`. Restarted first if it is still busy."""
        if self._overloaded or self.ask(_HELLO, timeout_s=_IDLE_TIMEOUT_S) is None:
            self.stop()
            self._overloaded = False
            self.start()
        fields = {
            "port": self.port,
            "path": self.route.path,
            "content_type": self.route.content_type,
            "template": self.route.template,
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
            f"  {self.program.name:15} {label:>11}: {result['answers_per_s']:8.1f} answers/s, "
            f"{result['goodput_per_s']:.1f} within the SLO, "
            f"p99 {result['p99_ms']} ms, {result['statuses']}{void}",
            flush=True,
        )

    def _check_answers(self) -> None:
        """SystemExit unless it answers as the pipeline does, to several requests at once."""
        kind = self.workload.kind
        if self.workload.answers is None or kind is None:
            return
        expected = json.loads(self.workload.answers.read_text())
        texts = [text for text, _ in expected]
        with ThreadPoolExecutor(len(texts)) as clients:
            together = list(clients.map(self.ask, texts))
        # With a short timeout a request in the batch may have expired: ask again, alone.
        answers = [self.ask(t) if a is None else a for t, a in zip(texts, together, strict=True)]
        for (text, right), given in zip(expected, answers, strict=True):
            if not kind.same(given, right):
                self.stop()
                raise SystemExit(f"{self.program.name} answers {kind.name} wrongly for {text[:60]!r}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
