"""Loading: makes a warmed-up model of what was given to `serve()`, or raises an error that says what to do.

torch and transformers are imported when a pipeline is loaded, never before.

Not here: what a model does with an input (`pipeline.py`, `functions.py`), warming up (`warm_up.py`), the
remedies (`advice.py`).
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from serving_kit.errors import StartError
from serving_kit.models.advice import advice
from serving_kit.models.functions import CallableModel
from serving_kit.models.heap import keep_freed_memory
from serving_kit.models.pipeline import PipelineModel, build_pipeline_model, short_name
from serving_kit.models.pipes import Pipe
from serving_kit.models.precision import fast_or_exact
from serving_kit.models.tasks import refuse_unserved
from serving_kit.models.warm_up import warm_up

DEMO_MODEL = Path(__file__).parent.parent / "demo_model"
DEMO_NAME = "serving-kit-demo"
_HUB_TIMEOUT_S = 5.0
# By the end of the architecture's name in config.json.
_TASKS = {
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForImageClassification": "image-classification",
    "ForObjectDetection": "object-detection",
    "ForCTC": "automatic-speech-recognition",
    "ForSpeechSeq2Seq": "automatic-speech-recognition",
    "Model": "feature-extraction",
}
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def load_model(
    model: object = None,
    *,
    task: str | None = None,
    device: object = None,
    pipeline_kwargs: Mapping[str, object] | None = None,
    shortcuts: bool = True,
    threads: int | None = None,
    most_threads: int | None = None,
    precision: str = "exact",
) -> PipelineModel | CallableModel:
    """Load what was given to `serve(model)`, and warm it up.

    Thread: the caller's, so that progress bars and interrupts go where they belong.

    Args:
        model: None for the bundled demo model; a Hub id or folder; a `Pipeline`; a `list -> list`
            callable.
        task: A task of `transformers.pipeline`; None lets it find out.
        device: As for `transformers.pipeline`; None takes the first accelerator, else the CPU.
        pipeline_kwargs: More arguments for `transformers.pipeline`.
        shortcuts: Leave out work that no answer shows (`mask_head.py`, `fast_linear.py`).
        threads: torch's threads for one operation, in the whole process; None leaves them as they are.
        most_threads: Fewer of them, if they are more than this and neither `threads` nor the environment
            (`OMP_NUM_THREADS`, `MKL_NUM_THREADS`) says how many there should be.
        precision: exact, or fast: bfloat16 where it is measured to be faster (`precision.py`).

    Raises:
        StartError: with what to do about it.
    """
    if model is None or isinstance(model, (str, os.PathLike)):
        _import_transformers()
    _set_threads(threads, most_threads)
    kwargs = dict(pipeline_kwargs or {})
    if model is None:
        with _without_progress_bar():  # it takes a tenth of a second
            pipe = _load_pipeline(str(DEMO_MODEL), task or "fill-mask", device, kwargs)
        return _ready(pipe, DEMO_NAME, shortcuts, precision)
    if isinstance(model, (str, os.PathLike)):
        source = os.fspath(model)
        pipe = _load_pipeline(source, task, device, kwargs)
        return _ready(pipe, short_name(source), shortcuts, precision)
    if task or device is not None or kwargs:
        raise StartError(
            "task, device and pipeline_kwargs are for loading a model by its id or folder; give them to "
            "transformers.pipeline(...) where you make the pipeline"
        )
    if all(hasattr(model, step) for step in ("preprocess", "forward", "postprocess", "task")):
        return _ready(cast("Pipe", model), "", shortcuts, precision, handed_over=True)
    return _function_model(model, precision)


def _ready(
    pipe: Pipe, name: str, shortcuts: bool, precision: str, *, handed_over: bool = False
) -> PipelineModel:
    """The model of a pipeline, warmed up, in the precision that was asked for or in exact.

    Raises:
        StartError: it raises for its own example.
    """
    model = build_pipeline_model(pipe, name, shortcuts=shortcuts, handed_over=handed_over)
    if model.device == "cpu":
        keep_freed_memory()
    try:
        model = warm_up(model)
    except Exception as error:
        raise StartError(f"{model.name} is loaded, but cannot answer: {advice(error)}") from error
    if precision == "exact":
        return model
    return fast_or_exact(model, pipe, shortcuts=shortcuts, handed_over=handed_over)


def _function_model(function: object, precision: str) -> CallableModel:
    """A function as a model.

    Raises:
        StartError: it is no function from a list to a list, or is to be fast.
    """
    if not callable(function):
        raise StartError(
            f"cannot serve {type(function).__name__}: pass a Hub id, a folder, a transformers Pipeline, "
            "or a function from a list to a list"
        )
    if _is_async(function):
        raise StartError(f"{_name(function)} must be a plain function from a list to a list, not async")
    if hasattr(function, "named_parameters") and hasattr(function, "state_dict"):
        raise StartError(
            f"{_name(function)} is a model without its tokenizer; pass transformers.pipeline(task, "
            "model=model, tokenizer=tokenizer)"
        )
    _check_takes_list(function)
    if precision != "exact":
        raise StartError(
            f"precision={precision!r} is for pipelines: {_name(function)} is a function, whose own code says "
            "in which precision it computes"
        )
    return CallableModel(function)


def _import_transformers() -> None:
    try:
        import torch  # noqa: F401
        from transformers import pipeline  # noqa: F401
    except ImportError as error:
        raise StartError("serving a model by name needs transformers and torch: pip install torch") from error


@contextlib.contextmanager
def _without_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _set_threads(threads: int | None, most: int | None) -> None:
    """Set torch's threads, if torch has been imported. Other threads take the number over at first use."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    if threads is None and most is not None and not any(name in os.environ for name in _THREAD_VARIABLES):
        threads = min(most, torch.get_num_threads())
    if threads is not None and threads != torch.get_num_threads():
        torch.set_num_threads(threads)


