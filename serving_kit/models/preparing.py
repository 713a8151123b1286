"""One input before the model call: tokenised, checked against the limits of the model.

Not here: the model call (`stepping.py`), which parameters exist (`tasks.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from serving_kit.errors import InputRejected, error_text
from serving_kit.model import Prepared, Work
from serving_kit.models.generating import Generating
from serving_kit.models.pipes import Chunk, Parameters, Pipe, width
from serving_kit.models.task_steps import NewTokens, TaskSteps
from serving_kit.models.tasks import Task

_MAX_CHUNKS = 128  # a long text with a stride, or a text with many labels, is a batch of its own
_PARAMETER_SETS = 128  # distinct parameter sets whose split is kept


@dataclass(frozen=True, slots=True)
class SplitParameters:
    """Call parameters as a pipeline splits them over its three steps."""

    preprocess: Parameters
    forward: Parameters
    postprocess: Parameters
    new_tokens: NewTokens


@dataclass(frozen=True, slots=True)
class Tokenised:
    """The payload of a `Prepared` input of a pipeline. Nothing changes it."""

    chunks: Sequence[Chunk]  # what `preprocess` gave: one set of tensors, or several for a chunk pipeline
    split: SplitParameters
    parameters: Parameters  # as the client set them
    tokens: int  # of the longest chunk
    sequence: Generating | None = None  # a text that is generated token by token; the only part that changes


@dataclass(eq=False)
class Preparer:
    """Prepares inputs for one pipeline. Model thread only.

    Attributes:
        pipe: The pipeline.
        task: Its contract.
        steps: What is special about its task.
        chunked: Whether `preprocess` gives several chunks.
        max_tokens: Of one input, with those that are generated; None: no limit.
    """

    pipe: Pipe
    task: Task
    steps: TaskSteps
    chunked: bool = False
    max_tokens: int | None = None
    _splits: dict[str, SplitParameters] = field(default_factory=dict)

    def prepare(self, value: object, parameters: Parameters) -> Prepared[Tokenised]:
        """Tokenise one input.

        Raises:
            InputRejected: no mask token, too long for the model, or rejected by the pipeline's own
                `preprocess`.
        """
        # Checked parameters are JSON. Anything else must not be told apart by its `repr`.
        key = json.dumps(parameters, sort_keys=True) if parameters else ""
        if self.task.media is not None:
            value = self.task.media(value)
        if isinstance(value, list) and list in self.task.takes:
            value = self._chat(value)
        split, chunks = self._preprocess(value, key, parameters)
        if len(chunks) > _MAX_CHUNKS:
            raise InputRejected(f"the input makes {len(chunks)} pieces; the most is {_MAX_CHUNKS}")
        tokens = max((width(chunk) for chunk in chunks), default=0)
        if not tokens:
            raise InputRejected("the model finds nothing in this input")
        fitted = self._fitted(split, tokens, parameters)
        if fitted is not split:  # inputs that differ in their new tokens share no step
            key = f"{key} {fitted.new_tokens.most}"
        self.steps.check(self.pipe, chunks, fitted.postprocess)
        return Prepared(
            Tokenised(chunks, fitted, parameters, tokens),
            Work(len(chunks), tokens, packed_tokens=sum(width(chunk) for chunk in chunks)),
            (key, frozenset(chunks[0])),
        )

    def example(self, times: int) -> Tokenised | None:
        """The task's example, so many times as long; None: the model does not take it."""
        example = self.steps.example(self.pipe)
        try:
            return self.prepare(str(example.value) * times, example.parameters).payload
        except InputRejected:
            return None

    def _chat(self, messages: list[dict[str, object]]) -> object:
        """Messages as the pipeline takes them.

        Raises:
            InputRejected: the model has no template for them.
        """
        from transformers.pipelines.text_generation import Chat

        if not getattr(self.pipe.tokenizer, "chat_template", None):
            raise InputRejected("this model has no chat template: send a text instead of messages")
        return Chat(messages)

    def _preprocess(
        self, value: object, key: str, parameters: Parameters
    ) -> tuple[SplitParameters, list[Chunk]]:
        from transformers.pipelines.base import PipelineException

        try:
            split = self._split(key, parameters)
            given = self.pipe.preprocess(value, **split.preprocess)
            chunks = list(given) if self.chunked else [given]
        except PipelineException as error:  # its text is written for whoever sent the input
            raise InputRejected(str(error)) from None
        except (ValueError, TypeError, KeyError, IndexError, ImportError) as error:
            detail = error_text(error)
            raise InputRejected("the model cannot take this input", detail=detail) from error
        return split, cast("list[Chunk]", chunks)

    def _split(self, key: str, parameters: Parameters) -> SplitParameters:
        """The pipeline's own split, on top of the parameters of its construction."""
        if key not in self._splits:
            pipe, own = self.pipe, self.steps.own_parameters
            known = {name: value for name, value in self.task.typed(parameters).items() if name not in own}
            preprocess, forward, postprocess = pipe._sanitize_parameters(**known)
            forward = {**pipe._forward_params, **forward}
            if len(self._splits) >= _PARAMETER_SETS:
                self._splits.clear()
            self._splits[key] = SplitParameters(
                {**pipe._preprocess_params, **preprocess},
                forward,
                {**pipe._postprocess_params, **postprocess},
                self.steps.new_tokens(pipe, forward),
            )
        return self._splits[key]

    def _fitted(self, split: SplitParameters, tokens: int, parameters: Parameters) -> SplitParameters:
        """The parameters with as few new tokens as fit behind the input. Only a default number is lowered.

        Raises:
            InputRejected: the input is too long. Past its last position a model raises, and on CUDA that
                leaves the device unusable for the whole process.
        """
        new = split.new_tokens
        most = min((n for n in (self.max_tokens, new.total) if n is not None), default=None)
        if most is None or tokens + new.most <= most:
            return split
        room = most - tokens
        if "max_new_tokens" in parameters or room < new.least or not new.most:
            raise InputRejected(_too_long(tokens, most, new, parameters))
        forward = {**split.forward, "max_new_tokens": room, "max_length": None}
        return replace(split, forward=forward, new_tokens=replace(new, most=room))


def _too_long(tokens: int, most: int, new: NewTokens, parameters: Parameters) -> str:
    """Why a text is rejected for its length, with the numbers."""
    more = ""
    if "max_new_tokens" in parameters:
        more = f" and max_new_tokens is {new.most}"
    elif "min_new_tokens" in parameters:
        more = f" and min_new_tokens is {new.least}"
    elif new.most:
        more = f" and {new.least} more must fit"
    return f"the text has {tokens} tokens{more}; this model takes {most} at most"
