"""A text is cut before the first stop string, however its pieces are cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving_kit.http.dialects.stop_strings import StopStrings

pytestmark = pytest.mark.light
PIECES = st.lists(st.text(alphabet="ab.", max_size=4), max_size=8)
STOPS = st.lists(st.text(alphabet="ab.", min_size=1, max_size=4), max_size=3)


@given(PIECES, STOPS)
def test_pieces_are_the_text_before_the_first_stop(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    whole = text[: min(ends)] if ends else text  # a model ends with the first stop string that is complete
    wanted = min((whole.index(stop) for stop in stops if stop in whole), default=len(whole))
    cut, given_out = StopStrings(stops), ""
    left = len(whole)
    for piece in pieces:
        given_out += cut.push(piece[:left])
        left -= len(piece[:left])
    assert given_out + cut.rest() == whole[:wanted]


def test_only_what_may_begin_a_stop_is_kept_back() -> None:
    cut = StopStrings(["END"])
    assert [cut.push(piece) for piece in ("one E", "N", "t", "E", "ND two", "three")] == [
        "one ",
        "",
        "ENt",
        "",
        "",
        "",
    ]
    assert (cut.stopped, cut.rest()) == (True, "")


def test_no_stops() -> None:
    cut = StopStrings([])
    assert cut.push("a") + cut.rest() == "a"
