"""The number of torch's threads: as given, and by default no more than CPU affinity and quota allow."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from tests.support import run_script

pytest.importorskip("torch")

HEAD = """
import os, sys, torch, serving_kit

def count(texts):
    return [torch.get_num_threads() for _ in texts]
"""
APP = (
    HEAD
    + """
from starlette.testclient import TestClient
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
torch.set_num_threads(3)
app = serving_kit.create_app(count)
with TestClient(app, base_url="http://localhost") as client:
    print(client.post("/", content="x").text)
"""
)
NOTEBOOK = (
    HEAD
    + """
torch.set_num_threads(3)
for threads in (None, 2):
    with serving_kit.serve(count, port=0, threads=threads) as server:
        print(server("x"), torch.get_num_threads())
"""
)
only_where_affinity_can_be_set = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="the system has no CPU affinity"
)


def last_line(script: str) -> Any:
    return json.loads(run_script(script, timeout=120, warnings="ignore").stdout.splitlines()[-1])


@only_where_affinity_can_be_set
def test_app_uses_no_more_than_allowed_cpus() -> None:
    assert last_line(APP) == 1


@only_where_affinity_can_be_set
@pytest.mark.parametrize(("variable", "threads"), [("SERVING_KIT_THREADS", "2"), ("OMP_NUM_THREADS", "3")])
def test_app_thread_count_from_environment(
    variable: str, threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, threads)
    assert last_line(APP) == int(threads)


def test_notebook_thread_count() -> None:
    """Unchanged unless `threads` is given."""
    said = run_script(NOTEBOOK, timeout=120).stdout.splitlines()
    assert [line for line in said if not line.startswith("serving")] == ["3 3", "2 2"]
