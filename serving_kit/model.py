"""What the core needs from a model: one protocol, and the values that pass between them.

    Input ── prepare ──▶ Prepared ─┐
    Input ── prepare ──▶ Prepared ─┴─ step ──▶ Done(output) | More(chunk) | Failed(error) ── finish ──▶ answer
                             ▲                        │
                             └───── next step ────────┘

A model that answers at once returns `Done` for every part of its first step. A generative model returns
`More` until a sequence has ended. The engine has no special case for either.

Not here: models (`models/`), when a step runs (`engine.py`), the thread that runs it (`batching.py`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

P = TypeVar("P")  # what `prepare` makes of one input: the model's own type


class Input(NamedTuple):
    """One input as a client sent it: a value, and the call parameters."""

    value: object
    parameters: Mapping[str, object] = {}


class Work(NamedTuple):
    """What the next step of one item costs.

    One item may be several sequences: the labels of a zero-shot input, the strides of a long text.
    """

    sequences: int = 1
    longest: int = 1  # tokens of its longest sequence
    context_tokens: int = 0  # in its cache, read by the step and not computed again
    most_context: int | None = None  # tokens in its cache once it has ended, at most; None: it has no cache
    packed_tokens: int | None = None  # of all its sequences, added up; None: sequences x longest

    @property
    def divisible(self) -> bool:
        """Whether a step may compute only the first of its tokens. What has a cache can go on behind them."""
        return self.most_context is not None

    @property
    def tokens(self) -> int:
        """Tokens that a model computes for the item alone if it pads: sequences x longest."""
        return self.sequences * self.longest

    def computed(self, *, packed: bool) -> int:
        """Tokens that a model computes for the item alone: without padding if it packs."""
        return self.tokens if self.packed_tokens is None or not packed else self.packed_tokens


def computed_tokens(items: Iterable[int], *, packed: bool) -> int:
    """Tokens that a model computes in one step: added up if it packs, else items x longest; 0 for none.

    Args:
        items: Tokens of each item.
        packed: Whether the model needs no padding.
    """
    tokens = list(items)
    return sum(tokens) if packed else len(tokens) * max(tokens, default=0)


class Prepared(NamedTuple, Generic[P]):
    """One input, ready for the model.

    Attributes:
        payload: The model's own. A step that raises leaves it unchanged.
        work: What its first step costs.
        key: Items share a step only if their keys are equal.
    """

    payload: P
    work: Work = Work()
    key: Hashable = ()


AnyPrepared = Prepared[Any]


class Part(NamedTuple):
    """One item in a step: its sequence, and the tokens that it may compute in this step."""

    prepared: AnyPrepared
    tokens: int  # fewer than its work only where that is divisible
    streamed: bool = False  # whether its client takes the answer in chunks


class Done(NamedTuple):
    """The item has ended.

    Attributes:
        output: `finish` makes the answer of it.
        chunk: What a stream passes on before the answer; None: nothing.
        generated: Tokens that this step has added to a text.
    """

    output: object
    chunk: object = None
    generated: int = 0


class More(NamedTuple):
    """The item goes on in the next step.

    Attributes:
        chunk: What a stream passes on now; None: nothing.
        work: What its next step costs.
        generated: Tokens that this step has added to a text; 0: it has computed a part of the prompt.
    """

    chunk: object = None
    work: Work = Work()
    generated: int = 0


class Failed(NamedTuple):
    """The item has failed alone; the others of the step have not."""

    error: BaseException


StepResult = Done | More | Failed


class FailureKind(StrEnum):
    """What went wrong in the model or around it."""

    ERROR = "error"  # the model raised
    OUTPUTS = "wrong_outputs"  # not one output per input
    MEMORY = "out_of_memory"
    DEVICE = "device"  # the accelerator is in a state that only a new process clears
    CRASH = "crash"  # the kit's own model thread died


class Limit(NamedTuple):
    """A bound, and why it is one."""

    value: int
    reason: str


class Layout(NamedTuple):
    """How a model lays out the items of a step, and why so.

    Packed: one after another in one row, so that a step costs the sum of their tokens. Padded: one row for
    each sequence, as long as the longest.
    """

    packed: bool = False
    reason: str = ""


PADDED = Layout()


@dataclass(frozen=True, slots=True)
class Limits:
    """What a model can do at most, and what it computes of a step."""

    max_batch_size: Limit | None = None  # items in one step; None: any number
    layout: Layout = PADDED
    sharing_obstacle: str = ""  # why equal inputs cannot share a computation; empty: see `samples`
    cache: Limit | None = None  # tokens that the caches of all sequences may hold; None: it has no caches


class Model(Protocol):
    """A model as the worker runs it.

    `prepare`, `step`, `finish`, `release` and `free_memory` are called on the model thread only, `estimate`
    on the loop thread, `classify` on any. A `step` that raises leaves every sequence unchanged, so that it
    can be run again in parts; so is `example`, to see whether the model still answers.
    """

    @property
    def limits(self) -> Limits:
        """What it can do at most, with the reasons."""

    @property
    def example(self) -> Input | None:
        """An input that it has answered well; None: there is none that may be run again."""

    def estimate(self, value: object) -> Work:
        """The rough cost of an input before `prepare`. Loop thread; cheap, without a tokenizer."""

    def prepare(self, value: object, parameters: Mapping[str, object]) -> AnyPrepared:
        """Check and convert one input.

        Raises:
            InputRejected: this model cannot take the input.
        """

    def step(self, parts: Sequence[Part]) -> Sequence[StepResult]:
        """Run the model once on items of one key. Returns one result for each part, in order."""

    def finish(self, prepared: AnyPrepared, output: object) -> object:
        """Make the client's answer of the output of one item."""

    def release(self, prepared: AnyPrepared) -> None:
        """Give back what an item holds (its cache); idempotent.

        Called once it has ended in any way, and before that where others need the memory: then its next step
        computes again what the cache held.
        """

    def classify(self, error: BaseException) -> FailureKind:
        """Which kind of failure an exception of this model is. Any thread."""

    def free_memory(self, error: BaseException, *, thorough: bool) -> None:
        """Give back the memory that a failed step holds.

        Args:
            error: What it raised: the frames of its traceback hold tensors.
            thorough: Whether to look for old cycles too, which takes 0.1 s in a large process.
        """


