"""The servers: which program each is, its environment, how it is asked, what is tried to tune it.

Not here: their processes (`processes.py`), the programs themselves (`servers/`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kinds import OURS_EMBEDDINGS, Route, everywhere

ROOT = Path(__file__).parent.parent
OURS = ROOT / ".venv" / "bin" / "python"
ENVIRONMENTS = ROOT / ".venv-bench"  # one for each group of peers; setup.sh makes them
Options = tuple[str, ...]  # of the command line of a server


@dataclass(frozen=True)
class Program:
    """A server program and its protocol."""

    name: str
    script: str
    group: str = ""  # of peers: whose environment it runs in; empty: ours
    routes: Mapping[str, Route] = field(default_factory=dict)  # by kind of work; none: no model is served
    options: tuple[Options, ...] = ((),)  # what is tried to tune it: the fastest is kept
    distribution: str = ""  # the package whose version is shown
    environment: tuple[tuple[str, str], ...] = ()  # variables

    @property
    def python(self) -> Path:
        return ENVIRONMENTS / self.group / "bin" / "python" if self.group else OURS

    def route(self, kind: str) -> Route:
        """How it is asked; plain text where no model is served."""
        return self.routes.get(kind, Route())


def batches(*sizes: int) -> tuple[Options, ...]:
    """Batch sizes to try."""
    return tuple(("--batch-size", str(size)) for size in sizes)


def delays(*pairs: tuple[int, int]) -> tuple[Options, ...]:
    """Batch sizes with the milliseconds that the first item waits for company."""
    return tuple(("--batch-size", str(size), "--delay-ms", str(delay)) for size, delay in pairs)


def _vllm_label(answer: Any) -> Any:
    """Of {"data": [{"label": ..., "probs": [...]}]}."""
    return [{"label": answer["data"][0]["label"], "score": max(answer["data"][0]["probs"])}]


def _infinity_label(answer: Any) -> Any:
    """Of {"data": [[{"label": ..., "score": ...}, ...]]}."""
    return [max(answer["data"][0], key=lambda each: float(each["score"]))]


def _embedding(answer: Any) -> Any:
    """Of {"data": [{"embedding": [...]}]}, as OpenAI's API has it."""
    return answer["data"][0]["embedding"]


_ASK_MANY = '{"model": "bench", "input": [$text]}'
_ANY_BATCH = batches(1, 4, 8, 16)
_QUEUED = delays((1, 0), (4, 0), (8, 0), (8, 2))
_VLLM = {
    "text-classification": Route("/classify", _ASK_MANY, _vllm_label),
    "embeddings": Route("/v1/embeddings", _ASK_MANY, _embedding),
}
_INFINITY = {
    "text-classification": Route("/classify", _ASK_MANY, _infinity_label),
    "embeddings": Route("/embeddings", _ASK_MANY, _embedding),
}
# One core, and no second look at which core that is.
_VLLM_ENVIRONMENT = (
    ("VLLM_CPU_OMP_THREADS_BIND", "0"),
    ("VLLM_CPU_KVCACHE_SPACE", "1"),
    ("VLLM_NO_USAGE_STATS", "1"),
    ("VLLM_LOGGING_LEVEL", "WARNING"),
)

PROGRAMS: Mapping[str, Program] = {
    program.name: program
    for program in (
        Program("guide", "guide.py", "peers", everywhere(Route())),
        Program("guide-batching", "guide_batching.py", "peers", everywhere(Route()), _ANY_BATCH),
        Program(
            "litserve",
            "litserve_server.py",
            "peers",
            everywhere(Route("/predict", "$text")),
            _ANY_BATCH,
            "litserve",
        ),
        Program(
            "mosec", "mosec_server.py", "peers", everywhere(Route("/inference", "$text")), _ANY_BATCH, "mosec"
        ),
        Program("batched", "batched_server.py", "peers", everywhere(Route()), _ANY_BATCH, "batched"),
        Program(
            "vllm",
            "vllm_server.py",
            "vllm",
            _VLLM,
            tuple(("--step-tokens", str(tokens)) for tokens in (512, 1024, 4096)),
            "vllm-cpu",
            _VLLM_ENVIRONMENT,
        ),
        Program("infinity", "infinity_server.py", "infinity", _INFINITY, batches(4, 8, 32), "infinity-emb"),
        Program(
            "onnxruntime",
            "onnxruntime_server.py",
            "onnxruntime",
            everywhere(Route()),
            _QUEUED,
            "onnxruntime",
        ),
        Program("openvino", "openvino_server.py", "openvino", everywhere(Route()), _QUEUED, "openvino"),
        # With its defaults: nothing is tuned.
        Program("ours", "ours.py", routes={**everywhere(Route()), "embeddings": OURS_EMBEDDINGS}),
    )
}
ECHO = Program("starlette-echo", "echo.py")
NOOP = Program("ours-noop", "ours_noop.py")
