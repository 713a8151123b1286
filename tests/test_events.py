"""What the client of one item gets: chunks in order, then one end, with the times of the item."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving_kit.errors import DeadlineExceeded, InputRejected, ModelFailed
from serving_kit.events import Chunk, Done, End, Failed
from tests.support_core import Bed, Echo, raise_for

pytestmark = pytest.mark.light


@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=6), fails=st.booleans())
def test_chunks_then_one_end(lengths: list[int], fails: bool) -> None:
    """Whatever shares the steps with it, and also where the model fails for another item."""
    names = [f"item {number}" for number in range(len(lengths))]
    model = Echo()
    model.lengths = dict(zip(names, lengths, strict=True))
    bad = ["failing"] if fails else []
    model.bad = raise_for(*bad)
    bed = Bed(model)
    bed.offer(*names, *bad, stream_timeout_s=1000.0)
    bed.settle()
    for name, steps in model.lengths.items():
        *chunks, end = bed.events[name]
        assert chunks == [Chunk(number) for number in range(1, steps)]
        assert isinstance(end, Done)
    for name in bad:
        assert [type(event) for event in bed.events[name]] == [Failed]


def test_ends_are_done_or_failed() -> None:
    assert set(get_args(End)) == {Done, Failed}


def test_times_of_an_answer() -> None:
    """Seconds from arrival to the first step, and from there to the end of the last one."""
    model = Echo()
    model.lengths = {"long": 3}
    bed = Bed(model)
    bed.offer("first")
    bed.turn()  # prepares it
    bed.offer("long", k=1)  # of another key, so it waits for one step
    bed.settle()
    assert bed.end("first") == Done("FIRST", queue_wait_s=0.0, model_time_s=1.0)
    assert bed.end("long") == Done("LONG", queue_wait_s=1.0, model_time_s=3.0)


def test_times_of_a_failure() -> None:
    """From the first step to the end of the retry that isolated the item."""
    model = Echo()
    model.bad = raise_for("failing")
    bed = Bed(model)
    bed.offer("failing", "good")
    bed.settle()
    end = bed.end("failing")
    assert isinstance(end, Failed)
    assert isinstance(end.error, ModelFailed)
    assert end.queue_wait_s == 0.0
    assert end.model_time_s == 2.0


def test_no_times_without_a_step() -> None:
    bed = Bed()
    bed.offer("late", timeout_s=1.0)
    bed.now = 2.0
    bed.settle()
    end = bed.end("late")
    assert isinstance(end, Failed)
    assert isinstance(end.error, DeadlineExceeded)
    assert (end.queue_wait_s, end.model_time_s) == (None, None)


def test_rejected_input() -> None:
    bed = Bed()
    bed.offer("bad")
    bed.settle()
    assert isinstance(bed.error("bad"), InputRejected)
    assert bed.chunks("bad") == []
