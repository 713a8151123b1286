"""Which kind of failure an exception is, and what its client is told."""

from __future__ import annotations

import pytest

from serving_kit.errors import (
    InputRejected,
    ModelFailed,
    RequestTooLarge,
    ServingError,
    Unavailable,
)
from serving_kit.failures.classify import (
    Failure,
    WorkerDied,
    WrongNumberOfOutputs,
    client_error,
    kind,
)
from serving_kit.model import FailureKind

pytestmark = pytest.mark.light


class OutOfMemoryError(RuntimeError):
    """As `torch.cuda.OutOfMemoryError` is named."""


def raised_from(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("no"), FailureKind.ERROR),
        (MemoryError(), FailureKind.MEMORY),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), FailureKind.MEMORY),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: "
                "you tried to allocate 400000000000 bytes. Error code 12 (Cannot allocate memory)"
            ),
            FailureKind.MEMORY,
        ),
        (
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 42 bytes."),
            FailureKind.MEMORY,
        ),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be..."), FailureKind.MEMORY),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
            FailureKind.MEMORY,
        ),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), FailureKind.MEMORY),
        (raised_from(ValueError("wrapped"), MemoryError()), FailureKind.MEMORY),
        (RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors..."), FailureKind.DEVICE),
        (RuntimeError("CUDA error: an illegal memory access was encountered\n..."), FailureKind.DEVICE),
        (RuntimeError("HIP error: unspecified launch failure"), FailureKind.DEVICE),
        (RuntimeError("CUDA error: invalid configuration argument"), FailureKind.ERROR),
        (WrongNumberOfOutputs("2 inputs, 1 outputs"), FailureKind.OUTPUTS),
        (raised_from(WorkerDied("dead"), ValueError()), FailureKind.CRASH),
        # What a client has written proves nothing.
        (ValueError("CUDA error: device-side assert triggered"), FailureKind.ERROR),
        (RuntimeError("cannot read 'CUDA error: device-side assert triggered'"), FailureKind.ERROR),
        (RuntimeError("cannot read 'not enough memory'"), FailureKind.ERROR),
    ],
)
def test_kinds(error: BaseException, expected: FailureKind) -> None:
    assert kind(error) is expected


def test_torch_without_the_memory() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50, dtype=torch.uint8)
    assert kind(raised.value) is FailureKind.MEMORY


def test_exception_whose_text_raises() -> None:
    class Odd(RuntimeError):
        def __str__(self) -> str:
            raise ValueError

        def __eq__(self, other: object) -> bool:
            raise ValueError

        __hash__ = RuntimeError.__hash__

    error = raised_from(Odd(), Odd())
    assert kind(error) is FailureKind.ERROR
    assert client_error(Failure(error, FailureKind.ERROR), alone=True).detail is not None


def test_circle_of_causes() -> None:
    first, second = ValueError(), ValueError()
    first.__cause__, second.__cause__ = second, first
    assert kind(first) is FailureKind.ERROR


@pytest.mark.parametrize(
    ("error", "kind", "alone", "expected"),
    [
        (ValueError("secret"), FailureKind.ERROR, True, ModelFailed),
        (ValueError("secret"), FailureKind.OUTPUTS, False, ModelFailed),
        (ValueError("secret"), FailureKind.DEVICE, True, ModelFailed),
        (MemoryError("secret"), FailureKind.MEMORY, True, RequestTooLarge),
        (MemoryError("secret"), FailureKind.MEMORY, False, Unavailable),
    ],
)
def test_clients_are_told(
    error: Exception, kind: FailureKind, alone: bool, expected: type[ServingError]
) -> None:
    told = client_error(Failure(error, kind, f"{error!r}"), alone=alone)
    assert type(told) is expected
    assert "secret" not in str(told)
    assert "secret" in str(told.detail)


def test_errors_for_clients_pass_unchanged() -> None:
    rejected = InputRejected("no mask token")
    assert client_error(Failure(rejected, FailureKind.ERROR), alone=True) is rejected


@pytest.mark.parametrize(
    ("error", "rejects_input", "is_plain"),
    [
        (InputRejected("no"), True, True),
        (raised_from(InputRejected("no"), ValueError()), True, False),
        (ModelFailed("no"), False, True),
        (ValueError("no"), False, False),
    ],
)
def test_failures_of_the_input(error: BaseException, rejects_input: bool, is_plain: bool) -> None:
    failure = Failure(error, FailureKind.ERROR)
    assert (failure.rejects_input, failure.is_plain) == (rejects_input, is_plain)
