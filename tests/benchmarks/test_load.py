"""What the load generator of `make bench` makes of its samples."""

from __future__ import annotations

import pytest

from tests.programs import load_program

pytestmark = pytest.mark.light
load = load_program("benchmarks/load.py")
JOB = load.Job(
    port=0, path="/", content_type="text/plain", texts="", seconds=10, warmup=0, slo_ms=500, rate=1
)


def sample(status: str, took_s: float) -> object:
    return load.Sample(planned=1.0, tokens=10, sent=1.0, done=1.0 + took_s, status=status)


def summary(*samples: object) -> dict[str, object]:
    result: dict[str, object] = load.summarise(samples, JOB, 0.0)
    return result


def test_refusal_on_admission_is_not_late() -> None:
    assert summary(sample("200", 0.1), sample("503", 0.01))["admitted_late_share"] == 0.0


@pytest.mark.parametrize("status", [load.DROPPED, "504", load.UNANSWERED])
def test_admitted_without_answer_is_late(status: str) -> None:
    assert summary(sample("200", 0.1), sample(status, 0.4))["admitted_late_share"] == 0.5


def test_late_answer_counts_as_late() -> None:
    assert summary(sample("200", 0.1), sample("200", 0.6))["admitted_late_share"] == 0.5


def test_dropped_later_is_no_refusal_on_admission() -> None:
    assert summary(sample("503", 0.01), sample(load.DROPPED, 0.4))["reject_p99_ms"] == 10.0


class Transport:
    """Takes what is written; nothing is sent."""

    def write(self, data: bytes) -> None:
        pass


@pytest.mark.parametrize(
    ("head", "body", "status"),
    [
        (b"503 Service Unavailable", b'{"error": "late", "dropped": true}', load.DROPPED),
        (b"503 Service Unavailable", b'{"error": "full"}', "503"),
        (b"200 OK", b'"dropped": true is what the text says', "200"),
    ],
)
@pytest.mark.parametrize("cut", [5, 40, 1_000])
def test_body_says_whether_it_was_dropped(head: bytes, body: bytes, status: str, cut: int) -> None:
    connection = load.Connection(lambda connection: None)
    connection.connection_made(Transport())
    asked = load.Sample(planned=0.0, tokens=1)
    connection.ask(b"", asked)
    answer = b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (head, len(body), body)
    for piece in (answer[:cut], answer[cut:]):
        connection.data_received(piece)
    assert asked.status == status


def test_template_holds_the_text_as_json() -> None:
    assert load.body('{"input": [$text]}', 'a "b"') == '{"input": ["a \\"b\\""]}'
    assert load.body("", "plain") == "plain"
