"""The model call for several prepared inputs, whose batch the library itself cuts up again.

Not here: preparing inputs (`preparing.py`), making answers of outputs (`pipeline.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from serving_kit.models.packed import PackedForward
from serving_kit.models.pipes import Collate, Output, Pipe, Runner
from serving_kit.models.preparing import Tokenised
from serving_kit.models.task_steps import TaskSteps
from serving_kit.models.tasks import Task

_ONE_BY_ONE = "inputs of this task are answered one by one"


@dataclass(frozen=True, eq=False)
class Stepper:
    """Calls the model of one pipeline. Model thread only.

    Attributes:
        pipe: The pipeline.
        unbatch: The library's iterator that cuts the outputs of a batch up again.
        chunked: Whether an input has several chunks, and its output is a list of theirs.
        collate: Pads chunks to one length; None: inputs run one by one.
        shortcut: Runs a collated batch instead of `pipe.forward`; None: nothing does.
        packed: Runs chunks without padding; None: nothing does.
    """

    pipe: Pipe
    unbatch: Callable[..., Iterable[Output]]
    chunked: bool = False
    collate: Collate | None = None
    shortcut: Runner | None = None
    packed: PackedForward | None = None

    @property
    def takes_shortcuts(self) -> bool:
        """Whether anything runs but `pipe.forward`."""
        return self.shortcut is not None or self.packed is not None

    def outputs(self, inputs: Sequence[Tokenised]) -> list[Output]:
        """Run inputs of one key. Each output is what `pipe.forward` gives for that input alone."""
        parameters = inputs[0].split.forward
        chunks = [chunk for each in inputs for chunk in each.chunks]
        if self.packed is not None and all(map(self.packed.takes, chunks)):
            return self._of_inputs(inputs, self.packed.outputs(chunks, parameters))
        if self.shortcut is not None and self.collate is not None:
            return list(self.shortcut(self.collate(chunks)))
        if len(chunks) == 1 or self.collate is None:
            return self._of_inputs(inputs, [self.pipe.forward(chunk, **parameters) for chunk in chunks])
        batch = [self.collate(chunks)]
        return list(self.unbatch(batch, self.pipe.forward, parameters, loader_batch_size=len(chunks)))

    def _of_inputs(self, inputs: Sequence[Tokenised], outputs: Sequence[Output]) -> list[Output]:
        """The outputs of all chunks, put together for each input."""
        if not self.chunked:
            return list(outputs)
        rest = iter(outputs)
        return [list(itertools.islice(rest, len(each.chunks))) for each in inputs]


def make_stepper(pipe: Pipe, *, chunked: bool, batches: bool) -> Stepper:
    """A stepper without a shortcut."""
    from transformers.pipelines import base, pt_utils

    unbatch = pt_utils.PipelinePackIterator if chunked else pt_utils.PipelineIterator
    collate = base.pad_collate_fn(pipe.tokenizer, None) if batches else None
    return Stepper(pipe, unbatch, chunked, collate)


def batch_obstacle(pipe: Pipe, task: Task, steps: TaskSteps) -> str:
    """Why inputs of different lengths cannot share a model call, and the remedy; empty if they can."""
    if not task.batches:
        return _ONE_BY_ONE
    if pipe.tokenizer is None:
        return "the pipeline has no tokenizer, so its inputs cannot be padded to one length"
    if pipe.tokenizer.pad_token_id is None:
        return (
            "its tokenizer has no pad token, so inputs of different lengths cannot share a batch; set one "
            "(pipe.tokenizer.pad_token = pipe.tokenizer.eos_token)"
        )
    if steps.needs_config_pad_token and getattr(pipe.model.config, "pad_token_id", 0) is None:
        return (
            "its config has no pad token, so a batch cannot be told from its padding; set one "
            "(pipe.model.config.pad_token_id = pipe.tokenizer.pad_token_id)"
        )
    return ""
