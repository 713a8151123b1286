"""What single tasks need beyond the pipeline's own `preprocess`, `forward` and `postprocess`.

`TaskSteps` is the rule; the subclasses are the exceptions, one for each task that has some. A plain
`pipeline(list, batch_size=n)` differs from `pipeline(value)` in a few of them: `text-classification` drops a
list level, `feature-extraction` leaves the rows of the padding in. They are corrected here, so that every
client gets what `pipeline(value)` gives.

Not here: which tasks are served and what clients may send (`tasks.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from serving_kit.errors import InputRejected
from serving_kit.model import Input
from serving_kit.models import generated
from serving_kit.models.mask_head import mask_head
from serving_kit.models.packed import Reads
from serving_kit.models.pipes import Chunk, Collate, Output, Parameters, Pipe, Runner, tokenizer_of, width
from serving_kit.models.pooling import pooled

_MAX_FILLS = 5_000  # each one is the whole text once more: 5,000 of 500 tokens take about a second


@dataclass(frozen=True, slots=True)
class NewTokens:
    """Tokens that a model call adds to those of the input."""

    most: int = 0
    least: int = 0
    total: int | None = None  # most tokens of input and output together, where `max_length` is set


class TaskSteps:
    """A task without exceptions. Model thread, except for the attributes."""

    timed = True  # whether the time of a short example says what a batch costs
    reads: Reads | None = None  # of the encoder's output; None: the task is not packed
    generates = False  # whether the output is made token by token
    own_parameters: frozenset[str] = frozenset()  # of requests, which the pipeline does not know
    padding_sides: tuple[str, ...] = ("right", "left")  # that its answers allow
    needs_config_pad_token = False  # whether the model finds the end of each text by `config.pad_token_id`

    def example(self, pipe: Pipe) -> Input:
        """A short input that the model is warmed up with. Only for tasks that batch."""
        return Input("a word ")

    def new_tokens(self, pipe: Pipe, parameters: Parameters) -> NewTokens:
        """Tokens that `pipe.forward` adds with these parameters.

        Raises:
            InputRejected: each of the parameters is valid, but not all of them together.
        """
        return NewTokens()

    def check(self, pipe: Pipe, chunks: Sequence[Chunk], postprocess: Parameters) -> None:
        """Raise `InputRejected` for an input whose answer would be too large."""

    def shortcut(self, pipe: Pipe, collate: Collate) -> Runner | None:
        """A faster way to the same outputs, tried on this model; None: there is none. May hook modules."""
        return None

    def own_output(self, pipe: Pipe, output: Output, chunk: Chunk, parameters: Parameters) -> Output:
        """What `pipe.postprocess` is given: the output for the input's own tokens only.

        Args:
            pipe: The pipeline.
            output: Of one input of a batch, with rows for its padding.
            chunk: The first of the input.
            parameters: As the client set them.
        """
        return output

    def answer(self, answer: object, output: Output, parameters: Parameters) -> object:
        """What `pipe(value)` gives, made of what `pipe.postprocess` gives.

        Args:
            answer: Of `pipe.postprocess`.
            output: Of `own_output`.
            parameters: As the client set them.
        """
        return answer


class FillMask(TaskSteps):
    """The vocabulary is projected at the masks only, and their number is bounded."""

    reads = Reads.MASKS

    def example(self, pipe: Pipe) -> Input:
        """A text with a mask."""
        return Input(f"a short {tokenizer_of(pipe).mask_token}.")

    def check(self, pipe: Pipe, chunks: Sequence[Chunk], postprocess: Parameters) -> None:
        """Every candidate for every mask is a whole text in the answer."""
        masks = int((chunks[0]["input_ids"] == tokenizer_of(pipe).mask_token_id).sum())
        top_k = cast("int", postprocess.get("top_k", 5))
        if masks * top_k > _MAX_FILLS:
            raise InputRejected(f"{masks} masks make {masks * top_k} answers; the most is {_MAX_FILLS}")

    def shortcut(self, pipe: Pipe, collate: Collate) -> Runner | None:
        """See `mask_head.py`."""
        head = mask_head(pipe, collate)
        return None if head is None else head.run


class TextClassification(TaskSteps):
    """Without `top_k` the pipeline puts its one answer into a list, but not for the items of a batch."""

    reads = Reads.FIRST
    needs_config_pad_token = True

    def answer(self, answer: object, output: Output, parameters: Parameters) -> object:
        """Put the list level back."""
        return answer if "top_k" in parameters else [answer]


class ZeroShotClassification(TaskSteps):
    """Every label is a sequence of its own."""

    reads = Reads.FIRST
    needs_config_pad_token = True

    def example(self, pipe: Pipe) -> Input:
        """A text with one label."""
        return Input("a word ", {"candidate_labels": ["example"]})


class TokenClassification(TaskSteps):
    """Every token has an answer, with the number of its row."""

    reads = Reads.ALL
    padding_sides = ("right",)


class FeatureExtraction(TaskSteps):
    """A batch has rows of features for its padding too. They may be pooled into one vector for each text."""

    reads = Reads.ALL

    def own_output(self, pipe: Pipe, output: Output, chunk: Chunk, parameters: Parameters) -> Output:
        """Features of shape (1, tokens, hidden), pooled (1, 1, hidden), in a tuple as the pipeline does."""
        features, tokens = output[0], width(chunk)
        if features.ndim == 3 and features.shape[1] > tokens:
            left = tokenizer_of(pipe).padding_side == "left"
            features = features[:, -tokens:] if left else features[:, :tokens]
        pooling = parameters.get("pooling")
        if pooling is None and not parameters.get("normalize"):
            return (features,)
        mask = chunk.get("attention_mask")
        if mask is not None and mask.shape[-1] == features.shape[1]:  # the given pipeline itself may pad
            features = features[:, mask[0].bool()]
        return (pooled(features, str(pooling or "none"), normalize=bool(parameters.get("normalize"))),)

    def answer(self, answer: object, output: Output, parameters: Parameters) -> object:
        """One vector instead of a list of vectors, where they are pooled."""
        return cast("list[list[object]]", answer)[0][0] if parameters.get("pooling") else answer


class TextGeneration(TaskSteps):
    """The output has more tokens than the input."""

    timed = False  # a call's cost is in the tokens that it generates
    generates = True
    own_parameters = frozenset({"details", "seed", "usage"})

    def example(self, pipe: Pipe) -> Input:
        """One new token."""
        return Input("a word ", {"max_new_tokens": 1})

    def own_output(self, pipe: Pipe, output: Output, chunk: Chunk, parameters: Parameters) -> Output:
        """With `details` where they, or only the `usage` among them, are asked for."""
        if not (parameters.get("details") or parameters.get("usage")):
            return output
        texts = output.get("generated")
        if texts is None:
            most = self.new_tokens(pipe, {**pipe._forward_params, **_generation(parameters)}).most
            texts = generated.of_group(pipe, output, width(chunk), most)
        seed = cast("int | None", parameters.get("seed"))
        found = [
            generated.details(pipe, each, seed) if parameters.get("details") else generated.usage(each)
            for each in texts
        ]
        return {**output, "details": found}

    def answer(self, answer: object, output: Output, parameters: Parameters) -> object:
        """Each text with its `details` where they are asked for."""
        if "details" not in output:
            return answer
        texts = cast("list[dict[str, object]]", answer)
        return [{**text, "details": each} for text, each in zip(texts, output["details"], strict=True)]

    def new_tokens(self, pipe: Pipe, parameters: Parameters) -> NewTokens:
        """Read the generation config as `generate` will; an error has its own text."""
        config = copy.deepcopy(getattr(pipe, "generation_config", None) or pipe.model.generation_config)
        complete: dict[str, Any] = getattr(pipe, "_prepare_generate_kwargs", dict)(dict(parameters))
        own = complete.pop("generation_config", None)
        try:
            config.update(**(own.to_diff_dict() if own is not None else {}), **complete)
            config.validate()
        except ValueError as error:
            raise InputRejected(str(error).strip().split("\n")[0]) from None
        least = max(config.min_new_tokens or 0, 1)
        if config.max_new_tokens is None and config.max_length is not None:
            # `generate` would count it from the longest input of a batch. Each input gets its own number.
            return NewTokens(config.max_length, least, config.max_length)
        return NewTokens(config.max_new_tokens or 0, least)


def _generation(parameters: Parameters) -> Parameters:
    """Those of `generate` that bound the new tokens."""
    return {name: parameters[name] for name in ("max_new_tokens", "min_new_tokens") if name in parameters}


_PLAIN = TaskSteps()
_TASK_STEPS: Mapping[str, TaskSteps] = {
    "fill-mask": FillMask(),
    "text-classification": TextClassification(),
    "token-classification": TokenClassification(),
    "zero-shot-classification": ZeroShotClassification(),
    "feature-extraction": FeatureExtraction(),
    "text-generation": TextGeneration(),
}


def task_steps(task: str) -> TaskSteps:
    """The steps of a task by its name in `tasks.TASKS`."""
    return _TASK_STEPS.get(task, _PLAIN)
