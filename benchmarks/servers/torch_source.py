"""The torch model that other engines convert: it takes and returns tensors, and comes with an example."""

from __future__ import annotations

import argparse
from typing import Any

import torch
import transformers


class FirstOutput(torch.nn.Module):
    """A transformers model that returns its first output alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, token_type_ids: Any, attention_mask: Any) -> Any:
        return self.model(input_ids=input_ids, token_type_ids=token_type_ids, attention_mask=attention_mask)[
            0
        ]


def torch_model(args: argparse.Namespace) -> tuple[FirstOutput, dict[str, torch.Tensor]]:
    """The model, and an example of its input."""
    config = transformers.AutoConfig.from_pretrained(args.model)
    model = getattr(transformers, config.architectures[0]).from_pretrained(args.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    example = tokenizer(["one two", "three [MASK] four"], padding=True)
    return FirstOutput(model).eval(), {name: torch.tensor(value) for name, value in example.items()}
