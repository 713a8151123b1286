"""The protocols name what the pipelines of transformers really have."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from serving_kit.models.pipes import Pipe, Tokenizer, tokenizer_of, width
from tests.support_models import IMAGE_TASKS, SOUND_TASKS, TASKS, tiny


def members(protocol: type) -> set[str]:
    own = {name for name in vars(protocol) if callable(vars(protocol)[name]) and not name.startswith("__")}
    return (own | set(protocol.__annotations__)) - {"_no_init_or_replace_init", "_proto_hook"}


@pytest.mark.parametrize("task", [*TASKS, *IMAGE_TASKS, *SOUND_TASKS, "text-to-audio"])
def test_pipelines_have_every_member(task: str) -> None:
    """A new release of the library may rename one."""
    pipe = tiny(task)
    assert [name for name in members(Pipe) if not hasattr(pipe, name)] == []
    if task in TASKS:
        assert [name for name in members(Tokenizer) if not hasattr(tokenizer_of(pipe), name)] == []


def test_width() -> None:
    assert width(tiny("fill-mask").preprocess("a [MASK]")) == 4
    assert width({}) == 1
