"""Who runs in the next step of continuous batching, and with how many tokens."""

import math
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving_kit.items import Item
from serving_kit.scheduling.sequences import Advance, advance

pytestmark = pytest.mark.light


def sequence(arrived: float, tokens: int, context: int = 0) -> Item:
    return Item(arrived, math.inf, tokens, divisible=True, context_tokens=context)


def step(
    running: list[Item],
    waiting: list[Item],
    *,
    most: int = 32,
    budget: int = 10_000,
    chunk: int = 100,
    cache: float = math.inf,
) -> Advance:
    return advance(running, waiting, most=most, budget=budget, chunk=chunk, cache=cache)


def shares(plan: Advance) -> list[tuple[float, int]]:
    """The arrival of each item, and its tokens."""
    return [(item.arrived, tokens) for item, tokens in plan.shares]


def test_every_text_gets_its_next_token_beside_a_long_prompt() -> None:
    running = [sequence(0, 1, 50), sequence(1, 900, 100), sequence(2, 1, 7)]
    assert shares(step(running, [])) == [(0, 1), (1, 100), (2, 1)]


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    """The long one still gets half of the tokens at least."""
    plan = step([sequence(0, 5000, 100)], [sequence(1, 30), sequence(2, 2000)])
    assert shares(plan) == [(0, 50), (1, 30), (2, 20)]


def test_what_short_prompts_leave_is_the_oldest_ones() -> None:
    assert shares(step([sequence(0, 5000, 100)], [sequence(1, 30)])) == [(0, 70), (1, 30)]


def test_equal_prompts_in_order_of_arrival() -> None:
    plan = step([], [sequence(n, 60) for n in range(4)])
    assert shares(plan) == [(0, 60), (1, 40)]


def test_no_more_sequences_than_allowed() -> None:
    plan = step([sequence(0, 1, 5)], [sequence(n, 4) for n in (1, 2, 3)], most=3)
    assert shares(plan) == [(0, 1), (1, 4), (2, 4)]


def test_fewer_sequences_than_run() -> None:
    """The limit was lowered: the newest wait for the next step."""
    running = [sequence(n, 1, 5) for n in range(4)]
    assert shares(step(running, [sequence(9, 3)], most=2)) == [(0, 1), (1, 1)]


def test_next_tokens_within_the_budget() -> None:
    running = [sequence(n, 1, 5) for n in range(4)]
    assert shares(step(running, [sequence(9, 3)], budget=3)) == [(0, 1), (1, 1), (2, 1)]


def test_prompt_waits_for_room_in_the_cache() -> None:
    """In order of arrival: the shorter one behind it does not pass."""
    running = [sequence(0, 1, 500)]
    waiting = [sequence(1, 300), sequence(2, 5)]
    assert shares(step(running, waiting, cache=700)) == [(0, 1)]
    assert shares(step(running, waiting, cache=900)) == [(0, 1), (1, 95), (2, 5)]


def test_the_newest_gives_its_cache_back() -> None:
    running = [sequence(0, 1, 500), sequence(1, 1, 300), sequence(2, 1, 200)]
    plan = step(running, [], cache=1000)
    assert [item.arrived for item in plan.evicted] == [2]
    assert not plan.shares


def test_evicted_sequence_resumes_before_what_waits() -> None:
    running = [sequence(0, 1, 500), sequence(2, 201)]
    assert shares(step(running, [sequence(1, 5)], cache=740, chunk=1000)) == [(0, 1), (2, 201)]
    assert shares(step(running, [sequence(1, 5)], cache=720, chunk=1000)) == [(0, 1)]


def test_the_oldest_runs_whatever_the_cache_holds() -> None:
    """The limit was lowered below what it needs."""
    assert shares(step([sequence(0, 1, 500)], [], cache=10)) == [(0, 1)]
    assert shares(step([], [sequence(0, 50)], cache=10)) == [(0, 50)]


@dataclass
class Text:
    item: Item
    new: int  # tokens still to be generated
    most: int  # tokens in its cache at its end


texts = st.tuples(st.integers(0, 30), st.integers(1, 400), st.integers(1, 60))


@given(
    st.lists(texts, min_size=1, max_size=25),
    st.integers(1, 12),
    st.integers(1, 80),
    st.integers(16, 300),
    st.integers(0, 600),
    st.randoms(use_true_random=False),
)
@settings(deadline=None)
def test_every_text_ends(
    arrivals: list[tuple[int, int, int]], most: int, budget: int, chunk: int, spare: int, dice: Random
) -> None:
    """Within all bounds in every step, and with no more steps than their tokens need several times over.

    Now and then a client leaves, and the limits change.
    """
    largest = max(prompt + new for _, prompt, new in arrivals)
    cache = largest + spare
    todo = sorted(arrivals)
    waiting: list[Text] = []
    running: list[Text] = []
    work = sum(prompt + new for _, prompt, new in arrivals)
    for now in range(30 + 20 * work):
        while todo and todo[0][0] <= now:
            arrived, prompt, new = todo.pop(0)
            waiting.append(Text(sequence(arrived + len(todo) / 1e6, prompt), new, prompt + new))
        waiting.sort(key=lambda text: text.item.arrived)
        if dice.random() < 0.05:
            most, cache = dice.randint(1, 12), largest + dice.choice([0, 0, spare])
        if running and dice.random() < 0.02:
            running.remove(dice.choice(running))
        by_item = {id(text.item): text for text in running + waiting}
        if not by_item:
            if not todo:
                return
            continue
        plan = advance(
            [text.item for text in running],
            [text.item for text in waiting],
            most=most,
            budget=budget,
            chunk=chunk,
            cache=cache,
        )
        for item in plan.evicted:
            holding = [text.item for text in running if text.item.context_tokens]
            assert item is not holding[0], "the oldest was evicted"
            item.tokens, item.context_tokens = item.tokens + item.context_tokens, 0
        if plan.evicted:
            continue
        assert plan.shares
        assert len(plan.shares) <= most
        assert sum(tokens for _, tokens in plan.shares) <= budget
        assert all(1 <= tokens <= item.tokens for item, tokens in plan.shares)
        holding = [text.item for text in running if text.item.context_tokens][:most]
        decoding = {id(item) for item in [item for item in holding if item.tokens == 1][:budget]}
        chosen = {id(item) for item, _ in plan.shares}
        assert decoding <= chosen
        prompts = sum(tokens for item, tokens in plan.shares if id(item) not in decoding)
        assert prompts <= chunk
        for item, tokens in plan.shares:
            text = by_item[id(item)]
            if text in waiting:
                waiting.remove(text)
                running.append(text)
            item.context_tokens += tokens
            item.tokens -= tokens
            if not item.tokens:
                text.new -= 1
                item.tokens = 1
                if not text.new:
                    running.remove(text)
        running.sort(key=lambda text: text.item.arrived)
        held = [text.item.context_tokens for text in running if text.item.context_tokens]
        assert len(held) < 2 or sum(held) <= cache
    raise AssertionError(f"{len(running)} texts still run, {len(waiting)} wait")


def test_sequences_with_a_cache_come_before_evicted_ones() -> None:
    """Fewer sequences are allowed than run, and the oldest has no cache: there is a step all the same."""
    running = [sequence(2, 380), sequence(3, 1, 30)]
    assert shares(step(running, [], most=1, cache=382)) == [(3, 1)]
