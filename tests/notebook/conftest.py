"""Kernels that the tests of a module share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support_kernel import Kernel


@pytest.fixture(scope="module")
def shared() -> Iterator[Kernel]:
    """The kernel of the module."""
    from tests.support_kernel import Kernel

    kernel = Kernel()
    yield kernel
    kernel.close()


@pytest.fixture
def kernel(shared: Kernel) -> Iterator[Kernel]:
    """The kernel of the module; the servers of the test are stopped afterwards."""
    from tests.support_kernel import OUR_THREADS

    yield shared
    shared.run("import serving_kit; serving_kit.stop_all()")
    assert shared.value(OUR_THREADS) == []
    assert shared.stray_output() == []
