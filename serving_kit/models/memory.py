"""Giving back the memory of a step that has failed.

Not here: which exception means a lack of memory (`failures/classify.py`), the limit that follows
(`failures/memory_limit.py`).
"""

from __future__ import annotations

import contextlib
import gc
import sys
import traceback


def free_memory(error: BaseException, *, thorough: bool = False) -> None:
    """Free what a failed step holds: tensors in the frames of its traceback, cycles, cached CUDA blocks.

    Model thread. Raises nothing.

    Args:
        error: What the step raised; the frames of its traceback and of its causes are cleared.
        thorough: Collect the oldest generation too, such as models that re-run cells have left in cycles.
            This takes 0.1 s in a large process.
    """
    each: BaseException | None = error
    while each is not None:
        traceback.clear_frames(each.__traceback__)
        each = each.__cause__ or each.__context__
    gc.collect() if thorough else gc.collect(1)
    # Looked up and not imported: without torch in the process there is no memory of torch to free.
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    with contextlib.suppress(Exception):  # if the device is in an error state, the next step reports it
        if cuda is not None and cuda.is_initialized():
            cuda.empty_cache()
