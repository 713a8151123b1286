"""The parts of a `transformers` pipeline that are used here, as types.

transformers and torch are imported late, and mypy does not read them. The protocols state what is relied on.

Not here: which pipelines are served (`tasks.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    import torch

Parameters: TypeAlias = Mapping[str, object]  # of a call, or of one step of a pipeline
# Inputs of the model: `input_ids` of shape (items, tokens), ...
Chunk: TypeAlias = "Mapping[str, torch.Tensor]"
Output: TypeAlias = Any  # what `_forward` returns for one input: a mapping, a tuple, or a list of these
Collate: TypeAlias = Callable[[Sequence[Chunk]], Chunk]  # pads chunks to one length
Runner: TypeAlias = Callable[[Chunk], Sequence[Output]]  # runs a collated batch: one output for each item


class Tokenizer(Protocol):
    """The attributes of a tokenizer that are read here."""

    mask_token: str
    mask_token_id: int
    pad_token_id: int | None
    padding_side: str
    all_special_ids: list[int]
    model_input_names: list[str]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of tokens."""


class Pipe(Protocol):
    """A `transformers.Pipeline`. Its methods are called on one thread only, the model thread."""

    task: str
    model: torch.nn.Module
    tokenizer: Tokenizer | None
    device: torch.device
    _preprocess_params: Parameters  # given when it was constructed; a call's own go before these
    _forward_params: Parameters
    _postprocess_params: Parameters

    def _sanitize_parameters(self, **parameters: object) -> tuple[Parameters, Parameters, Parameters]:
        """Split the parameters of a call over `preprocess`, `_forward` and `postprocess`."""

    def preprocess(self, inputs: object, **parameters: object) -> Chunk | Iterable[Chunk]:
        """Tokenise one input; a `ChunkPipeline` gives several chunks."""

    def forward(self, chunk: Chunk, **parameters: object) -> Output:
        """Call the model."""

    def postprocess(self, output: Output, **parameters: object) -> object:
        """Make the answer of one output."""


def tokenizer_of(pipe: Pipe) -> Tokenizer:
    """The tokenizer of a pipeline for text."""
    assert pipe.tokenizer is not None, f"a {pipe.task} pipeline without a tokenizer. This is a bug."
    return pipe.tokenizer


def width(chunk: Chunk) -> int:
    """Tokens of one chunk: the length of its `input_ids`, shape (1, tokens); 1 if it has none."""
    ids = chunk.get("input_ids") if hasattr(chunk, "get") else None
    return int(ids.shape[-1]) if ids is not None else 1