def _load_pipeline(source: str, task: str | None, device: object, kwargs: dict[str, object]) -> Pipe:
    from transformers import pipeline
    from transformers.pipelines import PIPELINE_REGISTRY

    if device is not None:
        kwargs["device"] = device
    try:
        if task is not None:
            # Before the weights are loaded, which may take minutes.
            refuse_unserved(PIPELINE_REGISTRY.check_task(task)[0])
        place = _where(source, kwargs)
        if task is None and os.path.isdir(place):
            _refuse_without_task(place)
        return cast("Pipe", pipeline(task=task, model=place, **kwargs))
    except StartError as error:
        raise StartError(f"cannot load {source!r}: {error}") from None
    except Exception as error:
        raise StartError(f"cannot load {source!r}: {advice(error)}") from error


def _where(source: str, kwargs: Mapping[str, Any]) -> str:
    """What to load an id from: the Hub, or if that cannot be reached the folder of the cached copy.

    huggingface_hub itself tries six times for every file, which is half a minute for an id that is
    misspelt.
    """
    if os.path.isdir(source):
        return source
    from huggingface_hub import constants, get_session, snapshot_download

    if not constants.is_offline_mode():
        try:
            get_session().head(constants.ENDPOINT, timeout=_HUB_TIMEOUT_S)
        except Exception:  # the classes are those of the HTTP library of the session
            pass
        else:
            return source
    cache = (kwargs.get("model_kwargs") or {}).get("cache_dir")
    return str(
        snapshot_download(source, revision=kwargs.get("revision"), cache_dir=cache, local_files_only=True)
    )


def _refuse_without_task(folder: str) -> None:
    """Only the Hub states a model's task; its folder can suggest one.

    Raises:
        StartError: with the task to pass, unless the folder brings a pipeline of its own.
    """
    try:
        config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise StartError("that folder has no config.json that can be read: it holds no model") from None
    if config.get("custom_pipelines"):
        return
    architecture = str(next(iter(config.get("architectures") or ()), ""))
    task = next((task for end, task in _TASKS.items() if architecture.endswith(end)), None)
    if task == "text-classification" and Path(folder, "preprocessor_config.json").exists():
        task = "audio-classification"
    advice = f"task={task!r}, which fits a {architecture}" if task else "such as task='fill-mask'"
    raise StartError(
        f"its task cannot be found out here: only the Hub states it, for an id. Pass it: {advice}"
    )


def _is_async(function: Callable[..., object]) -> bool:
    """Whether calling it gives a coroutine or a generator: also for an object with such a `__call__`."""
    return any(
        test(each)
        for test in (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
        for each in (function, type(function).__call__)
    )


def _check_takes_list(function: Callable[..., object]) -> None:
    """Raise `StartError` if a function cannot be called with one list and nothing else."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin without a signature
        return
    try:
        signature.bind([])
    except TypeError as error:
        raise StartError(
            f"{_name(function)} cannot be called with one list of inputs ({error}); what else it needs must "
            "have a default, or be held by functools.partial"
        ) from None


def _name(value: object) -> str:
    return str(getattr(value, "__name__", type(value).__name__))
