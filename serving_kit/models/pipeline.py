"""A model as three steps: prepare, forward, finish. Wraps a `transformers` pipeline.

    value ── prepare ──▶ Prepared ──┐
    value ── prepare ──▶ Prepared ──┴─ forward ──▶ outputs ── finish ──▶ answers

`PipelineModel` drives the pipeline's own `preprocess`, `forward` and `postprocess` and lets the
library cut the batch up again, so that every client gets what `pipeline(value)` gives. What a plain
`pipeline(list, batch_size=n)` gets wrong for a server is put right here: a list of one that
`fill-mask` collapses, a list level that `text-classification` drops, the padding rows that
`feature-extraction` leaves in.

Not here: getting a model (`loading.py`), functions (`functions.py`), when to run (`batching.py`), which
parameters exist (`tasks.py`), JSON (`formats.py`).
"""

from __future__ import annotations

import copy
import json
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from serving_kit.errors import InputRejected, StartError, error_text
from serving_kit.execution import Prepared
from serving_kit.models.fast_linear import use_fast_linear
from serving_kit.models.mask_head import MaskHead, mask_head
from serving_kit.models.positions import most_positions
from serving_kit.models.shared_weights import own_pipeline, structure, twin
from serving_kit.models.tasks import Task, contract, task_name

_WARM_UP_S, _FEWEST_TIMINGS = 0.15, 3
_MOST_PIECES = 128  # a long text with a stride, or a text with many labels, is a batch of its own
_MOST_FILLS = 5_000  # each one is the whole text once more: 5,000 of 500 tokens take about a second
_PARAMETER_SETS = 128  # distinct parameter sets whose resolved form is kept
_LONGEST_TRIAL, _TRIAL_S = 1024, 0.5  # tokens and seconds up to which the longest length is tried
_ONE_BY_ONE = "inputs of this task are answered one by one"


class Timing(NamedTuple):
    """What a batch took when the model was loaded."""

    padded_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Resolved:
    """Call parameters as a pipeline splits them over its three steps."""

    preprocess: Mapping[str, Any]
    forward: Mapping[str, Any]
    postprocess: Mapping[str, Any]
    new_tokens: int = 0  # that the forward may add to the input's
    least_new_tokens: int = 0  # that it must add
    most_tokens: int | None = None  # of input and output together, where that is what was set


@dataclass(frozen=True, slots=True)
class _Tokenised:
    """One input between prepare and finish."""

    chunks: list[Any]  # what `preprocess` gave: one set of tensors, or several for a chunk pipeline
    resolved: _Resolved
    legacy: bool  # text-classification without top_k: its one answer comes in a list
    tokens: int  # of the longest chunk


