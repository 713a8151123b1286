"""From what `serve()` was given to a model that can answer, or an error that says what to do.

torch and transformers are imported when a pipeline is loaded, never before.

Not here: what a model does with an input (`models.py`).
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serving_kit.errors import StartError
from serving_kit.functions import CallableModel
from serving_kit.models import PipelineModel, short_name
from serving_kit.tasks import refuse_unserved

DEMO_MODEL = Path(__file__).parent / "demo_model"
DEMO_NAME = "serving-kit-demo"

ServedModel = PipelineModel | CallableModel


def load_model(
    model: Any = None,
    *,
    task: str | None = None,
    device: Any = None,
    pipeline_kwargs: Mapping[str, Any] | None = None,
    shortcuts: bool = True,
) -> ServedModel:
    """Load what `serve(model)` was given, and warm it up.

    Thread: the caller's, so that progress bars and interrupts go where they belong.

    Args:
        model: None for the bundled demo model; a Hub id or folder; a `Pipeline`; a `list -> list`
            callable.
        task: A task of `transformers.pipeline`; None lets it find out.
        device: As for `transformers.pipeline`; None takes the first accelerator, else the CPU.
        pipeline_kwargs: More arguments for `transformers.pipeline`.
        shortcuts: Take shorter roads to the same answers (`mask_head.py`, `fast_linear.py`).

    Raises:
        StartError: with what to do about it.
    """
    served: ServedModel
    if model is None:
        pipe = _load_pipeline(str(DEMO_MODEL), task or "fill-mask", device, dict(pipeline_kwargs or {}))
        served = PipelineModel(pipe, DEMO_NAME, shortcuts)
    elif isinstance(model, (str, os.PathLike)):
        pipe = _load_pipeline(os.fspath(model), task, device, dict(pipeline_kwargs or {}))
        served = PipelineModel(pipe, short_name(os.fspath(model)), shortcuts)
    elif task or device is not None or pipeline_kwargs:
        raise StartError("task, device and pipeline_kwargs are for loading a model by its id or folder")
    elif all(hasattr(model, step) for step in ("preprocess", "forward", "postprocess", "task")):
        served = PipelineModel(model, shortcuts=shortcuts)
    elif callable(model):
        if _is_async(model):
            raise StartError(f"{_name(model)} must be a plain function from a list to a list, not async")
        served = CallableModel(model)
    else:
        raise StartError(
            f"cannot serve {type(model).__name__}: pass a Hub id, a folder, a transformers Pipeline, "
            "or a function from a list to a list"
        )
    try:
        served.timings = served.warm_up()
    except Exception as error:
        raise StartError(f"{served.name} is loaded, but cannot answer: {_explain(error)}") from error
    return served


def _load_pipeline(source: str, task: str | None, device: Any, kwargs: dict[str, Any]) -> Any:
    try:
        from transformers import pipeline
        from transformers.pipelines import PIPELINE_REGISTRY
    except ImportError as error:
        raise StartError("serving a model by name needs transformers and torch: pip install torch") from error
    if device is not None:
        kwargs["device"] = device
    try:
        if task is not None:
            refuse_unserved(
                PIPELINE_REGISTRY.check_task(task)[0]
            )  # before the weights, which may take minutes
        return pipeline(task=task, model=source, **kwargs)
    except StartError:
        raise
    except Exception as error:
        raise StartError(f"cannot load {source!r}: {_explain(error)}") from error


def _explain(error: BaseException) -> str:
    """What went wrong in a line, and what to do. The traceback stays attached as the cause."""
    chain = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    names = {type(each).__name__ for each in chain}
    story = " ".join(map(str, chain))
    first = str(error).strip().split("\n")[0] or type(error).__name__
    if isinstance(error, MemoryError) or "OutOfMemoryError" in names or "out of memory" in story.lower():
        return (
            "out of memory. Free some (stop other servers, restart other kernels), take a smaller model, "
            "or load in half precision: pipeline_kwargs={'dtype': 'float16'}"
        )
    if "GatedRepoError" in names:
        return "its owner has to grant you access on the Hub first; then log in with `hf auth login`"
    if names & {"RepositoryNotFoundError", "HFValidationError"} or "valid model identifier" in story:
        return (
            "there is no folder and no public model of that name. Check the spelling; a private model "
            "needs `hf auth login`"
        )
    if names & {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "ConnectionError"} or (
        "couldn't connect" in story.lower()
    ):
        return (
            "it is not on this machine and the Hub cannot be reached. Check the network, or pass a folder; "
            "serving_kit.serve() without arguments works offline"
        )
    if "Unknown task" in story:
        return f"{error.args[0] if error.args else first}"
    if "Inferring the task" in story or "infer the task" in story.lower():
        return f"{first} Say which task it is: serve({'...'}, task='fill-mask')"
    return f"{type(error).__name__}: {first}"


def _is_async(model: Any) -> bool:
    """Whether calling it gives a coroutine or a generator: also for an object with such a `__call__`."""
    return any(
        test(each)
        for test in (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
        for each in (model, type(model).__call__)
    )


def _name(value: Any) -> str:
    return str(getattr(value, "__name__", type(value).__name__))
