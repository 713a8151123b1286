"""The bundled model: it loads like any other, says sensible words, and its card is true."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from types import ModuleType
from typing import Any

import httpx
import pytest

torch = pytest.importorskip("torch")

from transformers import pipeline

from serving_kit.models.tasks import TASKS
from tests.support import REPOSITORY

MODEL_FOLDER = REPOSITORY / "serving_kit" / "demo_model"
CARD = (MODEL_FOLDER / "README.md").read_text(encoding="utf-8")

ACCEPTABLE = {
    "the cat sat on the [MASK].": "mat floor bed chair table sofa couch roof ground carpet lap",
    "paris is the capital of [MASK].": "france",
    "she drank a cup of [MASK].": "tea coffee water milk cocoa wine",
    "he went to the [MASK] to buy some bread.": "store shop market bakery town supermarket",
}


@pytest.fixture(scope="module")
def fill_mask() -> Any:
    """Load the model as users load any model."""
    return pipeline("fill-mask", model=str(MODEL_FOLDER))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """Load the training script, whose ``evaluate`` made the figures of the card."""
    path = REPOSITORY / "scripts" / "train_demo_model.py"
    spec = importlib.util.spec_from_file_location("train_demo_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dataclasses look their module up while they are made.
    spec.loader.exec_module(module)
    return module


def test_precision_and_vocabulary(fill_mask: Any) -> None:
    assert fill_mask.model.dtype is torch.float32
    assert fill_mask.tokenizer.mask_token == "[MASK]"
    assert len(fill_mask.tokenizer) == fill_mask.model.config.vocab_size
    assert fill_mask.tokenizer.tokenize("The CAT") == ["the", "cat"]


@pytest.mark.parametrize("prompt", ACCEPTABLE)
def test_plausible_words(fill_mask: Any, prompt: str) -> None:
    answers = {answer["token_str"] for answer in fill_mask(prompt, top_k=5)}
    assert answers & set(ACCEPTABLE[prompt].split())


def test_card_has_the_measured_scores(fill_mask: Any, script: ModuleType) -> None:
    sample = json.loads(script.HELD_OUT_FILE.read_text(encoding="utf-8"))
    scores = script.evaluate(fill_mask.model, fill_mask.tokenizer, sample)
    told = {name: float(share) for name, share in re.findall(r"\| (top-\d) \| ([\d.]+) \|", CARD)}
    # Another processor may round a few near ties the other way.
    assert scores.top1 == pytest.approx(told["top-1"], abs=0.002)
    assert scores.top5 == pytest.approx(told["top-5"], abs=0.002)
    assert f"({scores.masks:,} masks)" in CARD


def test_card_quotes_real_answers(fill_mask: Any, script: ModuleType) -> None:
    for prompt in script.PROMPTS:
        answers = [answer["token_str"] for answer in fill_mask(prompt, top_k=5)]
        assert f"| {prompt} | {', '.join(answers)} |" in CARD


def test_is_small_enough_to_be_bundled() -> None:
    assert sum(file.stat().st_size for file in MODEL_FOLDER.iterdir()) <= 20_000_000


@pytest.mark.parametrize(
    ("file", "phrase"),
    [
        ("LICENSE", "Apache License"),
        ("NOTICE", "sentence-transformers/all-MiniLM-L6-v2"),
        ("NOTICE", "WordNet 3.0 Copyright 2006 by Princeton University"),
        ("LICENSE-WORDNET", "Permission to use, copy, modify and distribute this software"),
    ],
)
def test_licence_texts_are_there(file: str, phrase: str) -> None:
    assert phrase in (MODEL_FOLDER / file).read_text(encoding="utf-8")


def test_openapi_lists_its_parameters(serve: Any) -> None:
    text = httpx.get(f"{serve(None).url}/openapi.json").text
    for name in TASKS["fill-mask"].parameters:
        assert f'"{name}"' in text
