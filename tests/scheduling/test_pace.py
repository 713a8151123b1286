"""How long prompts may be in a step, learned from the steps."""

import pytest

from serving_kit.scheduling.pace import Pace

pytestmark = pytest.mark.light


def learned(*, decode_s: float, prompt_token_s: float) -> Pace:
    """After steps of a model that costs so much."""
    pace = Pace()
    for _ in range(20):
        pace.observe(8, 0, decode_s)
        pace.observe(8, 100, decode_s + 100 * prompt_token_s)
    return pace


def test_chunk_fills_the_time_between_two_tokens() -> None:
    pace = learned(decode_s=0.030, prompt_token_s=0.001)
    assert pace.chunk(0.100, decoding=True) == pytest.approx(70, abs=1)
    assert pace.chunk(0.100, decoding=False) == pytest.approx(100, abs=1)


def test_slow_model_still_computes_prompts() -> None:
    """Where the next tokens alone take longer than the target, prompts make a step half as long again."""
    pace = learned(decode_s=0.4, prompt_token_s=0.002)
    assert pace.chunk(0.100, decoding=True) == pytest.approx(100, abs=1)


def test_chunk_is_never_tiny() -> None:
    assert learned(decode_s=0.001, prompt_token_s=1.0).chunk(0.1, decoding=True) == 16


def test_first_chunk_is_moderate() -> None:
    assert Pace().chunk(0.1, decoding=True) == 256


def test_wrong_estimate_is_corrected() -> None:
    """A pause of the machine in the first steps does not keep prompts in tiny chunks."""
    pace = Pace()
    pace.observe(0, 20, 5.0)
    pace.observe(4, 0, 3.0)
    for _ in range(40):
        pace.observe(4, 0, 0.02)
        chunk = pace.chunk(0.1, decoding=True)
        pace.observe(4, chunk, 0.02 + chunk * 0.001)
    assert pace.chunk(0.1, decoding=True) > 60
