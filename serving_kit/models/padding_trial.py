"""On which side inputs are padded: tried when a model is loaded.

A tokenizer says a side, and anything in the notebook may have changed it: `pipeline("text-generation")` sets
left on the tokenizer that it is given. Most encoders count positions from the first token of a row and read
that one, so that padding on the left gives other answers, without an error. Others read the last token.

Not here: padding (`stepping.py`), steps without padding (`packing_trial.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from serving_kit.errors import error_text
from serving_kit.models.pipes import Output, Pipe, tokenizer_of
from serving_kit.models.preparing import Preparer, Tokenised
from serving_kit.models.stepping import Stepper, make_stepper

if TYPE_CHECKING:
    import torch

_REPEATS = (1, 7)  # of the example, for two texts of different lengths
# Of the largest number, by what PyTorch may round to in a product of single precision. Measured: 1e-6 in the
# first case; 3e-4 with TF32, where a wrong side differs by 0.2.
_ROUNDING = {"highest": 1e-4, "high": 5e-3, "medium": 3e-2}
_HALF_ROUNDING = 3e-2


def padded_stepper(pipe: Pipe, preparer: Preparer, stepper: Stepper) -> tuple[Stepper, str]:
    """A stepper that pads on a side where the numbers are those of each text alone, and what is wrong.

    Sets the side of the pipeline's tokenizer, which is the server's own.

    Args:
        pipe: Of our own, with the model that is to run.
        preparer: Of its inputs.
        stepper: A padded step, without shortcuts.

    Returns:
        The stepper, and why inputs of different lengths cannot share its steps; empty: they can.
    """
    inputs = [each for times in _REPEATS if (each := preparer.example(times)) is not None]
    if stepper.collate is None or preparer.steps.reads is None or len(inputs) < len(_REPEATS):
        return stepper, ""
    try:
        alone = [stepper.outputs([each]) for each in inputs]
    except Exception:  # what is wrong with this model, its warm-up will say
        return stepper, ""
    tokenizer, why = tokenizer_of(pipe), ""
    for side in preparer.steps.padding_sides:
        tokenizer.padding_side = side
        tried = make_stepper(pipe, chunked=stepper.chunked, batches=True)
        try:
            if _difference(tried, inputs, [each for (each,) in alone]) <= rounding(pipe):
                return tried, ""
            why = why or "the model's numbers for a text change where the text is padded"
        except Exception as error:  # the library cannot cut every output up
            why = why or f"several texts in a padded step raise {error_text(error)}"
    return make_stepper(pipe, chunked=stepper.chunked, batches=False), why


def _difference(stepper: Stepper, inputs: Sequence[Tokenised], alone: Sequence[Output]) -> float:
    """The largest difference of texts that share a padded step."""
    left = tokenizer_of(stepper.pipe).padding_side == "left"
    worst = 0.0
    for each, output, right in zip(inputs, stepper.outputs(inputs), alone, strict=True):
        given, wanted = (numbers(one[0] if stepper.chunked else one) for one in (output, right))
        if given.ndim == 3 and given.shape[1] > each.tokens:
            given = given[:, -each.tokens :] if left else given[:, : each.tokens]
        worst = max(worst, difference(given, wanted))
    return worst


def numbers(output: Output) -> torch.Tensor:
    """What a pipeline reads of an output: logits, else its first tensor."""
    read: torch.Tensor = output["logits"] if "logits" in output else output[0]
    return read


def difference(given: torch.Tensor, right: torch.Tensor) -> float:
    """The largest difference, as a share of the largest number; infinite for other shapes and for NaN."""
    if given.shape != right.shape:
        return float("inf")
    given, right = given.float(), right.float()
    share = float((given - right).abs().max() / right.abs().max().clamp_min(1e-30))
    return share if share == share else float("inf")


def rounding(pipe: Pipe) -> float:
    """The largest difference that is rounding, for a model's parameters and the settings of PyTorch."""
    import torch

    if any(each.element_size() < 4 for each in pipe.model.parameters() if each.is_floating_point()):
        return _HALF_ROUNDING
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where the newer settings are in use as well
        try:
            return _ROUNDING[torch.get_float32_matmul_precision()]
        except RuntimeError:  # only the newer ones are, and differ from operator to operator
            return _ROUNDING["high"]
