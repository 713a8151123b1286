"""What to do about an exception that loading a model has raised: one line for the owner.

Not here: loading (`loading.py`), failures while serving (`failures/`).
"""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple


class _Advice(NamedTuple):
    """A remedy, and the exceptions that it is for: any of the class names, or any of the phrases."""

    names: Set[str]
    phrases: tuple[str, ...]  # in lower case, as torch, transformers and huggingface_hub write them
    text: str


# The first that fits is given.
_TABLE = (
    _Advice(
        {"MemoryError", "OutOfMemoryError"},
        ("out of memory",),
        "out of memory. Free some (stop other servers, restart other kernels), take a smaller model, "
        "load in half precision (pipeline_kwargs={'dtype': 'float16'}), or if this replaces a running "
        "server, stop that first: serve(..., stop_first=True)",
    ),
    _Advice(
        set(),
        ("not compiled with cuda",),
        "this build of torch has no CUDA; leave the device out, say 'cpu', or install another build",
    ),
    _Advice(
        {"GatedRepoError"},
        (),
        "its owner has to grant you access on the Hub first; then log in with `hf auth login`",
    ),
    _Advice(
        {"RepositoryNotFoundError", "HFValidationError"},
        ("valid model identifier",),
        "there is no folder and no public model of that name. Check the spelling; a private model "
        "needs `hf auth login`",
    ),
    _Advice(
        {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "ConnectionError"},
        ("couldn't connect",),
        "it is not on this machine and the Hub cannot be reached. Check the network, or pass a folder; "
        "serving_kit.serve() without arguments works offline",
    ),
)


def advice(error: BaseException) -> str:
    """What went wrong and what to do, in a line. The traceback stays attached as the cause."""
    chain = _chain(error)
    names = {type(each).__name__ for each in chain}
    texts = " ".join(map(str, chain)).lower()
    for row in _TABLE:
        if names & row.names or any(phrase in texts for phrase in row.phrases):
            return row.text
    first = str(error).strip().split("\n")[0] or type(error).__name__
    if "unknown task" in texts:
        return f"{error.args[0] if error.args else first}"
    if "inferring the task" in texts or "infer the task" in texts:
        return f"{first} Say which task it is: serve({'...'}, task='fill-mask')"
    return f"{type(error).__name__}: {first}"


def _chain(error: BaseException) -> list[BaseException]:
    """The exception, what it was raised from, and what was being handled when it was raised."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return chain
