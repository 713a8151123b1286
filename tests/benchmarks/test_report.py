"""The tables that `make bench` writes."""

from __future__ import annotations

import pytest

from tests.programs import load_program

pytestmark = pytest.mark.light
report = load_program("benchmarks/report.py")
targets = load_program("benchmarks/targets.py")


def run(answers: float, p99: float | None = 10.0, *, void: bool = False) -> dict[str, object]:
    return {
        "answers_per_s": answers,
        "goodput_per_s": answers,
        "p50_ms": 5.0,
        "p99_ms": p99,
        "void": void,
    }


def results(**kinds: object) -> dict[str, object]:
    return {
        "command": "make bench",
        "date": "2026-11-28",
        "rounds": 2,
        "slo_ms": 500.0,
        "machine": {"cpu": "C", "cores": 2, "python": "3.11", "system": "S", "versions": {"torch": "2"}},
        "noop": {},
        "kinds": kinds,
    }


def test_cell_shows_p99_beside_throughput() -> None:
    assert report.closed_cell([run(120.4, 31.0)]) == "120 (5.0 / 31)"
    assert report.goodput_cell([run(80.0, 450.0)]) == "80 (450)"


def test_cell_is_the_median_of_the_rounds() -> None:
    assert report.closed_cell([run(1, 10), run(30, 90), run(20, 20)]) == "20 (5.0 / 20)"


def test_cell_without_answers_has_no_p99() -> None:
    assert report.goodput_cell([run(0.0, None)]) == "0 (-)"


def test_cell_without_runs_is_empty() -> None:
    assert report.closed_cell([]) == "-"


def test_cell_with_one_void_run_is_marked() -> None:
    assert report.closed_cell([run(10), run(10, void=True)]).endswith(" void")


def test_table_has_every_load_of_any_server() -> None:
    lines = report.closed_table({"mosec": {"16": [run(9)]}, "ours": {"1": [run(8)], "16": [run(7)]}})
    assert lines.splitlines()[0] == "| server | 16 clients | 1 client |"
    assert "| mosec | 9 (5.0 / 10) | - |" in lines


def test_targets_say_whether_they_are_met() -> None:
    bar = targets.Bar("what", 0.9, lambda results: None)
    rows = report.targets_table([report.Reading(bar, 0.95), report.Reading(bar, 0.8)]).splitlines()
    assert rows[2] == "| what | >= 0.9 | 0.95 | met |"
    assert rows[3] == "| what | >= 0.9 | 0.8 | **missed** |"


def test_times_have_an_upper_bound() -> None:
    bar = targets.Bar("p99", 20, lambda results: None, at_most=True)
    assert "| p99 | <= 20 | 12 | met |" in report.targets_table([report.Reading(bar, 12.0)])


def test_report_says_how_peers_were_tuned() -> None:
    kind = {"tuned": {"vllm": {"best": ["--step-tokens", "1024"]}}, "closed": {"vllm": {"4": [run(5)]}}}
    text = report.text(results(embeddings=kind))
    assert "Tuned: vllm --step-tokens 1024." in text
    assert "| vllm | 5 (5.0 / 10) |" in text


def test_report_says_which_peers_are_missing() -> None:
    text = report.text(results(embeddings={"not_measured": {"vllm": "vllm does not start"}}))
    assert "Not measured: vllm does not start." in text


def test_report_replaces_only_what_is_marked() -> None:
    template = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    assert report.between_markers(template, "new") == f"before\n{report.BEGIN}\n\nnew\n{report.END}\nafter\n"
