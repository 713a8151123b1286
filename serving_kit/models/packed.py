"""A step without padding: all texts in one row through the unmodified model.

    chunks ── one row ──▶ model (attention by text) ── cut up ── in the shape of pipe.forward ──▶ outputs

A batch of texts of different lengths computes rows for padding, which is often more than for text. Packed,
a step computes the sum of the lengths, so that first come, first served costs no more than sorting does.

Each text gets what `pipe.forward` gives for it alone: the pipeline's own `_forward` runs once for each text,
around a stand-in of the model that returns the text's part of the output.

Not here: attention (`packed_attention.py`), whether this is right and faster (`packing_trial.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from serving_kit.models.last_layer import LastLayer
from serving_kit.models.mask_head import MaskLogits
from serving_kit.models.packed_attention import Row, packed_attention
from serving_kit.models.pipes import Chunk, Output, Parameters, Pipe, tokenizer_of, width
from serving_kit.models.positions import position_rows

if TYPE_CHECKING:
    import torch


class Reads(Enum):
    """Which tokens' output of the encoder a task reads."""

    FIRST = "first"  # the first of each text: classification
    MASKS = "masks"
    ALL = "all"


class Texts(NamedTuple):
    """The texts of one row, in the order of the row."""

    chunks: Sequence[Chunk]
    order: Sequence[int]  # their numbers in the step

    @property
    def lengths(self) -> list[int]:
        """Tokens of each."""
        return [width(chunk) for chunk in self.chunks]


class PackedForward:
    """Runs the chunks of one pipeline in one row. Model thread only.

    Args:
        pipe: With modules of its own.
        reads: What its task reads.
        first_position: Number of the first token's position; None: the model is given none.
    """

    def __init__(self, pipe: Pipe, reads: Reads, first_position: int | None) -> None:
        self.pipe = pipe
        self.last_layer: LastLayer | None = None
        self._reads = reads
        self._first_position = first_position
        self._rows = position_rows(pipe)
        self._names = [name for name in tokenizer_of(pipe).model_input_names if name != "attention_mask"]
        self._padding = tokenizer_of(pipe).pad_token_id
        self._part = _PartOfOutput(pipe.model)
        self._shaper = copy.copy(pipe)  # its `forward` gives an output the shape that `postprocess` takes
        self._shaper.model = cast("torch.nn.Module", self._part)

    def outputs(self, chunks: Sequence[Chunk], parameters: Parameters) -> list[Output]:
        """For each chunk what `pipe.forward` gives for it alone.

        Args:
            chunks: Of one or several inputs, without padding.
            parameters: Of `pipe.forward`.
        """
        # Texts of one length become neighbours, and share a call of the attention.
        order = sorted(range(len(chunks)), key=lambda index: width(chunks[index]))
        texts = Texts([chunks[index] for index in order], order)
        row = self.row(texts)
        output = self.run(texts, row)
        outputs: list[Output] = [None] * len(chunks)
        start = 0
        logits = output["logits"][0].cpu() if self._reads is Reads.MASKS else None
        for place, (index, length) in enumerate(zip(order, row.lengths, strict=True)):
            if self._reads is Reads.MASKS:
                end = start + row.counts[place]
                own = MaskLogits(cast("torch.Tensor", logits)[start:end])
                outputs[index] = {"input_ids": chunks[index]["input_ids"], "logits": own}
            else:
                end = start + length
                self._part.output = self._own(output, place, start, end, sum(row.lengths))
                outputs[index] = self._shaper.forward(chunks[index], **parameters)
            start = end
        self._part.output = None
        return outputs

    def takes(self, chunk: Chunk) -> bool:
        """Whether a chunk may be in a row: not with padding, which only a padded step leaves out.

        A model that counts positions behind that of its padding token gives a token of that kind in the text
        itself no position of its own.
        """
        mask = chunk.get("attention_mask")
        if mask is not None and not bool(mask.all()):
            return False
        return not self._first_position or not bool((chunk["input_ids"] == self._padding).any())

    def remove(self) -> None:
        """Take the hooks on the model away."""
        if self.last_layer is not None:
            self.last_layer.remove()

    def row(self, texts: Texts) -> Row:
        """The row of some texts, with what is read of them."""
        import torch

        lengths = texts.lengths
        if self._reads is Reads.ALL or self.last_layer is None:
            return Row(lengths)
        if self._reads is Reads.FIRST:
            first = torch.tensor([0, *lengths[:-1]]).cumsum(0)
            return Row(lengths, first.to(self.pipe.device), [1] * len(lengths), each_alone=True)
        masks = [chunk["input_ids"][0] == tokenizer_of(self.pipe).mask_token_id for chunk in texts.chunks]
        read = torch.cat(masks).nonzero().squeeze(-1)
        return Row(lengths, read.to(self.pipe.device), [int(each.sum()) for each in masks])

    def run(self, texts: Texts, row: Row) -> Any:
        """What the model gives for a row."""
        import torch

        device = self.pipe.device
        inputs = {
            name: torch.cat([chunk[name] for chunk in texts.chunks], dim=1).to(device)
            for name in self._names
            if name in texts.chunks[0]
        }
        if self._first_position is not None:
            first, most = self._first_position, max(row.lengths)
            if (
                self._rows is not None and first + most > self._rows
            ):  # an accelerator would not raise, but break
                raise IndexError(
                    f"{self._rows} rows of positions are too few for {most} tokens from {first} on"
                )
            places = torch.cat([torch.arange(first, first + length) for length in row.lengths])
            inputs["position_ids"] = places[None].to(device)
        with torch.inference_mode(), packed_attention(self.pipe.model, row):
            return self.pipe.model(**inputs)

    def _own(self, output: Any, place: int, start: int, end: int, tokens: int) -> Any:
        """The part of one text, in the class of the whole."""
        import torch

        own = {}
        for name, value in output.items():
            if not isinstance(value, torch.Tensor):
                continue
            if self._reads is Reads.FIRST:
                own[name] = value[place : place + 1]
            elif value.ndim == 3 and value.shape[1] == tokens:
                own[name] = value[:, start:end]
        return type(output)(**own)


class _PartOfOutput:
    """Takes the place of the model in `pipe.forward`, and returns what has been computed already."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self.output: Any = None
        self.forward = model.forward  # pipelines look at its signature

    def __call__(self, **inputs: object) -> Any:
        return self.output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
