"""What is known of a generated text beside the text: its tokens, and why it has ended.

    continuous batching ── generating.output ──▶ Generated ─┬─ details ──▶ member of the answer
    in groups ── of_group ────────────────────▶ Generated ─┘

Not here: generating (`generating.py`), the clients' names for it (`http/dialects/`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from serving_kit.models.pipes import Output, Pipe, tokenizer_of

LENGTH, EOS_TOKEN, STOP_SEQUENCE = "length", "eos_token", "stop_sequence"


class Generated(NamedTuple):
    """One generated text.

    Attributes:
        prompt_tokens: How many.
        tokens: Ids of the generated ones, the token that has ended the text included.
        finish_reason: LENGTH, EOS_TOKEN or STOP_SEQUENCE.
        logprobs: Of the tokens, natural logarithms; None: not known.
    """

    prompt_tokens: int
    tokens: list[int]
    finish_reason: str
    logprobs: list[float] | None = None


def of_group(pipe: Pipe, output: Output, prompt_tokens: int, most: int) -> Sequence[Generated]:
    """The texts of one output of the library's `generate`, which gives only tokens.

    Args:
        pipe: Of text generation.
        output: Of one input of a batch, with its padding.
        prompt_tokens: Of the input, without padding.
        most: New tokens that the call allows.
    """
    given = getattr(pipe, "generation_config", None) or pipe.model.generation_config
    ends = given.eos_token_id
    ends = set(ends) if isinstance(ends, (list, tuple)) else {ends}
    start = output["input_ids"].shape[-1]
    found = []
    for ids in output["generated_sequence"][0].tolist():
        tokens = ids[start:]
        end = next((place for place, token in enumerate(tokens) if token in ends), None)
        if end is not None:  # padding follows, as long as the batch was generated
            found.append(Generated(prompt_tokens, tokens[: end + 1], EOS_TOKEN))
        else:
            reason = LENGTH if len(tokens) >= most else STOP_SEQUENCE
            found.append(Generated(prompt_tokens, tokens, reason))
    return found


def usage(generated: Generated) -> dict[str, object]:
    """How many tokens there are, and why the text has ended."""
    return {
        "finish_reason": generated.finish_reason,
        "generated_tokens": len(generated.tokens),
        "prompt_tokens": generated.prompt_tokens,
    }


def details(pipe: Pipe, generated: Generated, seed: int | None) -> dict[str, object]:
    """The member `details` of an answer, as text-generation-inference has it, with `prompt_tokens` added."""
    words = tokenizer_of(pipe)
    special = set(words.all_special_ids)
    logprobs: Sequence[float | None] = generated.logprobs or [None] * len(generated.tokens)
    return {
        **usage(generated),
        "seed": seed,
        "prefill": [],
        "tokens": [
            {"id": token, "text": words.decode([token]), "logprob": logprob, "special": token in special}
            for token, logprob in zip(generated.tokens, logprobs, strict=True)
        ],
    }
