"""Whether a model's inputs are packed: tried when it is loaded, with no list of architectures.

A step is packed if our attention runs, the numbers are those of each text alone, also in a row that is longer
than any text may be, and it is not slower than a padded step. Otherwise steps are padded as the library does
it, and the reason is kept.

Not here: the packed step (`packed.py`).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from serving_kit.errors import error_text
from serving_kit.model import PADDED, Layout
from serving_kit.models.last_layer import find_last_layer
from serving_kit.models.packed import PackedForward, Reads, Texts
from serving_kit.models.packed_attention import Row
from serving_kit.models.padding_trial import difference, numbers, rounding
from serving_kit.models.pipes import Chunk, Output, Pipe, tokenizer_of, width
from serving_kit.models.preparing import Preparer, Tokenised
from serving_kit.models.stepping import Stepper

if TYPE_CHECKING:
    import torch

_REPEATS = (1, 7, 2, 2, 4)  # of the example, for texts of several lengths, two of them equal
_LONGEST_WINDOW, _MORE_THAN_A_TABLE = 1_000, 514  # tokens
_NOISE = 1.03  # times as long as padded: not slower
_TRIES, _TRIAL_S = 3, 0.3


@dataclass(frozen=True, eq=False)
class Trial:
    """One pipeline, and its padded step."""

    pipe: Pipe
    reads: Reads
    preparer: Preparer
    stepper: Stepper  # padded


class _Refused(Exception):
    """Why a model is not packed."""


def choose_layout(trial: Trial) -> tuple[PackedForward | None, Layout]:
    """A packed step, or None, and why. Runs some small steps; hooks the pipeline's modules if it packs.

    Args:
        trial: The pipeline, with modules of its own.
    """
    packed: PackedForward | None = None
    try:
        if _asks_for_more(trial.pipe):
            raise _Refused("its config asks for hidden states or attentions of every text")
        texts = _texts(trial)
        alone = [_numbers(trial, trial.pipe.forward(dict(chunk)), chunk) for chunk in texts]
        packed = _exact(trial, texts, alone)
        _check_long_row(trial, packed, texts, alone)
        gain = _gain(trial, packed)
        if gain * _NOISE < 1:
            raise _Refused(f"a packed step took {1 / gain:.1f} times as long as a padded one when tried")
    except _Refused as refused:
        reason = str(refused)
    except Exception as error:  # any model may be loaded, and a padded step is always right
        reason = f"several texts in one row raise {error_text(error)}"
    else:
        return packed, Layout(True, f"packed steps were {gain:.1f} times as fast as padded ones when tried")
    if packed is not None:
        packed.remove()
    return None, PADDED._replace(reason=reason)


def _asks_for_more(pipe: Pipe) -> bool:
    config = pipe.model.config
    return bool(getattr(config, "output_hidden_states", False) or getattr(config, "output_attentions", False))


def _texts(trial: Trial) -> list[Chunk]:
    """Chunks of several lengths, within what the model takes."""
    return [chunk for each in _inputs(trial) for chunk in each.chunks]


def _inputs(trial: Trial) -> list[Tokenised]:
    """Inputs of several lengths, without those that are too long for the model."""
    return [each for times in _REPEATS if (each := trial.preparer.example(times)) is not None]


def _exact(trial: Trial, texts: Sequence[Chunk], alone: Sequence[torch.Tensor]) -> PackedForward:
    """A packed forward with the numbers of each text alone, and as little as possible in the last layer.

    Raises:
        _Refused: there is none.
    """
    why = ""
    for packed in _candidates(trial, texts):
        problem = _problem(trial, packed, texts, alone)
        if not problem:
            return packed
        why = why or problem
        packed.remove()
    raise _Refused(why)


def _problem(
    trial: Trial, packed: PackedForward, texts: Sequence[Chunk], alone: Sequence[torch.Tensor]
) -> str:
    """Why this way of packing is not right; empty: it is."""
    try:
        worst = _difference(trial, packed, texts, alone)
        if worst > rounding(trial.pipe):
            return f"texts in one row have other numbers ({worst:.0e} of the largest)"
        windows = _probe(packed, texts).windows
        return _window_problem(trial, packed, max((each for each in windows if each), default=0))
    except Exception as error:  # another way may do: its last layer may not take a part of the tokens
        return f"several texts in one row raise {error_text(error)}"


def _candidates(trial: Trial, texts: Sequence[Chunk]) -> Iterator[PackedForward]:
    """What to try, best first. Positions count from 0, or behind that of the padding token."""
    padding = tokenizer_of(trial.pipe).pad_token_id or 0
    for first in (0, padding + 1, None):
        packed = PackedForward(trial.pipe, trial.reads, first)
        try:
            attends = _probe(packed, texts[:1]).calls
        except Exception:  # it takes no positions, or not so many
            if first is None:
                raise
            continue
        if not attends:
            raise _Refused("its attention is its own, so that texts in one row would see each other")
        if trial.reads is Reads.ALL:
            yield packed
            continue
        packed.last_layer = find_last_layer(trial.pipe.model, functools.partial(_probe, packed, texts[:1]))
        if packed.last_layer is None:
            raise _Refused("its layers are not in a list, so the last one is not known")
        yield packed
        if packed.last_layer.cuts:
            packed.last_layer = packed.last_layer.whole()
            yield packed


def _probe(packed: PackedForward, texts: Sequence[Chunk]) -> Row:
    """Run one row of which everything is read."""
    given = Texts(texts, range(len(texts)))
    row = Row(given.lengths)
    packed.run(given, row)
    return row


def _difference(
    trial: Trial, packed: PackedForward, texts: Sequence[Chunk], wanted: Sequence[torch.Tensor]
) -> float:
    """The largest difference of a text in the row, as a share of its largest number."""
    worst = 0.0
    for chunk, output, right in zip(texts, packed.outputs(texts, {}), wanted, strict=True):
        worst = max(worst, difference(_numbers(trial, output, chunk), right))
    return worst


def _numbers(trial: Trial, output: Output, chunk: Chunk) -> torch.Tensor:
    """What the pipeline reads of an output."""
    given = numbers(output)
    if trial.reads is Reads.MASKS:
        masks = chunk["input_ids"][0] == tokenizer_of(trial.pipe).mask_token_id
        rows = given[0]
        return rows if rows.shape[0] == int(masks.sum()) else rows[masks]
    return given


def _window_problem(trial: Trial, packed: PackedForward, window: int) -> str:
    """Why a text that is longer than a layer's window is not right; empty: it is, or none may be so long."""
    if not window or window > _LONGEST_WINDOW or (example := trial.preparer.example(window + 1)) is None:
        return ""
    chunk = example.chunks[0]
    wanted = [_numbers(trial, trial.pipe.forward(dict(chunk)), chunk)]
    worst = _difference(trial, packed, [chunk], wanted)
    if worst > rounding(trial.pipe):
        return f"texts longer than its window have other numbers ({worst:.0e} of the largest)"
    return ""


def _check_long_row(
    trial: Trial, packed: PackedForward, texts: Sequence[Chunk], alone: Sequence[torch.Tensor]
) -> None:
    """Raise where a row that is longer than a table of positions has other numbers."""
    times = -(-_MORE_THAN_A_TABLE // sum(width(chunk) for chunk in texts))
    worst = _difference(trial, packed, list(texts) * times, list(alone) * times)
    if worst > rounding(trial.pipe):
        raise _Refused(f"texts in a long row have other numbers ({worst:.0e} of the largest)")


def _gain(trial: Trial, packed: PackedForward) -> float:
    """How many times as fast a packed step is as a padded one, for texts of several lengths."""
    inputs = _inputs(trial)
    steps = (trial.stepper, replace(trial.stepper, packed=packed))
    best = [float("inf"), float("inf")]
    started = time.perf_counter()
    for _ in range(_TRIES):
        for index, stepper in enumerate(steps):
            best[index] = min(best[index], _seconds(functools.partial(stepper.outputs, inputs)))
        if time.perf_counter() - started > _TRIAL_S:
            break
    return best[0] / best[1]


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
