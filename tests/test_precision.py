"""`precision=` from the argument to the printed line, /info and the panel. Only the time is made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("torch")

from starlette.testclient import TestClient

import serving_kit
from serving_kit import SettingError, StartError
from serving_kit.models import precision
from tests.support_models import fresh

FIELDS = {
    *("asked", "used", "reason", "speedup", "top1_agreement", "cosine_similarity"),
    *("largest_score_difference", "extra_bytes"),
}


@pytest.fixture
def fast_is_twice_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    def speedup(exact: Any, fast: Any, timer: Any) -> float:
        return 2.0

    monkeypatch.setattr(precision, "layer_speedup", lambda layer, timer: 2.0)
    monkeypatch.setattr(precision, "speedup", speedup)


@pytest.fixture
def fast_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "layer_speedup", lambda layer, timer: 0.125)


def info(server: Any) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.get(f"{server.url}/info").json()
    return answer


@pytest.mark.usefixtures("fast_is_twice_as_fast")
def test_gain_is_printed_and_on_info(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = fresh("text-classification")
    server = serve(pipe, precision="fast")
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 1
    assert "precision is fast: bfloat16, 2 times as fast as exact, 100.0 % of the first" in printed
    told = info(server)["precision"]
    assert told.keys() == FIELDS
    assert (told["asked"], told["used"], told["reason"], told["speedup"]) == ("fast", "fast", "", 2.0)
    assert told["top1_agreement"] == 1.0
    assert 0 < told["largest_score_difference"] < 0.1
    assert told["extra_bytes"] == sum(2 * each.numel() for each in pipe.model.parameters())
    assert server.stats()["precision"] == "fast"
    assert server.as_code() == "serving_kit.serve(pipe, port=0, precision='fast')"


@pytest.mark.usefixtures("fast_is_twice_as_fast")
def test_answers_of_a_fast_server(serve: Any) -> None:
    pipe = fresh("text-classification")
    server = serve(pipe, precision="fast")
    (got,), (want,) = server("a text"), pipe("a text")
    assert got["label"] == want["label"]
    assert type(got["score"]) is float
    assert got["score"] == pytest.approx(want["score"], abs=0.01)
    assert got["score"] != want["score"]


@pytest.mark.usefixtures("fast_is_slow")
def test_refusal_is_printed_and_on_info(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    server = serve(fresh("text-classification"), precision="fast")
    line = "precision is exact, not fast: bfloat16 is slower here, in a layer of 32 × 32 (0.125 times as fast"
    assert line in capsys.readouterr().out
    told = info(server)["precision"]
    assert (told["asked"], told["used"], told["speedup"], told["extra_bytes"]) == ("fast", "exact", 0.125, 0)
    assert told["reason"] in line
    assert server.stats()["precision"] == "exact"


def test_exact_is_the_default(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    server = serve(fresh("text-classification"))
    assert "precision" not in capsys.readouterr().out
    assert info(server)["precision"]["asked"] == "exact"


def test_function_is_refused() -> None:
    with pytest.raises(StartError, match="is for pipelines"):
        serving_kit.serve(sorted, port=0, precision="fast")


def test_live_change_is_refused(serve: Any) -> None:
    with pytest.raises(SettingError, match="precision"):
        serve(sorted).tune(precision="fast")


@pytest.mark.usefixtures("fast_is_slow")
@pytest.mark.parametrize("source", ["argument", "environment", "file"])
def test_app_reads_it(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"precision": "fast"} if source == "argument" else {}
    if source == "environment":
        monkeypatch.setenv("SERVING_KIT_PRECISION", "fast")
    if source == "file":
        (tmp_path / "kit.toml").write_text('precision = "fast"\n')
        monkeypatch.setenv("SERVING_KIT_SETTINGS", str(tmp_path / "kit.toml"))
    app = serving_kit.create_app(fresh("text-classification"), **arguments)
    with TestClient(app, base_url="http://localhost") as client:
        assert client.get("/info").json()["precision"]["asked"] == "fast"