@dataclass(eq=False)
class PipelineModel:
    """A `transformers` pipeline.

    Attributes:
        pipe: The pipeline that runs: a copy of the one that was loaded or handed over, with a tokenizer and
            processors of its own, around the same weights. Where a shortcut applies, the modules are its
            own as well, so that nothing in the given pipeline is changed.
        shortcuts: Whether work may be left out that no answer shows (`mask_head.py`, `fast_linear.py`).
        task: What clients may send.
        max_batch_size: 1 for a pipeline that cannot batch, else None. `batch_obstacle` says why.
        notes: What its owner should know.

    Raises:
        StartError: the pipeline may open what clients send, its tokenizer cannot be copied, or its model is
            in training mode and cannot be copied.
    """

    pipe: Any
    name: str = ""
    shortcuts: bool = True
    task: Task = field(init=False)
    max_batch_size: int | None = None
    batch_obstacle: str = ""
    notes: Sequence[str] = ()
    longest: int | None = None  # tokens that one input may have
    timings: Sequence[Timing] = ()  # of the batches that warmed it up
    example: tuple[str, Mapping[str, Any]] | None = None  # the input that warmed it up, and its parameters
    _resolved: dict[str, _Resolved] = field(default_factory=dict)
    _collate: Callable[[list[Any]], Any] | None = None
    _iterator: Any = None  # cuts a batch of outputs up again: the library's own
    _chunked: bool = False
    _mask_head: MaskHead | None = None
    _given: Callable[[], Any] = field(init=False)  # the pipeline that was handed over, while it exists
    _given_parts: tuple[Any, ...] = field(init=False)  # its model and its tokenizer when it was
    _structure: int | None = None  # of the given model; None: the model that runs is that one

    def __post_init__(self) -> None:
        from transformers.pipelines import base, pt_utils

        given = self.pipe
        self.task = contract(given)
        self.pipe = pipe = own_pipeline(given)
        pipe.task = task_name(pipe.task)
        self._given, self._given_parts = weakref.ref(given), (given.model, given.tokenizer)
        self.name = self.name or _display_name(pipe)
        self.longest = most_positions(pipe)
        self._chunked = isinstance(pipe, base.ChunkPipeline)
        self._iterator = pt_utils.PipelinePackIterator if self._chunked else pt_utils.PipelineIterator
        self.batch_obstacle = _batch_obstacle(pipe) if self.task.batches else _ONE_BY_ONE
        if self.batch_obstacle:
            self.max_batch_size = 1
        else:
            self._collate = base.pad_collate_fn(pipe.tokenizer, None)
        self._choose_modules(given.model)

    def _choose_modules(self, given: Any) -> None:
        """Run on a twin of the given model where that is of use, else on the given model."""
        trains = bool(getattr(given, "training", False))
        own = twin(given) if trains or self.shortcuts else None
        if trains:
            if own is None:
                raise StartError(
                    "the model is in training mode, so dropout would make its answers vary: call "
                    "pipe.model.eval() first"
                )
            own.eval()
            self.notes = (*self.notes, "the model is in training mode; its copy is served in evaluation mode")
        if own is None:
            return
        self.pipe.model = own
        applied = 0
        if self.shortcuts:
            applied = use_fast_linear(own)
            if self._collate is not None and self.task_name == "fill-mask":
                self._mask_head = mask_head(self.pipe, self._collate)
        if trains or applied or self._mask_head is not None:
            self._structure = structure(given)
        else:
            self.pipe.model = given

    def changed(self) -> str:
        """What the notebook has changed since, which answers do not show, and what to do; empty if nothing.

        Any thread; a few microseconds for each module and parameter.
        """
        given = self._given()
        model, tokenizer = self._given_parts
        again = "run serve() again"
        if given is not None and given.model is not model:
            return f"the pipeline has another model since serve(), which is not served: {again}"
        if given is not None and given.tokenizer is not tokenizer:
            return f"the pipeline has another tokenizer since serve(), which is not used: {again}"
        if self._structure is None:
            if getattr(model, "training", False):
                return "the model is in training mode, so answers vary: call pipe.model.eval()"
            return ""
        try:
            same = structure(model) == self._structure
        except RuntimeError:  # a cell is adding or removing modules at this moment
            return ""
        if same:
            return ""
        return (
            f"the model's modules, hooks or tensors were replaced since serve(), which is not served: {again}"
        )

    @property
    def task_name(self) -> str:
        """The pipeline's task, as `transformers` names it."""
        return str(self.pipe.task)

    @property
    def device(self) -> str:
        """Where the weights are: cpu, cuda:0, mps."""
        return str(self.pipe.device)

    @property
    def media(self) -> bool:
        """Whether request bodies are images or sound."""
        return self.task.media is not None

    def check(self, values: Sequence[Any], parameters: Mapping[str, Any]) -> None:
        """Raise `MalformedRequest` for values or parameters that this task does not take."""
        self.task.check_parameters(parameters)
        for value in values:
            self.task.check_input(value)

    def warm_up(self) -> list[Timing]:
        """Run a few small batches, so that the first client does not pay for the first call.

        Returns:
            What the batches after the first took, so that a cost is known from the start; fewer of
            them on a slow model.
        """
        example = f"a short {self.pipe.tokenizer.mask_token}." if self.task_name == "fill-mask" else "a word "
        parameters: dict[str, Any] = {}
        if self.task_name == "zero-shot-classification":
            parameters["candidate_labels"] = ["example"]
        elif self.task_name == "text-generation":
            parameters["max_new_tokens"] = 1
        elif not self.task.batches:
            return []
        short = self.prepare(example, parameters)
        self._time([short])  # initialises all that is lazy
        self.example = example, parameters
        self._try_longest(short.payload.chunks[0])
        if self.task_name == "text-generation":
            return []  # a forward's cost is in what it generates, which this says nothing about
        fits = self.longest is None or 12 * _width(short.payload.chunks[0]) <= self.longest
        long = self.prepare(example * 12, parameters) if fits else short
        timings: list[Timing] = []
        begun = time.perf_counter()
        for batch in ([short], [long], [short] * 4, [long] * 4, [short] * 16):
            if len(timings) >= _FEWEST_TIMINGS and time.perf_counter() - begun > _WARM_UP_S:
                break
            timings.append(self._time(batch[: self.max_batch_size]))
        return timings

    def _try_longest(self, chunk: Mapping[str, Any]) -> None:
        """Lower `longest` to what the model answers: on a CPU, as far as a try takes little time and memory.

        Elsewhere it stays what the position tables say: an index past their end costs a CUDA device.

        Args:
            chunk: The tensors of a short text.
        """
        if self.longest is None or self.device != "cpu":
            return
        takes, most = _width(chunk), min(self.longest, _LONGEST_TRIAL)
        fails = 0
        while takes < most and not fails:
            length, start = min(2 * takes, most), time.perf_counter()
            if not self._takes(chunk, length):
                fails = length
            elif 2 * (time.perf_counter() - start) > _TRIAL_S:
                return
            else:
                takes = length
        while takes + 1 < fails:
            length = (takes + fails) // 2
            if self._takes(chunk, length):
                takes = length
            else:
                fails = length
        if fails and takes > _width(chunk):  # else it takes no text twice, which says nothing about lengths
            self.longest = takes

    def _takes(self, chunk: Mapping[str, Any], tokens: int) -> bool:
        """Whether the model has positions for so many tokens: those of `chunk` over and over."""
        import torch

        model, width = self.pipe.model, _width(chunk)
        names = [name for name in self.pipe.tokenizer.model_input_names if name in chunk]
        repeated = {name: chunk[name].repeat(1, tokens // width + 1)[:, :tokens] for name in names}
        try:
            with torch.no_grad():
                getattr(model, "base_model", model)(**repeated)
        except Exception:  # an index past the table, or a model that takes no such inputs at any length
            return False
        return True

    def _time(self, batch: list[Prepared]) -> Timing:
        start = time.perf_counter()
        for output, prepared in zip(self.forward(batch), batch, strict=True):
            self.finish(output, prepared)
        padded = len(batch) * max(each.tokens for each in batch)
        return Timing(padded, time.perf_counter() - start)

    def estimate(self, value: Any) -> int:
        """About four characters make a token."""
        if self.media:
            return 1
        return (len(value) if isinstance(value, str) else len(str(value))) // 4 + 2

    def prepare(self, value: Any, parameters: Mapping[str, Any]) -> Prepared:
        """Tokenise one input.

        Raises:
            InputRejected: no mask token, too long for the model, or anything else that the
                pipeline's own `preprocess` has against it.
        """
        from transformers.pipelines.base import PipelineException

        key = _key(parameters)
        if self.task.media is not None:
            value = self.task.media(value)
        try:
            resolved = self._resolve(key, parameters)
            given = self.pipe.preprocess(value, **resolved.preprocess)
            chunks = list(given) if self._chunked else [given]
        except PipelineException as error:  # written for the person who sent the input
            raise InputRejected(str(error)) from None
        except (ValueError, TypeError, KeyError, IndexError, ImportError) as error:
            detail = error_text(error)
            raise InputRejected("the model cannot take this input", detail=detail) from error
        if len(chunks) > _MOST_PIECES:
            raise InputRejected(f"the input makes {len(chunks)} pieces; the most is {_MOST_PIECES}")
        tokens = max((_width(chunk) for chunk in chunks), default=0)
        if not tokens:
            raise InputRejected("the model finds nothing in this input")
        longest = min((n for n in (self.longest, resolved.most_tokens) if n is not None), default=None)
        if longest is not None and tokens + resolved.new_tokens > longest:
            # Past its last position a model crashes, and on a GPU it takes the process with it.
            room = longest - tokens
            if "max_new_tokens" in parameters or room < resolved.least_new_tokens or not resolved.new_tokens:
                raise InputRejected(_too_long(tokens, longest, resolved, parameters))
            # Only a default is too much: as many as fit. Those that differ in it share no forward.
            resolved = replace(
                resolved,
                forward={**resolved.forward, "max_new_tokens": room, "max_length": None},
                new_tokens=room,
            )
            key = f"{key} {room}"
        if self.task_name == "fill-mask":
            masks = int((chunks[0]["input_ids"] == self.pipe.tokenizer.mask_token_id).sum())
            answers = masks * resolved.postprocess.get("top_k", 5)
            if answers > _MOST_FILLS:
                raise InputRejected(f"{masks} masks make {answers} answers; the most is {_MOST_FILLS}")
        tokenised = _Tokenised(chunks, resolved, "top_k" not in parameters, tokens)
        return Prepared(tokenised, tokens * len(chunks), (key, frozenset(chunks[0])))

    def forward(self, batch: Sequence[Prepared]) -> Sequence[Any]:
        """Run the batch. Each output is what `pipe.forward` gives for that input alone."""
        inputs: list[_Tokenised] = [each.payload for each in batch]
        parameters = inputs[0].resolved.forward
        chunks = [chunk for each in inputs for chunk in each.chunks]
        if self._mask_head is not None and self._collate is not None:
            return self._mask_head.forward(self._collate(chunks))
        if len(chunks) == 1 or self._collate is None:
            outputs = [[self.pipe.forward(chunk, **parameters) for chunk in each.chunks] for each in inputs]
            return outputs if self._chunked else [output for (output,) in outputs]
        batches = [self._collate(chunks)]
        return list(self._iterator(batches, self.pipe.forward, parameters, loader_batch_size=len(chunks)))

    def finish(self, output: Any, prepared: Prepared) -> Any:
        """Turn one output into what `pipe(value)` returns."""
        given: _Tokenised = prepared.payload
        if self.task_name == "feature-extraction":
            output = self._without_padding(output, given.tokens)
        answer = self.pipe.postprocess(output, **given.resolved.postprocess)
        if self.task_name == "text-classification" and given.legacy:
            return [answer]
        return answer

    def _resolve(self, key: str, parameters: Mapping[str, Any]) -> _Resolved:
        """The pipeline's own split of call parameters, on top of those from its construction."""
        if key not in self._resolved:
            pipe = self.pipe
            preprocess, forward, postprocess = pipe._sanitize_parameters(**self.task.typed(parameters))
            forward = {**pipe._forward_params, **forward}
            new_tokens = _new_tokens(pipe, forward) if pipe.task == "text-generation" else (0, 0, None)
            if len(self._resolved) >= _PARAMETER_SETS:
                self._resolved.clear()
            self._resolved[key] = _Resolved(
                {**pipe._preprocess_params, **preprocess},
                forward,
                {**pipe._postprocess_params, **postprocess},
                *new_tokens,
            )
        return self._resolved[key]

    def _without_padding(self, output: Any, tokens: int) -> Any:
        """Features of the input's own tokens only; a batch has rows for its padding too."""
        features = output[0]
        if features.ndim < 3 or features.shape[1] <= tokens:
            return output
        left = self.pipe.tokenizer.padding_side == "left"
        return (features[:, -tokens:] if left else features[:, :tokens],)


def _new_tokens(pipe: Any, parameters: Mapping[str, Any]) -> tuple[int, int, int | None]:
    """Tokens that `generate` may and must add with these parameters, and the most with the input's.

    Raises:
        InputRejected: they are fine one by one, but not together; the text is the library's own.
    """
    config = copy.deepcopy(getattr(pipe, "generation_config", None) or pipe.model.generation_config)
    complete = getattr(pipe, "_prepare_generate_kwargs", dict)(dict(parameters))
    own = complete.pop("generation_config", None)
    try:
        config.update(**({} if own is None else own.to_diff_dict()), **complete)
        config.validate()
    except ValueError as error:
        raise InputRejected(str(error).strip().split("\n")[0]) from None
    least = max(config.min_new_tokens or 0, 1)
    if config.max_new_tokens is None and config.max_length is not None:
        # `generate` would count it from the longest input of a batch. Each input gets its own number.
        return config.max_length, least, config.max_length
    return config.max_new_tokens or 0, least, None


def _too_long(tokens: int, longest: int, resolved: _Resolved, parameters: Mapping[str, Any]) -> str:
    """Why a text is refused for its length, with the numbers."""
    more = ""
    if "max_new_tokens" in parameters:
        more = f" and max_new_tokens is {resolved.new_tokens}"
    elif "min_new_tokens" in parameters:
        more = f" and min_new_tokens is {resolved.least_new_tokens}"
    elif resolved.new_tokens:
        more = f" and {resolved.least_new_tokens} more must fit"
    return f"the text has {tokens} tokens{more}; this model takes {longest} at most"


def _batch_obstacle(pipe: Any) -> str:
    """Why inputs of different lengths cannot share a forward, and the remedy; empty if they can."""
    if pipe.tokenizer is None:
        return "the pipeline has no tokenizer, so its inputs cannot be padded to one length"
    if pipe.tokenizer.pad_token_id is None:
        return (
            "its tokenizer has no pad token, so inputs of different lengths cannot share a batch; set one "
            "(pipe.tokenizer.pad_token = pipe.tokenizer.eos_token)"
        )
    classifies = pipe.task in ("text-classification", "zero-shot-classification")
    if classifies and getattr(pipe.model.config, "pad_token_id", 0) is None:
        return (
            "its config has no pad token, so a batch cannot be told from its padding; set one "
            "(pipe.model.config.pad_token_id = pipe.tokenizer.pad_token_id)"
        )
    return ""


def _width(chunk: Any) -> int:
    """Tokens of one chunk: the length of its `input_ids`, shape (1, tokens)."""
    ids = chunk.get("input_ids") if hasattr(chunk, "get") else None
    return int(ids.shape[-1]) if ids is not None else 1


def _key(parameters: Mapping[str, Any]) -> str:
    # Checked parameters are JSON. Anything else must not be told apart by its `repr`.
    return json.dumps(parameters, sort_keys=True) if parameters else ""


def _display_name(pipe: Any) -> str:
    return short_name(str(getattr(pipe.model, "name_or_path", "") or type(pipe.model).__name__))


def short_name(source: str) -> str:
    """A Hub id as it is; of a folder only its last part, since names are shown to strangers."""
    path = Path(source)
    return path.resolve().name if path.exists() or path.is_absolute() else source
