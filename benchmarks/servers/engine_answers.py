"""Texts to arrays and arrays to the pipeline's answers, in NumPy: for engines other than torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import numpy
from transformers import AutoConfig, AutoTokenizer

Arrays = dict[str, numpy.ndarray]
_TOP = 5  # answers of fill-mask, as in the pipeline


class Answers:
    """`run` computes the first output of the model of the arrays of a batch."""

    def __init__(self, args: argparse.Namespace, run: Callable[[Arrays], numpy.ndarray]) -> None:
        self._run = run
        self._tokenizer = AutoTokenizer.from_pretrained(args.model)
        self._labels = AutoConfig.from_pretrained(args.model).id2label
        self._answer = {
            "text-classification": self._label,
            "embeddings": self._embedding,
            "fill-mask": self._fill,
            "feature-extraction": self._features,
        }[args.kind]

    def __call__(self, texts: Sequence[str]) -> list[Any]:
        arrays = dict(self._tokenizer(list(texts), padding=True, truncation=True, return_tensors="np"))
        output = self._run(arrays)
        lengths = arrays["attention_mask"].sum(1)
        return [
            self._answer(row[:length] if row.ndim > 1 else row, ids[:length])
            for row, ids, length in zip(output, arrays["input_ids"], lengths, strict=True)
        ]

    def _label(self, logits: numpy.ndarray, ids: numpy.ndarray) -> Any:
        scores = _softmax(logits)
        best = int(scores.argmax())
        return [{"label": self._labels[best], "score": float(scores[best])}]

    def _embedding(self, hidden: numpy.ndarray, ids: numpy.ndarray) -> Any:
        mean = hidden.mean(0)
        return (mean / numpy.linalg.norm(mean)).tolist()

    def _features(self, hidden: numpy.ndarray, ids: numpy.ndarray) -> Any:
        return [hidden.tolist()]

    def _fill(self, logits: numpy.ndarray, ids: numpy.ndarray) -> Any:
        (place,) = numpy.flatnonzero(ids == self._tokenizer.mask_token_id)
        scores = _softmax(logits[place])
        top = numpy.argpartition(scores, -_TOP)[-_TOP:]
        best = top[numpy.argsort(-scores[top])]
        return [self._filled(ids, int(place), int(token), float(scores[token])) for token in best]

    def _filled(self, ids: numpy.ndarray, place: int, token: int, score: float) -> dict[str, Any]:
        filled = ids.copy()
        filled[place] = token
        return {
            "score": score,
            "token": token,
            "token_str": self._tokenizer.decode([token]),
            "sequence": self._tokenizer.decode(filled, skip_special_tokens=True),
        }


def _softmax(logits: numpy.ndarray) -> numpy.ndarray:
    powers = numpy.exp(logits - logits.max())
    return numpy.asarray(powers / powers.sum())
