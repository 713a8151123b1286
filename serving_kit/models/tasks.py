"""What each pipeline task takes: its input, its parameters, and their bounds.

A pipeline hands parameters that it does not know to its tokenizer or to `generate`, where they are
ignored, crash the whole batch, or exhaust the machine. So a server must know them itself: this table
is the contract with clients. It is checked on the loop thread before anything is queued, in time
that does not depend on the model.

Most pipelines of `transformers` open a string as a file, or fetch it as a URL. So only pipelines with a row
here are served: those of text hand it to their tokenizer and nothing else, and those of images and sound
get what `media.py` has decoded.

Not here: what single tasks do differently (`task_steps.py`), the shape of the answer for each client
(`formats.py`).
"""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from serving_kit.errors import MalformedRequest, StartError
from serving_kit.models import media
from serving_kit.models.pipes import Pipe

Check = Callable[[Any], str | None]  # None: fine; else what the value must be


@dataclass(frozen=True, slots=True)
class Task:
    """The contract of one task.

    A parameter that has no row here does not reach the pipeline.
    """

    pipeline: str  # the class in `transformers.pipelines` whose steps it was written for
    parameters: Mapping[str, Check] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    inputs: str = "a string"
    takes: tuple[type, ...] = (str,)
    members: tuple[str, ...] = ()  # of an object input: strings, the first of them required
    batches: bool = True  # whether several inputs may share a step
    media: Callable[[Any], Any] | None = None  # makes an image or sound of what a client sends

    def check_input(self, value: Any) -> None:
        """Raise `MalformedRequest` unless this task takes such a value."""
        fits = isinstance(value, self.takes)
        if fits and self.members and isinstance(value, dict):
            known = self.members[0] in value and value.keys() <= set(self.members)
            fits = known and all(isinstance(each, str) for each in value.values())
        if not fits:
            raise MalformedRequest(f"inputs must be {self.inputs}, got {_short(value)}")

    def check_parameters(self, given: Mapping[str, Any]) -> None:
        """Raise `MalformedRequest` for the first parameter that is unknown, missing or impossible."""
        for name, value in given.items():
            check = self.parameters.get(name)
            if check is None:
                known = ", ".join(self.parameters) or "none"
                raise MalformedRequest(f"unknown parameter {_short(name)}; this task takes {known}")
            if (needs := check(value)) is not None:
                raise MalformedRequest(f"parameter {name} must be {needs}, got {_short(value)}")
        for name in self.required:
            if name not in given:
                example = f'{{"inputs": ..., "parameters": {{"{name}": ...}}}}'
                raise MalformedRequest(f"this task needs the parameter {name}: {example}")

    def typed(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Checked parameters in the types that pipelines want: JSON's 1 is their 1.0."""
        return {
            name: float(value) if isinstance(self.parameters[name], number) else value
            for name, value in given.items()
        }


def whole(low: int, high: int) -> Check:
    """A whole number in a closed range."""

    def check(value: Any) -> str | None:
        fits = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return None if fits else f"a whole number from {low} to {high}"

    return check


@dataclass(frozen=True, slots=True)
class number:
    """A number in a closed range."""

    low: float
    high: float

    def __call__(self, value: Any) -> str | None:
        """None if it is one, else what it must be."""
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        fits = fits and self.low <= value <= self.high
        return None if fits else f"a number from {self.low:g} to {self.high:g}"


def flag(value: Any) -> str | None:
    """Either true or false."""
    return None if isinstance(value, bool) else "true or false"


def choice(*words: str) -> Check:
    """One of some words."""

    def check(value: Any) -> str | None:
        return None if value in words else f"one of {', '.join(words)}"

    return check


def text(most: int = 1000) -> Check:
    """A string that is not empty."""

    def check(value: Any) -> str | None:
        fits = isinstance(value, str) and 0 < len(value) <= most
        return None if fits else f"a string of 1 to {most} characters"

    return check


def texts(most: int, *, or_one: bool = True) -> Check:
    """A list of strings that are not empty; or one such string."""

    def check(value: Any) -> str | None:
        many = [value] if or_one and isinstance(value, str) else value
        fits = isinstance(many, list) and 0 < len(many) <= most
        if fits and all(isinstance(each, str) and 0 < len(each) <= 1000 for each in many):
            return None
        return f"a list of 1 to {most} strings of 1 to 1000 characters"

    return check


def labels(most: int) -> Check:
    """A list of strings that are not empty; or one such string, which the pipeline cuts at its commas."""
    listed = texts(most)

    def check(value: Any) -> str | None:
        if isinstance(value, str):
            value = [each for each in value.split(",") if each.strip()]
        return listed(value)

    return check


def template(value: Any) -> str | None:
    """A hypothesis template: exactly one `{}`, no other braces."""
    fits = isinstance(value, str) and len(value) <= 1000 and value.count("{}") == 1
    return None if fits and "{" not in value.replace("{}", "") else "a string with exactly one {} in it"


def optional(check: Check) -> Check:
    """Either null, or what `check` says."""

    def checked(value: Any) -> str | None:
        needs = None if value is None else check(value)
        return needs and f"null or {needs}"

    return checked


def options(**checks: Check) -> Check:
    """A JSON object with some of these members."""

    def check(value: Any) -> str | None:
        needs = f"an object with some of {', '.join(checks)}"
        if not isinstance(value, dict) or not value.keys() <= checks.keys():
            return needs
        for name, each in value.items():
            if (why := checks[name](each)) is not None:
                return f"{needs}, where {name} is {why}"
        return None

    return check


_TOKENS = whole(1, 1_000_000)
_TRUNCATION: Mapping[str, Check] = {"truncation": flag, "max_length": _TOKENS}
_GENERATION: Mapping[str, Check] = {
    "max_new_tokens": whole(1, 4096),
    "min_new_tokens": whole(0, 4096),
    "do_sample": flag,
    "temperature": number(0.01, 100),
    "top_k": whole(0, 1000),
    "top_p": number(1e-6, 1),
    "min_p": number(0, 1),
    "typical_p": number(1e-6, 1),
    "repetition_penalty": number(1e-3, 100),
    "length_penalty": number(-100, 100),
    "no_repeat_ngram_size": whole(0, 100),
    "num_beams": whole(1, 16),
    "num_return_sequences": whole(1, 16),
    "early_stopping": flag,
    "return_full_text": flag,
    "stop_sequence": texts(8),
    "truncation": flag,
}

_CLASSES: Mapping[str, Check] = {
    "top_k": optional(whole(1, 1000)),
    "function_to_apply": choice("sigmoid", "softmax", "none"),
}

TASKS: Mapping[str, Task] = {
    "fill-mask": Task(
        "FillMaskPipeline",
        {"top_k": whole(1, 1000), "targets": texts(1000), "tokenizer_kwargs": options(**_TRUNCATION)},
    ),
    "text-classification": Task(
        "TextClassificationPipeline",
        {
            "top_k": optional(whole(1, 1000)),
            "function_to_apply": choice("sigmoid", "softmax", "none"),
            **_TRUNCATION,
        },
        inputs="a string, or an object with text and text_pair",
        takes=(str, dict),
        members=("text", "text_pair"),
    ),
    "token-classification": Task(
        "TokenClassificationPipeline",
        {
            "aggregation_strategy": choice("none", "simple", "first", "average", "max"),
            "ignore_labels": texts(1000, or_one=False),
            "stride": whole(0, 128),
        },
    ),
    "zero-shot-classification": Task(
        "ZeroShotClassificationPipeline",
        {"candidate_labels": labels(100), "hypothesis_template": template, "multi_label": flag},
        required=("candidate_labels",),
    ),
    "feature-extraction": Task(
        "FeatureExtractionPipeline", {"truncation": flag, "tokenize_kwargs": options(**_TRUNCATION)}
    ),
    "text-generation": Task("TextGenerationPipeline", _GENERATION),
    "text-to-audio": Task("TextToAudioPipeline", batches=False),
    "image-classification": Task(
        "ImageClassificationPipeline", _CLASSES, takes=(object,), batches=False, media=media.image
    ),
    "image-feature-extraction": Task(
        "ImageFeatureExtractionPipeline", {"pool": flag}, takes=(object,), batches=False, media=media.image
    ),
    "object-detection": Task(
        "ObjectDetectionPipeline",
        {"threshold": number(0, 1)},
        takes=(object,),
        batches=False,
        media=media.image,
    ),
    "audio-classification": Task(
        "AudioClassificationPipeline", _CLASSES, takes=(object,), batches=False, media=media.sound
    ),
    "automatic-speech-recognition": Task(
        "AutomaticSpeechRecognitionPipeline", takes=(object,), batches=False, media=media.sound
    ),
}


# `transformers` takes these for tasks as well, and a pipeline keeps the name that it was made with.
_OTHER_NAMES = {
    "sentiment-analysis": "text-classification",
    "ner": "token-classification",
    "text-to-speech": "text-to-audio",
}
_OPENS = "its pipeline may open the paths and addresses that clients send"


def task_name(name: str) -> str:
    """The name of a task in `TASKS`, for another one that `transformers` takes."""
    return _OTHER_NAMES.get(name, name)


def contract(pipe: Pipe) -> Task:
    """The contract of a pipeline.

    Raises:
        StartError: there is none, so that the pipeline might open or fetch what clients send.
    """
    name, task = type(pipe).__name__, TASKS.get(task_name(pipe.task))
    why = ""
    if task is None:
        why = _OPENS
    elif not any(_is_derived(each, task.pipeline) for each in type(pipe).__mro__):
        why = f"{name} is no {task.pipeline}, so it may open the paths and addresses that clients send"
    elif task_name(pipe.task) == "text-to-audio" and not _takes_text_first(getattr(pipe, "processor", None)):
        why = "its processor takes a string for an image or for sound, and opens or fetches it"
    if task is None or why:
        raise _not_served(pipe.task, why)
    return task


def refuse_unserved(task: str) -> None:
    """Raise `StartError` for a task whose pipelines would be refused: before its weights are loaded."""
    if task_name(task) not in TASKS:
        raise _not_served(task, _OPENS)


def _not_served(task: str, why: str) -> StartError:
    return StartError(
        f"{task} is not served: {why}. Served are {', '.join(TASKS)}. For another pipeline, serve a function "
        "from a list to a list that decodes what it is sent and calls the pipeline"
    )


def _is_derived(kind: type, name: str) -> bool:
    return kind.__name__ == name and kind.__module__.startswith("transformers.pipelines.")


def _takes_text_first(processor: object) -> bool:
    """Whether `processor(text)` is given a text. The library's own default takes images first."""
    if processor is None:
        return True
    try:
        _, first = list(inspect.signature(type(processor).__call__).parameters.values())[:2]
    except (TypeError, ValueError):
        return False
    return first.name == "text"


def _short(value: object) -> str:
    """A client's value, safe to repeat to that client; however large, it takes no time."""
    words = reprlib.repr(value)
    return words if len(words) <= 60 else f"{words[:57]}..."
