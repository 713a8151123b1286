"""A second pipeline around the same weights, so that what a server does to its model stays its own.

    pipe ── model ── modules ──┐
                               ├── the same parameters and buffers, once in memory
    twin ── model ── modules ──┘

The shortcuts (`mask_head.py`, `fast_linear.py`) hook and replace modules. A notebook may hold the very
pipeline that it serves, and call it in a cell while the model thread is in the middle of a forward: it
must never see a hook of ours.

Not here: the shortcuts.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any


def twin(pipe: Any) -> Any:
    """A pipeline with modules of its own, sharing weights, tokeniser and parameters with `pipe`.

    Returns `pipe` itself where its model cannot be taken apart so: no torch module, or one whose
    forward was replaced by something that remembers the modules (quantised, split over devices).
    """
    import torch

    model = pipe.model
    if not isinstance(model, torch.nn.Module) or getattr(model, "hf_quantizer", None) is not None:
        return pipe
    if any("forward" in vars(module) or hasattr(module, "_hf_hook") for module in model.modules()):
        return pipe
    shared = {id(each): each for each in itertools.chain(model.parameters(), model.buffers())}
    try:
        own = copy.deepcopy(model, shared)
    except Exception:  # something that cannot be copied: then there are no shortcuts, which is always right
        return pipe
    other = copy.copy(pipe)
    other.model = own
    return other
