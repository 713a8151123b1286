"""What kind of failure an exception is, and what its client is told.

Decided by class names and fixed phrases of the libraries, so that nothing has to be imported. The
phrases are matched where the libraries write them and not anywhere in a text, because exception texts
may quote a client.

Not here: what follows from it (`recovery.py`).
"""

from __future__ import annotations

import re
from typing import NamedTuple

from serving_kit.errors import ModelFailed, RequestTooLarge, ServingError, Unavailable
from serving_kit.model import FailureKind


class Failure(NamedTuple):
    """An exception of the model as a value."""

    error: BaseException
    kind: FailureKind
    detail: str = ""  # class and text of the exception, made on the model thread

    @property
    def rejects_input(self) -> bool:
        """Whether it says something about the input only: the model works."""
        return isinstance(self.error, ServingError) and not isinstance(self.error, ModelFailed)

    @property
    def is_plain(self) -> bool:
        """Whether its text is all there is to know: it has no cause for the owner to look at."""
        return isinstance(self.error, ServingError) and self.error.__cause__ is None


class WrongNumberOfOutputs(RuntimeError):
    """The model did not return one output per input, so that no output can be assigned to an input."""


class WorkerDied(RuntimeError):
    """The model thread ended on its own; its cause is what ended it."""


# PyTorch's allocators. The class of CUDA's is recognised by its name.
_NO_MEMORY = re.compile(
    r"(not enough memory|can't allocate memory): you tried to allocate \d+ bytes"
    r"|^(CUDA|HIP|XPU) (driver )?error: out of memory"
    r"|^MPS backend out of memory"
    r"|^(CUDA|HIP) error: \w+_STATUS_ALLOC_FAILED"
)
# Errors after which every further call in the process fails. PyTorch begins all of them like this.
_LOST = re.compile(
    r"^(CUDA|HIP|cuDNN|CUDA driver) error: .*("
    r"device-side assert|illegal memory access|illegal address|misaligned address|illegal instruction"
    r"|invalid program counter|unspecified launch failure|launch failed|launch timed out"
    r"|hardware stack error|uncorrectable ECC|unspecified driver error|unknown error)",
    re.IGNORECASE,
)


def kind(error: BaseException) -> FailureKind:
    """What `error`, as a model raised it, says about the model's state."""
    for each in _chain(error):
        if isinstance(each, MemoryError) or _is_named(each, "OutOfMemoryError"):
            return FailureKind.MEMORY
        if isinstance(each, RuntimeError):
            text = _text(each)
            if _NO_MEMORY.search(text):
                return FailureKind.MEMORY
            if _LOST.search(text):
                return FailureKind.DEVICE
    if isinstance(error, WrongNumberOfOutputs):
        return FailureKind.OUTPUTS
    return FailureKind.CRASH if isinstance(error, WorkerDied) else FailureKind.ERROR


def client_error(failure: Failure, *, alone: bool) -> ServingError:
    """What the clients of a failure are told; its text never quotes the exception.

    Args:
        failure: What the model raised.
        alone: Whether it came of one input while others fit into memory.
    """
    error, detail = failure.error, failure.detail
    if isinstance(error, ServingError):
        return error
    if failure.kind is not FailureKind.MEMORY:
        return ModelFailed("the model failed on this request", detail=detail)
    if alone:
        return RequestTooLarge("this input needs more memory than the server has", detail=detail)
    unavailable = Unavailable("the server has run out of memory")
    unavailable.detail = detail
    return unavailable


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # the model's own class, which may raise here as anywhere
        return ""


def _is_named(error: BaseException, name: str) -> bool:
    return any(base.__name__ == name for base in type(error).__mro__)


def _chain(error: BaseException) -> list[BaseException]:
    """The exception and what it was raised from; not what merely was being handled meanwhile."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and all(cause is not each for each in chain):
        chain.append(cause)
    return chain
