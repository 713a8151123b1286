"""Noticing what a notebook has changed in a pipeline since it was served.

Weights that change in place reach a server that shares them. Another model or tokenizer in the pipeline, and
other modules in a model of which the server runs modules of its own, do not: the owner is told.

Not here: sharing the weights (`shared_weights.py`).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serving_kit.models.pipes import Pipe, Tokenizer
from serving_kit.models.shared_weights import structure

if TYPE_CHECKING:
    import torch

_AGAIN = "run serve() again"


@dataclass(frozen=True, eq=False)
class GivenPipeline:
    """The pipeline that was handed over, as it was then.

    Attributes:
        pipe: A weak reference to it: the server keeps its model, not the pipeline.
        model: Its model then.
        tokenizer: Its tokenizer then.
        structure: `structure(model)` then; None: the server runs that very model, so changes reach it.
        versions: `versions(model)` then, where the server runs a copy of the weights; None: it shares them.
    """

    pipe: weakref.ref[Pipe]
    model: torch.nn.Module
    tokenizer: Tokenizer | None
    structure: int | None = None
    versions: int | None = None

    def changed(self) -> str:
        """The change that answers do not show, and the remedy; empty: none.

        Any thread; a few microseconds for each module and parameter.
        """
        given = self.pipe()
        if given is not None and given.model is not self.model:
            return f"the pipeline has another model since serve(), which is not served: {_AGAIN}"
        if given is not None and given.tokenizer is not self.tokenizer:
            return f"the pipeline has another tokenizer since serve(), which is not used: {_AGAIN}"
        if self.structure is None:
            if getattr(self.model, "training", False):
                return "the model is in training mode, so answers vary: call pipe.model.eval()"
            return ""
        try:
            same = structure(self.model) == self.structure
        except RuntimeError:  # another thread adds or removes modules at this moment
            return ""
        if same and self.versions is not None and versions(self.model) != self.versions:
            return f"the model's weights have changed since serve(), and a copy of them is served: {_AGAIN}"
        if same:
            return ""
        return (
            "the model's modules, hooks or tensors were replaced since serve(), which is not served: "
            + _AGAIN
        )


def versions(model: torch.nn.Module) -> int:
    """A number that grows when torch changes parameters of a model in place. Any thread."""
    return sum(0 if each.is_inference() else each._version for each in model.parameters())
