"""What is known of a generated text beside the text: its tokens, and why it has ended.

    output of `pipe.forward` ── of_output ──▶ Generated ── details ──▶ member of the answer

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


def of_output(pipe: Pipe, output: Output, most: int) -> Sequence[Generated]:
    """The texts of one output: `generating.output` knows them, the library's `generate` gives only tokens.

    Args:
        pipe: Of text generation.
        output: Of one input.
        most: New tokens that the call allows.
    """
    if "generated" in output:
        known: Sequence[Generated] = output["generated"]
        return known
    given = getattr(pipe, "generation_config", None) or pipe.model.generation_config
    ends = given.eos_token_id
    ends = set(ends) if isinstance(ends, (list, tuple)) else {ends}
    prompt = output["input_ids"].shape[-1]
    found = []
    for ids in output["generated_sequence"][0].tolist():
        tokens = ids[prompt:]
        end = next((place for place, token in enumerate(tokens) if token in ends), None)
        if end is not None:  # padding follows, as long as the batch was generated
            found.append(Generated(prompt, tokens[: end + 1], EOS_TOKEN))
        else:
            found.append(Generated(prompt, tokens, LENGTH if len(tokens) >= most else STOP_SEQUENCE))
    return found


def details(pipe: Pipe, generated: Generated, seed: int | None) -> dict[str, object]:
    """The member `details` of an answer, as text-generation-inference has it, with `prompt_tokens` added."""
    words = tokenizer_of(pipe)
    special = set(words.all_special_ids)
    logprobs: Sequence[float | None] = generated.logprobs or [None] * len(generated.tokens)
    return {
        "finish_reason": generated.finish_reason,
        "generated_tokens": len(generated.tokens),
        "prompt_tokens": generated.prompt_tokens,
        "seed": seed,
        "prefill": [],
        "tokens": [
            {"id": token, "text": words.decode([token]), "logprob": logprob, "special": token in special}
            for token, logprob in zip(generated.tokens, logprobs, strict=True)
        ],
    }
