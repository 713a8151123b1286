"""Which shortcuts a pipeline takes: tried on modules of our own around the weights that were given.

    given model ── own modules, the same weights ──▶ linear layers, head at the masks, packed steps or
                                                     continuous batching: what is right and faster

Where none applies, the given model itself runs, so that later changes to it count.

Not here: the shortcuts (`fast_linear.py`, `mask_head.py`, `packed.py`, `decoding.py`), the modules
(`shared_weights.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from serving_kit.errors import StartError
from serving_kit.model import PADDED, Layout
from serving_kit.models.decoding import Decoder
from serving_kit.models.decoding_trial import make_decoder
from serving_kit.models.fast_linear import use_fast_linear
from serving_kit.models.packing_trial import Trial, choose_layout
from serving_kit.models.padding_trial import padded_stepper
from serving_kit.models.pipes import Pipe
from serving_kit.models.preparing import Preparer
from serving_kit.models.shared_weights import structure, with_shared_weights
from serving_kit.models.stepping import Stepper

_OFF = "shortcuts=False"
_NO_MODULES = "its modules cannot be copied, and those of the given pipeline are not changed"
_NOT_PACKED = "inputs of this task are not packed"


@dataclass(frozen=True, eq=False)
class Chosen:
    """What runs.

    Attributes:
        stepper: Calls the model.
        layout: How a step is laid out, and why so.
        decoder: Calls the model for texts that are generated token by token; None: it does not work so.
        obstacle: Why several inputs cannot share a padded step; empty: they can.
        structure: Of the given model; None: the model that runs is that one.
        notes: What the owner should know.
    """

    stepper: Stepper
    layout: Layout
    decoder: Decoder | None = None
    obstacle: str = ""
    structure: int | None = None
    notes: Sequence[str] = ()


def choose_shortcuts(
    pipe: Pipe, preparer: Preparer, stepper: Stepper, obstacle: str, *, shortcuts: bool
) -> Chosen:
    """Try what applies to a pipeline. Sets `pipe.model` to what is to run.

    Args:
        pipe: Of our own, around the given model.
        preparer: Of its inputs.
        stepper: A padded step without shortcuts.
        obstacle: Why several inputs cannot share a padded step; empty: they can.
        shortcuts: Whether any may be taken.

    Raises:
        StartError: the given model is in training mode and cannot be copied.
    """
    given = pipe.model
    trains = bool(getattr(given, "training", False))
    own = with_shared_weights(given) if trains or shortcuts else None
    if own is None:
        if trains:
            raise StartError(
                "the model is in training mode, so dropout would make its answers vary: call "
                "pipe.model.eval() first"
            )
        stepper, problem = padded_stepper(pipe, preparer, stepper)
        return _padded(stepper, obstacle or problem, _NO_MODULES if shortcuts else _OFF)
    if trains:
        own.eval()
    pipe.model = own  # for the trials
    fast = use_fast_linear(own) if shortcuts else 0
    stepper, problem = padded_stepper(pipe, preparer, stepper)
    obstacle = obstacle or problem
    chosen = _tried(pipe, preparer, stepper, obstacle) if shortcuts else _padded(stepper, obstacle, _OFF)
    if not (trains or fast or chosen.stepper.takes_shortcuts or chosen.decoder):
        pipe.model = given
        return chosen
    notes = ("the model is in training mode; its copy is served in evaluation mode",) if trains else ()
    return replace(chosen, structure=structure(given), notes=notes)


def _tried(pipe: Pipe, preparer: Preparer, stepper: Stepper, obstacle: str) -> Chosen:
    """A packed step or continuous batching where a trial shows that they are right, else a padded step."""
    steps = preparer.steps
    if steps.generates:
        decoder, reason = make_decoder(pipe)
        return Chosen(stepper, Layout(decoder is not None, reason), decoder, obstacle)
    if stepper.collate is not None:
        stepper = replace(stepper, shortcut=steps.shortcut(pipe, stepper.collate))
    if obstacle or steps.reads is None:
        return _padded(stepper, obstacle, _NOT_PACKED)
    packed, layout = choose_layout(Trial(pipe, steps.reads, preparer, stepper))
    return Chosen(replace(stepper, packed=packed), layout)


def _padded(stepper: Stepper, obstacle: str, reason: str) -> Chosen:
    return Chosen(stepper, PADDED._replace(reason=obstacle or reason), obstacle=obstacle)
