"""One text that is being generated: its tokens, its cache, how the next token is chosen and when it ends.

The library itself reads the parameters: `generate` is called with a decoding method of ours, which keeps the
logits processors and stopping criteria that it was given and generates nothing. So every parameter means
what it means to `pipeline("text-generation")`.

Not here: the model call (`decoding.py`), the cache (`sequence_cache.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from serving_kit.models.generated import EOS_TOKEN, LENGTH, STOP_SEQUENCE, Generated
from serving_kit.models.pipes import Chunk, Output, Parameters, Pipe, tokenizer_of
from serving_kit.models.sequence_cache import SequenceCache
from serving_kit.models.text_pieces import TextPieces

if TYPE_CHECKING:
    import torch

_PLAIN = frozenset({"MaxLengthCriteria", "EosTokenCriteria"})


@dataclass(eq=False, slots=True, weakref_slot=True)
class Generating:
    """A sequence on its way. Model thread only.

    Attributes:
        ids: Tokens of the prompt, and those that were generated.
        prompt: Tokens of the prompt.
        rules: How the next token is chosen, and when the text ends.
        cache: Of the tokens that the model has seen.
        random: Its own random numbers; None: it takes the most likely token.
        pieces: Decodes its text as it grows.
        logprobs: Of the generated tokens, natural logarithms; None: they are not asked for.
        ended: Whether its text is complete.
    """

    ids: list[int]
    prompt: int
    rules: Rules
    pieces: TextPieces
    cache: SequenceCache = field(default_factory=SequenceCache)
    random: torch.Generator | None = None
    logprobs: list[float] | None = None
    ended: bool = False

    @property
    def unseen(self) -> list[int]:
        """Tokens that the model has not computed yet."""
        return self.ids[self.cache.length :]

    def take(self, logits: torch.Tensor) -> int:
        """Choose the next token by the logits behind the last one, shape (1, vocabulary), and append it."""
        import torch

        if self.rules.processors:
            logits = self.rules.processors(torch.tensor([self.ids], device=logits.device), logits.float())
        if self.random is None:
            token = int(logits.argmax(-1))
        else:
            odds = torch.nn.functional.softmax(logits.float(), dim=-1)
            token = int(torch.multinomial(odds, 1, generator=self.random))
        if self.logprobs is not None:
            self.logprobs.append(float(torch.log_softmax(logits[0].float(), dim=-1)[token]))
        self.ids.append(token)
        return token

    def finish_reason(self) -> str:
        """Why a text has ended, in the words of text-generation-inference."""
        if self.ids[-1] in self.rules.ends:
            return EOS_TOKEN
        full = self.rules.most is not None and len(self.ids) >= self.rules.most
        return LENGTH if full else STOP_SEQUENCE

    def has_ended(self) -> bool:
        """Whether a stopping criterion holds after the last token."""
        return self.rules.stops(self.ids)


@dataclass(frozen=True, slots=True)
class Rules:
    """What `generate` makes of the parameters of a call."""

    processors: Any  # of transformers: a LogitsProcessorList
    criteria: Any  # a StoppingCriteriaList
    samples: bool
    most: int | None  # tokens in all
    ends: frozenset[int]  # tokens that end a text
    plain: bool  # whether `most` and `ends` are all of the criteria

    def stops(self, ids: Sequence[int]) -> bool:
        """Whether a text of these tokens has ended."""
        if (self.most is not None and len(ids) >= self.most) or ids[-1] in self.ends:
            return True
        if self.plain:
            return False
        import torch

        return bool(self.criteria(torch.tensor([ids]), None).all())


def begin(
    pipe: Pipe, chunk: Chunk, parameters: Parameters, *, seed: int | None = None, details: bool = False
) -> Generating | None:
    """A sequence for a prompt; None: the call asks for more than one sequence or for a search.

    Args:
        pipe: Of text generation.
        chunk: The prompt, as `preprocess` gives it.
        parameters: Of `pipe.forward`.
        seed: Of its random numbers; None: another one for each sequence.
        details: Whether the probabilities of its tokens are kept.

    Raises:
        Exception: what `generate` raises for the parameters.
    """
    kept: list[tuple[torch.Tensor, Any, Any, Any]] = []

    def keep(
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **others: object,
    ) -> torch.Tensor:
        kept.append((input_ids, logits_processor, stopping_criteria, generation_config))
        return input_ids

    # `generate` drops the tokenizer that stop strings need when it is given a decoding method.
    given = {name: value for name, value in parameters.items() if name not in ("stop_strings", "tokenizer")}
    pipe.forward(dict(chunk), **{**given, "use_cache": False}, custom_generate=keep)  # no cache of its own
    ids, processors, criteria, config = kept[0]
    if strings := parameters.get("stop_strings"):
        criteria.append(_stop_strings(pipe, strings))
    if ids.shape[0] != 1 or config.get_generation_mode().value not in ("greedy_search", "sample"):
        return None
    tokens = ids[0].tolist()
    return Generating(
        tokens,
        len(tokens),
        _rules(processors, criteria, config),
        TextPieces(tokenizer_of(pipe), len(tokens)),
        random=_random(ids, config, seed),
        logprobs=[] if details else None,
    )


def _stop_strings(pipe: Pipe, strings: object) -> Any:
    from transformers.generation.stopping_criteria import StopStringCriteria

    return StopStringCriteria(pipe.tokenizer, strings)


def _rules(processors: Any, criteria: Any, config: Any) -> Rules:
    eos = config._eos_token_tensor
    names = {type(each).__name__ for each in criteria}
    return Rules(
        processors,
        criteria,
        bool(config.do_sample),
        criteria.max_length,
        frozenset() if eos is None else frozenset(eos.flatten().tolist()),
        names <= _PLAIN,
    )


def _random(ids: torch.Tensor, config: Any, seed: int | None) -> torch.Generator | None:
    import torch

    if not config.do_sample:
        return None
    generator = torch.Generator(device=ids.device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def output(generating: Generating, chunk: Chunk) -> Output:
    """What `pipe.postprocess` takes, of a text that has ended."""
    import torch

    return {
        "generated_sequence": torch.tensor([[generating.ids]]),
        "input_ids": chunk["input_ids"],
        "prompt_text": chunk["prompt_text"],
        "generated": [Generated(*_split(generating), generating.finish_reason(), generating.logprobs)],
    }


def _split(generating: Generating) -> tuple[int, list[int]]:
    """The number of tokens of the prompt, and the tokens behind it."""
    return generating.prompt, generating.ids[generating.prompt :]