class Precision(NamedTuple):
    """The precision that was asked for and the one that is served, with what was measured.

    exact: the numbers of the model as it was given, within rounding. fast: bfloat16.
    """

    asked: str = "exact"
    used: str = "exact"
    reason: str = ""  # why it is not the one that was asked for; empty: it is
    speedup: float | None = None  # time of exact / time of fast, for the example texts; None: not measured
    top1_agreement: float | None = None  # share of the first answers that are the same
    cosine_similarity: float | None = None  # of features, in place of the above: the least of all texts
    largest_score_difference: float | None = None
    extra_bytes: int = 0  # of weights that are in memory beside those of the given model


EXACT = Precision()


class Timing(NamedTuple):
    """What one step took."""

    computed_tokens: int
    seconds: float


class ServedModel(Model, Protocol):
    """A model with what the server says about it."""

    name: str

    @property
    def notes(self) -> Sequence[str]:
        """What its owner should know."""

    @property
    def task_name(self) -> str:
        """What it does: fill-mask, function."""

    @property
    def device(self) -> str:
        """Where it runs: cpu, cuda:0."""

    @property
    def media(self) -> bool:
        """Whether its inputs are images or sound."""

    @property
    def timings(self) -> Sequence[Timing]:
        """Steps that it has run before it was served."""

    @property
    def precision(self) -> Precision:
        """The precision of its numbers."""

    def changed(self) -> str:
        """A change to the model that answers do not show, and the remedy; empty: none. Any thread; cheap."""

    def check(self, values: Sequence[object], parameters: Mapping[str, object]) -> None:
        """Raise `MalformedRequest` for what this model never takes. Loop thread; cheap."""

    def samples(self, parameters: Mapping[str, object]) -> bool:
        """Whether an equal input may get another answer with these parameters. Loop thread; cheap."""
