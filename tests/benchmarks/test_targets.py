"""The bars of `make bench`: how each is read from the results of a run."""

from __future__ import annotations

import pytest

from tests.programs import load_program

pytestmark = pytest.mark.light
targets = load_program("benchmarks/targets.py")
CLASSIFICATION, FILL_MASK = "text-classification", "fill-mask"


def run(answers: float = 100.0, p99: float | None = 10.0, **more: object) -> dict[str, object]:
    return {"answers_per_s": answers, "goodput_per_s": answers, "p50_ms": 5.0, "p99_ms": p99, **more}


def results(kind: str, **parts: object) -> dict[str, object]:
    return {"kinds": {kind: parts}}


def measured(of: dict[str, object], what: str) -> float | None:
    (bar,) = [bar for bar in targets.BARS if bar.what == what]
    value: float | None = bar.measure(of)
    return value


def test_ratio_is_the_median_of_the_rounds() -> None:
    closed = {"ours": {"16": [run(200), run(150), run(400)]}, "vllm": {"16": [run(100), run(100), run(100)]}}
    of = results(CLASSIFICATION, closed=closed)
    assert measured(of, "text-classification, 16 clients: answers/s / vLLM's") == 2.0


def test_ratio_is_taken_within_a_round() -> None:
    """Both sides were slower in the second round: the ratio is not."""
    closed = {"ours": {"4": [run(200), run(20)]}, "vllm": {"4": [run(100), run(10)]}}
    of = results(CLASSIFICATION, closed=closed)
    assert measured(of, "text-classification, 4 clients: answers/s / vLLM's") == 2.0


def test_tail_is_compared_as_a_time() -> None:
    closed = {"ours": {"64": [run(p99=45.0)]}, "vllm": {"64": [run(p99=50.0)]}}
    of = results(CLASSIFICATION, closed=closed)
    assert measured(of, "text-classification, 64 clients: p99 / vLLM's") == pytest.approx(0.9)


def test_best_peer_is_the_best_of_each_round() -> None:
    closed = {"ours": {"16": [run(100), run(100)]}, "mosec": {"16": [run(50), run(20)]}}
    closed["litserve"] = {"16": [run(20), run(50)]}
    assert measured(results(FILL_MASK, closed=closed), "fill-mask, 16 clients: answers/s / best peer") == 2.0


def test_other_engines_are_no_pipeline_peers() -> None:
    closed = {"ours": {"16": [run(100)]}, "mosec": {"16": [run(20)]}, "openvino": {"16": [run(90)]}}
    assert measured(results(FILL_MASK, closed=closed), "fill-mask, 16 clients: answers/s / best peer") == 5.0


def test_best_goodput_is_at_any_load() -> None:
    loads = {"ours": {"1": [run(20)], "4": [run(90)]}, "mosec": {"1": [run(20)], "4": [run(1)]}}
    assert measured(results(FILL_MASK, open=loads), "fill-mask: best goodput / best peer's") == 4.5


def test_overload_is_compared_with_the_peak() -> None:
    overload = {"1": [run(90)], "2": [run(100)], "5": [run(95)], "10": [run(80)]}
    of = results(FILL_MASK, overload=overload)
    assert measured(of, "fill-mask: goodput at 2x the knee / peak") == 1.0
    assert measured(of, "fill-mask: goodput at 10x the knee / peak") == 0.8


def test_worst_run_decides_about_late_answers() -> None:
    late = {"1": [run(admitted_late_share=0.0)], "10": [run(admitted_late_share=0.002)]}
    of = results(FILL_MASK, overload=late)
    assert measured(of, "fill-mask: admitted and late, %") == pytest.approx(0.2)


def test_refusals_without_any_are_not_measured() -> None:
    of = results(FILL_MASK, overload={"1": [run(reject_p99_ms=None)]})
    assert measured(of, "fill-mask: p99 of refusals on admission, ms") is None


def test_memory_is_beyond_the_pipeline() -> None:
    of = results(FILL_MASK, memory_mb={"ours": [530.0, 540.0], "pipe": [500.0, 500.0]})
    assert measured(of, "fill-mask: memory beyond the pipeline, MB") == 35.0


def test_one_client_is_compared_with_the_pipeline() -> None:
    of = results(FILL_MASK, closed={"ours": {"1": [run()]}}, pipe={"p50_ms": [10.0]})
    assert measured(of, "fill-mask: p50 with one client / pipe(text)") == 0.5


def test_raw_limit_is_compared_with_64_clients() -> None:
    of = results(FILL_MASK, closed={"ours": {"16": [run(10)], "64": [run(90)]}}, raw_per_s=[100.0])
    assert measured(of, "fill-mask: served with 64 clients / raw limit") == 0.9


def test_no_op_is_compared_with_an_echo() -> None:
    of = {"noop": {"ours-noop": [run(70)], "starlette-echo": [run(100)]}}
    assert measured(of, "no-op model, 32 clients / bare Starlette echo") == 0.7


def test_only_what_was_measured_is_read() -> None:
    assert targets.readings({"kinds": {}}) == []
    assert len(targets.readings({"noop": {"ours-noop": [run()], "starlette-echo": [run()]}})) == 1


@pytest.mark.parametrize(
    ("bound", "at_most", "value", "met"),
    [(0.9, False, 0.9, True), (0.9, False, 0.89, False), (20, True, 20, True), (20, True, 21, False)],
)
def test_bar_is_met_at_its_bound(bound: float, at_most: bool, value: float, met: bool) -> None:
    bar = targets.Bar("what", bound, lambda results: value, at_most)
    assert targets.Reading(bar, value).met is met


def test_names_of_bars_are_distinct() -> None:
    names = [bar.what for bar in targets.BARS]
    assert len(names) == len(set(names))
