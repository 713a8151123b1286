"""A `transformers` pipeline as a model: prepare, step, finish.

    value ── prepare ──▶ Prepared ─┐
    value ── prepare ──▶ Prepared ─┴─ step ──▶ one Done each ── finish ──▶ answers

The pipeline's own `preprocess`, `forward` and `postprocess` run, and the library itself cuts a batch up
again, so that every client gets what `pipeline(value)` gives.

Not here: the steps (`preparing.py`, `stepping.py`), what single tasks do differently (`task_steps.py`),
warming up (`warm_up.py`), loading a pipeline (`loading.py`), functions (`functions.py`).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from serving_kit.errors import InputRejected
from serving_kit.failures import classify
from serving_kit.model import (
    EXACT,
    Done,
    FailureKind,
    Input,
    Limit,
    Limits,
    Part,
    Precision,
    Prepared,
    StepResult,
    Timing,
    Work,
)
from serving_kit.models import memory
from serving_kit.models.bfloat16 import in_float32
from serving_kit.models.changes import GivenPipeline
from serving_kit.models.decoding import Decoder
from serving_kit.models.decoding_trial import cache_limit
from serving_kit.models.pipes import Output, Parameters, Pipe
from serving_kit.models.positions import most_positions
from serving_kit.models.preparing import Preparer, Tokenised
from serving_kit.models.sampling import samples, sharing_obstacle
from serving_kit.models.shared_weights import own_pipeline
from serving_kit.models.shortcuts import choose_shortcuts
from serving_kit.models.stepping import Stepper, batch_obstacle, make_stepper
from serving_kit.models.task_steps import TaskSteps, task_steps
from serving_kit.models.tasks import Task, contract, task_name

if TYPE_CHECKING:
    pass

_CHARACTERS_PER_TOKEN, _SPECIAL_TOKENS = 4, 2  # of an ordinary text


@dataclass(eq=False)
class PipelineModel:
    """A `transformers` pipeline. Implements `model.ServedModel`; `build_pipeline_model` makes one.

    Attributes:
        name: Shown to clients.
        pipe: The pipeline that runs: a copy of the one that was handed over, with a tokenizer and processors
            of its own, around the same weights. Where a shortcut applies, the modules are its own as well,
            so that nothing in the given pipeline is changed.
        task: What clients may send.
        preparer: Makes `Prepared` inputs.
        stepper: Calls the model.
        decoder: Calls it for texts that are generated token by token; None: it does not work so.
        given: The pipeline that was handed over.
        limits: One item in a step for a pipeline that cannot batch, with the reason.
        notes: What its owner should know.
        example: The input that it was warmed up with; None: it was not.
        timings: Of the steps that it was warmed up with.
        precision: Of its numbers; `precision.py` decides.
    """

    name: str
    pipe: Pipe
    task: Task
    preparer: Preparer
    stepper: Stepper
    given: GivenPipeline
    limits: Limits
    notes: Sequence[str] = ()
    example: Input | None = None
    timings: Sequence[Timing] = ()
    precision: Precision = EXACT
    decoder: Decoder | None = None

    @property
    def steps(self) -> TaskSteps:
        """What is special about its task."""
        return self.preparer.steps

    @property
    def task_name(self) -> str:
        """The pipeline's task, by its name in `tasks.TASKS`."""
        return str(self.pipe.task)

    @property
    def device(self) -> str:
        """Where the weights are: cpu, cuda:0, mps."""
        return str(self.pipe.device)

    @property
    def media(self) -> bool:
        """Whether request bodies are images or sound."""
        return self.task.media is not None

    def changed(self) -> str:
        """See `GivenPipeline.changed`. Any thread."""
        return self.given.changed()

    def check(self, values: Sequence[object], parameters: Parameters) -> None:
        """Raise `MalformedRequest` for values or parameters that this task does not take. Loop thread."""
        self.task.check_parameters(parameters)
        for value in values:
            self.task.check_input(value)

    def samples(self, parameters: Parameters) -> bool:
        """See `sampling.samples`. Loop thread."""
        return samples(self.pipe, parameters)

    def estimate(self, value: object) -> Work:
        """About four characters make a token. Loop thread."""
        if self.media:
            return Work()
        characters = len(value) if isinstance(value, str) else len(str(value))
        return Work(longest=characters // _CHARACTERS_PER_TOKEN + _SPECIAL_TOKENS)

    def prepare(self, value: object, parameters: Parameters) -> Prepared[Tokenised]:
        """Tokenise one input. Model thread.

        Raises:
            InputRejected: see `Preparer.prepare`.
        """
        prepared = self.preparer.prepare(value, parameters)
        if self.decoder is not None:
            prepared = self.decoder.begin(prepared)
        if "seed" in parameters and prepared.payload.sequence is None:
            raise InputRejected(
                "seed is not supported here: the model generates in groups, or the call asks for a search or "
                "for several texts, so that random numbers are shared"
            )
        return prepared

    def step(self, parts: Sequence[Part]) -> Sequence[StepResult]:
        """Call the model once on parts of one key. Model thread."""
        if self.decoder is not None and parts[0].prepared.payload.sequence is not None:
            return self.decoder.step(parts)
        return [Done(output) for output in self.stepper.outputs([part.prepared.payload for part in parts])]

    def finish(self, prepared: Prepared[Tokenised], output: Output) -> object:
        """Turn one output into what `pipe(value)` returns. Model thread."""
        given, steps = prepared.payload, self.steps
        own = steps.own_output(self.pipe, output, given.chunks[0], given.parameters)
        if self.precision.used == "fast":
            own = in_float32(own)
        return steps.answer(self.pipe.postprocess(own, **given.split.postprocess), own, given.parameters)

    def release(self, prepared: Prepared[Tokenised]) -> None:
        """Give back the cache of a text that is generated. Model thread."""
        if self.decoder is not None:
            self.decoder.release(prepared)

    def classify(self, error: BaseException) -> FailureKind:
        """See `classify.kind`, which knows the errors of torch. Any thread."""
        return classify.kind(error)

    def free_memory(self, error: BaseException, *, thorough: bool) -> None:
        """See `memory.free_memory`. Model thread."""
        if self.decoder is not None:
            self.decoder.free_memory()
        memory.free_memory(error, thorough=thorough)


def build_pipeline_model(
    given: Pipe, name: str = "", *, shortcuts: bool = True, handed_over: bool = True
) -> PipelineModel:
    """Make a model of a pipeline: copies its modules and times a layer. Does not warm it up.

    Args:
        given: The pipeline. Nothing in it is changed.
        name: Shown to clients; empty: that of its model.
        shortcuts: Whether work may be left out that no answer shows (`mask_head.py`, `fast_linear.py`).
        handed_over: Whether others may call the pipeline: then its tokenizer is copied.

    Raises:
        StartError: the pipeline may open what clients send, its tokenizer cannot be copied, or its model is
            in training mode and cannot be copied.
    """
    from transformers.pipelines.base import ChunkPipeline

    task, pipe = contract(given), own_pipeline(given, copied=handed_over)
    pipe.task = task_name(pipe.task)
    steps = task_steps(pipe.task)
    max_tokens = most_positions(pipe)
    chunked, obstacle = isinstance(pipe, ChunkPipeline), batch_obstacle(pipe, task, steps)
    stepper = make_stepper(pipe, chunked=chunked, batches=not obstacle)
    preparer = Preparer(pipe, task, steps, chunked, max_tokens)
    chosen = choose_shortcuts(pipe, preparer, stepper, obstacle, shortcuts=shortcuts)
    limit = Limit(1, chosen.obstacle) if chosen.obstacle and chosen.decoder is None else None
    cache = None if chosen.decoder is None else cache_limit(pipe, chosen.decoder)
    if chosen.decoder is not None and cache is not None:
        chosen.decoder.keep_prompts(cache.value // 8)
    return PipelineModel(
        name or short_name(str(getattr(given.model, "name_or_path", "") or type(given.model).__name__)),
        pipe,
        task,
        preparer,
        chosen.stepper,
        GivenPipeline(weakref.ref(given), given.model, given.tokenizer, chosen.structure),
        Limits(limit, chosen.layout, sharing_obstacle(pipe), cache),
        chosen.notes,
        decoder=chosen.decoder,
    )


def short_name(source: str) -> str:
    """A Hub id as it is; of a folder only its last part, since clients see names."""
    path = Path(source)
    return path.resolve().name if path.exists() or path.is_absolute() else source
